"""Settings of decoding: what each may be, the exits that follow from them, where they come from (files, flags,
--compare), and what the command says of mistakes."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import decode
from common.errors import UserError
from common.flags import given, read_field
from decode import generate
from decoding.command import make_parser
from decoding.presets import COMMAND, defaults_in_help, name_of, read_thresholds, settings_in_force, variants
from decoding.settings import DecodeConfig
from formats.checkpoint import save_checkpoint
from model import ModelConfig
from tests.reference import PROMPT, naive

FIVE, TWELVE = ModelConfig(n_layers=5), ModelConfig(n_layers=12, exit_layers=(3, 4, 6))


# ---------------------------------------------------------------- what each may be


@pytest.mark.parametrize(("field", "value"), [
    ("threshold", 1.5), ("threshold", -0.1), ("threshold", math.nan), ("confidence", "magic"), ("fill", "none"), ("top_p", 0.0),
    ("threshold_schedule", "rising"), ("threshold_schedule", "decaying:0"), ("threshold_schedule", "adaptive:1"),
    ("prune", "all"), ("prune", "fixed:1"), ("prune", "decaying:64:1"), ("prune", "adaptive:64:65"), ("prune", "fixed:64:16"),
    ("max_owed", 0), ("max_new_tokens", 0), ("temperature", -1.0), ("top_k", 0), ("predict", "next"), ("repetition_penalty", 0.5),
    ("draft", "often"), ("seed", -1), ("shortlist", 1),
])  # fmt: skip
def test_an_impossible_setting_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field}.*{value}"):
        DecodeConfig(**{field: value})


@pytest.mark.parametrize(("fields", "named"), [
    ({"verify": True, "fill": "copy"}, "fill is copy"), ({"max_owed": 2, "fill": "copy"}, "fill is copy"),
    ({"verify": True, "predict": "acd"}, "predict is acd"), ({"exit_layers": (2, 3), "layer_thresholds": (0.5,)}, "layer_thresholds"),
    ({"draft": "auto", "confidence": "softmax"}, "draft is auto"), ({"draft": "auto", "verify": True}, "draft is auto"),
    *[({"draft": "auto", "confidence": "softmax", "verify": True, **more}, next(iter(more)))
      for more in ({"exit_layers": (2,)}, {"max_owed": 4}, {"threshold_schedule": "decaying"}, {"threshold_schedule": "adaptive"})],
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        DecodeConfig(**fields)


@pytest.mark.parametrize(("prompt", "config", "message"), [
    ([], {}, "non-empty"), ([[1, 2], [3, 4]], {}, "batch size 1"), ([1] * 64, {}, "64 tokens"), ([1, 50], {}, "0 to 49"),
    ([1], {"stop_tokens": (50,)}, "stop_tokens has"),
    *[([1], {"confidence": "softmax", "exit_layers": (layer,)}, f"layer {layer}") for layer in (0, 5)],
    ([1], {"confidence": "softmax", "exit_layers": (6,), "shortlist": 10}, "layer 6"),
    ([1], {"confidence": "softmax", "shortlist": 10}, "no frequent ids are known"),
])  # fmt: skip
def test_an_impossible_request_is_refused(tiny_model, prompt, config, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_model(0), prompt, DecodeConfig(**config))


def test_exits_default_to_those_trained_and_else_to_every_layer():
    config = DecodeConfig(confidence="softmax", threshold=0.5)
    assert config.exits(TWELVE) == {3: 0.5, 4: 0.5, 6: 0.5}
    assert list(config.exits(FIVE)) == [1, 2, 3, 4]
    assert list(replace(config, exit_layers=(2, 5)).exits(TWELVE)) == [2, 5]
    assert list(replace(config, shortlist=8).exits(FIVE)) == [1, 2, 3, 4, 5]
    assert replace(config, exit_layers=(2, 4), layer_thresholds=(0.9, 0.1)).exits(FIVE) == {2: 0.9, 4: 0.1}
    with pytest.raises(UserError, match="there is no exit layer"):
        config.exits(ModelConfig(n_layers=1))


def test_a_layer_without_classifier_is_refused_before_a_token_is_made():
    shape, config = replace(FIVE, classifiers=(1, 2, 3, 4)), DecodeConfig(confidence="classifier", threshold=0.5, shortlist=8)
    assert list(config.exits(shape)) == [1, 2, 3, 4]  # softmax: 5, too, which has no classifier
    assert replace(config, exit_layers=(2, 5), layer_thresholds=(0.9, 0.0)).exits(shape) == {2: 0.9, 5: 0.0}
    for each, of, layer in ((replace(config, exit_layers=(2, 5)), shape, 5), (config, FIVE, 1)):
        with pytest.raises(UserError, match=f"layer {layer} has no confidence classifier"):
            each.exits(of)


# ---------------------------------------------------------------- where they come from


def chosen(*words) -> DecodeConfig:
    """The settings that the command takes from its flags and from files."""
    args = make_parser().parse_args(["--prompt=1", *map(str, words)])
    return settings_in_force(given(args, DecodeConfig), args.checkpoint, args.settings, args.thresholds)[0]


def test_thresholds_from_a_file_give_way_to_flags(tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "jsd", "exit_layers": [1, 2], "layer_thresholds": [0.5, 0.6]}')
    read = partial(chosen, f"--thresholds={tmp_path / 't.json'}")
    assert read().exits(FIVE) == {1: 0.5, 2: 0.6} and read().confidence == "jsd"
    assert read("--threshold=0.7").exits(FIVE) == {1: 0.7, 2: 0.7}
    assert read("--layer-thresholds=0.1,0.2").exits(FIVE) == {1: 0.1, 2: 0.2}
    assert read("--exit-layers=3,4").exits(FIVE) == dict.fromkeys((3, 4), read().threshold)  # 0.5 and 0.6 were of others
    assert variants("softmax+exit-layers=3,4", read())[0].config.layer_thresholds is None


def test_a_threshold_outranks_those_of_single_layers_from_below(tmp_path):
    (tmp_path / "m.json").write_text('{"decode": {"exit_layers": [2, 4], "layer_thresholds": [0.9, 0.8]}}')
    (tmp_path / "t.json").write_text('{"threshold": 0.3}')
    for flags, thresholds, expected in (
        ({}, None, (0.8, (0.9, 0.8))),
        ({"threshold": 0.1}, None, (0.1, None)),
        ({}, tmp_path / "t.json", (0.3, None)),
        ({"layer_thresholds": (0.5, 0.4)}, tmp_path / "t.json", (0.3, (0.5, 0.4))),
        ({"threshold": 0.1, "layer_thresholds": (0.5, 0.4)}, None, (0.1, (0.5, 0.4))),
    ):
        config, _ = settings_in_force(flags, tmp_path / "m.pt", None, thresholds)
        assert (config.threshold, config.layer_thresholds) == expected and config.exit_layers == (2, 4)


def test_settings_next_to_a_checkpoint_are_its_defaults(tmp_path):
    read = partial(chosen, f"--checkpoint={tmp_path / 'x.pt'}")
    assert read() == COMMAND
    (tmp_path / "x.json").write_text('{"decode": {"temperature": 0.8, "top_p": 0.9}, "stories": {}}')
    assert read() == replace(COMMAND, temperature=0.8, top_p=0.9) and read("--temperature=0").temperature == 0
    (tmp_path / "x.json").write_text('{"decode": {"temperature": -1}}')
    with pytest.raises(UserError, match=r"x.json: not usable as settings of decode"):
        read()
    (tmp_path / "y.json").write_text('{"decode": {"threshold": 0.4}}')
    assert read(f"--settings={tmp_path / 'y.json'}") == replace(COMMAND, threshold=0.4)
    with pytest.raises(UserError, match="no such file"):
        read(f"--settings={tmp_path / 'z.json'}")


@pytest.mark.parametrize("content, complaint", [
    ("{", "not JSON"), ("[1]", "is not a JSON object"), ('{"threshold": 2}', "threshold is 2"),
    ('{"treshold": 0.5}', "did you mean threshold?"),
    ('{"threshold": "high"}', "not usable"), ('{"exit_layers": ["a"]}', "exit_layers cannot be 'a'"),
])  # fmt: skip
def test_a_file_without_thresholds_is_one_clear_error(tmp_path, content, complaint):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=complaint) as error:
        read_thresholds(tmp_path / "t.json")
    assert str(error.value).startswith(str(tmp_path / "t.json")) and "\n" not in str(error.value)


def test_code_comes_from_flags_only(tmp_path):
    """A file may name a function of one's own only where the flag names it, too."""
    for name, content in (("x.json", {"decode": {"confidence": "os:system"}}), ("t.json", {"confidence": "os:system", "threshold": 0.3})):
        (tmp_path / name).write_text(json.dumps(content))
        words = [f"--checkpoint={tmp_path / 'x.pt'}"] if name == "x.json" else [f"--thresholds={tmp_path / 't.json'}"]
        with pytest.raises(UserError, match=f"{name}: .*'os:system' is none of .* name a function of your own with --confidence"):
            chosen(*words)
    assert read_thresholds(tmp_path / "t.json", "os:system") == {"threshold": 0.3}


def test_compared_settings_begin_with_a_name_or_a_function_and_may_name_a_checkpoint():
    steady = replace(COMMAND, exit_layers=(2, 3), layer_thresholds=(0.9, 0.2))
    named = {"softmax decaying": steady, "weighted": replace(COMMAND, confidence="weighted", shortlist=9)}
    expected = {
        "softmax decaying": steady,
        "weighted+threshold=0.5": replace(named["weighted"], threshold=0.5),
        "static+exit-layers=6": replace(COMMAND, threshold=0.0, exit_layers=(6,)),
        "full+checkpoint=small.pt": COMMAND.full(),
        "jsd+exit-layers=4,8+verify": replace(COMMAND, confidence="jsd", exit_layers=(4, 8), verify=True),
        "softmax decaying+threshold=0.3": replace(steady, threshold=0.3, layer_thresholds=None),  # one rule for all sources
    }
    found = variants(",".join(expected), COMMAND, named)
    assert {each.name: each.config for each in found} == expected
    assert [each.checkpoint for each in found] == [None, None, None, "small.pt", None, None]
    with pytest.raises(UserError, match=r"did you mean softmax decaying\?"):
        variants("softmax decayin", COMMAND, named)


@pytest.mark.parametrize("words", [
    "softmax", "full", "jsd+threshold=0.5+verify", "softmax+exit-layers=4,8+max-owed=none+prune=adaptive:512",
])  # fmt: skip
def test_a_configuration_is_named_as_compare_would_write_it(words):
    first, *changes = words.split("+")
    fields = {"confidence": None if first == "full" else first}
    for change in changes:
        field, _, text = change.partition("=")
        fields[field.replace("-", "_")] = read_field(DecodeConfig, field, text)
    assert name_of(fields) == words


# ---------------------------------------------------------------- the command


def test_help_shows_the_defaults_in_force(tmp_path):
    assert defaults_in_help(["decode.py", "--help"]).threshold == 0.6  # which default.json says
    (tmp_path / "x.json").write_text('{"decode": {"threshold": 0.4}}')
    for words in (["--checkpoint", str(tmp_path / "x.pt")], [f"--settings={tmp_path / 'x.json'}"]):
        assert defaults_in_help(["decode.py", *words, "--help"]) == replace(COMMAND, threshold=0.4)
    assert defaults_in_help(["decode.py", "--settings", "no.json"]) == COMMAND


def test_help_is_short_and_help_all_is_complete():
    parser = make_parser()
    shown = [action for action in parser._actions if action.help != "==SUPPRESS=="]
    assert len(shown) <= 27 < len(parser._actions)
    assert all(action.help_all for action in parser._actions if action not in shown)


@pytest.fixture
def decoded(tiny_model, tmp_path, monkeypatch, command):
    """Runs decode.py on a tiny model without a tokenizer, in a folder with the model and its settings."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("tiny.pt", tiny_model(0), None)
    return lambda *words: command(decode.main, "--checkpoint=tiny.pt", "--prompt=1,7,3,9", *words)


def test_the_command_writes_ids_where_there_is_no_tokenizer(tiny_model, decoded):
    out, _, status = decoded("--confidence=none", "--max-new-tokens=6")
    assert status is None and " ".join(map(str, naive(tiny_model(0), PROMPT, 6))) in out


def test_mistakes_end_in_one_line_and_what_was_there_stays(decoded):
    """Ten, of every kind; the ranges of settings are tested above. Checkpoint and settings survive an output of
    the same name."""
    Path("tiny.json").write_text('{"decode": {"threshold": 0.5}}')
    Path("trace.jsonl").write_text("old")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    mistakes = {
        "--prompt=hello": "token ids", "--exit-layers=1,,2": "invalid list", "--thresholds=no.json": "no.json",
        "--amateur=no.pt": "no such checkpoint", "--compare=softmax+tresholds=2": "did you mean threshold?", "--dtype=int3": "int3",
        "--trace=tiny.json": "tiny.json: is read here", "--html=a.html --trace=a.html": "two files would be written there",
        "--trace=nowhere/x": "there is no folder nowhere", "--predict=cd": "there is no amateur",
    }  # fmt: skip
    for words, message in mistakes.items():
        _, err, status = decoded(*(["--trace=trace.jsonl"] if "trace" not in words else []), *words.split())
        line = err.splitlines()[-1]
        assert status == 2 and line.startswith("error: ") and message in line
        assert before == {path.name: path.read_bytes() for path in Path().iterdir()}


def test_configurations_are_compared_with_each_other(tiny_model, decoded):
    names = "full,softmax+threshold=0+exit-layers=1,softmax+threshold=0+exit-layers=2+max-owed=2+verify"
    out, _, _ = decoded(f"--compare={names}", "--trace=t.jsonl", "--max-new-tokens=20")
    _, *parts = out.split("--- ")
    assert [part.splitlines()[0] for part in parts] == names.split(",")
    full, early = naive(tiny_model(0), PROMPT, 20), naive(tiny_model(0), PROMPT, 20, layer=1)
    for part in (parts[0], parts[2]):
        assert part.splitlines()[1] == " ".join(map(str, full)) and "the same text as the full model's" in part
    at = next(i for i in range(20) if early[i] != full[i])
    assert f"first differs from the full model's text at token {at + 1}: {early[at]} in place of {full[at]}" in parts[1]
    assert "drafts: " in parts[2] and "drafts: " not in parts[1]
    rows = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert [row["configuration"] for row in rows] == [name for name in names.split(",") for _ in range(20)]
