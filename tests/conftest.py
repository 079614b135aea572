"""What the tests share: tiny random models, their checkpoints, commands, fixed seeds, one thread."""

import sys

import pytest
import torch

from common.errors import run
from decode import load_checkpoint
from decoding import costs
from formats.checkpoint import save_checkpoint
from model import ModelConfig, Transformer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def model_with_ids(tiny_model):
    """A factory of tiny models that know some frequent ids, in random order."""

    def make(seed: int = 0, count: int = 50, **shape) -> Transformer:
        model = tiny_model(seed, **shape)
        model.frequent_ids = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))[:count]
        return model

    return make


@pytest.fixture
def reloaded(tmp_path):
    """Saves a model, its matrices as `stored`, and loads it again with the options of load_checkpoint."""

    def reload(model: Transformer, stored: torch.dtype | None = None, **options) -> Transformer:
        save_checkpoint(tmp_path / "reloaded.pt", model, None, stored)
        return load_checkpoint(tmp_path / "reloaded.pt", **options)[0]

    return reload


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command's main: what it printed, what it said on stderr, and its exit status (None: it went well)."""

    def call(main, *words) -> tuple[str, str, int | None]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        try:
            run(main)
            status = None
        except SystemExit as ended:
            status = ended.code
        return *capsys.readouterr(), status

    return call


@pytest.fixture(autouse=True)
def made_up_costs(monkeypatch):
    """No test looks at a stopwatch to choose how to draft: a token costs 6 blocks, of which the LM head is
    one, whatever the rows, and a confidence check a tenth of one."""

    def made_up(model, config) -> costs.Costs:
        exits = config.exits(model.config)
        return costs.Costs(model.config.n_layers, {1: 1.0}, {1: 1.0}, dict.fromkeys(exits, 0.1))

    monkeypatch.setattr(costs, "measure_costs", made_up)
