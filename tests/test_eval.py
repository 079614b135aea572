"""The table: figures that follow from the runs, settings that are chosen and read back, mistakes in one line."""

import json
import time
from dataclasses import replace

import pytest

import cli
import eval as evaluation
import measure as measuring
from data import read_pairs, task_file
from decode import DecodeConfig, Generation
from model import save_checkpoint
from tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    pairs = [pair for task in evaluation.TASKS for pair in list(read_pairs(task_file(task, "dev")))[:100]]
    return train_tokenizer(pairs, 350)


@pytest.fixture
def checkpoint(tiny_model, tokenizer, tmp_path, monkeypatch):
    """A tiny random model with a tokenizer, and settings of one row."""
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 8)
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, vocab_size=350, max_len=256), tokenizer)
    row = {"confidence": "softmax", "threshold": 0.2, "exit_layers": [2, 3], "prune": "fixed", "prune_k": 4}
    (tmp_path / "tiny.json").write_text(json.dumps({task: {"softmax": row} for task in evaluation.TASKS}))
    return tmp_path / "tiny.pt"


def run_command(monkeypatch, *words) -> None:
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    cli.run(evaluation.main)


def test_the_json_holds_the_table_and_follows_from_the_runs(checkpoint, monkeypatch, tmp_path, capsys):
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 4, "--repeat", 2, "--json", tmp_path / "out.json")
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
    (tmp_path / "tiny.json").write_text(json.dumps({task: dict.fromkeys(("a", "b", "c"), row) for task in evaluation.TASKS}))
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 1, "--repeat", 1, "--tasks", "e2e", "--rows", "c,a")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:] == ["full", "c", "a"]


def test_thresholds_from_a_file_make_a_row_and_give_way_to_flags(checkpoint, monkeypatch, tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "jsd", "exit_layers": [2, 4], "layer_thresholds": [0.5, 0.1], "provenance": {}}')
    for flags, bars in (((), [0.5, 0.1]), (("--threshold", 0.3), None)):
        file = ("--thresholds", tmp_path / "t.json", "--json", tmp_path / "out.json")
        run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 2, "--repeat", 1, "--tasks", "e2e", *file, *flags)
        config = json.loads((tmp_path / "out.json").read_text())["rows"][1]["config"]
        assert config["exit_layers"] == [2, 4] and config["layer_thresholds"] == bars and config["threshold"] == (0.8 if bars else 0.3)


def test_tune_writes_settings_that_the_table_reads(checkpoint, monkeypatch, tmp_path):
    """Of a setting that equals the full model and one that does not, the one that keeps its scores is chosen, however slow."""
    safe = DecodeConfig(confidence="softmax", threshold=1.0, exit_layers=(2,), max_new_tokens=8)
    wild = DecodeConfig(confidence="softmax", threshold=0.0, exit_layers=(1,), max_new_tokens=8)
    monkeypatch.setattr(evaluation, "candidates", lambda n_layers, name, layers, verify: [wild, safe])
    monkeypatch.setattr(measuring, "bleu", lambda texts, references, lowercase: 0.1 + 0.9 * (texts == full_texts))
    full_texts = None

    def summarize(model, tokenizer, task, examples, name, row, full, spent, original=evaluation.summarize):
        nonlocal full_texts
        full_texts = [tokenizer.decode(out.tokens) for out in full.outputs]
        return original(model, tokenizer, task, examples, name, row, full, spent)

    monkeypatch.setattr(evaluation, "summarize", summarize)
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 3, "--tune", "--settings", tmp_path / "new.json")
    assert set(json.loads((tmp_path / "new.json").read_text())) == set(evaluation.TASKS)
    rows = evaluation.read_settings(tmp_path / "new.json", "e2e", 5, {})
    schedules = ("none", "fixed", "decaying", "adaptive")
    assert list(rows) == ["static", *(f"softmax {name}" for name in schedules), "weighted fixed", *(f"jsd {name}" for name in schedules),
                          "softmax copy", "softmax verified", "jsd verified"]  # fmt: skip
    for name, row in rows.items():
        assert row.prune == (name.split()[1] if name.endswith(schedules) and not name.startswith("weighted") else "none")
        assert replace(row, prune="none", prune_k=64, fill="parallel") == safe and (row.fill == "copy") == name.endswith("copy")


def test_every_candidate_fits_its_model():
    for n_layers in (3, 5, 12, 30):
        for name, layers, verify in (("static", None, False), ("softmax", None, False), ("jsd", (1, 2), False), ("softmax", None, True)):
            configs = evaluation.candidates(n_layers, name, layers, verify)
            assert len(set(configs)) == len(configs) > 1 and all(config.exits(n_layers) for config in configs)
            assert all(config.verify == verify for config in configs)


def test_rows_take_turns_on_the_same_prompts(tiny_model, monkeypatch):
    """After a warm-up, prompt by prompt, every repeat asks every row once."""
    calls = []
    monkeypatch.setattr(measuring, "generate", lambda model, prompt, config: calls.append((prompt[0], config.threshold)) or Generation())
    rows = {name: DecodeConfig(threshold=threshold) for name, threshold in (("a", 0.1), ("b", 0.2))}
    measured = measuring.measure(tiny_model(), [[1], [2]], rows, 2, "")
    assert calls == [(1, 0.1), (1, 0.2)] + [(prompt, threshold) for prompt in (1, 2) for _ in range(2) for threshold in (0.1, 0.2)]
    assert all(len(row.outputs) == len(row.seconds) == 2 for row in measured.values())


def test_time_of_asking_counts_what_did_not_give_the_token(tiny_model):
    """A function that sleeps 5 ms at each of two layers takes nearly all of the time; one that answers at once takes a small part."""
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
    monkeypatch.setattr(evaluation, "candidates", lambda *_: [DecodeConfig(confidence="softmax", max_new_tokens=8)])
    before = json.loads((tmp_path / "tiny.json").read_text())
    run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 1, "--tune", "--tasks", "e2e")
    after = json.loads((tmp_path / "tiny.json").read_text())
    assert after["translation"] == before["translation"] and after["e2e"] != before["e2e"]


MISTAKES = {
    "--limit=-1": "limit is -1",
    "--repeat=0": "repeat 0; limit must be at least 0, repeat at least 1",
    "--tasks=chess": "unknown task 'chess'; choose from translation, e2e",
    "--threshold=2": "threshold is 2.0; it must lie between 0 and 1",
    "--rows=softmax,magic": "has no row 'magic' for translation; choose from softmax",
    "--confidence=magic": "unknown confidence 'magic'; choose from softmax",
    "--device=nowhere": "device 'nowhere' is not there",
    "--dtype=int4": "unknown dtype 'int4'",
    "--settings=missing.json": "missing.json: no settings for this checkpoint",
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
        run_command(monkeypatch, "--checkpoint", checkpoint, "--limit", 1, mistake)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and MISTAKES[mistake] in line


UNUSABLE = ["{", "[]", '{"e2e": {}}', '{"translation": {"a": {"threshold": 3}}}', '{"translation": {"a": {"colour": 3}}}']


@pytest.mark.parametrize("content", UNUSABLE)
def test_unusable_settings_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not usable as settings of translation"):
        evaluation.read_settings(tmp_path / "a.json", "translation", 5, {})
