"""Pictures are drawn from what the commands write; what they show is looked at by eye."""

import json
import sys

import pytest

from evaluation.plots import draw_training


@pytest.fixture
def log(tmp_path):
    rows = [{"step": step, "loss": 5 / step, "tokens_per_s": 9} for step in range(1, 500)]
    rows += [{"step": step, "dev": f"data/{task}/dev.tsv", "layers": {"2": [3.0, 0.5], "4": [2.0, 1.0]}}
             for step in (200, 400) for task in ("a", "b")]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "log.jsonl"


def test_a_training_is_drawn(log):
    pytest.importorskip("matplotlib")
    out = draw_training(log)
    assert out == log.with_suffix(".png") and out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_what_to_do(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pictures need matplotlib; pip install matplotlib"):
        draw_training(log)


@pytest.mark.parametrize("content", ["", "text", '{"step": 1}\n', "[1]"])
def test_what_is_no_log_is_said_so(content, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"not a log of train"):
        draw_training(tmp_path / "x.jsonl")
