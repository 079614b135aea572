"""eval.py: figures that follow from the runs, configurations that are compared and chosen, mistakes in one line."""

import datetime
import json
import random
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from common.errors import run
from confidence import FUNCTIONS
from decoding.presets import COMMAND, settings_in_force
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from evaluation import calibrate, figures, tasks, tune
from evaluation import measure as measuring
from evaluation import sweep as sweeping
from evaluation.inputs import Table
from evaluation.measure import Configuration
from evaluation.recipes import RECIPES
from evaluation.settings import EvalConfig
from formats.checkpoint import save_checkpoint
from formats.data import read_pairs, task_file
from formats.tokenizers.pieces import train_tokenizer
from formats.tokenizers.tokenizer import SentencePiece
from model import ModelConfig
from tests.test_page import embedded

INCLUDED = ("translation", "e2e")
ROW = {"confidence": "softmax", "threshold": 0.2, "exit_layers": [2, 3], "prune": "fixed:4"}


@pytest.fixture(scope="module")
def tokenizer():
    pairs = [pair for task in INCLUDED for pair in list(read_pairs(task_file(task, "dev")))[:100]]
    return train_tokenizer(pairs, 350)


@pytest.fixture
def checkpoint(tiny_model, tokenizer, tmp_path, monkeypatch):
    """A tiny random model with a tokenizer, and settings of one row."""
    monkeypatch.setattr(tasks, "TASKS", {name: replace(task, max_new_tokens=8) for name, task in tasks.TASKS.items()})
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, vocab_size=350, max_len=256), tokenizer)
    (tmp_path / "tiny.json").write_text(json.dumps({task: {"softmax": ROW} for task in INCLUDED}))
    return tmp_path / "tiny.pt"


@pytest.fixture
def command(checkpoint, monkeypatch):
    """Runs eval.py with these words on the tiny checkpoint, on two inputs of e2e unless the words say otherwise."""

    def run_command(*words) -> None:
        words = [str(word) for word in words]
        first = words[:1] if words and words[0] in ("sweep", "calibrate", "tune", "prompt") else []
        base = ["--checkpoint", str(checkpoint), "--tasks", "e2e", *([] if first == ["prompt"] else ["--limit", "2"])]
        monkeypatch.setattr("sys.argv", ["eval.py", *first, *base, *words[len(first) :]])  # the last of two flags is taken
        run(evaluation.main)

    return run_command


@pytest.fixture
def rows_of(command, tmp_path):
    """The rows of --json after a command with these words."""

    def read(*words) -> list[dict]:
        command(*words, "--json", tmp_path / "out.json")
        return json.loads((tmp_path / "out.json").read_text())["rows"]

    return read


def names_in(printed: str) -> list[str]:
    """The names of the rows in the tables printed."""
    cells = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    return [cell for cell in cells if cell not in ("", "---")]


# ---------------------------------------------------------------- the table


def test_the_json_holds_the_table_and_follows_from_the_runs(rows_of, capsys, tmp_path):
    rows = rows_of("--tasks", "translation,e2e", "--limit", 4, "--repeat", 2, "--wide")
    environment = json.loads((tmp_path / "out.json").read_text())["environment"]
    assert environment["dtype"] == "float32" and environment["split_of_data"] == "test"
    assert environment["date"] == str(datetime.date.today()) and "--limit 4" in environment["command"]
    assert [(row["task"], row["name"]) for row in rows] == [(task, name) for task in INCLUDED for name in ("full", "softmax")]
    printed = capsys.readouterr().out
    for full, row in zip(rows[::2], rows[1::2]):
        assert full["speedup"] == full["ideal_speedup"] == full["agreement"] == full["rougeL_full"] == 1 and full["avg_exit_layer"] == 5
        assert full["confidence_flops_per_token"] == 0 and full["confidence_time_share"] is None and full["miss_rate"] is None
        layers = [layer for prompt in row["prompts"] for layer in prompt["exit_layers"]]
        assert len(row["prompts"]) == 4 and set(layers) <= {2, 3, 5} and len(set(layers)) > 1
        assert row["avg_exit_layer"] == pytest.approx(sum(layers) / len(layers)) == pytest.approx(5 / row["ideal_speedup"])
        seconds = [sum(prompt["seconds"] for prompt in each["prompts"]) for each in (full, row)]
        tokens = [sum(len(prompt["tokens"]) for prompt in each["prompts"]) for each in (full, row)]
        assert row["speedup"] == pytest.approx(tokens[1] / seconds[1] / (tokens[0] / seconds[0]))
        assert row["exit_efficiency"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
        assert row["speedup_ci"][0] <= row["speedup"] <= row["speedup_ci"][1] and 0 <= row["miss_rate"] <= 1
        assert all(0 <= score <= 1 for score in (*row["scores"].values(), row["agreement"], row["rougeL_full"]))
        assert f"{row['flops_per_token'] / 1e6:.1f}" in printed and row["confidence_flops_per_token"] > 0


def test_the_table_shows_six_rows_in_eight_columns_of_a_hundred_characters(command, capsys, tmp_path):
    names = ["softmax adaptive", "jsd", "static", "softmax", "weighted", "verified"]
    (tmp_path / "tiny.json").write_text(json.dumps({"e2e": dict.fromkeys(names, ROW)}))
    command("--limit", 1)
    printed = capsys.readouterr().out
    assert names_in(printed) == ["full", "static", "softmax", "weighted", "jsd", "verified"]
    assert {line.count("|") - 1 for line in printed.splitlines() if line.startswith("|")} == {8}
    assert max(map(len, printed.splitlines())) <= 100 and "e2e, 1 of 630 test inputs, one run" in printed
    command("--limit", 1, "--all", "--wide")
    wide = capsys.readouterr().out
    assert names_in(wide) == ["full", *names] and "conf. time" in wide and "conf. time" not in printed


def test_configurations_of_all_kinds_are_compared_in_one_table(command, rows_of, tiny_model, tokenizer, monkeypatch, capsys, tmp_path):
    """Rows of the settings file, recipes, functions of one's own and other checkpoints, each named after what it is; a
    model is loaded once, and its speed is compared with that of the full model of the table."""
    (tmp_path / "own.py").write_text("def sure(trace, layer):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "other.pt", tiny_model(1, vocab_size=350, max_len=256, n_layers=3), tokenizer)
    loads = []
    original = evaluation.Setup.model_of
    monkeypatch.setattr(evaluation.Setup, "model_of", lambda self, file: loads.append(original(self, file)) or loads[-1])
    names = ["softmax", "softmax+threshold=0.9", "calm", "own:sure+exit-layers=2,4", "full+checkpoint=other.pt",
             "jsd+checkpoint=other.pt+exit-layers=1"]  # fmt: skip
    full, *rows = rows_of("--compare", ",".join(["full", *names]))
    assert full["name"] == "full" and [row["name"] for row in rows] == names == names_in(capsys.readouterr().out)[1:]
    assert [row["config"]["threshold"] for row in rows[:3]] == [0.2, 0.9, 0.9] and rows[2]["config"]["fill"] == "copy"
    assert rows[1]["config"]["exit_layers"] == [2, 3] and {layer for each in rows[3]["prompts"] for layer in each["exit_layers"]} == {2}
    assert [row["checkpoint"] for row in rows] == [None] * 4 + ["other.pt"] * 2 and loads[-1] is loads[-2] is not loads[0]
    assert rows[4]["ideal_speedup"] is None and rows[4]["avg_exit_layer"] == 3 and rows[4]["agreement"] < 1
    command("--compare", "softmax", "--fill", "copy")  # a row that nobody named is not blamed for the change
    save_checkpoint(tmp_path / "foreign.pt", tiny_model(1), None)
    with pytest.raises(SystemExit):
        command("--compare", "full+checkpoint=foreign.pt")
    assert "foreign.pt: has a different tokenizer" in capsys.readouterr().err


def test_recipes_are_compared_on_any_checkpoint(rows_of, tmp_path):
    """Also without settings. Contrast alone is compared with the model's own prediction."""
    (tmp_path / "tiny.json").unlink()
    full, *found = rows_of("--compare", ",".join(RECIPES))
    rows = {row["name"]: row for row in found}
    assert list(rows) == [*RECIPES] and full["config"]["predict"] == "own" and rows["dola"]["config"]["predict"] == "dola"
    assert rows["layerskip"]["agreement"] == 1 and rows["layerskip"]["accepted"] < 1 and rows["dola"]["agreement"] < 1
    assert rows["layerskip"]["config"]["exit_layers"] == rows["free"]["config"]["exit_layers"] == [1]
    assert rows["calm"]["config"]["exit_layers"] is None


def test_a_configuration_of_flags_begins_with_what_decode_does_and_is_named_after_them(rows_of):
    row = rows_of("--confidence", "softmax")[1]
    assert row["config"] == json.loads(json.dumps(asdict(replace(COMMAND, max_new_tokens=8)))) and row["name"] == "softmax"
    assert rows_of("--confidence", "hidden", "--threshold", 0.5)[1]["name"] == "hidden+threshold=0.5"


def test_thresholds_from_a_file_make_a_row_and_give_way_to_flags(rows_of, tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "jsd", "exit_layers": [2, 4], "layer_thresholds": [0.5, 0.1], "provenance": {}}')
    for flags, bars in (((), [0.5, 0.1]), (("--threshold", 0.3), None)):
        config = rows_of("--thresholds", tmp_path / "t.json", *flags)[1]["config"]
        assert config["exit_layers"] == [2, 4] and config["layer_thresholds"] == bars
        assert config["threshold"] == (COMMAND.threshold if bars else 0.3)


def test_a_change_leaves_a_row_what_it_is(rows_of, tmp_path):
    kinds = {
        "copy": {"confidence": "softmax", "exit_layers": [2], "fill": "copy"},
        "auto": {"confidence": "softmax", "verify": True, "draft": "auto"},
        "static": {"confidence": "softmax", "exit_layers": [2], "threshold": 0.0},
        "layers": {"confidence": "softmax", "exit_layers": [2, 3], "layer_thresholds": [0.9, 0.2]},
    }
    (tmp_path / "tiny.json").write_text(json.dumps({"e2e": kinds}))
    rows = rows_of("--all", "--limit", 1, "--max-owed", 4, "--threshold", 0.5, "--threshold-schedule", "decaying:4")[1:]
    row = {each["name"]: each["config"] for each in rows}
    assert {name: each["max_owed"] for name, each in row.items()} == {"copy": None, "auto": None, "static": 4, "layers": 4}
    assert row["auto"]["draft"] == "auto" and row["auto"]["threshold_schedule"] == "constant" and row["static"]["threshold"] == 0
    assert row["layers"]["layer_thresholds"] is None and row["layers"]["threshold"] == row["copy"]["threshold"] == 0.5


@pytest.mark.parametrize("content", ["{", '{"e2e": {"a": {"threshold": 3}}}', '{"e2e": {"a": {"colour": 3}}}', '{"e2e": [1]}'])
def test_unusable_settings_are_refused(content, command, tmp_path, capsys):
    (tmp_path / "tiny.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2 and "tiny.json: " in capsys.readouterr().err.splitlines()[-1]


def test_the_page_shows_the_first_inputs_under_every_row(rows_of, tmp_path):
    page = tmp_path / "page.html"
    rows = rows_of("--limit", 4, "--html", page)
    for place, shown in zip(range(3), embedded(page)["inputs"], strict=True):
        assert shown["references"] == rows[0]["prompts"][place]["references"]
        assert [run["name"] for run in shown["runs"]] == [row["name"] for row in rows] == ["full", "softmax"]
        for run_shown, row in zip(shown["runs"], rows):
            assert [token["id"] for token in run_shown["tokens"]] == row["prompts"][place]["tokens"]


def test_a_page_without_configurations_of_its_model_shows_the_full_model(command, checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "other.pt")
    command("--compare", f"full+checkpoint={tmp_path / 'other.pt'}", "--html", tmp_path / "page.html")
    assert {run["name"] for shown in embedded(tmp_path / "page.html")["inputs"] for run in shown["runs"]} == {"full"}


# ---------------------------------------------------------------- measuring


def test_rows_take_turns_on_the_same_prompts(tiny_model, monkeypatch):
    """After a warm-up, prompt by prompt, every repeat runs every row once."""
    calls = []
    note = lambda model, prompt, config, *_, **__: calls.append((prompt[0], config.threshold)) or Generation()  # noqa: E731
    monkeypatch.setattr(measuring, "generate", note)
    monkeypatch.setattr(measuring, "stream", lambda *given, **more: note(*given, **more).tokens)
    model = tiny_model()
    rows = {name: Configuration(DecodeConfig(threshold=bar), model) for name, bar in (("a", 0.1), ("b", 0.2))}
    measured = measuring.run_in_turns(rows, [[1], [2]], 2, "")
    once = [0.1, 0.2]
    assert calls == [(1, each) for each in once] + [(prompt, each) for prompt in (1, 2) for _ in range(2) for each in once]
    assert list(measured) == list(rows) and all(len(row.outputs) == len(row.seconds) == 2 for row in measured.values())


def test_time_of_checks_counts_what_did_not_give_the_token(tiny_model):
    """A function that sleeps 5 ms at each of two layers takes nearly all of the time; one that answers at once takes a
    small part."""
    model = tiny_model(0, vocab_size=350, max_len=256)

    def slow(trace, layer):
        time.sleep(0.005)
        return trace.logits(layer).max() * 0

    config = DecodeConfig(confidence=slow, threshold=1.0, exit_layers=(2, 4), max_new_tokens=8)
    assert 0.7 < measuring.confidence_share(Configuration(config, model), [[1, 2, 3]]) < 1
    quick = replace(config, confidence=lambda trace, layer: float(layer == 4))
    assert 0 < measuring.confidence_share(Configuration(quick, model), [[1, 2, 3]]) < 0.3


# ---------------------------------------------------------------- figures


def measured(tiny_model, tokens: list[list[int]], times: list[list[float]]) -> measuring.Measured:
    outputs = [Generation(each, [5] * len(each), [{}] * len(each), Counters(len(each), 5)) for each in tokens]
    return measuring.Measured(Configuration(DecodeConfig(), tiny_model()), [[1]] * len(tokens), outputs, times, [0.1] * len(tokens))


def test_first_difference_may_be_the_first_token(tiny_model, tokenizer):
    row, full = (measured(tiny_model, each, [[1.0]] * 3) for each in ([[1, 2], [5, 6], [7]], [[1, 2], [4, 6], [7, 8]]))
    table = Table(tasks.find_task("e2e"), [tasks.Example("p", ("r",))] * 3, 3, {})
    summary = figures.summarize(SentencePiece(tokenizer), table, "row", row, full, None)
    assert summary["first_difference"] == 0.5 and summary["same_texts"] == pytest.approx(1 / 3)  # of 0 and 1, the median


def test_the_interval_of_the_speedup_covers_prompts_and_repeats(tiny_model):
    """Equal prompts, equal repeats: no width. Repeats that differ give one though every prompt has the same median; so do
    prompts that differ. What slows both rows alike gives none."""
    make = lambda times: measured(tiny_model, [[1] * 4] * 20, times)  # noqa: E731
    full = make([[1.0, 1.0, 1.0]] * 20)
    assert figures.speedup_interval(make([[0.5] * 3] * 20), full) == [2, 2]
    low, high = figures.speedup_interval(make([[0.4, 0.5, 0.6]] * 20), full)
    assert 1.7 < low < 1.98 and 2.02 < high < 2.4
    low, high = figures.speedup_interval(make([[0.4]] * 10 + [[0.6]] * 10), make([[1.0]] * 20))
    assert 1.6 < low < 1.95 and 2.05 < high < 2.5
    slow = [[1.0, 3.0]] * 10 + [[1.0, 1.0]] * 10
    assert figures.speedup_interval(make([[each / 2 for each in times] for times in slow]), make(slow)) == [2, 2]


def test_intervals_of_scores_hold_the_scores():
    task = tasks.find_task("e2e")
    found = figures.quality_figures(task, ["a b c d", "a b c x", "y"], [["a b c d"], ["a b c d"], ["z"]])
    assert all(low < found["scores"][name] < high for name, (low, high) in found["scores_ci"].items())


def test_quality_is_the_least_share_of_the_full_models_scores():
    task = replace(tasks.find_task("e2e"), metrics={"f1": "f1", "exact_match": "exact_match"})
    assert figures.quality_kept(task, ["x b", "c"], ["b", "c"], [["b"], ["c"]])[0] == 0.5  # F1 keeps 5 of 6, exact match half
    assert figures.quality_kept(task, ["b"], ["c"], [["b"]])[0] == 1  # the full model has nothing to lose
    stories = tasks.find_task("stories")
    assert figures.quality_kept(stories, ["a b"], ["a c"], [["x"]])[0] == 0.5  # no scores: ROUGE-L to the full model's text


def test_quality_is_resampled_in_pairs():
    """A row that writes what the full model writes keeps everything in every resample, whatever that is worth."""
    task = tasks.find_task("e2e")
    texts, references = ["a b c d e", "a x c y e", "no"], [["a b c d e"], ["a b c d e"], ["yes"]]
    assert set(figures.quality_kept(task, texts, texts, references)[1]) == {1}
    estimate, resampled = figures.quality_kept(task, ["a b c x y", *texts[1:]], texts, references)
    assert resampled.min() < estimate < resampled.max() == 1


def test_a_row_is_best_only_where_the_intervals_do_not_overlap():
    def row(name, speed, kept):
        return {"name": name, "speedup_ci": [speed - 0.1, speed + 0.1], "kept_ci": [kept - 0.01, kept + 0.01]}

    rows = [row("exact", 1.0, 1.0), row("fast", 2.0, 0.9), row("beaten", 1.5, 0.85)]
    assert figures.best_rows(rows) == {"exact", "fast"}
    assert figures.best_rows([*rows, row("as fast", 2.05, 0.91)]) == {"exact"}  # one of the two, but nobody knows which


# ---------------------------------------------------------------- tuning


def tried(speedup: float, kept: float, low: float) -> tune.Tried:
    """A candidate whose share lies at `low` in a tenth of the resamples."""
    resampled = torch.full((100,), kept).numpy()
    resampled[:10] = low
    return tune.Tried(DecodeConfig(confidence="softmax", threshold=kept), speedup, kept, resampled)


def test_a_row_is_chosen_by_what_it_surely_keeps_not_by_the_estimate():
    """The third keeps everything by its estimate, but may keep only 97 %; what follows it is not looked at, though it would
    pass."""
    walked = [tried(1.0, 1.0, 1.0), tried(1.5, 0.995, 0.991), tried(2.0, 1.0, 0.97), tried(3.0, 0.999, 0.999)]
    assert tune.boldest(walked) is walked[1]
    assert tune.boldest(walked[2:]) is walked[2]  # nothing passes: the most cautious
    assert tune.fastest(walked) is walked[3] and tune.fastest([tried(9, 0.5, 0.4), tried(1, 0.6, 0.5)]).kept == 0.6


def test_the_margin_keeps_the_promise_on_other_inputs():
    """Of many texts the full model has all right and a row 98.5 %. Judged on 400 of them, 30 times, it passes as one that keeps
    99 % by the estimate in a quarter of them (four wrong or fewer; on average there are six), by the resamples hardly ever."""
    draw, task = random.Random(0), replace(tasks.find_task("e2e"), metrics={"f1": "f1"})
    by_estimate = by_margin = 0
    for _ in range(30):
        texts = ["wrong" if draw.random() < 0.015 else "right" for _ in range(400)]
        kept, resampled = figures.quality_kept(task, texts, ["right"] * 400, [["right"]] * 400)
        assert kept == pytest.approx(texts.count("right") / 400)
        by_estimate += kept >= tune.KEPT
        by_margin += (resampled < tune.KEPT).mean() <= tune.ERROR
    assert by_estimate > 4 and by_margin <= 1


class Plain:
    """What Tuning needs of a Setup to list its candidates."""

    def __init__(self, model):
        self.model, self.config, self.record = model, EvalConfig(), {"checkpoint_id": "", "commit": ""}


def test_every_candidate_fits_its_model(tiny_model):
    for n_layers in (3, 5, 12):
        tuning = tune.Tuning(Plain(tiny_model(n_layers=n_layers)), tasks.find_task("e2e"), [None])
        for configs in (tuning.static_candidates(), tuning.grid("softmax", tuning.exit_sets(tune.LAYERS), tune.COARSE),
                        tuning.grid("jsd", [(1, 2)], tune.FINE), tuning.verified_candidates("softmax")):  # fmt: skip
            assert len(set(configs)) == len(configs) > 1 and all(config.exits(ModelConfig(n_layers=n_layers)) for config in configs)


def test_layers_are_chosen_among_those_that_the_model_exits_at(tiny_model):
    tuning = tune.Tuning(Plain(tiny_model(n_layers=12)), tasks.find_task("e2e"), [None])
    for exits, sets in (
        ([2, 3, 4, 6, 8, 10], [(3,), (3, 4, 6), (3, 4, 6, 8), (3, 6), (4,), (4, 6, 8), (4, 8), (6,), (6, 8)]),
        ([5, 7], [(5,), (5, 7)]),
    ):
        tuning.exits = exits
        assert tuning.exit_sets(tune.LAYERS) == sets


def test_shortlists_are_tried_where_frequent_ids_are_known(tiny_model, monkeypatch):
    model, row = tiny_model(), DecodeConfig(confidence="softmax", prune="fixed")
    tuning = tune.Tuning(Plain(model), tasks.find_task("e2e"), [None])
    assert tuning.with_shortlists(row) == [row]
    monkeypatch.setattr(tune, "SHORTLISTS", (40, 25, 12))
    for known, sizes in ((30, [None, 25, 12]), (20, [None, 12])):
        model.frequent_ids = torch.arange(known)
        assert [each.shortlist for each in tuning.with_shortlists(row)] == sizes


def test_tune_writes_rows_that_the_table_reads(command, rows_of, monkeypatch, tmp_path, capsys):
    """Of a configuration that equals the full model and one that does not, the one that keeps its scores is chosen, however
    slow. Rows of another task stay, and nothing is replaced without --overwrite."""
    safe = DecodeConfig(confidence="softmax", threshold=1.0, exit_layers=(2,), max_new_tokens=8)
    wild = replace(safe, threshold=0.0, exit_layers=(1,))
    for name in ("static_candidates", "grid", "verified_candidates"):
        monkeypatch.setattr(tune.Tuning, name, lambda *_: [safe, wild])

    def kept(task, texts, full_texts, references):
        return (estimate := 0.1 + 0.9 * (texts == full_texts)), torch.tensor([estimate] * 9).numpy()

    monkeypatch.setattr(tune, "quality_kept", kept)
    before = (tmp_path / "tiny.json").read_text()
    with pytest.raises(SystemExit):
        command("tune")
    assert "tiny.json: already exists" in capsys.readouterr().err and (tmp_path / "tiny.json").read_text() == before
    monkeypatch.chdir(tmp_path)
    command("tune", "--overwrite", "--out", "tiny.json")  # the settings file, however it is spelled
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert content["translation"] == json.loads(before)["translation"] and content["provenance"]["e2e"]["inputs"] == 2
    _, *rows = rows_of("--all", "--limit", 1)
    assert [row["name"] for row in rows] == [
        "static", "softmax", "weighted", "jsd", "verified", "softmax none", "softmax decaying", "softmax adaptive",
        "jsd none", "jsd decaying", "jsd adaptive", "softmax copy", "jsd verified", "verified auto"]  # fmt: skip
    for row in rows[:-1]:
        schedule = row["name"].split()[-1]
        assert row["config"]["prune"].split(":")[0] == (schedule if schedule in ("decaying", "adaptive") else "none")
        assert row["config"]["threshold"] == 1 and (row["config"]["fill"] == "copy") == row["name"].endswith("copy")
    assert rows[-1]["config"]["draft"] == "auto" and rows[-1]["agreement"] == 1


# ---------------------------------------------------------------- sweeps


def test_a_sweep_measures_every_combination_on_dev_and_goes_on_where_it_stopped(command, monkeypatch, tmp_path, capsys):
    results = tmp_path / "sweep.json"
    words = ("sweep", "--results", results, "--over", "threshold", 0.1, 0.9, "--over", "exit-layers", "2,3", 4)
    command(*words)
    known = json.loads(results.read_text())
    names = [rows[1]["name"] for rows in known.values()]
    assert names == [f"threshold={bar} exit_layers={layers}" for bar in (0.1, 0.9) for layers in ("2,3", "4")]
    assert "e2e, 2 of 547 dev inputs" in capsys.readouterr().out
    results.write_text(json.dumps(dict(list(known.items())[:3])))
    measured_again = []
    measure = sweeping.evaluate
    monkeypatch.setattr(sweeping, "evaluate", lambda s, table: measured_again.append(list(table.configurations)) or measure(s, table))
    command(*words)
    again = json.loads(results.read_text())
    assert measured_again == [["threshold=0.9 exit_layers=4"]] and list(again) == list(known)
    assert [again[key] for key in again][:3] == [known[key] for key in known][:3]
    printed = capsys.readouterr().out
    assert names_in(printed)[0] in ("full", "full *") and printed.count("| threshold=") == 4
    assert "exit_layers 2,3 (2 rows): speed-up" in printed and "threshold 0.9 (2 rows)" in printed


@pytest.mark.parametrize("change", ["model", "ids", "data", "repeat", "function", "nothing"])
def test_a_result_is_used_again_only_for_the_same_model_data_and_measure(
    change, command, checkpoint, tiny_model, tokenizer, monkeypatch, tmp_path
):
    data, own = tmp_path / "mine.jsonl", tmp_path / "own_function.py"
    data.write_text('{"prompt": "one", "completion": "two"}\n')
    words = ["sweep", "--tasks", f"file={data}", "--results", tmp_path / "s.json", "--over", "threshold", 0.1]
    if change == "function":
        own.write_text("def sure(trace, layer):\n    return 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)
        words += ["--confidence", "own_function:sure"]
    command(*words)
    if change == "function":
        own.write_text("def sure(trace, layer):\n    return 0.5\n")
    elif change == "model":
        save_checkpoint(checkpoint, tiny_model(1, vocab_size=350, max_len=256), tokenizer)
    elif change == "ids":
        np.save(checkpoint.with_suffix(".ids.npy"), np.arange(300, dtype=np.int32))
    elif change == "data":
        data.write_text('{"prompt": "one", "completion": "three"}\n')
    elif change == "repeat":
        words += ["--repeat", 2]
    command(*words)
    assert len(json.loads((tmp_path / "s.json").read_text())) == (1 if change == "nothing" else 2)


def test_every_row_is_compared_with_its_own_full_model(rows_of, tmp_path):
    rows = rows_of("sweep", "--results", tmp_path / "s.json", "--over", "max-new-tokens", 2, 5, "--threshold", 1)
    names = [("full", 2), ("max_new_tokens=2", 2), ("full", 5), ("max_new_tokens=5", 5)]
    assert [(row["name"], row["config"]["max_new_tokens"]) for row in rows] == names and all(row["agreement"] == 1 for row in rows)


# ---------------------------------------------------------------- calibration


@pytest.fixture
def half(monkeypatch):
    """A confidence function that is always half sure."""
    monkeypatch.setitem(FUNCTIONS, "half", lambda trace, layer: trace.logits(layer).max() * 0 + 0.5)
    return ("calibrate", "--limit", 10, "--confidence", "half", "--prune", "none", "--tolerance", 0.2, "--error", 0.2,
            "--max-new-tokens", 4)  # fmt: skip


@pytest.mark.parametrize("risk, threshold", [("consistency", 0.55), ("task", 0.0)])
def test_calibration_writes_a_threshold_that_decoding_reads(risk, threshold, half, command, checkpoint, tmp_path, capsys):
    """A threshold above one half is the full model, one below exits at once, into another text; but of a random model no text
    scores worse than any other."""
    file = tmp_path / "t.json"
    command(*half, "--risk", risk, "--out", file)
    written, said = json.loads(file.read_text()), capsys.readouterr().out
    assert written["confidence"] == "half" and written["threshold"] == threshold
    calibrated = replace(COMMAND, confidence="half", prune="none", threshold=threshold, max_new_tokens=4)
    assert settings_in_force({}, checkpoint, thresholds=file)[0] == calibrated
    check, tested = written["provenance"]["held out"], written["provenance"]["tested"]
    assert check["on"] == "10 inputs of test" and check["risk"] < 0.2 and written["provenance"]["risk"] == risk
    assert all(each["p_value"] <= 0.2 for each in tested if each["threshold"] >= threshold) and tested[-1]["threshold"] <= threshold
    assert f"threshold {threshold:g}; on 10 inputs of test, not used to find it" in said
    assert f"with --thresholds {file}" in said


def test_thresholds_of_single_layers_give_way_to_the_calibrated_one(half, command, tiny_model, tmp_path):
    """It was proven for all exit layers, so none may keep a threshold of its own."""
    command(*half, "--exit-layers", "1,2", "--layer-thresholds", "0.1,0.1", "--out", tmp_path / "t.json")
    written = json.loads((tmp_path / "t.json").read_text())
    calibrated = settings_in_force({}, tmp_path / "tiny.pt", thresholds=tmp_path / "t.json")[0]
    assert calibrated.exits(tiny_model(0).config) == {1: written["threshold"], 2: written["threshold"]} and written["threshold"] > 0.1


def test_an_interrupted_calibration_leaves_the_last_threshold_that_passed(half, command, monkeypatch, tmp_path):
    original = calibrate.Calibration.p_value

    def interrupted(self, threshold):
        if threshold < 0.8:
            raise KeyboardInterrupt
        return original(self, threshold)

    monkeypatch.setattr(calibrate.Calibration, "p_value", interrupted)
    with pytest.raises(SystemExit) as end:
        command(*half, "--out", tmp_path / "t.json")
    written = json.loads((tmp_path / "t.json").read_text())
    assert end.value.code == 130 and written["threshold"] == 0.8 and len(written["provenance"]["tested"]) == 5


def inputs_of(kind: str, monkeypatch, command, *words) -> list:
    """The inputs of `tune`, or the two sets of `calibrate`, which goes no further."""
    seen = []
    monkeypatch.setattr(
        evaluation, kind, lambda setup, task, inputs: seen.extend(inputs.values() if isinstance(inputs, dict) else inputs) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        command(*words)
    return seen


def test_tuning_calibration_and_its_check_use_different_inputs_and_texts(command, monkeypatch, tmp_path):
    """In one file, whatever seed and limit, and though several questions are asked about each text."""
    lines = [json.dumps({"context": f"text {i // 3}", "question": f"q{i}?", "answers": ["x"]}) for i in range(120)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    words = ("--tasks", f"file={tmp_path}/mine.jsonl", "--limit", 0)
    tuned = inputs_of("Tuning", monkeypatch, command, "tune", "--overwrite", *words, "--seed", 1)
    proving = ("--tolerance", 0.5, "--error", 0.5, "--out", tmp_path / "t.json")
    sets = inputs_of("Calibration", monkeypatch, command, "calibrate", *words, *proving, "--seed", 2)
    texts = [[tasks.source(example) for example in each] for each in (tuned, *sets)]
    assert [len(set(each)) for each in texts] == [len(each) for each in texts]  # one question for each text
    assert sum(map(len, texts)) == len({text for each in texts for text in each}) == 40 and min(map(len, texts)) > 3


def test_calibration_of_an_included_task_leaves_out_what_tune_draws_from(command, monkeypatch, tmp_path):
    tuned = inputs_of("Tuning", monkeypatch, command, "tune", "--overwrite", "--limit", 0)
    fit, check = inputs_of("Calibration", monkeypatch, command, "calibrate", "--limit", 0, "--out", tmp_path / "t.json")
    assert {*tuned, *fit} == set(tasks.read_task(tasks.find_task("e2e"), "dev")) and not {*tuned} & {*fit}
    assert check == tasks.read_task(tasks.find_task("e2e"), "test")


def test_calibration_says_when_nothing_passes(half, command, monkeypatch, tmp_path, capsys):
    """Where every layer is always sure, even the most cautious threshold exits at once, into another text."""
    monkeypatch.setitem(FUNCTIONS, "half", lambda trace, layer: trace.logits(layer).max() * 0 + 1)
    with pytest.raises(SystemExit) as end:
        command(*half, "--out", tmp_path / "t.json")
    said = capsys.readouterr().out
    assert end.value.code == 1 and "no threshold keeps the consistency risk below 0.2" in said
    assert "inputs that were not used here" in said and not (tmp_path / "t.json").exists()


# ---------------------------------------------------------------- pictures, prompts


def test_pictures_are_drawn_from_a_table(command, tmp_path):
    pytest.importorskip("matplotlib")
    command("--confidence", "jsd", "--plot", tmp_path / "pictures")
    kinds = ("frontier", "time", "ranks", "confidence", "reliability", "jsd", "exits")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"e2e-{kind}.png" for kind in kinds}


def test_prompt_shows_what_the_model_gets_with_shots_that_are_no_inputs(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"p{number}", "references": [f"c{number}", "d"]}) for number in range(3)]
    Path("mine.jsonl").write_text("\n".join(lines))
    Path("shots.jsonl").write_text(lines[0] + "\nnothing\n" + lines[1])
    command("prompt", "--tasks", "file=mine.jsonl")
    assert capsys.readouterr().out == "--- mine, test\np0\n--- references\nc0\nd\n"
    command("prompt", "--tasks", "answers=mine.jsonl", "--shots", 2, "--shot-file", "shots.jsonl", "--skip-bad")
    printed = capsys.readouterr().out
    assert "mine: skipped 1 malformed lines\nshots.jsonl, line 2: not JSON" in printed
    assert printed.endswith("--- mine, test\np0\nc0\n\np1\nc1\n\np2\n\n--- references\nc2\nd\n")


# ---------------------------------------------------------------- mistakes


def test_a_mistake_in_the_second_task_is_found_before_the_first_is_measured(command, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate", None)
    with pytest.raises(SystemExit):
        command("--tasks", "e2e,samsum=no.jsonl", "--confidence", "jsd")
    assert "no.jsonl: no such data file" in capsys.readouterr().err


@pytest.mark.parametrize("fields, message", [
    ({"split": "train"}, "unknown split 'train'"), ({"tolerance": 1.0}, "tolerance is 1.0"),
    ({"shot_file": "x"}, "--shot-file needs --shots, the number of examples"),
    ({"compare": "softmax", "all": True}, "give only one of --all and --compare"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**fields)


MISTAKES = {
    "--tasks e2e,e2e": "two tasks would be named e2e",
    "--tasks file=plain.txt --confidence jsd": "plain.txt: holds texts without a prompt; stories=plain.txt continues",
    "--tasks stories --shots 1 --confidence jsd": "stories: continues a text; leave out --chat and --shots",
    "--tasks file=pairs.jsonl --confidence jsd --shots 1 --shot-file pairs.jsonl": "shots is 1, which uses every input of pairs",
    "--confidence jsd --compare softmax": "--confidence defines a configuration",
    "--compare softmax+exit-layers=9": "layer 9 is not an exit",
    "--json tiny.pt": "tiny.pt: is read here, and would be overwritten; give another name",
    "--wide sweep --over threshold 0.5": "flags come after the command: eval.py sweep",
    "--wide compare": "flags come after the command: eval.py compare",
    "sweep --over threshold 0.5 --results t.json": "t.json: does not hold the results of a sweep",
    "--thresholds t.json --compare softmax": "--thresholds defines a configuration",
    "calibrate --limit 4": "4 inputs cannot prove a risk below 0.05 at error level 0.05",
    "calibrate --tasks stories --risk task": "task stories has no score; calibrate with --risk consistency",
    "calibrate --verify": "no --verify, since that keeps the text",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2(mistake, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").write_text("Some words.")
    Path("pairs.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
    Path("t.json").write_text('{"confidence": "jsd", "threshold": 0.5}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        command(*mistake.split())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and MISTAKES[mistake] in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # nothing is left half-written


def test_without_words_the_command_is_the_table_of_the_included_model(monkeypatch):
    ran = []
    monkeypatch.setitem(evaluation.COMMANDS, "compare", evaluation.COMMANDS["compare"]._replace(run=ran.append))
    monkeypatch.setattr("sys.argv", ["eval.py"])
    evaluation.main()
    assert [Path(config.checkpoint).name for config in ran] == ["default.pt"]
