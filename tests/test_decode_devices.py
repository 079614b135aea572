"""Decoding on another device than the CPU's: nothing mixed, the same tokens, and few values read back."""

import pretend_device
import pytest
import torch

from confidence import FUNCTIONS
from decode import Run, plain
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from decoding.verification import verified

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="this torch cannot pretend a device")

PROMPT = [1, 7, 3, 9]
EXITS = {"exit_layers": (2, 4), "threshold": 0.15, "max_new_tokens": 12}
MODES = {
    "full": {},
    **{name: {"confidence": name, **EXITS} for name in FUNCTIONS},
    **{
        f"softmax {prune}": {"confidence": "softmax", "prune": prune, "prune_k": 8, "prune_min": 2, **EXITS}
        for prune in ("fixed", "decaying", "adaptive")
    },
    "static": {"confidence": "softmax", **EXITS, "threshold": 0.0},
    "copy": {"confidence": "softmax", "fill": "copy", **EXITS},
    "learned thresholds": {"confidence": "softmax", "threshold_schedule": "adaptive", **EXITS},
    "contrast": {"predict": "contrast", "contrast": "dola", "form": "ratio", "repetition_penalty": 1.2, "max_new_tokens": 12},
    "sampled": {"confidence": "softmax", "temperature": 1.0, "top_k": 20, "top_p": 0.9, **EXITS},
    "verified": {"confidence": "softmax", "verify": True, "max_owed": 4, **EXITS},
    "verified, sampled": {"confidence": "jsd", "verify": True, "temperature": 1.0, **EXITS},
    "shortlist": {"confidence": "softmax", "shortlist": 12, **EXITS, "exit_layers": (3, 5)},
    "shortlist, verified": {
        "confidence": "jsd", "shortlist": 12, "verify": True, "prune": "fixed", "prune_k": 6, **EXITS, "exit_layers": (3, 5)
    },
}  # fmt: skip


def decoded(model, config: DecodeConfig) -> Generation:
    """What `generate` gives; without its inference mode, which the pretended device does not know."""
    with torch.no_grad():
        counters = Counters()
        run = Run(model, PROMPT, config, counters)
        return Generation.of(verified(run) if config.verify else plain(run), counters)


def make(tiny_model):
    model = tiny_model(2)
    model.frequent_ids = torch.arange(0, 50, 2)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_the_same_tokens_from_another_device(tiny_model, mode):
    """Reading back is what a GPU waits for. A token costs one value; a question one more, and what it asks of
    the amateurs (jsd chooses a layer); judging one each draft and row."""
    config = DecodeConfig(**MODES[mode])
    here = decoded(make(tiny_model), config)
    with pretend_device.pretended() as waits:
        there = decoded(make(tiny_model).to(pretend_device.NAME), config)
        assert there.tokens == here.tokens and there.exit_layers == here.exit_layers
        for ours, theirs in zip(there.confidences, here.confidences):
            assert ours == pytest.approx(theirs, abs=1e-6)
        questions = sum(map(len, there.confidences))
        if mode in ("full", "softmax", "hidden", "classifier", "entropy", "weighted", "static"):
            assert waits.count <= len(there.tokens) + questions
