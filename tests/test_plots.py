"""Pictures are drawn from what the commands write; what they show is looked at by eye."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest

from decoding.settings import DecodeConfig
from evaluation import plots
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


def row(name: str, speedup: float, kept: float, **config) -> dict:
    """A row of a table about the task e2e, its intervals 0.1 to both sides."""
    prompts = [{"prompt_tokens": [1], "tokens": [2, 3], "exit_layers": [5, 5] if name == "full" else [2, 5]}]
    return {"task": "e2e", "name": name, "inputs": 7, "config": asdict(DecodeConfig(**config)), "prompts": prompts, "speedup": speedup,
            "speedup_ci": [speedup - 0.1, speedup + 0.1], "kept": kept, "kept_ci": [kept - 0.1, kept + 0.1],
            "avg_exit_layer": 3.0, "confidence_flops_per_token": 1e6 if config else 0}  # fmt: skip


ROWS = [row("full", 1.0, 1.0), row("softmax", 1.5, 0.97, confidence="softmax", prune="fixed"),
        row("verified", 1.2, 1.0, confidence="softmax", verify=True)]  # fmt: skip


class Tokenizer:
    """Its pieces are named by their numbers."""

    def piece(self, token: int) -> str:
        return f" w{token}"


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib")
    return plots.pyplot()


def test_speed_is_drawn_with_the_intervals_of_every_row_the_full_model_among_them(plt):
    axis = plots.draw_speed(plt, ROWS).axes[0]
    assert axis.get_title().startswith("e2e, 7 inputs")
    assert {text.get_text() for text in axis.get_legend().get_texts()} == {"Pareto front", "full", "softmax", "verified"}
    bars = {drawn.get_label(): [line.get_segments()[0] for line in drawn.lines[2]] for drawn in axis.containers}
    for each in ROWS:
        across, up = bars[each["name"]]
        assert across[:, 0] == pytest.approx(each["speedup_ci"]) and up[:, 1] == pytest.approx(100 * np.array(each["kept_ci"]))
        assert across[:, 1] == pytest.approx([100 * each["kept"]] * 2)


def test_no_two_kinds_of_row_differ_by_colour_alone():
    assert len(set(plots.SHAPES.values())) == len(plots.SHAPES) and len(set(plots.FILLINGS.values())) == len(plots.FILLINGS)


def test_flops_are_points_since_a_logarithmic_axis_has_no_zero(plt):
    axis = plots.draw_flops(plt, ROWS).axes[0]
    assert not axis.patches and axis.get_yscale() == "log" and axis.get_title().startswith("e2e, 7 inputs")
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1e6]]
    assert plots.draw_flops(plt, ROWS[:1]) is None


def test_exits_name_the_layer_of_every_token_first_of_the_full_model(plt):
    axis = plots.draw_exits(plt, ROWS, 0, Tokenizer(), 5).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["full", "softmax", "verified"]
    assert [text.get_text() for text in axis.texts] == ["w2\n5", "w3\n5"] + ["w2\n2", "w3\n5"] * 2
    assert "e2e" in axis.get_title()
