"""What decode.py prints: each token in the colour of its exit layer, with the drafts that were rolled back
struck through; then figures, and how fast configurations are."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from statistics import median
from typing import TextIO

from decoding.record import Token, first_difference
from decoding.replay import Recorder
from decoding.settings import DecodeConfig
from model import ModelConfig

# Red, green and blue.
CIVIDIS = ((0, 52, 110), (62, 78, 108), (112, 113, 115), (156, 149, 116), (205, 188, 99), (254, 232, 56))


# ---------------------------------------------------------------- tokens and colours


def layer_colour(layer: int, n_layers: int) -> tuple[int, int, int]:
    """The background of an exit layer, from dark blue (the first layer) to yellow (the last): the scale
    cividis (Nuñez 2018). Its lightness rises from layer to layer, so colour-blind readers can tell them
    apart."""
    place = (layer - 1) / max(1, n_layers - 1) * (len(CIVIDIS) - 1)
    below = min(int(place), len(CIVIDIS) - 2)
    share = place - below
    pairs = zip(CIVIDIS[below], CIVIDIS[below + 1])
    return tuple(round((1 - share) * low + share * high) for low, high in pairs)


def colour(text: str, layer: int, n_layers: int, on: bool) -> str:
    """`text` on the colour of its exit layer, in white or black, whichever is easier to read on it."""
    if not on or not text:
        return text
    background = layer_colour(layer, n_layers)
    light = sum(background) > 3 * 115
    return f"\033[38;5;{16 if light else 231}m\033[48;2;{';'.join(map(str, background))}m{text}\033[0m"


def struck(text: str, on: bool) -> str:
    """`text` in grey and struck through. Without colours, nothing: plain text shows only the output."""
    return f"\033[9;90m{text}\033[0m" if on and text else ""


def piece(tokenizer, token: int) -> str:
    """The text of one token; its id if there is no tokenizer."""
    return tokenizer.piece(token) if tokenizer else f" {token}"


def pieces(tokenizer, tokens: Iterator[Token]) -> Iterator[tuple[Token, str]]:
    """Each token with the text that it adds. The bytes of an unfinished character wait for the rest of it."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token.id)
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        new = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += new
        yield token, new


# ---------------------------------------------------------------- one run


class Screen:
    """Prints runs, and writes the lines of --trace."""

    def __init__(self, tokenizer, shape: ModelConfig, staircase: bool = False, trace: TextIO | None = None):
        """`staircase`: print one token a line, with the heights of the staircase. `trace`: an open file."""
        self.tokenizer, self.shape, self.staircase, self.trace = tokenizer, shape, staircase, trace
        self.on = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def show(self, tokens: Iterator[Token], config: DecodeConfig, recorder: Recorder, name: str = "") -> None:
        """Prints the text of a run as it comes, then its figures. A run with a `name` is one of several,
        whose speeds are compared later; without one, the figures contain its speed."""
        n_layers, started, elapsed = self.shape.n_layers, time.perf_counter(), 0.0
        for token, text in pieces(self.tokenizer, recorder.watch(tokens)):
            elapsed = time.perf_counter() - started
            dropped = "".join(piece(self.tokenizer, draft) for draft in token.rolled_back)
            shown = colour(text, token.exit_layer, n_layers, self.on)
            print(struck(dropped, self.on) + shown, end="", flush=True)
            if self.staircase:
                print(f"{' ' * max(1, 20 - len(text))}{steps(recorder.heights)}")
            if self.trace:
                row = ({"configuration": name} if name else {}) | trace_row(token, text, elapsed)
                print(json.dumps(row, ensure_ascii=False), file=self.trace)
        print(f"\n\n{self.legend(recorder)}")
        timing = "" if name else f" in {elapsed:.2f} s ({recorder.tokens / elapsed:.0f} tokens/s)"
        ideal = recorder.ideal_speedup(self.shape, bool(config.shortlist))
        print(f"{figures(recorder, n_layers, timing)} (ideal speed-up {ideal:.2f})")

    def legend(self, recorder: Recorder) -> str:
        """The exit layers with their colours and numbers of tokens, and what became of drafts."""
        layers = [token.exit_layer for token in recorder.settled]
        counts = []
        for layer in sorted(set(layers)):
            number = colour(str(layer), layer, self.shape.n_layers, self.on)
            counts.append(f"{number} ({layers.count(layer)})")
        line = f"exit layers: {'  '.join(counts)}"
        if recorder.drafted:
            lost = recorder.drafted - recorder.accepted
            line += f"; drafts: {recorder.accepted} kept, {lost} rolled back"
        return line


def in_force(config: DecodeConfig, shape: ModelConfig) -> str:
    """The settings that are in force, in a line: confidence, exit layers with their thresholds, and what
    differs from the defaults."""
    shown = ["the full model"]
    if config.confidence is not None:
        exits = config.exits(shape)
        layers = ",".join(map(str, exits))
        values = ",".join(f"{threshold:g}" for threshold in sorted(set(exits.values())))
        where = f"at layers {layers}, threshold {values}"
        if config.draft == "auto":
            where = f"at one of layers {layers}, chosen from measurements"
        shown = [f"{config.confidence} {where}"]
    named = {"confidence", "threshold", "layer_thresholds", "exit_layers"}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name not in named and value != each.default:
            shown.append(each.name if value is True else f"{each.name} {value}")
    return ", ".join(shown)


def figures(recorder: Recorder, n_layers: int, speed: str = "") -> str:
    """How many tokens there are, how fast they came (`speed`, in words), and how much work they took."""
    tokens = recorder.settled
    mean = sum(token.exit_layer for token in tokens) / len(tokens)
    depth = f"average exit layer {mean:.1f} of {n_layers}"
    runs = recorder.block_runs / len(tokens)
    return f"{len(tokens)} tokens{speed}, {depth}, {runs:.1f} block runs per token"


def steps(heights: list[int]) -> str:
    """The heights of the staircase (KVCache.heights) in few characters, layers of the same height together:
    4×13 12×7 head×9 are 13 positions in layers 1 to 4, 7 in layers 5 to 12, and 9 at the LM head, which is
    left out if it is owed nothing."""
    begun, *layers, head = heights
    highest = {height: layer for layer, height in enumerate(layers, 1)}  # height -> the last layer with it
    parts = [f"{layer}×{height}" for height, layer in highest.items()]
    if head < begun:
        parts.append(f"head×{head}")
    return " ".join(parts)


def trace_row(token: Token, text: str, elapsed: float) -> dict:
    """What --trace records of a token."""
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


# ---------------------------------------------------------------- compared with the full model


def difference(tokens: list[Token], full: list[Token], tokenizer) -> str:
    """Where a text first differs from the full model's, in words."""
    at = first_difference([token.id for token in tokens], [token.id for token in full])
    if at is None:
        return "the same text as the full model's"

    def named(side: list[Token]) -> str:
        if at >= len(side):
            return "nothing"
        return repr(piece(tokenizer, side[at].id)) if tokenizer else str(side[at].id)

    change = f"{named(tokens)} in place of {named(full)}"
    return f"first differs from the full model's text at token {at + 1}: {change}"


def speed(pace: list[float], tokens: int, full: list[float]) -> str:
    """How fast runs of `tokens` tokens are, in words, and how many times as fast as the full model, unless
    the spreads of the two overlap. `pace` and `full`: seconds per token of every run."""
    middle, (low, high), (full_low, full_high) = median(pace), spread(pace), spread(full)
    words = f"{middle * tokens:.3f} s, {1 / middle:.0f} tokens/s"
    if pace is full:
        return words
    if low <= full_high and full_low <= high:
        return f"{words}; too short to tell whether it is faster than the full model"
    return f"{words}, {median(full) / middle:.2f} times as fast as the full model"


def spread(values: list[float]) -> tuple[float, float]:
    """The lowest and the highest value, without the extremes if there are five or more."""
    kept = sorted(values)[1:-1] if len(values) >= 5 else values
    return min(kept), max(kept)
