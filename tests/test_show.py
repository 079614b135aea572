"""What the screen shows: text as it comes, colours, drafts, the trace file, and where two texts part."""

import json
import sys

import pytest

from decode import generate, stream
from decoding.display import colour, difference, layer_colour, pieces, show
from decoding.record import Counters, Token
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
    with open(tmp_path / "trace.jsonl", "w") as file:
        counters = Counters()
        ids = show(stream(model, PROMPT, config, counters), None, model.config, config, counters, file)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    out = generate(model, PROMPT, config)
    assert [row["id"] for row in rows] == out.tokens == ids and [row["exit_layer"] for row in rows] == out.exit_layers
    assert all(set(row["contrast_layer"]) == set(row["confidence"]) == set(row["threshold"]) for row in rows)
    printed = capsys.readouterr().out
    assert "\033" not in printed and "10 tokens in" in printed and f"average exit layer {sum(out.exit_layers) / 10:.1f} of 5" in printed


def test_colours_run_from_dark_blue_to_yellow_can_be_read_and_can_be_off():
    assert colour("x", 1, 12, True) == "\033[38;5;231m\033[48;2;0;52;110mx\033[0m"  # white on dark blue
    assert colour("x", 12, 12, True) == "\033[38;5;16m\033[48;2;254;232;56mx\033[0m"  # black on yellow
    assert colour("x", 6, 12, False) == "x"


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
    counters, plain = Counters(), generate(tiny_model(0), PROMPT, DecodeConfig(max_new_tokens=12)).tokens
    tokens = list(stream(tiny_model(0), PROMPT, config, counters))
    dropped = [i for token in tokens for i in token.rolled_back]
    assert len(dropped) == counters.drafted - counters.accepted > 0
    assert show(iter(tokens), None, tiny_model(0).config, config, counters) == plain
    printed = capsys.readouterr().out
    assert f"drafts: {counters.accepted} kept, {len(dropped)} rolled back" in printed
    assert printed.count("\033[9;90m") == (sum(bool(token.rolled_back) for token in tokens) if on else 0)
    assert on or " ".join(map(str, plain)) in printed


def test_the_first_difference_is_named():
    assert difference([1, 2, 3], [1, 2, 3], None) == "the same text as the full model's"
    assert difference([1, 5, 3], [1, 2, 3], None).endswith("token 2: 5 in place of 2")
    assert difference([1, 2], [1, 2, 3], None).endswith("token 3: nothing in place of 3")
    assert difference([1, 2, 4], [1, 2], None).endswith("token 3: 4 in place of nothing")
