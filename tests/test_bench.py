"""The baseline of the benchmark decodes what this project decodes, and every line is printed."""

import pytest

from common.errors import run
from decode import generate
from decoding.settings import DecodeConfig
from formats.checkpoint import save_checkpoint
from model import ModelConfig
from tools import bench
from training.losses import LOSSES
from training.settings import TrainConfig


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"tie_embeddings": False}])
def test_the_plain_loop_gives_the_same_tokens(tiny_model, shape):
    for seed in range(3):
        model = tiny_model(seed, **shape)
        assert bench.plain_loop(model, [1, 2, 3], 12) == generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=12)).tokens


def test_the_command_prints_its_figures(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, max_len=128), None)
    monkeypatch.setattr("sys.argv", ["bench.py", f"--checkpoint={tmp_path / 'tiny.pt'}", "--repeat=1"])
    run(bench.main)
    printed = capsys.readouterr().out
    assert "the same tokens" in printed and "a pass of 16 rows" in printed and "checks after layers 2,3, all in vain" in printed
    assert "jsd: " in printed and "weighted: " in printed


def test_the_training_benchmark_prints_every_loss_beside_a_plain_model(monkeypatch, capsys):
    small = ModelConfig(vocab_size=50, n_layers=3, d_model=16, n_heads=2, n_kv_heads=2, d_ff=16)
    monkeypatch.setattr(bench, "ModelConfig", lambda: small)
    bench.training(TrainConfig(rows=2, length=8, exits=(1, 2), device="cpu"), 1)
    printed = capsys.readouterr().out
    assert all(f"  {name}: " in printed for name in ("plain PyTorch", *LOSSES, "rotate, layer dropout 0.2")) and "GFLOP/s" in printed
    monkeypatch.setattr("sys.argv", ["bench.py", "--training", "--dtype=float16"])
    with pytest.raises(SystemExit):
        run(bench.main)
    assert "unknown dtype 'float16'" in capsys.readouterr().err


def test_copied_keys_and_values_are_off_only_above_the_layer_after_the_exit(tiny_model):
    """Layer 3 reads the state after layer 2, so that a copy from exit 2 is exact there, as long as no earlier copy is attended to."""
    config = DecodeConfig(max_new_tokens=1, confidence="softmax", threshold=0.0, exit_layers=(2,), fill="copy")
    errors = bench.copy_error(tiny_model(0), [[1, 2, 3, 4], [5]], config)
    assert set(errors) == {3, 4, 5} and max(errors[3]) < 1e-5 and min(*errors[4], *errors[5]) > 0.05
    never = DecodeConfig(max_new_tokens=4, confidence="softmax", threshold=1.0, fill="copy")
    assert bench.copy_error(tiny_model(0), [[1, 2, 3]], never) == {}
