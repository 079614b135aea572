"""Tokens on the screen: each in the colour of its exit layer, drafts that were rolled back struck through, then a legend and figures."""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from decoding.record import Counters, Token


def colour(text: str, layer: int, n_layers: int, on: bool) -> str:
    """`text` in the colour of its exit layer, from green (the first) through yellow to red (the full model)."""
    share = (layer - 1) / max(1, n_layers - 1)
    red, green = min(255, int(510 * share)), min(255, int(510 * (1 - share)))
    return f"\033[38;2;{red};{green};60m{text}\033[0m" if on and text else text


def struck(text: str, on: bool) -> str:
    """`text` grey and struck through; nothing where there are no colours, so that the plain text is the output."""
    return f"\033[9;90m{text}\033[0m" if on and text else ""


def pieces(tokenizer, tokens: Iterator["Token"]) -> Iterator[tuple["Token", str]]:
    """Each token with the text that it adds; bytes of an unfinished character wait for the rest of it."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token.id)
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        new = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += new
        yield token, new


def show(tokens: Iterator["Token"], tokenizer, n_layers: int, counters: "Counters", trace: TextIO | None = None) -> list[int]:
    """Streams the text and a legend, and one JSON line per token to `trace`; returns the token ids."""
    on = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ids, layers, started, elapsed = [], [], time.perf_counter(), 0.0
    for token, text in pieces(tokenizer, tokens):
        elapsed = time.perf_counter() - started
        ids.append(token.id)
        layers.append(token.exit_layer)
        dropped = [tokenizer.id_to_piece(i).replace("▁", " ") if tokenizer else f" {i}" for i in token.rolled_back]
        print(struck("".join(dropped), on) + colour(text, token.exit_layer, n_layers, on), end="", flush=True)
        if trace:
            row = {"id": token.id, "text": text, "exit_layer": token.exit_layer, "confidence": token.confidences,
                   "threshold": token.thresholds, "contrast_layer": token.amateurs, "rolled_back": token.rolled_back,
                   "seconds": round(elapsed, 6)}  # fmt: skip
            trace.write(json.dumps(row, ensure_ascii=False) + "\n")
    n = len(layers)
    legend = "  ".join(f"{colour(str(layer), layer, n_layers, on)} ({layers.count(layer)})" for layer in sorted(set(layers)))
    drafts = f"; drafts: {counters.accepted} kept, {counters.drafted - counters.accepted} rolled back" if counters.drafted else ""
    print(f"\n\nexit layers: {legend}{drafts}")
    print(f"{n} tokens in {elapsed:.2f} s ({n / elapsed:.0f} tokens/s), average exit layer {sum(layers) / n:.1f} of {n_layers}, "
          f"{counters.block_runs / n:.1f} block runs a token (ideal speed-up {n_layers * n / counters.block_runs:.2f})")  # fmt: skip
    return ids


def difference(ids: list[int], full: list[int], tokenizer) -> str:
    """Where a text first differs from the full model's, in words."""
    if ids == full:
        return "the same text as the full model's"
    at = next((i for i, pair in enumerate(zip(ids, full)) if pair[0] != pair[1]), min(len(ids), len(full)))
    ours, theirs = (
        "nothing" if at >= len(side) else repr(tokenizer.id_to_piece(side[at]).replace("▁", " ")) if tokenizer else str(side[at])
        for side in (ids, full)
    )
    return f"differs from the full model's text first at token {at + 1}: {ours} in place of {theirs}"
