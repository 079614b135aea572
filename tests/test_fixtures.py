"""Tiny public checkpoints that were stored once, with logits from NumPy: convert.py and the model still read them
so. tests/fixtures/make.py made them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import convert
from decode import load_checkpoint
from tests.fixtures.make import MADE, TOKENS

FOLDER = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("name", MADE)
def test_a_stored_checkpoint_has_its_stored_logits(tmp_path, name):
    convert.convert(FOLDER / name, tmp_path / "model.pt")
    for options in ({"dtype": torch.float32}, {"dtype": torch.float32, "form": "plain"}, {"dtype": torch.float64, "form": "plain"}):
        logits = load_checkpoint(tmp_path / "model.pt", **options)[0](torch.tensor([TOKENS]))[0]
        np.testing.assert_allclose(logits.numpy(), np.load(FOLDER / name / "logits.npy"), rtol=1e-4, atol=1e-4)
