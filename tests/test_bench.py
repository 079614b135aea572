"""The baseline of the benchmark decodes what this project decodes, and every line is printed."""

import pytest

import bench
import cli
from decode import DecodeConfig, generate
from model import save_checkpoint


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"tie_embeddings": False}])
def test_the_plain_loop_gives_the_same_tokens(tiny_model, shape):
    for seed in range(3):
        model = tiny_model(seed, **shape)
        assert bench.plain_loop(model, [1, 2, 3], 12) == generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=12)).tokens


def test_the_command_prints_its_figures(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, max_len=128), None)
    monkeypatch.setattr("sys.argv", ["bench.py", f"--checkpoint={tmp_path / 'tiny.pt'}", "--repeat=1"])
    cli.run(bench.main)
    printed = capsys.readouterr().out
    assert "the same tokens" in printed and "a pass of 16 rows" in printed and "jsd, exits 2,2,3, fixed" in printed
