"""The newest position of one pass: its states, its exit heads over the candidates, and its confidence checks.

Dimensions: R rows of a pass, d model width, n candidates, V vocabulary.
"""

import math

import torch
from torch import Tensor

from common.errors import UserError
from confidence import read_pruning
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from model import Transformer

ROUNDING = 1e-4  # how far rounding may take a confidence out of [0, 1]


class Trace:
    """The newest position of one pass, layer by layer. Logits are computed when they are first needed, once,
    over the current candidates: the vocabulary or the shortlist at first, then what pruning leaves.
    (TraceView in confidence.py says what confidence functions may use.)"""

    def __init__(self, model: Transformer, config: DecodeConfig, shortlist: Shortlist | None = None):
        """The confidence function of `config` must have been resolved."""
        self.model, self.config, self.shortlist = model, config, shortlist
        self.hidden: list[Tensor] = []  # h_0 .. h_l, (1, R, d) each, the newest position last
        self.final: Tensor | None = None  # (R, V) logits of the rows that the LM head ran on, if any
        self.candidates: Tensor | None = None  # (n,) int64 token ids; None is the whole vocabulary
        self.n = model.config.vocab_size  # how many candidates there are
        self.checked: dict[int, int] = {}  # exit layer reached, even with threshold 0 -> how many candidates
        self.confidences: dict[int, float] = {}  # of each layer with a check (threshold above 0)
        self.thresholds: dict[int, float] = {}  # of each exit layer reached
        self.amateurs: dict[int, int] = {}  # exit layer -> the layer that it was contrasted with
        self.flops: dict[int, int] = {}  # layer -> floating-point operations of its head
        self._logits: dict[int, Tensor] = {}  # layer -> z over the candidates, (n,)
        self._guesses: dict[int, Tensor] = {}  # layer checked -> its best token, before pruning could drop it
        # The rows of W that `stack` multiplies by, in parts (a shortlist has two); a part None is all of W.
        # The list itself is None after pruning: then `stack` gathers the rows of the candidates.
        self._weights: list[Tensor | None] | None = [None]
        if shortlist is not None:
            self.candidates, self._weights, self.n = shortlist.ids, shortlist.weights, len(shortlist.ids)

    @property
    def layer(self) -> int:
        """The newest layer l."""
        return len(self.hidden) - 1

    def state(self, layer: int) -> Tensor:
        """h of `layer` <= l at the newest position: (d,)."""
        return self.hidden[layer][0, -1]

    def decided(self, threshold: float) -> bool:
        """Whether the confidence after the newest layer reaches the threshold. A threshold of 0 needs no
        check."""
        layer = self.layer
        self.thresholds[layer] = threshold
        if threshold > 0:
            if getattr(self.config.confidence, "reads_logits", True):
                self.prune()  # first, so that amateurs are computed over few candidates, too
            self.confidences[layer] = checked_confidence(self.config.confidence, self)
        self.checked[layer] = self.n
        return self.confidences.get(layer, 0.0) >= threshold

    def prune(self) -> None:
        """Vocabulary pruning: of the candidates so far, keeps those with the largest z_l, as many as the
        schedule says, and cuts all logits computed so far to these."""
        schedule, sizes = read_pruning(self.config.prune)
        if schedule is None:
            return
        newest, size = self.logits(self.layer), schedule(self, *sizes)
        if size >= self.n:
            return
        for layer in self.confidences:
            if layer not in self._guesses:
                self._guesses[layer] = self.token(self.logits(layer).argmax())
        index = newest.topk(size).indices  # (size,) by falling z_l
        self.candidates, self._weights, self.n = self.token(index), None, size
        self._logits = {layer: logits[index] for layer, logits in self._logits.items()}
        self._guesses[self.layer] = self.candidates[0]

    def logits(self, layer: int) -> Tensor:
        """z of `layer` <= l over the candidates: (n,)."""
        return self.stack([layer])[0]

    def log_probs(self, layer: int) -> Tensor:
        """log p of `layer` over the candidates: (n,)."""
        return self.logits(layer).log_softmax(-1)

    def stack(self, layers: list[int]) -> list[Tensor]:
        """z of several layers, (n,) each; one product yields all that are missing, so W is read once."""
        missing = [layer for layer in layers if layer not in self._logits]
        if missing:
            if self._weights is None:  # pruned
                self._weights = [self.model.unembedding(self.candidates)]
            normed = [self.model.exit_norm(self.hidden[layer][0, -1:], layer) for layer in missing]
            rows = normed[0] if len(normed) == 1 else torch.cat(normed)  # (m, d)
            parts = [self.model.score(rows, weight) for weight in self._weights]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # (m, n)
            self._logits.update(zip(missing, logits.unbind()))
            self.flops.update({layer: head_flops(self.model, layer, self.n) for layer in missing})
        return [self._logits[layer] for layer in layers]

    def token(self, index: int | Tensor) -> int | Tensor:
        """Token ids of candidates, given by their index."""
        return index if self.candidates is None else self.candidates[index]

    def guess(self, layer: int) -> int:
        """Token id of the most probable candidate at `layer`, among those present when the layer was
        checked."""
        known = layer in self._guesses
        return int(self._guesses[layer] if known else self.token(self.logits(layer).argmax()))

    def spread(self, probs: Tensor | None) -> Tensor | None:
        """Extends probabilities (n,) of the candidates to the vocabulary: (V,), 0 for all other tokens."""
        if probs is None or self.candidates is None:
            return probs
        return probs.new_zeros(self.model.config.vocab_size).scatter(0, self.candidates, probs)

    def at_the_top(self) -> "Trace":
        """A new trace of this position, whose logits at the last layer are the LM head's. Needs `final`."""
        trace = Trace(self.model, self.config)
        trace.hidden, trace._logits = self.hidden, {self.model.config.n_layers: self.final[-1]}
        return trace

    def checked_at(self, states: list[Tensor]) -> "Trace":
        """A new trace of another position, with its states h_0 .. h_l, (1, 1, d) each, and a check at layer
        l."""
        trace = Trace(self.model, self.config, self.shortlist)
        trace.hidden = list(states)
        trace.decided(math.inf)  # any threshold above 0 runs the check; nobody reads this one
        return trace


def checked_confidence(function, trace: Trace) -> float:
    """The confidence after the newest layer. Raises UserError for a value that is not a number in [0, 1]."""
    value = function(trace, trace.layer)
    try:
        confidence = float(value)
    except (TypeError, ValueError, RuntimeError):  # None, text, several numbers
        confidence = math.nan
    if not -ROUNDING <= confidence <= 1 + ROUNDING:
        name, shown = getattr(function, "__name__", repr(function)), " ".join(repr(value).split())[:60]
        where = f"confidence {name} at layer {trace.layer}"
        raise UserError(f"{where} returned {shown}; it must be one number from 0 to 1")
    return confidence


def head_flops(model: Transformer, layer: int, n: int) -> int:
    """Floating-point operations of one row's head over n tokens, multiply-adds counted twice: those of the
    unembedding, and of the layer's adapter if it has one."""
    weights = model.config.d_model * n
    if str(layer) in model.adapters:
        weights += model.adapters[str(layer)].numel()
    return 2 * weights
