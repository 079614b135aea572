"""The benchmark prints its figures, also for a random model with a large vocabulary."""

from dataclasses import replace

import pytest

from common.errors import run
from formats.checkpoint import save_checkpoint
from tools import bench


def test_the_command_prints_its_figures(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, max_len=128), None)
    monkeypatch.setattr("sys.argv", ["bench.py", f"--checkpoint={tmp_path / 'tiny.pt'}", "--repeat=1"])
    run(bench.main)
    printed = capsys.readouterr().out
    assert "a pass of 16 rows" in printed and "checks after layers 2,3," in printed and "shortlist" not in printed
    assert all(printed.count(f"  {name}, all 50 ids") == 2 for name in bench.CHECKS)


def test_the_passes_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = bench.draw_passes({rows: 0.001 * rows**0.5 for rows in bench.ROWS}, tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_large_vocabulary_is_checked_whole_and_over_a_shortlist(monkeypatch, capsys):
    small = {"vocab_size": 600, "n_layers": 5, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 16}
    monkeypatch.setattr(bench, "LARGE", replace(bench.LARGE, **small))
    monkeypatch.setattr(bench, "SHORTLIST", 40)
    monkeypatch.setattr("sys.argv", ["bench.py", "--large-vocabulary", "--repeat=1", "--dtype=int8"])
    run(bench.main)
    printed = capsys.readouterr().out
    for name in bench.CHECKS:
        assert printed.count(f"  {name}, all 600 ids") == printed.count(f"  {name}, a shortlist of 40") == 2
