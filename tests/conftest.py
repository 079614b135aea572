"""What the tests share: tiny random models, fixed seeds, one thread."""

import os

import pytest
import torch

from decoding import costs
from model import ModelConfig, Transformer

torch.set_num_threads(1)


@pytest.fixture
def tiny_model():
    """A factory of tiny random float32 models whose weights are large enough for the layers to disagree."""

    def make(seed: int = 0, **shape) -> Transformer:
        torch.manual_seed(seed)
        small = {"vocab_size": 50, "n_layers": 5, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_len": 64, "eos_id": None}
        small["classifiers"] = tuple(range(1, shape.get("n_layers", 5)))
        model = Transformer(ModelConfig(**{**small, **shape})).requires_grad_(False).eval()
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3) + (weight.dim() == 1))
        for weight in model.classifiers.values():
            weight.copy_(torch.randn_like(weight) * 0.3)
        return model

    return make


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """No warning of a busy machine among what the commands say."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True)
def made_up_costs(request, monkeypatch, tmp_path_factory):
    """No test looks at a stopwatch to choose how to draft, nor leaves a file in the user's cache folder: a
    token costs 6 blocks, of which a head is one, whatever the rows; a question a tenth of one."""

    def made_up(model, config, run_type) -> costs.Costs:
        exits = config.exits(model.config)
        return costs.Costs(model.config.n_layers, {1: 1.0}, {1: 1.0}, dict.fromkeys(exits, 0.1))

    if request.module.__name__.rpartition(".")[2] != "test_real":  # where speeds are told
        monkeypatch.setattr(costs, "measure", made_up)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
