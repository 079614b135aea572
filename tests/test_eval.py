"""The table: figures that follow from the runs, settings that are chosen and read back, mistakes in one
line."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
from common.errors import run
from confidence import FUNCTIONS
from decode import generate
from decoding.choosing import COMMAND, settings_of
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from evaluation import calibrate, figures, tasks, tune
from evaluation import measure as measuring
from evaluation import sweep as sweeping
from evaluation.recipes import RECIPES
from evaluation.rows import default_tasks, exit_layers_of, read_settings
from formats.checkpoint import save_checkpoint
from formats.data import read_pairs, task_file
from formats.pieces import train_tokenizer
from formats.tokenizer import SentencePiece
from model import ModelConfig

EMBEDDED = ("translation", "e2e")


@pytest.fixture(scope="module")
def tokenizer():
    pairs = [pair for task in EMBEDDED for pair in list(read_pairs(task_file(task, "dev")))[:100]]
    return train_tokenizer(pairs, 350)


@pytest.fixture
def checkpoint(tiny_model, tokenizer, tmp_path, monkeypatch):
    """A tiny random model with a tokenizer, and settings of one row."""
    monkeypatch.setattr(tasks, "TASKS", {name: replace(task, max_new_tokens=8) for name, task in tasks.TASKS.items()})
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, vocab_size=350, max_len=256), tokenizer)
    row = {"confidence": "softmax", "threshold": 0.2, "exit_layers": [2, 3], "prune": "fixed", "prune_k": 4}
    (tmp_path / "tiny.json").write_text(json.dumps({task: {"softmax": row} for task in EMBEDDED}))
    return tmp_path / "tiny.pt"


def run_command(monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    run(evaluation.main)


def test_the_json_holds_the_table_and_follows_from_the_runs(checkpoint, monkeypatch, tmp_path, capsys):
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 4, "--repeat", 2, "--wide", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["environment"]["dtype"] == "float32" and result["environment"]["split_of_data"] == "test"
    assert [row["task"] for row in result["rows"]] == ["translation", "translation", "e2e", "e2e"]
    assert [row["name"] for row in result["rows"]] == ["full", "softmax"] * 2
    printed = capsys.readouterr().out
    for full, row in zip(result["rows"][::2], result["rows"][1::2]):
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


def test_one_setting_of_your_own_replaces_the_settings(checkpoint, monkeypatch, capsys):
    own = ("--confidence", "hidden", "--threshold", 0.5)
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 2, "--repeat", 1, "--tasks", "e2e", *own)
    printed = capsys.readouterr().out
    assert "| yours" in printed and "| softmax" not in printed and "translation" not in printed


def test_rows_are_chosen_by_name(checkpoint, monkeypatch, capsys, tmp_path):
    row = {"confidence": "softmax", "exit_layers": [2]}
    (tmp_path / "tiny.json").write_text(json.dumps({task: dict.fromkeys(("a", "b", "c"), row) for task in EMBEDDED}))
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 1, "--repeat", 1, "--tasks", "e2e", "--rows", "c,a")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:] == ["full", "c", "a"]


def row_names(printed: str) -> list[str]:
    """Of the tables printed, the names of the rows."""
    cells = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    return [cell for cell in cells if cell not in ("", "---")]


def test_the_table_shows_six_rows_in_eight_columns_of_a_hundred_characters(checkpoint, monkeypatch, capsys, tmp_path):
    row = {"confidence": "softmax", "exit_layers": [2]}
    names = ["softmax adaptive", "jsd", "static", "softmax", "weighted", "verified"]
    (tmp_path / "tiny.json").write_text(json.dumps({task: dict.fromkeys(names, row) for task in EMBEDDED}))
    base = ("--checkpoint", checkpoint, "--limit", 1)
    run_command(monkeypatch, *base)
    printed = capsys.readouterr().out
    assert row_names(printed) == ["full", "static", "softmax", "weighted", "jsd", "verified"] * 2
    assert {line.count("|") - 1 for line in printed.splitlines() if line.startswith("|")} == {8}
    assert max(map(len, printed.splitlines())) <= 100 and "e2e, 1 of 630 test inputs, one run" in printed
    run_command(monkeypatch, *base, "--all")
    printed = capsys.readouterr().out
    assert row_names(printed) == ["full", *names] * 2 and max(map(len, printed.splitlines())) <= 100
    run_command(monkeypatch, *base, "--all", "--wide", "--tasks", "e2e")
    wide = capsys.readouterr().out
    assert row_names(wide) == ["full", *names] and "conf. time" in wide and "ROUGE-L to full" in wide and "conf. time" not in printed


def test_recipes_are_rows_on_any_checkpoint(checkpoint, monkeypatch, capsys, tmp_path):
    """Beside those of the settings, or without settings. Contrast alone is compared with the model's own
    prediction."""
    base = ("--checkpoint", checkpoint, "--limit", 2, "--tasks", "e2e", "--json", tmp_path / "out.json")
    run_command(monkeypatch, *base, "--rows", "softmax,calm")
    assert row_names(capsys.readouterr().out) == ["full", "softmax", "calm"]
    (tmp_path / "tiny.json").unlink()
    run_command(monkeypatch, *base, "--rows", ",".join(RECIPES))
    said = capsys.readouterr()
    assert row_names(said.out) == ["full", *RECIPES] and "the recipes in evaluation/recipes.py" in said.err
    full, *found = json.loads((tmp_path / "out.json").read_text())["rows"]
    rows = {row["name"]: row for row in found}
    assert full["config"]["predict"] == "own" and rows["dola"]["config"]["predict"] == "contrast"
    assert rows["layerskip"]["agreement"] == 1 and rows["layerskip"]["accepted"] < 1 and rows["dola"]["agreement"] < 1
    assert rows["layerskip"]["config"]["exit_layers"] == rows["free"]["config"]["exit_layers"] == [1]
    assert rows["calm"]["config"]["exit_layers"] is None


def test_a_model_of_one_layer_has_nothing_to_exit_at(tiny_model):
    with pytest.raises(ValueError, match="has one layer, and so no exit"):
        exit_layers_of(tiny_model(n_layers=1))


def test_one_line_says_which_settings_are_in_force_and_from_where(checkpoint, monkeypatch, capsys, tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "jsd", "threshold": 0.3}')
    base = ("--checkpoint", checkpoint, "--limit", 1, "--tasks", "e2e")
    for words, line in (
        ((), f"settings: {tmp_path}/tiny.json, beside the checkpoint"),
        (("--settings", checkpoint.with_suffix(".json"), "--max-owed", 3), f"settings: flags (max_owed 3), over {tmp_path}/tiny.json"),
        (
            ("--thresholds", tmp_path / "t.json", "--min-layer", 2),
            f"settings: flags (min_layer 2), over {tmp_path}/t.json (confidence jsd, threshold 0.3), over decode.py's",
        ),
    ):
        run_command(monkeypatch, *base, *words)
        found = [each for each in capsys.readouterr().err.splitlines() if each.startswith("settings: ")]
        assert len(found) == 1 and found[0].startswith(line)


def test_a_row_of_your_own_is_what_decode_would_do(checkpoint, monkeypatch, tmp_path):
    """The same defaults; exit layers that nobody named stay unnamed, for the model to tell."""
    words = ("--checkpoint", checkpoint, "--limit", 1, "--tasks", "e2e", "--confidence", "softmax", "--json", tmp_path / "out.json")
    run_command(monkeypatch, *words)
    config = json.loads((tmp_path / "out.json").read_text())["rows"][1]["config"]
    assert config == json.loads(json.dumps(asdict(replace(COMMAND, max_new_tokens=8)))) and config["exit_layers"] is None


def test_merged_references_are_counted_and_said(checkpoint, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one", "completion": "a"}\n' * 2 + '{"prompt": "two", "completion": "b"}\n')
    run_command(monkeypatch, "prompt", "--checkpoint", checkpoint, "--tasks", f"file={tmp_path}/mine.jsonl")
    assert "mine: 3 pairs of prompt and reference are 2 inputs" in capsys.readouterr().err


def test_thresholds_from_a_file_make_a_row_and_give_way_to_flags(checkpoint, monkeypatch, tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "jsd", "exit_layers": [2, 4], "layer_thresholds": [0.5, 0.1], "provenance": {}}')
    for flags, bars in (((), [0.5, 0.1]), (("--threshold", 0.3), None)):
        file = ("--thresholds", tmp_path / "t.json", "--json", tmp_path / "out.json")
        run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 2, "--repeat", 1, "--tasks", "e2e", *file, *flags)
        config = json.loads((tmp_path / "out.json").read_text())["rows"][1]["config"]
        assert config["exit_layers"] == [2, 4] and config["layer_thresholds"] == bars
        assert config["threshold"] == (COMMAND.threshold if bars else 0.3)


def test_tune_writes_settings_that_the_table_reads(checkpoint, tiny_model, monkeypatch, tmp_path):
    """Of a setting that equals the full model and one that does not, the one that keeps its scores is chosen,
    however slow."""
    safe = DecodeConfig(confidence="softmax", threshold=1.0, exit_layers=(2,), max_new_tokens=8)
    wild = DecodeConfig(confidence="softmax", threshold=0.0, exit_layers=(1,), max_new_tokens=8)
    monkeypatch.setattr(tune, "candidates", lambda *_: [safe, wild])
    kept = lambda task, texts, full_texts, *_: 0.1 + 0.9 * (texts == full_texts)  # noqa: E731
    monkeypatch.setattr(tune, "quality_kept", kept)
    monkeypatch.setattr(tune, "quality_interval", lambda *given: [kept(*given), 1.0])
    new = tmp_path / "new.json"
    run_command(monkeypatch, "tune", "--checkpoint", checkpoint, "--limit", 3, "--settings", new)
    assert set(json.loads(new.read_text())) == {*EMBEDDED, "provenance"}
    chosen = read_settings(new, tasks.find_task("e2e"), tiny_model(), {})
    assert list(chosen) == ["static", "softmax", "weighted", "jsd", "verified", "softmax none", "softmax decaying", "softmax adaptive",
                            "jsd none", "jsd decaying", "jsd adaptive", "softmax copy", "jsd verified", "verified auto"]  # fmt: skip
    assert chosen.pop("verified auto") == DecodeConfig(max_new_tokens=8, confidence="softmax", verify=True, draft="auto")
    for name, row in chosen.items():
        schedule = name.split()[-1]
        assert row.prune == (schedule if schedule in ("decaying", "adaptive") else "none")
        assert replace(row, prune="none", prune_k=64, fill="parallel") == safe and (row.fill == "copy") == name.endswith("copy")
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 1, "--settings", new)


def test_a_change_leaves_a_row_what_it_is(tiny_model, tmp_path):
    rows = {
        "copy": {"confidence": "softmax", "exit_layers": [2], "fill": "copy"},
        "auto": {"confidence": "softmax", "verify": True, "draft": "auto"},
        "static": {"confidence": "softmax", "exit_layers": [2], "threshold": 0.0},
        "layers": {"confidence": "softmax", "exit_layers": [2, 3], "layer_thresholds": [0.9, 0.2]},
    }
    (tmp_path / "rows.json").write_text(json.dumps({"e2e": rows, "samsum": rows}))
    change = {"max_owed": 4, "threshold": 0.5, "threshold_schedule": "decaying"}
    row = read_settings(tmp_path / "rows.json", tasks.find_task("e2e"), tiny_model(), change)
    assert {name: each.max_owed for name, each in row.items()} == {"copy": None, "auto": None, "static": 4, "layers": 4}
    assert row["auto"].draft == "auto" and row["auto"].threshold_schedule == "constant" and row["static"].threshold == 0
    assert row["layers"].layer_thresholds is None and row["layers"].threshold == row["copy"].threshold == 0.5
    assert default_tasks(tmp_path / "rows.json") == ["e2e"]  # samsum would need a file


def test_shortlists_are_tried_where_frequent_ids_are_known(tiny_model, monkeypatch):
    model, row = tiny_model(), DecodeConfig(confidence="softmax", prune="fixed")
    assert tune.with_shortlists(model, row) == [row]
    model.frequent_ids = torch.arange(30)
    monkeypatch.setattr(tune, "SHORTLISTS", (40, 25, 12))
    assert [each.shortlist for each in tune.with_shortlists(model, row)] == [None, 25, 12]
    model.frequent_ids = torch.arange(20)
    assert tune.with_shortlists(model, row) == [row, replace(row, shortlist=12)]


def test_every_candidate_fits_its_model():
    for n_layers in (3, 5, 12, 30):
        for name, layers, verify in (("static", None, False), ("softmax", None, False), ("jsd", (1, 2), False), ("softmax", None, True)):
            configs = tune.candidates(n_layers, list(range(1, n_layers)), 9, name, layers, verify)
            assert len(set(configs)) == len(configs) > 1 and all(config.exits(ModelConfig(n_layers=n_layers)) for config in configs)
            assert all(config.verify == verify for config in configs)


def test_layers_are_chosen_among_those_that_the_model_exits_at():
    sets = tune.exit_sets(tune.SHARES, 12, [2, 3, 4, 6, 8, 10])
    assert sets == [(3,), (3, 4, 6), (3, 4, 6, 8), (3, 6), (4,), (4, 6, 8), (4, 8), (6,), (6, 8)]
    assert tune.exit_sets(tune.SHARES, 12, [5, 7]) == [(5,), (5, 7)]


def tried(speedup: float, kept: float, surely: float) -> tune.Tried:
    return tune.Tried(DecodeConfig(confidence="softmax", threshold=kept), speedup, kept, surely, "t", 9)


def test_a_row_is_chosen_by_what_it_surely_keeps_not_by_the_estimate():
    """The third keeps everything by its estimate, but may keep only 97 %; what follows it is not looked at,
    though it would pass."""
    walked = [tried(1.0, 1.0, 1.0), tried(1.5, 0.995, 0.991), tried(2.0, 1.0, 0.97), tried(3.0, 0.999, 0.999)]
    assert tune.boldest(walked) == walked[1].config
    assert tune.boldest(walked[2:]) == walked[2].config  # nothing passes: the most cautious
    assert tune.fastest(walked) == walked[3].config and tune.fastest([tried(9, 0.5, 0.4), tried(1, 0.6, 0.5)]).threshold == 0.6


def test_the_margin_keeps_the_promise_on_other_inputs():
    """Of many texts the full model has all right and a row 98.5 %. Judged on 400 of them, 50 times, it passes
    as one that keeps 99 % by the estimate in a quarter of them (four wrong or fewer; on average there are
    six), by the lower end of the interval hardly ever."""
    draw, task = random.Random(0), replace(tasks.find_task("e2e"), metrics={"f1": "f1"})
    by_estimate = by_margin = 0
    for _ in range(50):
        texts = ["wrong" if draw.random() < 0.015 else "right" for _ in range(400)]
        asked = (task, texts, ["right"] * 400, [["right"]] * 400)
        assert figures.quality_kept(*asked) == pytest.approx(texts.count("right") / 400)
        by_estimate += figures.quality_kept(*asked) >= 0.99
        by_margin += figures.quality_interval(*asked, level=0.9)[0] >= 0.99
    assert by_estimate > 7 and by_margin <= 2


def test_quality_is_resampled_in_pairs():
    """A row that writes what the full model writes keeps everything in every resample, whatever that is
    worth."""
    task = tasks.find_task("e2e")
    texts, references = ["a b c d e", "a x c y e", "no"], [["a b c d e"], ["a b c d e"], ["yes"]]
    assert figures.quality_interval(task, texts, texts, references, level=0.9) == [1, 1]
    low, high = figures.quality_interval(task, ["a b c x y", *texts[1:]], texts, references, level=0.9)
    assert low < figures.quality_kept(task, ["a b c x y", *texts[1:]], texts, references) < high == 1


def test_a_row_may_be_another_models(tiny_model):
    rows, models = {"a": DecodeConfig(max_new_tokens=9), "b": DecodeConfig(max_new_tokens=9)}, [tiny_model(0), tiny_model(1)]
    measured = measuring.run_in_turns(models[0], [[1], [2]], rows, 1, "", {"b": models[1]})
    for row, model in zip(measured.values(), models):
        expected = [generate(model, prompt, row.config).tokens for prompt in ([1], [2])]
        assert [out.tokens for out in row.outputs] == expected
    assert measured["a"].outputs[0].tokens != measured["b"].outputs[0].tokens


def test_rows_take_turns_on_the_same_prompts(tiny_model, monkeypatch):
    """After a warm-up, prompt by prompt, every repeat asks every row once."""
    calls = []
    note = lambda model, prompt, config, *_, **__: calls.append((prompt[0], config.threshold)) or Generation()  # noqa: E731
    monkeypatch.setattr(measuring, "generate", note)
    monkeypatch.setattr(measuring, "stream", lambda *asked, **more: note(*asked, **more).tokens)
    rows = {name: DecodeConfig(threshold=threshold) for name, threshold in (("a", 0.1), ("b", 0.2))}
    measured = measuring.run_in_turns(tiny_model(), [[1], [2]], rows, 2, "")
    assert calls == [(1, 0.1), (1, 0.2)] + [(prompt, threshold) for prompt in (1, 2) for _ in range(2) for threshold in (0.1, 0.2)]
    assert all(len(row.outputs) == len(row.seconds) == 2 for row in measured.values())


def test_time_of_asking_counts_what_did_not_give_the_token(tiny_model):
    """A function that sleeps 5 ms at each of two layers takes nearly all of the time; one that answers at
    once takes a small part."""
    model = tiny_model(0, vocab_size=350, max_len=256)

    def slow(trace, layer):
        time.sleep(0.005)
        return trace.logits(layer).max() * 0

    config = DecodeConfig(confidence=slow, threshold=1.0, exit_layers=(2, 4), max_new_tokens=8)
    assert 0.7 < measuring.confidence_share(model, [[1, 2, 3]], config) < 1
    quick = replace(config, confidence=lambda trace, layer: float(layer == 4))
    assert 0 < measuring.confidence_share(model, [[1, 2, 3]], quick) < 0.3


def test_flags_without_a_confidence_change_every_row_and_the_full_model_alike(checkpoint, monkeypatch, tmp_path):
    changes = ("--max-new-tokens", 3, "--threshold", 0.9)
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit=2", "--repeat=1", "--tasks=e2e", *changes, f"--json={tmp_path}/out.json")
    full, row = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [len(prompt["tokens"]) for each in (full, row) for prompt in each["prompts"]] == [3] * 4
    assert row["config"]["threshold"] == 0.9 and row["config"]["exit_layers"] == [2, 3]


def test_the_full_model_is_measured_under_the_same_prediction():
    row = DecodeConfig(confidence="softmax", verify=True, repetition_penalty=1.3, temperature=0.7, seed=4)
    assert row.full() == DecodeConfig(repetition_penalty=1.3, temperature=0.7, seed=4)


def test_tuning_one_task_keeps_the_other(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "candidates", lambda *_: [DecodeConfig(confidence="softmax", max_new_tokens=8)])
    before = json.loads((tmp_path / "tiny.json").read_text())
    run_command(monkeypatch, "tune", "--checkpoint", checkpoint, "--limit", 1, "--tasks", "e2e")
    after = json.loads((tmp_path / "tiny.json").read_text())
    assert after["translation"] == before["translation"] and after["e2e"] != before["e2e"]


# ---------------------------------------------------------------- sweeps, calibration, pictures, processes


def test_a_sweep_makes_every_combination_marks_its_front_and_goes_on_where_it_stopped(checkpoint, monkeypatch, tmp_path, capsys):
    words = ("sweep", "--checkpoint", checkpoint, "--limit", 3, "--tasks", "e2e", "--results", tmp_path / "sweep.jsonl",
             "--over", "threshold", 0.1, 0.9, "--over", "exit-layers", "2,3", 4)  # fmt: skip
    run_command(monkeypatch, *words)
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines()
    names = [json.loads(line)["rows"][1]["name"] for line in lines]
    assert names == [f"threshold={bar} exit_layers={layers}" for bar in (0.1, 0.9) for layers in ("2,3", "4")]
    printed = capsys.readouterr().out
    assert "* on the Pareto front" in printed and any(line.split(" | ")[0].rstrip().endswith(" *") for line in printed.splitlines())
    (tmp_path / "sweep.jsonl").write_text("\n".join(lines)[:-9])  # killed while it wrote
    asked = []
    monkeypatch.setattr(sweeping, "evaluate", lambda *args, original=sweeping.evaluate: asked.append(list(args[4])) or original(*args))
    run_command(monkeypatch, *words)
    again = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert asked == [["threshold=0.9 exit_layers=4"]] and again[:3] == lines[:3] and len(again) == 4
    printed = capsys.readouterr().out
    assert printed.count("| threshold=") == 4 and "exit_layers 2,3 (2 rows): speed-up" in printed and "threshold 0.9 (2 rows)" in printed


@pytest.mark.parametrize("change", ["model", "data", "repeat", "weights", "function", "nothing"])
def test_a_result_is_used_again_only_for_the_same_model_data_and_measure(change, checkpoint, tiny_model, tokenizer, monkeypatch, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "one", "completion": "two"}\n')
    words = ["sweep", "--checkpoint", checkpoint, "--repeat", 1, "--tasks", f"file={data}", "--results", tmp_path / "s.jsonl"]
    words += ["--over", "threshold", 0.1]
    own = tmp_path / "own_function.py"
    if change == "function":
        own.write_text("def sure(trace, layer):\n    return 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)
        words += ["--confidence", "own_function:sure"]
    run_command(monkeypatch, *words)
    if change == "weights":
        words += ["--weights", "plain"]
    elif change == "function":
        own.write_text("def sure(trace, layer):\n    return 0.5\n")
    elif change == "model":
        save_checkpoint(checkpoint, tiny_model(1, vocab_size=350, max_len=256), tokenizer)
    elif change == "data":
        data.write_text('{"prompt": "one", "completion": "three"}\n')
    elif change == "repeat":
        words[4] = 2
    run_command(monkeypatch, *words)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == (1 if change == "nothing" else 2)


def test_a_mistake_in_the_second_task_is_found_before_the_first_is_measured(checkpoint, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluation.table, "evaluate", None)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "--checkpoint", checkpoint, "--tasks", f"e2e,samsum={tmp_path}/no.jsonl", "--confidence", "jsd")
    assert "no.jsonl: no such data file" in capsys.readouterr().err


def test_every_row_is_compared_with_its_own_full_model(checkpoint, monkeypatch, tmp_path, capsys):
    words = ("sweep", "--checkpoint", checkpoint, "--limit", 2, "--tasks", "e2e", "--results", tmp_path / "s.jsonl",
             "--over", "max-new-tokens", 2, 5, "--json", tmp_path / "out.json", "--threshold", 1)  # fmt: skip
    run_command(monkeypatch, *words)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["name"], row["config"]["max_new_tokens"]) for row in rows] == [
        ("full", 2), ("max_new_tokens=2", 2), ("full", 5), ("max_new_tokens=5", 5)]  # fmt: skip
    assert all(row["agreement"] == 1 for row in rows) and capsys.readouterr().out.count("on the Pareto front") == 2


def test_first_difference_may_be_the_first_token(tiny_model, tokenizer):
    texts = ([[1, 2], [5, 6], [7]], [[1, 2], [4, 6], [7, 8]])
    outputs = [[Generation(tokens, [5], [{}], Counters(len(tokens), 5)) for tokens in each] for each in texts]
    row, full = (measuring.Measured(DecodeConfig(), [[1]] * 3, each, [[1.0]] * 3, [0.1] * 3) for each in outputs)
    tokenizer = SentencePiece(tokenizer)
    examples = [tasks.Example("p", ("r",))] * 3
    summary = figures.summarize(tiny_model(), tokenizer, tasks.find_task("e2e"), examples, "row", row, full, None)
    assert summary["first_difference"] == 0.5 and summary["same_texts"] == pytest.approx(1 / 3)  # of 0 and 1, the median


def measured(tokens: list[int], times: list[list[float]]) -> measuring.Measured:
    outputs = [Generation([1] * count, [5] * count, [{}] * count, Counters(count, 5)) for count in tokens]
    return measuring.Measured(DecodeConfig(), [[1]] * len(tokens), outputs, times, [0.1] * len(tokens))


def test_the_interval_of_the_speedup_covers_prompts_and_repeats():
    """Equal prompts, equal repeats: no width. Repeats that differ give one though every prompt has the same
    median; so do prompts that differ. What slows both rows alike gives none."""
    full = measured([4] * 20, [[1.0, 1.0, 1.0]] * 20)
    assert figures.speedup_interval(measured([4] * 20, [[0.5] * 3] * 20), full) == [2, 2]
    low, high = figures.speedup_interval(measured([4] * 20, [[0.4, 0.5, 0.6]] * 20), full)
    assert 1.7 < low < 1.98 and 2.02 < high < 2.4
    low, high = figures.speedup_interval(measured([4] * 20, [[0.4]] * 10 + [[0.6]] * 10), measured([4] * 20, [[1.0]] * 20))
    assert 1.6 < low < 1.95 and 2.05 < high < 2.5
    slow = [[1.0, 3.0]] * 10 + [[1.0, 1.0]] * 10
    halves = [[each / 2 for each in times] for times in slow]
    assert figures.speedup_interval(measured([4] * 20, halves), measured([4] * 20, slow)) == [2, 2]


def test_intervals_of_scores_hold_the_scores():
    task = tasks.find_task("e2e")
    found = figures.quality_figures(task, ["a b c d", "a b c x", "y"], [["a b c d"], ["a b c d"], ["z"]])
    assert all(low < found["scores"][name] < high for name, (low, high) in found["scores_ci"].items())


NO_RESULTS = ['{"key": "k", "rows": null}\n', '{"key": "k", "rows": [{}]}\n', '{"key": "k", "rows": [1, 2]}\n',
              '{"key": ["k"], "rows": [{}, {}]}\n', "[" * 100000 + "\n", '{"key": ' + "9" * 5000 + "}\n", b"\xff\n"]  # fmt: skip


@pytest.mark.parametrize("content", NO_RESULTS, ids=range(len(NO_RESULTS)))
def test_what_is_no_result_is_named_by_its_file_and_line(content, tmp_path):
    good = b'{"key": "good", "rows": [{}, {}]}\n'
    (tmp_path / "s.jsonl").write_bytes(good + (content if isinstance(content, bytes) else content.encode()))
    with pytest.raises(ValueError, match=r"s\.jsonl, line 2: not a result of a sweep"):
        sweeping.read_results(tmp_path / "s.jsonl")


def test_the_pareto_front_by_hand():
    points = {"full": (1, 0.8), "slow": (0.9, 0.8), "fast": (2, 0.7), "bad": (1.5, 0.6), "twin": (2, 0.7)}
    assert figures.pareto(points) == {"full", "fast", "twin"}


def test_quality_is_the_least_share_of_the_full_models_scores():
    assert figures.least_share((0.45, 0.8), (0.5, 0.8)) == pytest.approx(0.9)
    assert figures.least_share((0.3, 0.8), (0.0, 0.8)) == 1
    stories = tasks.find_task("stories")
    assert figures.quality_kept(stories, ["a b"], ["a c"], [["x"]]) == 0.5  # no scores: ROUGE-L to the full model's text


@pytest.mark.parametrize("risk, threshold", [("consistency", 0.55), ("task", 0.0)])
def test_calibration_writes_a_threshold_that_decoding_reads(risk, threshold, checkpoint, monkeypatch, tmp_path, capsys):
    """Where every layer is always half sure, a threshold above that is the full model, one below exits at
    once, into another text; but of a random model no text scores worse than any other."""
    monkeypatch.setitem(FUNCTIONS, "half", lambda trace, layer: trace.logits(layer).max() * 0 + 0.5)
    monkeypatch.setattr(measuring, "tqdm", lambda items, **_: items)
    file, base = tmp_path / "t.json", ("--checkpoint", checkpoint, "--tasks", "e2e", "--limit", 30, "--out", tmp_path / "t.json")
    setting = ("--confidence", "half", "--prune", "none")
    run_command(monkeypatch, "calibrate", *base, "--risk", risk, *setting, "--tolerance", 0.2, "--error", 0.2)
    written = json.loads(file.read_text())
    assert written["confidence"] == "half" and written["threshold"] == threshold
    calibrated = replace(COMMAND, confidence="half", prune="none", threshold=threshold, max_new_tokens=8)
    assert settings_of(checkpoint, file, {})[0] == calibrated
    check, tested = written["provenance"]["held out"], written["provenance"]["tested"]
    assert check["on"] == "30 inputs of test" and check["risk"] < 0.2 and written["provenance"]["risk"] == risk
    assert all(each["p_value"] <= 0.2 for each in tested if each["threshold"] >= threshold) and tested[-1]["threshold"] <= threshold
    assert f"threshold {threshold:g}; on 30 inputs of test, not used to find it" in capsys.readouterr().out
    run_command(monkeypatch, "--checkpoint", checkpoint, "--tasks", "e2e", "--limit", 1, "--repeat", 1, "--thresholds", file)
    assert "| yours" in capsys.readouterr().out


def asked_to_calibrate(monkeypatch, *words) -> dict[str, list]:
    """The sets of inputs that a calibration would use."""
    seen = {}
    nothing = (None, {"risk": "consistency", "tolerance": 0.1, "error": 0.1})
    monkeypatch.setattr(calibrate, "find_threshold", lambda *args: seen.update(args[3]) or nothing)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, "calibrate", *words)
    return seen


def test_tuning_calibration_and_its_check_use_different_inputs_and_texts(checkpoint, monkeypatch, tmp_path):
    """Of one file, whatever seed and limit, and though several questions are asked about each text."""
    lines = [json.dumps({"context": f"text {i // 3}", "question": f"q{i}?", "answers": ["x"]}) for i in range(120)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    words = ("--checkpoint", checkpoint, "--tasks", f"file={tmp_path}/mine.jsonl", "--limit", 0)
    proving = ("--tolerance", 0.5, "--error", 0.5)
    tuned = []
    monkeypatch.setattr(tune, "tune", lambda model, tokenizer, task, examples: tuned.extend(examples) or {})
    run_command(monkeypatch, "tune", *words, "--settings", tmp_path / "s.json", "--seed", 1)
    provenance = json.loads((tmp_path / "s.json").read_text())["provenance"]["mine"]
    assert provenance["inputs"] == len(tuned) and "calibrate does not use" in provenance["of"] and provenance["seed"] == 1
    sets = asked_to_calibrate(monkeypatch, *words, *proving, "--out", tmp_path / "t.json", "--seed", 2)
    texts = [[tasks.source(example) for example in each] for each in (tuned, *sets.values())]
    assert [len(set(each)) for each in texts] == [len(each) for each in texts]  # one question for each text
    assert sum(map(len, texts)) == len({text for each in texts for text in each}) == 40 and min(map(len, texts)) > 3


def test_calibration_of_an_embedded_task_leaves_out_what_tune_draws_from(checkpoint, monkeypatch, tmp_path):
    tuned = []
    monkeypatch.setattr(tune, "tune", lambda model, tokenizer, task, examples: tuned.extend(examples) or {})
    words = ("--checkpoint", checkpoint, "--tasks", "e2e", "--limit", 0)
    run_command(monkeypatch, "tune", *words, "--settings", tmp_path / "s.json")
    fit, check = asked_to_calibrate(monkeypatch, *words, "--out", tmp_path / "t.json").values()
    assert {*tuned, *fit} == set(tasks.read_task(tasks.find_task("e2e"), "dev")) and not {*tuned} & {*fit}
    assert check == tasks.read_task(tasks.find_task("e2e"), "test")


def test_a_held_out_risk_above_the_tolerance_is_said():
    from evaluation.calibrate import report

    provenance = {"risk": "task", "tolerance": 0.1, "error": 0.05, "held out": {"on": "5 inputs of test", "risk": 0.2}}
    assert "is 0.2000 (tolerance 0.1). Above it: " in report(tasks.find_task("e2e"), 0.5, provenance)
    provenance["held out"]["risk"] = 0.05
    assert report(tasks.find_task("e2e"), 0.5, provenance).endswith("is 0.0500 (tolerance 0.1).")


def test_calibration_says_when_nothing_passes_and_advises_nothing_that_voids_the_guarantee(checkpoint, monkeypatch, tmp_path, capsys):
    """Where every layer is always sure, even the most cautious threshold exits at once, into another text."""
    monkeypatch.setitem(FUNCTIONS, "sure", lambda trace, layer: trace.logits(layer).max() * 0 + 1)
    with pytest.raises(SystemExit) as end:
        base = ("--checkpoint", checkpoint, "--tasks", "e2e", "--limit", 20, "--tolerance", 0.2, "--error", 0.2)
        run_command(monkeypatch, "calibrate", *base, "--confidence", "sure", "--out", tmp_path / "t.json")
    said = capsys.readouterr().out
    assert end.value.code == 1 and "no threshold keeps the consistency risk below 0.2" in said
    assert "raise --tolerance" not in said and "calibrate once on inputs that were not used here" in said
    assert not (tmp_path / "t.json").exists()


def test_pictures_are_drawn_from_a_table_and_from_a_sweep(checkpoint, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    base = ("--checkpoint", checkpoint, "--limit", 2, "--repeat", 1, "--tasks", "e2e", "--plot", tmp_path / "pictures")
    run_command(monkeypatch, *base)
    kinds = ("speed", "confidence-flops", "ranks", "confidence", "reliability", "jsd", "exits")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"e2e-{kind}.png" for kind in kinds}
    sweep = ("--over", "confidence", "softmax", "jsd", "--over", "min-layer", 1, 2, 3)
    run_command(monkeypatch, "sweep", *base, "--results", tmp_path / "s.jsonl", *sweep)
    assert (tmp_path / "pictures" / "e2e-sweep.png").exists()


def test_two_processes_share_the_prompts_and_merge_their_results(checkpoint, tmp_path):
    environment, folder = {**os.environ, "OMP_NUM_THREADS": "1"}, Path(evaluation.__file__).parent
    words = ["eval.py", "--checkpoint", checkpoint, "--limit=5", "--repeat=1", "--tasks=e2e", "--max-new-tokens=8"]
    outputs = {}
    for count, command in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        out = tmp_path / f"{count}.json"
        line = [sys.executable, *command, *words, f"--json={out}"]
        ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        result = json.loads(out.read_text())
        assert result["environment"]["processes"] == count
        outputs[count] = [[(each["prompt"], each["text"], each["exit_layers"]) for each in row["prompts"]] for row in result["rows"]]
    assert outputs[1] == outputs[2] and len(outputs[1][0]) == 5


def test_the_page_shows_the_inputs_asked_for_under_every_row(checkpoint, monkeypatch, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "out.json"
    flags = ("--tasks", "e2e", "--limit", 3, "--html", page, "--html-inputs", "1,3", "--json", out)
    run_command(monkeypatch, "--checkpoint", checkpoint, *flags)
    text = page.read_text(encoding="utf-8").split('id="data">', 1)[1].split("</script>", 1)[0]
    inputs, rows = json.loads(text)["inputs"], json.loads(out.read_text())["rows"]
    for place, shown in zip((0, 2), inputs, strict=True):
        assert shown["references"] == rows[0]["prompts"][place]["references"]
        assert shown["prompt"] == rows[0]["prompts"][place]["prompt_tokens"]
        assert [run["name"] for run in shown["runs"]] == [row["name"] for row in rows] == ["full", "softmax"]
        for run_shown, row in zip(shown["runs"], rows):
            assert [token["id"] for token in run_shown["tokens"]] == row["prompts"][place]["tokens"]


def test_show_prompt_prints_what_the_model_gets(checkpoint, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one", "references": ["two", "three"]}\n')
    run_command(monkeypatch, "prompt", "--checkpoint", checkpoint, "--tasks", f"file={tmp_path}/mine.jsonl")
    assert capsys.readouterr().out == "--- mine, test\none\n--- references\ntwo\nthree\n"


def test_shots_come_from_their_file_in_the_template_and_are_not_asked_again(checkpoint, monkeypatch, tmp_path, capsys):
    lines = [json.dumps({"prompt": f"p{number}", "completion": f"c{number}"}) for number in range(3)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "shots.jsonl").write_text(lines[0] + "\nnothing\n" + lines[1])
    words = ("prompt", "--checkpoint", checkpoint, "--tasks", "file=mine.jsonl", "--shots", 2, "--shot-file", "shots.jsonl")
    monkeypatch.chdir(tmp_path)
    run_command(monkeypatch, *words, "--skip-bad")
    printed = capsys.readouterr().out
    assert "skipped: shots.jsonl, line 2: not JSON" in printed
    assert printed.endswith("--- mine, test\np0\nc0\n\np1\nc1\n\np2\n\n--- references\nc2\n")


def test_malformed_lines_are_named_or_counted_and_skipped(checkpoint, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one", "completion": "two"}\n{"prompt": 3}\nnothing\n')
    words = ("prompt", "--checkpoint", checkpoint, "--tasks", f"file={tmp_path}/mine.jsonl")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, *words)
    assert "mine.jsonl, line 2: needs two non-empty texts" in capsys.readouterr().err
    run_command(monkeypatch, *words, "--skip-bad")
    assert "mine: 2 malformed lines skipped" in capsys.readouterr().out


MISTAKES = {
    "--limit=-1": "limit is -1",
    "--repeat=0": "repeat is 0; it must be at least 1",
    "--tasks=chess": "unknown task 'chess'; choose from translation, e2e",
    "--tasks=squad": "task squad needs its file: squad=FILE",
    "--tasks=squad=missing.json": "missing.json: no such data file",
    "--shots=-1": "shots is -1; it must be at least 0",
    "calibrate --tasks e2e --limit 4": "4 inputs cannot prove a risk below 0.05 at error level 0.05, whatever their losses; take at",
    "--limit=100000000000000000000": "limit is 100000000000000000000; it must be at least 0 and at most",
    "--tasks e2e --shots 99999 --confidence jsd": "shots is 99999, but e2e has 4862 solved examples; take fewer",
    "--tasks file=.": ".: is a folder; name a file in it",
    "--tasks file=folder.tsv": "folder.tsv: is a folder; name a file in it",
    "calibrate --tasks e2e --tolerance 1": "tolerance is 1.0; it must lie between 0 and 1",
    "calibrate --tasks e2e --error 0": "error is 0.0; it must lie between 0 and 1",
    "--tolerance=0.1": "unrecognized arguments: --tolerance=0.1",
    "calibrate --tasks e2e --json x.json": "unrecognized arguments: --json x.json",
    "sweep --over threshold 0.5 --rows softmax": "unrecognized arguments: --rows softmax",
    "tune --repeat 3": "unrecognized arguments: --repeat 3",
    "tune --confidence jsd": "unrecognized arguments: --confidence jsd",
    "sweep": "the following arguments are required: --over",
    "--limit 3 sweep --over threshold 0.5": "flags come after the command: eval.py sweep --limit ..",
    "play": "invalid choice: 'play'",
    "--rows softmax --all": "argument --all: not allowed with argument --rows",
    "--confidence jsd --all": "--confidence makes a row of its own",
    "--confidence jsd --rows softmax": "--rows and --all choose among the settings, --confidence makes a row",
    "--shot-file x.jsonl": "say how many with --shots",
    "--tasks stories --shots 1 --confidence jsd": "stories: goes on from a text, so it takes no --shots",
    "--tasks e2e,e2e": "two tasks would be called e2e",
    "--tasks fairytaleqa": "tiny.json: not usable as settings of fairytaleqa (it has no rows for this task; choose some with",
    "--tasks file=plain.txt --confidence jsd": "plain.txt: holds texts without a prompt; the task stories=plain.txt goes on",
    "--tasks stories=plain.txt --confidence jsd": "plain.txt: has no paragraph of 80 words",
    "--tasks file=/{x}.jsonl": "/{x}.jsonl: no such data file",
    "--max-new-tokens 255 --tasks e2e": "max_new_tokens is 255, of 256 positions",
    "--settings list.json": "list.json: holds no JSON object, so it is not usable as settings by task",
    "--settings plain.txt": "plain.txt: not JSON",
    "tune --settings plain.txt": "plain.txt: not JSON",
    "--plot plain.txt": "plain.txt: is a file; give the name of a folder",
    "--json .": ".: is no regular file, and nothing else is replaced; give another name",
    "--html .": "is no regular file, and nothing else is replaced",
    "--html-inputs 2": "--html-inputs chooses what --html shows; give --html a file, too",
    "--html page.html --html-inputs 0": "--html-inputs is 0; inputs count from 1 to 60, the --limit",
    "--html page.html --html-inputs 7 --limit 3": "--html-inputs is 7; inputs count from 1 to 3, the --limit",
    "sweep --results tiny.pt --over threshold 0.5": "tiny.pt: is read here, and would be overwritten",
    "sweep --results list.json --over threshold 0.5": "list.json, line 1: not a result of a sweep",
    "--json tiny.pt": "tiny.pt: is read here, and would be overwritten; give another name",
    "--json tiny.json": "tiny.json: is read here, and would be overwritten; give another name",
    "calibrate --tasks e2e --out tiny.json": "tiny.json: is read here, and would be overwritten; give another name",
    "--tasks file=pairs.jsonl --json pairs.jsonl": "pairs.jsonl: is read here, and would be overwritten",
    "--tasks file=pairs.jsonl --confidence jsd --shots 1 --shot-file pairs.jsonl": "shots is 1: all inputs of pairs",
    "calibrate --tasks e2e --checkpoint layers.pt": "layer_thresholds outranks the threshold",
    "sweep --over threshold 0.5 --checkpoint layers.pt": "layer_thresholds outranks the threshold",
    "--json a.json --html a.json": "a.json: two files would be written there",
    "--tasks=": "--tasks is empty; give a value, or leave it out",
    "calibrate --thresholds list.json --tasks e2e": "list.json: holds no JSON object, so it is not usable as thresholds",
    "calibrate --tasks e2e --confidence none": "needs a confidence function",
    "calibrate --tasks stories --risk task": "task stories has no score; calibrate with --risk consistency",
    "calibrate --tasks e2e --exit-layers 2 --layer-thresholds 0.5": "layer_thresholds outranks the threshold",
    "sweep --over threshold 0.5 --exit-layers 2 --layer-thresholds 0.5": "layer_thresholds outranks the threshold",
    "sweep --over threshold 0.5 --over threshold 0.6": "--over threshold: give it once, with all of its values",
    "calibrate": "calibrate finds a threshold for one task; choose it with --tasks (here: translation,e2e)",
    "sweep --over threshold": "--over threshold: give it once, with all of its values",
    "sweep --over threshold 2": "threshold is 2.0; it must lie between 0 and 1",
    "sweep --over colour 2": "unknown setting 'colour'",
    "sweep --over exit-layers 2 9": "layer 9 is not an exit",
    "sweep --over threshold 0.5 --results=tiny.json": "tiny.json: is read here, and would be overwritten",
    "--threshold=2": "threshold is 2.0; it must lie between 0 and 1",
    "--rows=": "--rows is empty; give a value, or leave it out",
    "--json=": "argument --json: invalid path value: ''",
    "--plot=": "argument --plot: invalid path value: ''",
    "--settings=": "argument --settings: invalid path value: ''",
    "calibrate --out=": "argument --out: invalid path value: ''",
    "--rows=softmax,magic": "has no row 'magic' for translation; choose from softmax",
    "--confidence=magic": "unknown confidence 'magic'; choose from softmax",
    "--device=nowhere": "device 'nowhere' is not there",
    "--dtype=int4": "unknown dtype 'int4'",
    "--settings=missing.json": "missing.json: no such file; it was to hold settings",
    "--settings=missing.json --confidence jsd": "missing.json: no such file; it was to hold settings",
    "--checkpoint=.": ".: is a folder; name a file in it",
    "calibrate --tasks e2e --verify": "verify changes no text, so every threshold is safe",
    "calibrate --tasks e2e --threshold 0.5": "threshold is 0.5, but it is what calibrate finds",
    "--tasks file=decode.jsonl --confidence jsd": "called as its file is, and decode is taken; rename it",
    "--checkpoint=missing.pt": "missing.pt: no such checkpoint",
    "--json=nowhere/out.json": "nowhere/out.json: there is no folder nowhere to write to",
    "--min-layer=9": "min_layer is 9, which leaves no exit layer",
    "--exit-layers=2,a": "--exit-layers: invalid list of int, separated by commas, value: '2,a'",
    "--max-owed=x": "--max-owed: invalid int value: 'x'",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2(mistake, checkpoint, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        monkeypatch.chdir(checkpoint.parent)
        Path("plain.txt").write_text("Some words.")
        Path("folder.tsv").mkdir(exist_ok=True)
        Path("list.json").write_text("[1]")
        Path("pairs.jsonl").write_text('{"prompt": "one", "completion": "two"}\n')
        Path("layers.pt").touch()
        Path("layers.json").write_text('{"decode": {"exit_layers": [2], "layer_thresholds": [0.5]}}')
        words, base = mistake.split(), ("--checkpoint", checkpoint)
        first = 1 if words and words[0].isalpha() else 0
        run_command(monkeypatch, *words[:first], *(base if "--limit 3" not in mistake else ()), *words[first:])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and MISTAKES[mistake] in line


UNUSABLE = ["{", "[]", '{"e2e": {}}', '{"translation": {"a": {"threshold": 3}}}', '{"translation": {"a": {"colour": 3}}}',
            '{"translation": {"a": {"exit_layers": ["b"]}}}', '{"translation": [1]}', '{"translation": {"a": 5}}',
            "[" * 100000, '{"translation": ' + "9" * 5000 + "}"]  # fmt: skip


@pytest.mark.parametrize("content", UNUSABLE, ids=range(len(UNUSABLE)))
def test_unusable_settings_are_refused(tmp_path, content, tiny_model):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not usable as settings of translation"):
        read_settings(tmp_path / "a.json", tasks.find_task("translation"), tiny_model(), {})
