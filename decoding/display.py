"""Tokens on the screen: each in the colour of its exit layer, drafts that were rolled back struck through,
then figures."""

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from typing import TextIO

from common.errors import UserError
from decoding.record import Counters, Token, first_difference
from decoding.settings import DecodeConfig
from formats.tokenizer import encode_prompt
from model import ModelConfig, Transformer, load_checkpoint

CIVIDIS = (  # red, green, blue
    (0, 52, 110),
    (62, 78, 108),
    (112, 113, 115),
    (156, 149, 116),
    (205, 188, 99),
    (254, 232, 56),
)


def read_prompt(text: str, tokenizer) -> list[int]:
    """Token ids of a prompt. A checkpoint without a tokenizer takes ids, separated by commas. Raises
    UserError."""
    if tokenizer is not None:
        if not text.strip():
            raise UserError("the prompt is empty; give some text")
        return encode_prompt(tokenizer, text)
    print("this checkpoint has no tokenizer: token ids in, token ids out", file=sys.stderr)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            "this checkpoint has no tokenizer: give the prompt as token ids, separated by commas"
        ) from None


def read_amateur(path: str | None, tokenizer, options: dict) -> Transformer | None:
    """The second model of --amateur, loaded as the first. Raises UserError if its tokenizer is another."""
    if path is None:
        return None
    amateur, other = load_checkpoint(path, **options)
    if tokenizer and (not other or other.to_blob() != tokenizer.to_blob()):
        raise UserError(f"{path}: has another tokenizer than the model; an amateur must read the same tokens")
    return amateur


def layer_colour(layer: int, n_layers: int) -> tuple[int, int, int]:
    """The background of an exit layer, from dark blue (the first) to yellow (the full model): the scale
    cividis (Nuñez 2018), which colour-blind readers can tell apart."""
    place = (layer - 1) / max(1, n_layers - 1) * (len(CIVIDIS) - 1)
    below = min(int(place), len(CIVIDIS) - 2)
    share = place - below
    return tuple(
        round((1 - share) * low + share * high) for low, high in zip(CIVIDIS[below], CIVIDIS[below + 1])
    )


def colour(text: str, layer: int, n_layers: int, on: bool) -> str:
    """`text` on the colour of its exit layer, in white or black, whichever can be read there on any
    terminal."""
    if not on or not text:
        return text
    background = layer_colour(layer, n_layers)
    light = sum(background) > 3 * 115
    return f"\033[38;5;{16 if light else 231}m\033[48;2;{';'.join(map(str, background))}m{text}\033[0m"


def struck(text: str, on: bool) -> str:
    """`text` grey and struck through; nothing where there are no colours, so that the plain text is the
    output."""
    return f"\033[9;90m{text}\033[0m" if on and text else ""


def piece(tokenizer, token: int) -> str:
    """The text of one token; its id where there is no tokenizer."""
    return tokenizer.piece(token) if tokenizer else f" {token}"


def pieces(tokenizer, tokens: Iterator[Token]) -> Iterator[tuple[Token, str]]:
    """Each token with the text that it adds; bytes of an unfinished character wait for the rest of it."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token.id)
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        new = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += new
        yield token, new


def show(
    tokens: Iterator[Token],
    tokenizer,
    shape: ModelConfig,
    config: DecodeConfig,
    counters: Counters,
    trace: TextIO | None = None,
    staircase: bool = False,
    name: str = "",
) -> list[int]:
    """Streams the text and a legend, and one JSON line per token to `trace`, with the `name` of the setting
    where it has one; returns the token ids. `staircase`: one token a line, with `counters.filled`
    (decoding/replay.py) after it."""
    n_layers = shape.n_layers
    on = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ids, layers, started, elapsed = [], [], time.perf_counter(), 0.0
    for token, text in pieces(tokenizer, tokens):
        elapsed = time.perf_counter() - started
        ids.append(token.id)
        layers.append(token.exit_layer)
        dropped = "".join(piece(tokenizer, draft) for draft in token.rolled_back)
        print(struck(dropped, on) + colour(text, token.exit_layer, n_layers, on), end="", flush=True)
        if staircase:
            print(f"{' ' * max(1, 20 - len(text))}{steps(counters.filled)}")
        if trace:
            row = ({"setting": name} if name else {}) | trace_row(token, text, elapsed)
            trace.write(json.dumps(row, ensure_ascii=False) + "\n")
    ideal = counters.ideal_speedup(shape, bool(config.shortlist))
    print(f"\n\n{figures(layers, elapsed, n_layers, counters, ideal, on)}")
    return ids


def steps(filled: list[int]) -> str:
    """filled[0 .. L + 1] in few characters, from the bottom, layers of the same height together: 4×13 12×7
    head×9 are 13 positions in layers 1 to 4, 7 in 5 to 12, and 9 at the head over the vocabulary, which is
    left out where it owes nothing."""
    begun, *layers, head = filled
    parts = []
    for height, group in groupby(enumerate(layers, 1), key=lambda pair: pair[1]):
        *_, (highest, _) = group
        parts.append(f"{highest}×{height}")
    return " ".join(parts + [f"head×{head}"] * (head < begun))


def trace_row(token: Token, text: str, elapsed: float) -> dict:
    """What --trace tells of a token."""
    return {
        "id": token.id,
        "text": text,
        "exit_layer": token.exit_layer,
        "confidence": token.confidences,
        "threshold": token.thresholds,
        "contrast_layer": token.amateurs,
        "rolled_back": token.rolled_back,
        "seconds": round(elapsed, 6),
    }


def figures(
    layers: list[int], seconds: float, n_layers: int, counters: Counters, ideal: float, on: bool
) -> str:
    """The legend of exit layers, and speed and work, in words."""
    n = len(layers)
    shown = [
        f"{colour(str(layer), layer, n_layers, on)} ({layers.count(layer)})" for layer in sorted(set(layers))
    ]
    drafts = ""
    if counters.drafted:
        drafts = f"; drafts: {counters.accepted} kept, {counters.drafted - counters.accepted} rolled back"
    return (
        f"exit layers: {'  '.join(shown)}{drafts}\n{n} tokens in {seconds:.2f} s ({n / seconds:.0f} tokens/s), "
        f"average exit layer {sum(layers) / n:.1f} of {n_layers}, {counters.block_runs / n:.1f} block runs a token "
        f"(ideal speed-up {ideal:.2f})"
    )


def difference(ids: list[int], full: list[int], tokenizer) -> str:
    """Where a text first differs from the full model's, in words."""
    at = first_difference(ids, full)
    if at is None:
        return "the same text as the full model's"
    ours, theirs = (describe(side, at, tokenizer) for side in (ids, full))
    return f"differs from the full model's text first at token {at + 1}: {ours} in place of {theirs}"


def describe(ids: list[int], at: int, tokenizer) -> str:
    """The token at a place of a text, in words."""
    if at >= len(ids):
        return "nothing"
    return repr(piece(tokenizer, ids[at])) if tokenizer else str(ids[at])
