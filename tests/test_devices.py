"""Decoding and training on another device than the CPU's: nothing mixed, the same tokens and weights, and few
values read back."""

import itertools
from dataclasses import replace

import numpy as np
import pretend_device
import pytest
import torch
from torch.testing import assert_close

from confidence import FUNCTIONS
from decode import Run, plain, verified
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from formats.heads import HEAD_WEIGHTS
from model import ModelConfig, Transformer
from tests.reference import PROMPT
from train import make_optimizer, train_step
from training.batches import Batch
from training.device import on_device
from training.losses import LOSSES
from training.objective import Objective
from training.parallel import steps
from training.settings import TrainConfig
from training.validation import validate

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="this torch cannot pretend a device")

SHAPE = ModelConfig(
    vocab_size=60, n_layers=4, d_model=16, n_heads=2, n_kv_heads=1, d_ff=24, max_len=16,
    exit_norms=(1, 2, 3), classifiers=(1, 2, 3), adapter="lowrank:2"
)  # fmt: skip
CONFIG = TrainConfig(exits=(1, 2, 3), warmup=0, lr=0.01, layer_dropout=0.5, accumulate=2, device="cpu")


def test_what_a_gpu_would_refuse_raises_here_and_what_it_would_wait_for_is_counted():
    with pretend_device.pretended() as waits:
        there = torch.ones(2, device=pretend_device.NAME)
        assert there.device.type == pretend_device.NAME and (there + 1).device == there.device
        with pytest.raises(RuntimeError, match="on pretend and on the CPU in one operation"):
            there + torch.ones(2)
        assert waits.count == 0
        assert there.sum().item() == 2 and there.tolist() == [1, 1] and there.cpu().sum() == 2
        assert waits.count == 3


# ---------------------------------------------------------------- decoding


EXITS = {"exit_layers": (2, 4), "threshold": 0.15, "max_new_tokens": 12}
MODES = {
    "full": {},
    **{name: {"confidence": name, **EXITS} for name in FUNCTIONS},
    **{
        f"softmax {prune}": {"confidence": "softmax", "prune": prune, **EXITS}
        for prune in ("fixed:8", "decaying:8:2", "adaptive:8:2")
    },
    "static": {"confidence": "softmax", **EXITS, "threshold": 0.0},
    "copy": {"confidence": "softmax", "fill": "copy", **EXITS},
    "learned thresholds": {"confidence": "softmax", "threshold_schedule": "adaptive", **EXITS},
    "contrast": {"predict": "dola", "repetition_penalty": 1.2, "max_new_tokens": 12},
    "sampled": {"confidence": "softmax", "temperature": 1.0, "top_k": 20, "top_p": 0.9, **EXITS},
    "verified": {"confidence": "softmax", "verify": True, "max_owed": 4, **EXITS},
    "verified, sampled": {"confidence": "jsd", "verify": True, "temperature": 1.0, **EXITS},
    "shortlist": {"confidence": "softmax", "shortlist": 12, **EXITS, "exit_layers": (3, 5)},
    "shortlist, verified": {
        "confidence": "jsd", "shortlist": 12, "verify": True, "prune": "fixed:6", **EXITS, "exit_layers": (3, 5)
    },
}  # fmt: skip


def decoded(model, config: DecodeConfig) -> Generation:
    """What `generate` gives; without its inference mode, which the pretended device does not know."""
    with torch.no_grad():
        counters = Counters()
        run = Run(model, PROMPT, config, counters, None)
        return Generation.of(verified(run) if config.verify else plain(run), counters)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_tokens_from_another_device(model_with_ids, mode):
    """Reading back is what a GPU waits for. A token costs one value; a confidence check one more, and what it reads of
    the amateurs (jsd chooses a layer); judging one each draft and row."""
    config = DecodeConfig(**MODES[mode])
    here = decoded(model_with_ids(2), config)
    with pretend_device.pretended() as waits:
        there = decoded(model_with_ids(2).to(pretend_device.NAME), config)
        assert there.tokens == here.tokens and there.exit_layers == here.exit_layers
        for ours, theirs in zip(there.confidences, here.confidences):
            assert ours == pytest.approx(theirs, abs=1e-6)
        checks = sum(map(len, there.confidences))
        if mode in ("full", "softmax", "hidden", "classifier", "entropy", "weighted", "static"):
            assert waits.count <= len(there.tokens) + checks


# ---------------------------------------------------------------- training


def batches() -> list[Batch]:
    """Four batches of two rows of 12 positions."""
    draw, made = np.random.default_rng(0), []
    for _ in range(4):
        tokens = draw.integers(0, SHAPE.vocab_size, (2, 13))
        targets = np.where(np.arange(12) >= draw.integers(2, 9), tokens[:, 1:], -1)
        made.append(Batch(tokens[:, :-1], targets, np.array([[1] * 7 + [2] * 5] * 2)))
    return made


def trained(config: TrainConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after two steps on the device of the settings, and the losses of the steps."""
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)  # so that the layers disagree
    if config.train == "heads":
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.startswith(HEAD_WEIGHTS))
    model = model.to(config.device)
    objective, optimizer = Objective(model, config), make_optimizer(model, config)
    stream = steps(on_device(itertools.cycle(batches()), config.device), config, 0)
    losses = [train_step(objective, optimizer, next(stream), config, step) for step in range(2)]
    return {name: weight.detach().cpu() for name, weight in model.state_dict().items()}, losses


SETTINGS = {loss: {"loss": loss, "classifier": loss != "none"} for loss in LOSSES}
SETTINGS["layerskip"]["seed"] = 1  # with 0 a gradient is so small that AdamW makes its rounding a visible step
SETTINGS |= {
    "recompute": {"recompute": True},
    "chunks": {"loss": "distill"},
    "heads": {"train": "heads", "init": "x.pt", "loss": "distill", "classifier": True, "layer_dropout": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_elsewhere_ends_in_the_same_weights_and_waits_once_a_step(name, monkeypatch):
    config = replace(CONFIG, **SETTINGS[name])
    if name == "chunks":
        monkeypatch.setattr("training.losses.CHUNK", {"cpu": 300, "cuda": 300})
        monkeypatch.setattr("training.losses.FEWEST", 4)
    expected, losses = trained(config)
    with pretend_device.pretended() as waits:
        found, same = trained(replace(config, device=pretend_device.NAME))
        count = waits.count - len(found)  # those that the test reads
    assert_close(found, expected, rtol=0, atol=1e-4)  # of 0.01 that a step moves a weight
    assert same == pytest.approx(losses, rel=1e-5)
    assert count == (2 + 2 * 2 if name == "hidden" else 2)  # which matches layers anew in every micro-batch


def test_validation_elsewhere_gives_the_same(tiny_model):
    records = np.zeros(40, [("token", "<u2"), ("flags", "u1")])
    records["token"] = np.random.default_rng(0).integers(0, 50, 40)
    records["flags"] = 1
    records["flags"][::10] = 3
    config = replace(CONFIG, rows=2, length=12)
    expected = validate(tiny_model(), records, config)
    with pretend_device.pretended():
        elsewhere = replace(config, device=pretend_device.NAME)
        assert validate(tiny_model().to(pretend_device.NAME), records, elsewhere) == expected
