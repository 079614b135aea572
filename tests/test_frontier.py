"""One model that exits early beside smaller ones: which rows there are, and that only models of one tokenizer are compared."""

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
    assert "\nsmaller, 12 layers " in printed and "\ntrained longer, 12 layers " in printed
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="a second model of 12 layers; give it a curve of its own"):
        command(monkeypatch, "--small", f"{DEFAULT_CHECKPOINT},{DEFAULT_CHECKPOINT}")
    with pytest.raises(UserError, match="full is a curve of"):
        command(monkeypatch, "--small", f"full={DEFAULT_CHECKPOINT}")
