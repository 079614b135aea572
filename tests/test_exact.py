"""Exits do not change a bit: keys, values, logits and tokens of any run with exits equal those of one position at a
time through all layers, in every form that says so. `tools.exact` checks the same for a whole model."""

import copy

import pytest
import torch

from decode import DecodeConfig, generate
from decoding.weights import slow_dtype
from formats.checkpoint import save_checkpoint
from tests.test_model import FEATURES, SHAPES
from tests.test_weights import WIDE, prepared
from tools.exact import differences, main, passes

FORMS = {"packed": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
LONG = {**WIDE, "max_len": 400}


def exact_model(tiny_model, form: str, **shape):
    """A tiny model in a form whose rows are exact; skips the test where the CPU has no such form."""
    dtype = FORMS[form]
    if slow_dtype(dtype):
        pytest.skip("without instructions for bfloat16, its products are not exact")
    return prepared(tiny_model(1, **{**LONG, **shape}).to(dtype), "int8" if form == "int8" else "packed", dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [*SHAPES, *FEATURES, {"d_ff": 1536}], ids=str)
def test_exits_owed_rows_and_rejected_drafts_change_no_bit(tiny_model, form, shape):
    model = exact_model(tiny_model, form, **shape)
    assert differences(model, runs=2, prompts=(1, 30)) == [0, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 63, 64, 65, 129, 300])
def test_prompts_of_every_length_change_no_bit(tiny_model, form, prompt):
    model = exact_model(tiny_model, form, window=40, global_layers=(2, 4))
    assert differences(model, runs=1, prompts=(prompt, prompt), length=50) == [0]


def test_a_difference_would_be_found(tiny_model):
    """A form whose rows depend on each other: each result is moved by the number of rows."""
    model = exact_model(tiny_model, "packed")
    forward = type(model.blocks[2].down).forward
    model.blocks[2].__dict__["down"] = lambda x: forward(model.blocks[2]._modules["down"], x) + x.shape[1] * 1e-6
    assert min(differences(model, runs=2, prompts=(1, 9))) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [
    {"confidence": "softmax", "threshold": 0.1}, {"confidence": "jsd", "threshold": 0.05, "prune": "fixed:8"},
    {"confidence": "classifier", "threshold": 0.5}, {"confidence": "hidden", "threshold": 0.7, "max_owed": 3},
    {"confidence": "softmax", "threshold": 0.2, "shortlist": 20, "exit_layers": (3, 5)}, {"confidence": "softmax", "draft": "auto"},
])  # fmt: skip
def test_verified_text_is_the_full_models(tiny_model, form, settings):
    early = False
    for seed in range(2):
        model = exact_model(tiny_model, form) if seed else exact_model(tiny_model, form, window=20)
        model.frequent_ids = torch.arange(49, 19, -1)
        full = generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=60))
        out = generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=60, verify=True, **settings))
        assert out.tokens == full.tokens
        early |= out.counters.accepted > 0
    assert early


def test_a_prompt_is_computed_as_one_piece_whatever_exits_follow(tiny_model):
    """Its keys at the top are those of a pass that took all of it to the top, in every form."""
    model, tokens = copy.deepcopy(tiny_model(1, **LONG)), list(range(20))
    top = passes(model, tokens, 20, [6], [0])
    for stop in (1, 3, 5):
        assert torch.equal(passes(model, tokens, 20, [stop], [0])[0], top[0])


def test_the_command_prints_a_line_for_each_form(tiny_model, tmp_path, command):
    save_checkpoint(tmp_path / "model.pt", tiny_model(0, **LONG), None)
    out, _, status = command(main, "--checkpoint", tmp_path / "model.pt", "--runs", 1)
    assert status is None and len(out.splitlines()) == 4
    assert "packed float32   keys, values and logits of 1 runs are equal to the bit" in out and "plain float32    keys" in out
