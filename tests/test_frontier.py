"""One model that exits early beside smaller ones: which rows there are, and that only models of one tokenizer
are compared."""

import json
import sys

import pytest

from common.errors import UserError
from decoding.choosing import DEFAULT_CHECKPOINT
from tools import frontier


def command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["frontier.py", "--tasks", "e2e", "--limit", "1", *map(str, words)])
    frontier.main()


def test_every_kind_of_row_is_measured_on_the_same_inputs(monkeypatch, capsys, tmp_path):
    command(monkeypatch, "--small", DEFAULT_CHECKPOINT, "--json", tmp_path / "frontier.json")
    rows = json.loads((tmp_path / "frontier.json").read_text())["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds == ["smaller", "full"] + ["static"] * 7 + ["softmax"] * 5 + ["classifier"] * 5 + ["verified"]
    by_kind = {row["kind"]: row for row in rows}
    assert by_kind["smaller"]["scores"] == by_kind["full"]["scores"] == by_kind["verified"]["scores"]  # the same text
    assert all(row["ms_per_token"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "static, layer 10" in printed and "classifier, from 0.95" in printed


def test_a_model_of_another_tokenizer_is_refused(monkeypatch):
    other = DEFAULT_CHECKPOINT.parent / "stories.pt"
    with pytest.raises(UserError, match=r"stories\.pt: has another tokenizer than"):
        command(monkeypatch, "--small", other)


def test_a_curve_of_its_own_for_models_trained_otherwise(monkeypatch, capsys, tmp_path):
    """Two models of one depth need names; with them, each is a row and a curve in the picture."""
    twice = ("--small", DEFAULT_CHECKPOINT, "--small", f"trained longer={DEFAULT_CHECKPOINT}")
    pytest.importorskip("matplotlib")
    command(monkeypatch, *twice, "--plot", tmp_path / "frontier.png")
    printed = capsys.readouterr().out
    assert "\n| smaller, 12 layers " in printed and "\n| trained longer, 12 layers " in printed
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="a second model of 12 layers; give it a curve of its own"):
        command(monkeypatch, "--small", f"{DEFAULT_CHECKPOINT},{DEFAULT_CHECKPOINT}")
    with pytest.raises(UserError, match="full is a curve of"):
        command(monkeypatch, "--small", f"full={DEFAULT_CHECKPOINT}")


def test_rows_of_an_earlier_run_keep_their_time_beside_the_full_models(monkeypatch, capsys, tmp_path):
    earlier, out = tmp_path / "earlier.json", tmp_path / "out.json"
    rows = [
        {"task": "e2e", "kind": "smaller", "name": "3 layers", "ms_per_token": 2.0, "scores": {"bleu": 0.5, "rougeL": 0.25}},
        {"task": "e2e", "kind": "full", "name": "12 layers", "ms_per_token": 8.0, "scores": {"bleu": 0, "rougeL": 0}},
        {"task": "translation", "kind": "smaller", "name": "3 layers", "ms_per_token": 1.0, "scores": {"bleu": 1}},
    ]
    earlier.write_text(json.dumps({"inputs": 1, "rows": rows}))
    command(monkeypatch, "--small", DEFAULT_CHECKPOINT, "--with", earlier, "--json", out)
    content = json.loads(out.read_text())
    added, *others = content["rows"]
    (full,) = [row for row in others if row["kind"] == "full"]
    assert content["inputs"] == 1 and (added["name"], added["scores"]) == ("3 layers", rows[0]["scores"])
    assert added["ms_per_token"] == pytest.approx(full["ms_per_token"] / 4) and full["scores"]["bleu"] > 0
    assert "| 0.25    | 50.0 | 25.0    |" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [
    ({"rows": []}, "holds no figures of a frontier"),
    ({"inputs": 1, "rows": [{"task": "e2e"}]}, "holds no figures of a frontier"),
    ({"inputs": 2, "rows": []}, "of 2 inputs a task, not 1; --limit 2 takes the same"),
    ({"inputs": 1, "rows": [{"task": "e2e", "kind": "full", "name": "9 layers", "ms_per_token": 1, "scores": {}}]},
     "no row of a full model with 12 layers"),
])  # fmt: skip
def test_figures_of_an_earlier_run_must_be_comparable(content, message, monkeypatch, tmp_path):
    (tmp_path / "earlier.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        command(monkeypatch, "--small", DEFAULT_CHECKPOINT, "--with", tmp_path / "earlier.json")
