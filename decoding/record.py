"""The record of a run: its tokens, the exit of each and why it was taken, and the work done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

from torch import Tensor

from cache import KVCache
from decoding.trace import Trace
from model import ModelConfig


@dataclass
class Token:
    """One generated token, its exit and why it was taken."""

    id: int
    exit_layer: int  # L: from the full model, or from the shortlist after all blocks
    probs: Tensor | None = None  # (V,) what a draft was drawn from, if it was sampled
    rolled_back: tuple[int, ...] = ()  # verified mode: the drafts that this token replaced
    confidences: dict[int, float] = field(default_factory=dict)  # of each layer checked
    thresholds: dict[int, float] = field(default_factory=dict)  # that they had to reach
    amateurs: dict[int, int] = field(default_factory=dict)  # exit layer -> the layer it was contrasted with

    def explain(self, trace: Trace) -> None:
        """Takes over the confidences, thresholds and amateurs from the trace of its position."""
        self.confidences, self.thresholds = trace.confidences, trace.thresholds
        self.amateurs = {**self.amateurs, **trace.amateurs}


@dataclass
class Counters:
    """The work done; the loop reports to it, and a subclass may record more (decoding/replay.py). FLOPs count
    multiply-adds twice, and cover the weights of blocks, attention, and heads. Those of confidence checks are
    the FLOPs of heads that were computed for a check and did not yield the token."""

    tokens: int = 0
    block_runs: int = 0
    block_rows: int = 0
    deep_passes: int = 0  # passes that reached the LM head
    deep_rows: int = 0  # rows at the last layer in these, owed ones included
    block_flops: int = 0
    head_flops: int = 0
    confidence_flops: int = 0  # part of head_flops
    pruned_deep: int = 0  # deep passes with checks over fewer candidates than the vocabulary
    missed: int = 0  # how often the full model's token was not among them
    drafted: int = 0  # verified mode: early tokens judged by the full model
    accepted: int = 0  # of these, kept

    def new_trace(self, *args) -> Trace:
        """The trace of the next pass."""
        return Trace(*args)

    def add_pass(self, before: list[int], cache: KVCache, layer: int, trace: Trace) -> None:
        """Counts one pass up to `layer` (L + 1: the LM head), which raised the layers of the staircase from
        the heights `before` to cache.begun."""
        shape, stop = trace.model.config, cache.begun
        L = shape.n_layers
        for first, layers in groupby(before[1 : min(layer, L) + 1]):
            runs = len(list(layers)) if first < stop else 0
            self.block_runs += runs
            self.block_rows += runs * (stop - first)
            self.block_flops += runs * block_flops(shape, first, stop)
        if trace.final is not None:
            self.deep_passes += 1
            self.deep_rows += stop - before[L]
        self.confidence_flops += sum(flops for head, flops in trace.flops.items() if head != layer)

    def add_copies(self, shape: ModelConfig, layers: int) -> None:
        """Counts copies of keys and values to a number of layers, each of which computes its projection of
        queries, keys and values."""
        heads = shape.n_heads + 2 * shape.n_kv_heads
        self.block_flops += layers * 2 * heads * shape.head_dim * shape.d_model

    def ideal_speedup(self, shape: ModelConfig, shortlist: bool) -> float:
        """The steps of the staircase that the full model runs for these tokens, divided by those that were
        run. With a shortlist, the LM head is one of them, counted as (its weights / a block's weights) steps;
        without one, every check reads these weights, so nothing is saved there."""
        head = shape.vocab_size * shape.d_model / block_weights(shape) if shortlist else 0
        return (shape.n_layers + head) * self.tokens / (self.block_runs + head * self.deep_passes)

    def add_miss(self, trace: Trace, token: int) -> None:
        """Notes whether the full model's token was among the candidates of the confidence checks."""
        if trace.confidences and trace.candidates is not None:
            self.pruned_deep += 1
            self.missed += token not in trace.candidates

    def add_judgement(self, drafted: int, kept: int) -> None:
        """Counts the drafts that the full model judged, and those that it kept."""
        self.drafted += drafted
        self.accepted += kept


@dataclass
class Generation:
    """Tokens (the end-of-text token included), the exit layer and the confidences of each, and the work
    done."""

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[dict[int, float]] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    @classmethod
    def of(cls, tokens: Iterable[Token], counters: Counters) -> "Generation":
        """What `stream` yields, with the counters that it was given."""
        tokens = list(tokens)
        ids, layers = [token.id for token in tokens], [token.exit_layer for token in tokens]
        return cls(ids, layers, [token.confidences for token in tokens], counters)


def first_difference(tokens: Sequence[int], full_tokens: Sequence[int]) -> int | None:
    """Position of the first token that differs (a prefix differs where it ends); None for equal sequences."""
    return next((i for i, (a, b) in enumerate(zip_longest(tokens, full_tokens)) if a != b), None)


def block_weights(config: ModelConfig) -> int:
    """How many weights the matrices of one block have."""
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    return config.d_model * (attention + 3 * config.d_ff)


def block_flops(config: ModelConfig, first: int, stop: int) -> int:
    """FLOPs of one block on the positions first .. stop - 1: 2 per weight and row, 4 H C per row and position
    that it sees (without a window)."""
    seen = (first + 1 + stop) * (stop - first) // 2
    return 2 * block_weights(config) * (stop - first) + 4 * config.n_heads * config.head_dim * seen
