"""Pictures are drawn from what the commands write; what they show is looked at by eye."""

import json
import sys
from dataclasses import asdict

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
    with pytest.raises(ValueError, match="plots need matplotlib; pip install matplotlib"):
        draw_training(log)


@pytest.mark.parametrize("content", ["", "text", '{"step": 1}\n'])
def test_what_is_no_log_is_said_so(content, tmp_path):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"not a log of train"):
        draw_training(tmp_path / "x.jsonl")


def row(name: str, speedup: float, kept: float, **config) -> dict:
    """A row of a table about the task e2e, its intervals 0.1 to both sides."""
    prompts = [{"prompt_tokens": [1], "tokens": [2, 3], "exit_layers": [5, 5] if name == "full" else [2, 5]}]
    interval = [kept - 0.1, kept + 0.1]
    return {"task": "e2e", "name": name, "checkpoint": None, "inputs": 7, "config": asdict(DecodeConfig(**config)), "prompts": prompts,
            "tokens_per_s": 100 * speedup, "speedup": speedup, "speedup_ci": [speedup - 0.1, speedup + 0.1],
            "exit_efficiency": None if name == "full" else 0.5, "confidence_time_share": 0.2 if kept < 1 else None,
            "kept": kept, "kept_ci": interval, "scores": {"bleu": kept}, "scores_ci": {"bleu": interval}}  # fmt: skip


ROWS = [row("full", 1.0, 1.0), row("softmax", 1.5, 0.97, confidence="softmax"), row("bold", 2.0, 0.9, confidence="softmax", threshold=0.3),
        row("verified", 1.2, 1.0, confidence="softmax", verify=True)]  # fmt: skip


class Tokenizer:
    """Its pieces are named by their numbers."""

    def piece(self, token: int) -> str:
        return f" w{token}"


def test_rows_are_drawn_with_their_intervals_labelled_with_their_threshold_where_they_are_a_curve():
    pytest.importorskip("matplotlib")
    figure = plots.draw_rows(ROWS, [("bleu", "scores"), ("kept", "kept")])
    for axis in figure.axes:
        assert axis.get_title().startswith("e2e, 7 inputs")
        assert {text.get_text() for text in axis.texts} == {"full", "0.8", "0.3", "verified"}
        assert sorted(len(drawn.lines[0].get_xdata()) for drawn in axis.containers) == [1, 1, 2]
        (curve,) = [drawn for drawn in axis.containers if len(drawn.lines[0].get_xdata()) == 2]
        across, up = (bars.get_segments() for bars in curve.lines[2])
        for each, x, y in zip(ROWS[1:3], across, up):
            assert curve.lines[0].get_xydata().tolist().count([pytest.approx(10 / each["speedup"]), pytest.approx(100 * each["kept"])])
            assert sorted(x[:, 0]) == pytest.approx([10 / end for end in reversed(each["speedup_ci"])])
            assert sorted(y[:, 1]) == pytest.approx([100 * end for end in each["kept_ci"]])


def test_bars_of_time_add_up_to_the_time_of_a_token():
    pytest.importorskip("matplotlib")
    axis = plots.draw_time(ROWS).axes[0]
    widths = {label: [bar.get_width() for bar in bars] for label, bars in zip(("blocks", "checks", "rest"), axis.containers)}
    assert widths["blocks"] == pytest.approx([5 / 1.5, 5 / 2, 5 / 1.2])
    assert widths["checks"] == pytest.approx([2 / 1.5, 2 / 2, 0])
    assert widths["rest"] == pytest.approx([3 / 1.5, 3 / 2, 5 / 1.2])


def test_no_two_kinds_of_row_differ_by_color_alone():
    assert len({shape for _, shape in plots.STYLES.values()}) == len(plots.STYLES)


def test_exits_name_the_layer_of_every_token_first_of_the_full_model():
    pytest.importorskip("matplotlib")
    axis = plots.draw_exits(ROWS[:2], 0, Tokenizer(), 5).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["full", "softmax"]
    assert [text.get_text() for text in axis.texts] == ["w2\n5", "w3\n5", "w2\n2", "w3\n5"]
