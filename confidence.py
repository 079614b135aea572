"""Is the next token decided? The trace of one position, vocabulary pruning, the confidence functions, and
contrast.

Notation: h_l the hidden state of the newest position after layer l, z_l = W norm_l(h_l) its logits, p_l =
softmax(z_l), over the n current candidates (the whole vocabulary V unless there is a shortlist or pruning).
Logits and probabilities are float32. Confidences lie in [0, 1]; exit when c >= threshold.
"""

import common.threads  # noqa: F401  before torch

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.plugins import find_function
from decoding.asking import ask
from decoding.flops import head_flops
from formats.classifiers import belief, numbers
from formats.weights import lookup
from model import Transformer

ALPHA = 0.1  # plausibility: tokens of at least this share of the largest probability (Li 2022, section 3.2)


class Trace:
    """The newest position of one pass, layer by layer. `hidden` holds h_0 (the embedding) .. h_l, each (R,
    d), the newest position last. Logits are computed when asked for, once, over the current candidates. These
    begin as the vocabulary, or as a `shortlist` (decoding/shortlist.py), and `decided` narrows them."""

    def __init__(
        self,
        model: Transformer,
        confidence: "Confidence | None" = None,
        prune: str = "none",
        prune_k: int = 64,
        prune_min: int = 16,
        premature_layers: tuple[int, ...] | None = None,
        shortlist=None,
        classifiers: dict | None = None,
    ):
        self.model = model
        self.classifiers = {} if classifiers is None else classifiers  # layer -> made ready, once a text
        self.confidence = confidence
        self.hidden: list[Tensor] = []
        self.final: Tensor | None = None  # (R, V) logits of the rows that the head took, if any did
        self.candidates: Tensor | None = None  # (n,) int64 token ids; None is the whole vocabulary
        self.n = model.config.vocab_size  # how many candidates there are
        self.confidences: dict[int, float] = {}  # of each layer asked
        self.thresholds: dict[int, float] = {}  # that they had to reach
        self.amateurs: dict[int, int] = {}  # exit layer -> the layer it was contrasted with
        self.flops: dict[int, int] = {}  # layer -> floating-point operations of its head
        self._schedule, self._limits = SCHEDULES[prune], (prune_k, prune_min)
        self._premature = premature_layers
        self._logits: dict[int, Tensor] = {}  # layer -> z over the candidates, (n,)
        self._guesses: dict[int, Tensor] = {}  # layer asked -> its best token first: pruning may drop it
        self._weights: list[Tensor] | None = [
            model.head_weight
        ]  # (n, d) side by side; None: not gathered yet
        if shortlist is not None:
            self.candidates, self._weights, self.n = shortlist.ids, shortlist.weights, len(shortlist.ids)

    @property
    def layer(self) -> int:
        """The newest layer l."""
        return len(self.hidden) - 1

    def decided(self, threshold: float) -> bool:
        """Whether the confidence after the newest layer reaches the threshold. A threshold of 0 is reached
        without asking."""
        self.thresholds[self.layer] = threshold
        if threshold <= 0:
            return True
        if getattr(self.confidence, "reads_logits", True):
            self.prune()  # first, so that amateurs, too, are read over few candidates
        self.confidences[self.layer] = ask(self.confidence, self)
        return self.confidences[self.layer] >= threshold

    def prune(self) -> None:
        """Vocabulary pruning: of the candidates so far, those of largest z_l stay, as many as the schedule
        says; and all logits known so far are cut to these."""
        if self._schedule is None:
            return
        newest, size = self.logits(self.layer), self._schedule(self, *self._limits)
        if size >= self.n:
            return
        for layer in self.confidences:  # what earlier exits would have said may go with the candidates
            if layer not in self._guesses:
                self._guesses[layer] = self.token(self.logits(layer).argmax(keepdim=True))
        best, index = newest.topk(size)  # (size,) by falling z_l
        self.candidates = self.token(index)
        self._weights, self.n = None, size
        del self._logits[self.layer]  # `best` has been cut already
        self._logits = {layer: logits[index] for layer, logits in self._logits.items()}
        self._logits[self.layer], self._guesses[self.layer] = best, self.candidates

    def logits(self, layer: int) -> Tensor:
        """z of `layer` <= l over the candidates: (n,)."""
        return self.stack([layer])[0]

    def log_probs(self, layer: int) -> Tensor:
        """log p of `layer` over the candidates: (n,)."""
        return self.logits(layer).log_softmax(-1)

    def stack(self, layers: list[int]) -> list[Tensor]:
        """z of several layers, those not known yet in one product, so that W is read once: (n,) each."""
        missing = [layer for layer in layers if layer not in self._logits]
        if missing:
            if self._weights is None:
                self._weights = [lookup(self.model.unembed, self.candidates)]
            normed = [self.model.exit_norm(self.hidden[layer][-1:], layer) for layer in missing]
            rows = normed[0] if len(normed) == 1 else torch.cat(normed)  # (m, d)
            parts = [self.model.score(rows, weight) for weight in self._weights]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)  # (m, n)
            self._logits.update(zip(missing, logits.unbind()))
            self.flops.update({layer: head_flops(self.model.config, layer, self.n) for layer in missing})
        return [self._logits[layer] for layer in layers]

    def token(self, index: int | Tensor) -> int | Tensor:
        """Token ids of candidates, given by their index."""
        return index if self.candidates is None else self.candidates[index]

    def guess(self, layer: int) -> int:
        """Token id of the most probable candidate at `layer`, of those that there were when it was asked."""
        return int(
            self._guesses[layer][0] if layer in self._guesses else self.token(self.logits(layer).argmax())
        )

    def spread(self, probs: Tensor | None) -> Tensor | None:
        """Probabilities of the candidates (n,) as those of the vocabulary (V,)."""
        if probs is None or self.candidates is None:
            return probs
        return probs.new_zeros(self.model.config.vocab_size).scatter(0, self.candidates, probs)

    def whole(self) -> "Trace":
        """The same position at the last layer over the whole vocabulary."""
        trace, L = Trace(self.model, premature_layers=self._premature), self.model.config.n_layers
        trace.hidden, trace._logits = self.hidden, {L: self.final[-1]}
        return trace

    def premature(self, layer: int) -> list[int]:
        """J of `layer`: the layers below it that may serve as its amateur; by default from 2 on."""
        return [j for j in (range(2, layer) if self._premature is None else self._premature) if j < layer]


# ---------------------------------------------------------------- vocabulary pruning


def decaying(trace: Trace, k: int, k_min: int) -> int:
    """k first (where there are no more than k candidates, at once the next), then k_next = max(k_min, k_now /
    (1 + (k_now - k_min) / k_min * l/L)), rounded up."""
    if not trace.confidences and k < trace.n:  # the first layer asked
        return k
    shrink = 1 + (trace.n - k_min) / k_min * trace.layer / trace.model.config.n_layers
    return max(k_min, math.ceil(trace.n / shrink))


def adaptive(trace: Trace, k: int, k_min: int) -> int:
    """min(k, V (1 - 0.9 c)) with c the confidence of the previous check, at least k_min. Since this is never
    below V/10, k caps it wherever k <= V/10; the uncapped form is k = V."""
    sure = list(trace.confidences.values())[-1] if trace.confidences else 0.0
    return max(k_min, min(k, math.ceil(trace.model.config.vocab_size * (1 - 0.9 * sure))))


# Name -> (trace, prune_k, prune_min) -> how many candidates to keep once an exit layer is asked; None keeps
# all.
SCHEDULES: dict[str, Callable[[Trace, int, int], int] | None] = {
    "none": None,
    "fixed": lambda trace, k, k_min: k,
    "decaying": decaying,
    "adaptive": adaptive,
}


# ---------------------------------------------------------------- confidence functions

Confidence = Callable[[Trace, int], Tensor | float]
FUNCTIONS: dict[str, Confidence] = {}


def register(name: str, reads_logits: bool = True) -> Callable[[Confidence], Confidence]:
    """Registers a confidence function (trace, layer) -> a number in [0, 1] under `name`. Where it reads hidden
    states alone, say reads_logits=False: no head is computed for its check."""

    def add(function: Confidence) -> Confidence:
        function.reads_logits = reads_logits
        FUNCTIONS[name] = function
        return function

    return add


def resolve(name: str | Confidence) -> Confidence:
    """The function registered under `name`, or that "package.module:function" imports, or `name` itself if
    callable. Raises UserError."""
    return name if callable(name) else find_function("confidence", name, FUNCTIONS, ("trace", "layer"))


@register("softmax")
def softmax(trace: Trace, layer: int) -> float:
    """p_l(1st) - p_l(2nd) (CALM, Schuster 2022, section 3.5, softmax response)."""
    return margin(trace.logits(layer).softmax(-1))


@register("hidden", reads_logits=False)
def hidden(trace: Trace, layer: int) -> float:
    """max(0, cos(h_l, h_{l-1})) (CALM, section 3.5, hidden-state saturation)."""
    now, before = trace.hidden[layer][-1].float(), trace.hidden[layer - 1][-1].float()
    a, b, product = numbers(
        now.dot(now), before.dot(before), now.dot(before)
    )  # operations on tensors cost more
    return min(max(product / max(math.sqrt(a * b), 1e-12), 0.0), 1.0)


@register("classifier", reads_logits=False)
def classifier(trace: Trace, layer: int) -> float:
    """sigmoid(w_l norm_l(h_l) + b_l), trained to predict argmax p_l = argmax p_L (CALM, section 3.5,
    early-exit classifier). Raises UserError for a layer without one."""
    return belief(trace.model, trace.hidden[layer][-1:], layer, trace.classifiers)


@register("entropy")
def entropy(trace: Trace, layer: int) -> Tensor:
    """1 - H(p_l) / log n."""
    log_p = trace.log_probs(layer)
    return (1 + (log_p.exp() * log_p).sum() / math.log(len(log_p))).clamp(0, 1)


@register("weighted")
def weighted(trace: Trace, layer: int) -> float:
    """Margin of p_l contrasted with the fixed amateur m = max(1, floor(l/2)) (after ACD, Gera 2023). Layer 1
    is its own amateur: there the plausible tokens become equal, and the margin is 0 unless there is one
    alone."""
    return margin(contrasted(trace, layer, halfway(trace, layer)))


def halfway(trace: Trace, layer: int) -> int:
    """max(1, floor(l/2))."""
    return max(1, layer // 2)


@register("jsd")
def jsd(trace: Trace, layer: int) -> float:
    """Margin of p_l contrasted with the layer that `most_different` finds (after DoLa, Chuang 2023); of p_l
    alone where there is none."""
    amateur = most_different(trace, layer)
    return margin(trace.log_probs(layer).exp() if amateur is None else contrasted(trace, layer, amateur))


def most_different(trace: Trace, layer: int, by_distance: bool = True) -> int | None:
    """argmax over j in J of JSD(p_l, p_j) / (l - j), or of JSD(p_l, p_j) alone as in DoLa, Eq. 4. None where
    J is empty."""
    premature = trace.premature(layer)
    if len(premature) < 2:
        return premature[0] if premature else None
    log_p = trace.log_probs(layer)
    log_q = torch.stack(trace.stack(premature)).log_softmax(-1)  # (|J|, n)
    distance = layer - torch.tensor(premature, device=log_q.device) if by_distance else 1
    return premature[int((jensen_shannon(log_p, log_q) / distance).argmax())]


def margin(probs: Tensor) -> float:
    """Difference of the two largest probabilities of (n,), in [0, 1]."""
    first, second = probs.topk(2).values.tolist()
    return first - second


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD(p, q) = KL(p‖m)/2 + KL(q‖m)/2 with m = (p + q)/2, natural logarithm, of finite log-probabilities
    (..., n): in [0, log 2]."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return (terms.sum(-1) / 2).clamp(0, math.log(2))


def plausible(log_p: Tensor, alpha: float = ALPHA) -> Tensor:
    """V_head = {x : p(x) >= alpha max p} of log-probabilities (n,), as a mask (Li 2022, section 3.2)."""
    return log_p >= log_p.max() + math.log(alpha)


def contrast(log_expert: Tensor, log_amateur: Tensor, alpha: float = ALPHA) -> Tensor:
    """The contrasted distribution p_DCD of log-probabilities (n,), (n,): over V_head the softmax of log p -
    log q, scaled to the mass that p has there; p elsewhere (ACD, Gera 2023, Eq. 3-5). It sums to 1."""
    p, head = log_expert.exp(), plausible(log_expert, alpha)
    ratio = (log_expert - log_amateur).masked_fill(~head, -math.inf)
    return torch.where(head, ratio.softmax(-1) * (p * head).sum().clamp(max=1), p)


def contrasted(trace: Trace, layer: int, amateur: int) -> Tensor:
    """p_DCD(l, m), the choice of m noted in the trace."""
    trace.amateurs[layer] = amateur
    return contrast(trace.log_probs(layer), trace.log_probs(amateur))
