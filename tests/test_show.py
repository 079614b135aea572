"""What the screen shows: text as it comes, colours, drafts, the trace file, and where two texts part."""

import json
import sys

import pytest

import decode
from common.errors import run
from decode import generate, stream
from decoding.display import Screen, colour, difference, layer_colour, pieces, speed, spread
from decoding.record import Token
from decoding.replay import Recorder
from decoding.settings import DecodeConfig

PROMPT = [1, 7, 3, 9]


class Letters:
    """A tokenizer whose token 1 and 2 are the two bytes of é."""

    def decode(self, ids):
        return b"".join({1: b"\xc3", 2: b"\xa9"}.get(i, bytes([97 + i])) for i in ids).decode("utf-8", "replace")


def test_an_unfinished_character_waits_for_the_rest_of_it():
    tokens = [Token(i, 1) for i in (0, 1, 2, 3)]
    assert [text for _, text in pieces(Letters(), iter(tokens))] == ["a", "", "é", "d"]


def test_the_trace_file_holds_one_line_per_token(tiny_model, tmp_path, capsys):
    model = tiny_model(1)
    config = DecodeConfig(max_new_tokens=10, confidence="jsd", threshold=0.1, exit_layers=(3, 4))
    recorder = Recorder()
    with open(tmp_path / "trace.jsonl", "w") as file:
        Screen(None, model.config, trace=file).show(stream(model, PROMPT, config, recorder), config, recorder)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    out = generate(model, PROMPT, config)
    assert [row["id"] for row in rows] == out.tokens and [row["exit_layer"] for row in rows] == out.exit_layers
    assert all(set(row["contrast_layer"]) == set(row["confidence"]) == set(row["threshold"]) for row in rows)
    printed = capsys.readouterr().out
    assert "\033" not in printed and "10 tokens in" in printed and f"average exit layer {sum(out.exit_layers) / 10:.1f} of 5" in printed


@pytest.mark.parametrize("n_layers", [1, 2, 5, 12, 80])
def test_the_scale_rises_in_lightness_and_its_text_contrasts(n_layers):
    """Lightness alone tells the layers apart, whatever colours an eye sees; the text is as readable as WCAG
    asks of large text (a contrast of 3)."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    steps = [luminance(layer_colour(layer, n_layers)) for layer in range(1, n_layers + 1)]
    assert steps == sorted(steps) and len(set(steps)) == n_layers
    for layer, background in enumerate(steps, 1):
        ink = 0.0 if "38;5;16m" in colour("x", layer, n_layers, True) else 1.0
        assert (max(ink, background) + 0.05) / (min(ink, background) + 0.05) >= 3


@pytest.mark.parametrize("on", [True, False])
def test_drafts_that_were_rolled_back_are_struck_through_and_counted(tiny_model, monkeypatch, capsys, on):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on)
    monkeypatch.delenv("NO_COLOR", raising=False)
    config = DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.0, exit_layers=(2,), max_owed=2, verify=True)
    model, recorder = tiny_model(0), Recorder()
    plain = generate(model, PROMPT, DecodeConfig(max_new_tokens=12)).tokens
    Screen(None, model.config).show(stream(model, PROMPT, config, recorder), config, recorder)
    tokens = recorder.settled
    dropped = [i for token in tokens for i in token.rolled_back]
    assert len(dropped) == recorder.drafted - recorder.accepted > 0
    assert [token.id for token in tokens] == plain
    printed = capsys.readouterr().out
    assert f"drafts: {recorder.accepted} kept, {len(dropped)} rolled back" in printed
    assert printed.count("\033[9;90m") == (sum(bool(token.rolled_back) for token in tokens) if on else 0)
    assert on or " ".join(map(str, plain)) in printed


@pytest.mark.parametrize("ours, theirs, words", [
    ([1, 2, 3], [1, 2, 3], "the same text as the full model's"), ([1, 5, 3], [1, 2, 3], "token 2: 5 in place of 2"),
    ([1, 2], [1, 2, 3], "token 3: nothing in place of 3"), ([1, 2, 4], [1, 2], "token 3: 4 in place of nothing"),
])  # fmt: skip
def test_the_first_difference_is_named(ours, theirs, words):
    texts = [[Token(id, 1) for id in ids] for ids in (ours, theirs)]
    assert difference(*texts, None).endswith(words)


def test_speeds_are_compared_only_where_their_spreads_lie_apart():
    """Of five times the extremes do not count."""
    assert spread([5.0, 1.0, 2.0, 3.0, 9.0]) == (2.0, 5.0) and spread([5.0, 1.0]) == (1.0, 5.0)
    full = [0.9, 1.0, 1.0, 1.1, 7.0]
    assert speed(full, 3, full) == "3.000 s, 1 tokens/s"
    assert speed([0.4, 0.5, 0.5, 0.6, 1.0], 3, full).startswith("1.500 s, 2 tokens/s, 2.00 times as fast")
    assert ", 0.50 times as fast" in speed([2.0, 2.0, 2.0, 2.0, 2.0], 3, full)
    assert "too short to tell" in speed([0.4, 0.5, 0.5, 1.0, 1.0], 3, full)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(tiny_model, monkeypatch, capsys):
    """Runs decode.py with a tiny model and these words; returns what it prints, and how often it decodes."""
    model, count = tiny_model(8), []
    monkeypatch.setattr("decoding.command.load_checkpoint", lambda *_, **__: (model, None))
    monkeypatch.setattr(decode, "stream", lambda *args: count.append(args) or stream(*args))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, words)])
        count.clear()
        status = 0
        try:
            run(decode.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr(), len(count)

    return call


def test_the_prompt_is_given_with_or_without_its_flag_but_once(command):
    plain, flag = command("1,7,3", "--max-new-tokens", 4), command("--max-new-tokens", 4, "--prompt", "1,7,3")
    assert plain[0] == flag[0] == 0 and plain[1].splitlines()[:2] == flag[1].splitlines()[:2] and plain[3] == 1
    assert command("--verify")[0] == command("1,7", "--prompt", "3,4")[0] == 2


def test_files_are_written_at_the_end_and_only_if_all_went_well(command, tmp_path):
    page, trace = tmp_path / "page.html", tmp_path / "trace.jsonl"
    trace.write_text("old")
    words = ["--html", page, "--trace", trace, "--compare", "full,softmax+exit-layers=9"]
    assert command("1,7,3", *words)[0] == 2
    assert trace.read_text() == "old" and sorted(tmp_path.iterdir()) == [trace]
    assert command("1,7,3", *words[:4])[0] == 0
    assert json.loads(trace.read_text().splitlines()[0]) and sorted(tmp_path.iterdir()) == [page, trace]


def test_compared_configurations_are_decoded_in_turns_and_their_medians_shown(command):
    status, out, err, decodings = command("1,7,3", "--compare", "full,softmax+threshold=0.1,softmax+verify", "--max-new-tokens", 9)
    assert status == 0 and decodings == 4 + 5 * 3  # in turns without "full", which the full model already is
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["full", "softmax+threshold=0.1", "softmax+verify"]
    assert "threshold 0.1" in err and out.count("tokens/s") == 3
