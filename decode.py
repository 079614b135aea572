"""The decoding loop: stop early, pay the debt later. `python decode.py --prompt ...` shows each token by the layer at which it exited.

Dimensions: R rows of a pass, d model width, n candidates, L layers. The loop knows token ids only; text begins at `main`.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from cli import Parser, add_flags, add_model_flags, device_and_dtype, given, option, run
from confidence import SCHEDULES, THRESHOLDS, Trace, resolve
from data import encode_prompt
from model import KVCache, Transformer, check_layers, load_checkpoint

DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "default.pt"


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode. Layers count from 1; exit layer l is after l blocks."""

    max_new_tokens: int = option(64, "tokens at most; fewer where the model's positions end")
    confidence: str | None = option(None, "confidence function: a registered name, package.module:function, or none for the full model")
    threshold: float = option(0.8, "exit when confidence >= threshold, 0 to 1; at 0 the question is not asked")
    threshold_schedule: str = option("constant", "constant, or decaying over the steps (CALM)")
    tau: float = option(4.0, "how fast the decaying threshold falls, above 0")
    exit_layers: tuple[int, ...] | None = option(None, "layers after which to ask, 1 to L-1; none: every one")
    min_layer: int = option(1, "first layer at which an exit is allowed")
    fill: str = option("parallel", "keys and values of skipped layers: parallel (exact, when next needed) or copy (approximate, at once)")
    max_owed: int | None = option(None, "with so many positions owed to the last layer the next pass goes to the top; none: no bound")
    verify: bool = option(False, "take early tokens as drafts and let the full model judge them: its output, exactly, only sooner")
    prune: str = option("none", "candidates kept after the first exit layer asked: none (all) or fixed (prune_k)")
    prune_k: int = option(64, "candidates of fixed pruning, at least 2")
    premature_layers: tuple[int, ...] | None = option(None, "layers that jsd may contrast with; none: all from 2 on")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy")
    top_k: int | None = option(None, "sample from the k most probable tokens")
    top_p: float = option(1.0, "sample from the most probable tokens of this total mass, above 0, up to 1")
    seed: int = option(0, "seed of the sampling")

    def __post_init__(self):
        for name in ("exit_layers", "premature_layers"):
            object.__setattr__(self, name, None if getattr(self, name) is None else tuple(getattr(self, name)))
        choices = {"threshold_schedule": THRESHOLDS, "fill": ("parallel", "copy"), "prune": SCHEDULES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        least = {"max_new_tokens": 1, "min_layer": 1, "max_owed": 1, "prune_k": 2, "top_k": 1, "temperature": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**63:
                raise ValueError(f"{name} is {value}; it must be at least {low}, and finite")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must lie between 0 and 1")
        if not 0 < self.top_p <= 1 or not self.tau > 0:
            raise ValueError(f"top_p is {self.top_p} and tau {self.tau}; top_p must lie above 0 and up to 1, tau above 0")
        if self.verify and self.fill != "parallel":
            raise ValueError("verify is True, but fill is copy; only exact keys and values can judge, so fill must be parallel")
        if self.confidence is not None:
            resolve(self.confidence)

    def exits(self, n_layers: int) -> frozenset[int]:
        """The layers at which this model may exit. Raises ValueError for one that it does not have, and if none is left."""
        layers = range(1, n_layers) if self.exit_layers is None else self.exit_layers
        check_layers("exit_layers", layers, n_layers)
        check_layers("premature_layers", self.premature_layers or (), n_layers)
        allowed = frozenset(layer for layer in layers if layer >= self.min_layer)
        if self.confidence and n_layers > 1 and not allowed:
            raise ValueError(f"min_layer is {self.min_layer}, which leaves no exit layer; lower it or give other exit_layers")
        return allowed if self.confidence else frozenset()


@dataclass
class Token:
    """One generated token and why it came from where it came."""

    id: int
    exit_layer: int                   # L: from the full model
    confidences: dict[int, float]     # of each layer asked
    amateurs: dict[int, int]          # exit layer -> the layer that it was contrasted with
    probs: Tensor | None = None       # (V,) what a draft was drawn from, if it was sampled


@dataclass
class Counters:
    """Work done. FLOPs count multiply-adds twice: block weights, attention, and heads; of the heads, confidence is what was computed to ask
    but not to emit (every head but that of the layer emitted from)."""

    tokens: int = 0
    block_runs: int = 0
    block_rows: int = 0
    deep_passes: int = 0        # passes that reached the top
    deep_rows: int = 0          # rows at the top layer in these, owed ones included
    block_flops: int = 0
    head_flops: int = 0
    confidence_flops: int = 0   # part of head_flops
    pruned_deep: int = 0        # deep passes whose candidates had been pruned
    missed: int = 0             # of these, how often the full model's token had been pruned away
    drafted: int = 0            # verified mode: early tokens judged by the full model
    accepted: int = 0           # of these, kept

    def add_blocks(self, model: Transformer, before: list[int], stop: int, layer: int) -> None:
        """One pass up to `layer` that took the positions filled[1..layer] from `before` to `stop`."""
        for first, layers in groupby(before[1 : layer + 1]):
            runs = len(list(layers)) if first < stop else 0
            self.block_runs += runs
            self.block_rows += runs * (stop - first)
            self.block_flops += runs * model.block_flops(first, stop)
        if layer == model.config.n_layers:
            self.deep_passes += 1
            self.deep_rows += stop - before[layer]

    def add_heads(self, trace: Trace, layer: int, rows: int) -> None:
        """The heads of one pass up to `layer`: those asked, and the final head on `rows` rows."""
        asked = sum(trace.flops.values())
        self.head_flops += asked + 2 * trace.model.unembed.numel() * rows
        self.confidence_flops += asked - (0 if rows else trace.flops[layer])

    def add_judgement(self, trace: Trace, drafted: int, kept: int, token: int | None) -> None:
        """What the full model made of the drafts and of the candidates of the newest position."""
        self.drafted += drafted
        self.accepted += kept
        if trace.candidates is not None and kept == drafted:
            self.pruned_deep += 1
            self.missed += token not in trace.candidates


@dataclass
class Generation:
    """Tokens (the end-of-text token included), the exit layer and the confidences asked of each, and the work done."""

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[dict[int, float]] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)


def run_pass(model: Transformer, cache: KVCache, tokens: list[int], trace: Trace, exits: frozenset[int], threshold: float) -> int:
    """Advances the staircase by `tokens` until an exit layer finds the next token decided, and returns the layer reached. Rows that
    stopped below a layer in earlier passes join there, so that keys and values are those of a full forward pass. Without tokens, what is
    owed is paid."""
    first, stop = cache.filled[0], cache.filled[0] + len(tokens)
    cache.filled[0] = stop
    x = model.embed(torch.tensor(tokens, dtype=torch.int64, device=cache.hidden.device))  # (R, d)
    trace.hidden.append(x)
    for layer, block in enumerate(model.blocks, 1):
        if cache.filled[layer] < first:
            x = torch.cat([cache.owed(layer, first), x])
            first = cache.filled[layer]
        if stop > first:  # else, without new tokens, nothing is owed so far down
            x = block.forward(x, partial(cache.attend, layer))  # not block(...): hooks cost time at every call
        trace.hidden.append(x)
        if layer in exits and trace.decided(threshold):
            cache.hidden[first:stop] = x
            break
    return layer


def copy_up(model: Transformer, cache: KVCache, layer: int, counters: Counters) -> None:
    """CALM's state propagation (Schuster 2022, section 3.2): every layer above projects keys and values from the state at the exit."""
    for above, block in enumerate(model.blocks[layer:], layer + 1):
        rows = cache.owed(above, cache.filled[0])
        cache.store(above, block.project(rows))
        counters.block_flops += 2 * block.qkv.numel() * len(rows)


@torch.inference_mode()
def stream(
    model: Transformer, prompt: list[int], config: DecodeConfig, counters: Counters | None = None, trace_type: type[Trace] = Trace
) -> Iterator[Token]:
    """Yields tokens up to and including the end of the text, adding the work to `counters`. Batch size 1: `prompt` is one list of token
    ids. `trace_type` may be a Trace that observes.
    Raises ValueError for a prompt that is empty or too long, and for layers that the model does not have."""
    L, counters = model.config.n_layers, counters or Counters()
    exits = config.exits(L)
    check_prompt(prompt, model)
    steps = min(config.max_new_tokens, model.config.max_len - len(prompt))
    cache = KVCache(model, len(prompt) + steps)
    generator = torch.Generator(cache.hidden.device).manual_seed(config.seed)
    confidence = config.confidence and resolve(config.confidence)
    new_trace = partial(trace_type, model, confidence, config.prune, config.prune_k, config.premature_layers)
    tokens = list(prompt)
    if config.fill == "copy" and exits and len(prompt) > 1:  # a prompt has its exact keys and values, as in CALM
        run_pass(model, cache, tokens[:-1], new_trace(), frozenset(), 1.0)
        counters.add_blocks(model, [0] * (L + 1), len(prompt) - 1, L)
        tokens = tokens[-1:]

    generated, drafts = 0, []  # drafts: in verified mode, the early tokens that the full model has yet to judge
    while generated < steps:
        step, ended = generated + len(drafts), bool(drafts) and drafts[-1].id == model.config.eos_id
        tokens = [] if ended or step == steps else tokens  # nothing more to draft: pay what is owed and judge
        full = not tokens or (config.max_owed is not None and cache.filled[0] - cache.filled[L] >= config.max_owed)
        threshold = THRESHOLDS[config.threshold_schedule](config.threshold, config.tau, step, steps)
        trace, before = new_trace(), list(cache.filled)
        layer = run_pass(model, cache, tokens, trace, frozenset() if full else exits, threshold)
        counters.add_blocks(model, before, cache.filled[0], layer)
        if layer < L:
            choice, probs = pick(trace.logits(layer), config, generator)  # over (n,)
            token = Token(trace.token(choice), layer, trace.confidences, trace.amateurs, trace.spread(probs))
            settled, drafts = ([], [*drafts, token]) if config.verify else ([token], [])
            counters.add_heads(trace, layer, 0)
            if config.fill == "copy":
                copy_up(model, cache, layer, counters)
        else:
            rows = trace.hidden[L][-(len(drafts) + bool(tokens)) :]  # each judges the draft after it; the newest gives one more token
            kept, choice = judge(model.head(rows), drafts, config, generator)  # over (R, V)
            settled = drafts[:kept]
            if choice is not None:
                settled.append(Token(choice, L, *((trace.confidences, trace.amateurs) if kept == len(drafts) else ({}, {}))))
            counters.add_heads(trace, layer, len(rows))
            counters.add_judgement(trace, len(drafts), kept, choice)
            cache.rollback(cache.filled[0] - len(rows) + kept + 1)
            drafts = []
        for token in settled:
            generated, counters.tokens = generated + 1, counters.tokens + 1
            yield token
            if token.id == model.config.eos_id:
                return
        tokens = [token.id]  # the newest, settled or a draft


def check_prompt(prompt: list[int], model: Transformer) -> None:
    """Raises ValueError unless `prompt` is one non-empty list of token ids with room for an answer."""
    if len(prompt) == 0 or not all(isinstance(token, int) for token in prompt):
        raise ValueError("the prompt must be one non-empty list of token ids (batch size 1)")
    if len(prompt) >= model.config.max_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens, this model {model.config.max_len} positions; shorten the prompt")
    if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
        raise ValueError(f"a token id of the prompt lies outside 0 to {model.config.vocab_size - 1}")


def pick(logits: Tensor, config: DecodeConfig, generator: torch.Generator) -> tuple[int, Tensor | None]:
    """Index of the chosen candidate of logits (n,): the argmax at temperature 0, else a sample; and what it was drawn from, (n,)."""
    if config.temperature == 0:
        return int(logits.argmax()), None
    probs = distribution(logits, config)
    return int(torch.multinomial(probs, 1, generator=generator)), probs


def judge(logits: Tensor, drafts: list[Token], config: DecodeConfig, generator: torch.Generator) -> tuple[int, int | None]:
    """How many drafts the full model keeps, and the token that follows them. Row i of its logits (R, V) judges draft i: kept if it is the
    argmax; sampled, with probability min(1, p/q), else replaced by a sample of max(p - q, 0) (Leviathan 2023, Chen 2023). The row after
    the last draft, if there is one, gives one more token."""
    for i, (row, draft) in enumerate(zip(logits, drafts)):
        if config.temperature == 0:
            if (best := int(row.argmax())) != draft.id:
                return i, best
            continue
        p = distribution(row, config)
        if torch.rand((), generator=generator, device=p.device) * draft.probs[draft.id] >= p[draft.id]:
            rest = (p - draft.probs).clamp(min=0)
            return i, int(torch.multinomial(rest if rest.sum() > 0 else p, 1, generator=generator))
    return len(drafts), pick(logits[-1], config, generator)[0] if len(logits) > len(drafts) else None


def distribution(logits: Tensor, config: DecodeConfig) -> Tensor:
    """What is sampled from: softmax(z / temperature) of (n,), cut to the top k, then to the fewest of mass >= top_p, renormalized."""
    probs, index = ((logits - logits.max()) / config.temperature).softmax(-1).sort(descending=True)
    if config.top_k is not None:
        probs[config.top_k :] = 0
    if config.top_p < 1:
        probs = probs / probs.sum()
        probs[probs.cumsum(-1) - probs >= config.top_p] = 0
    return torch.zeros_like(probs).scatter(0, index, probs / probs.sum())


def generate(model: Transformer, prompt: list[int], config: DecodeConfig = DecodeConfig(), trace_type: type[Trace] = Trace) -> Generation:
    """Decodes one prompt; see `stream` for what it raises."""
    counters = Counters()
    tokens = list(stream(model, prompt, config, counters, trace_type))
    return Generation([t.id for t in tokens], [t.exit_layer for t in tokens], [t.confidences for t in tokens], counters)


# ---------------------------------------------------------------- the command line


def colour(text: str, layer: int, n_layers: int, on: bool) -> str:
    """`text` in the colour of its exit layer, from green (the first) through yellow to red (the full model)."""
    share = (layer - 1) / max(1, n_layers - 1)
    red, green = min(255, int(510 * share)), min(255, int(510 * (1 - share)))
    return f"\033[38;2;{red};{green};60m{text}\033[0m" if on and text else text


def read_prompt(text: str, tokenizer) -> list[int]:
    """Token ids of a prompt. A checkpoint without a tokenizer takes ids, separated by commas."""
    if tokenizer is not None:
        if not text.strip():
            raise ValueError("the prompt is empty; give some text")
        return encode_prompt(tokenizer, text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError("this checkpoint has no tokenizer: give the prompt as token ids, separated by commas") from None


def pieces(tokenizer, tokens: Iterator[Token]) -> Iterator[tuple[Token, str]]:
    """Each token with the text that it adds; bytes of an unfinished character wait for the rest of it."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token.id)
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        new = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += new
        yield token, new


def show(model: Transformer, tokenizer, prompt: list[int], config: DecodeConfig, trace: TextIO | None) -> None:
    """Streams the text, each token in the colour of its exit layer, then a legend and one line of figures."""
    L, on = model.config.n_layers, sys.stdout.isatty() and "NO_COLOR" not in os.environ
    counters, layers, started = Counters(), [], time.perf_counter()
    for token, text in pieces(tokenizer, stream(model, prompt, config, counters)):
        elapsed = time.perf_counter() - started
        layers.append(token.exit_layer)
        print(colour(text, token.exit_layer, L, on), end="", flush=True)
        if trace:
            row = {"id": token.id, "text": text, "exit_layer": token.exit_layer, "confidence": token.confidences,
                   "contrast_layer": token.amateurs, "seconds": round(elapsed, 6)}  # fmt: skip
            trace.write(json.dumps(row, ensure_ascii=False) + "\n")
    n = len(layers)
    print("\n\nexit layers: " + "  ".join(f"{colour(str(layer), layer, L, on)} ({layers.count(layer)})" for layer in sorted(set(layers))))
    print(f"{n} tokens in {elapsed:.2f} s ({n / elapsed:.0f} tokens/s), average exit layer {sum(layers) / n:.1f} of {L}, "
          f"{counters.block_runs / n:.1f} block runs a token (ideal speed-up {L * n / counters.block_runs:.2f})")  # fmt: skip


DEMO = DecodeConfig(confidence="softmax", threshold=0.6, prune="fixed", max_new_tokens=100)  # what the command does


def demo_exits(n_layers: int) -> tuple[int, ...]:
    """Exits after a third, a half and two thirds of the layers, where the model is deep enough."""
    return tuple(sorted({max(1, round(n_layers * share)) for share in (1 / 3, 1 / 2, 2 / 3)} - {n_layers}))


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--prompt", required=True, help="text; token ids, separated by commas, where the checkpoint has no tokenizer")
    parser.add_argument("--trace", metavar="FILE", help="write one JSON line per token: id, text, exit layer, confidences, time")
    add_model_flags(parser, DEFAULT_CHECKPOINT)
    add_flags(parser, DEMO, "decoding")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    model, tokenizer = load_checkpoint(args.checkpoint, *device_and_dtype(args))
    config = replace(DEMO, **{"exit_layers": demo_exits(model.config.n_layers), **given(args, DecodeConfig)})
    prompt = read_prompt(args.prompt, tokenizer)
    config.exits(model.config.n_layers)  # a mistake there leaves an old trace file alone
    check_prompt(prompt, model)
    if tokenizer is None:
        print("this checkpoint has no tokenizer: token ids in, token ids out", file=sys.stderr)
    with open(args.trace, "w", encoding="utf-8") if args.trace else nullcontext() as trace:
        show(model, tokenizer, prompt, config, trace)


if __name__ == "__main__":
    run(main)
