"""Is the next token decided? The confidence functions, the pruning schedules, and the contrast of two layers.

Notation: h_l is the hidden state of the newest position after layer l, z_l = W norm_l(h_l) are its logits,
p_l = softmax(z_l), over the n current candidates (the whole vocabulary V unless there is a shortlist or
pruning). Logits and probabilities are float32. Confidence lies in [0, 1]; a token exits when it reaches the
threshold.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Number, read_choice
from common.errors import UserError
from common.plugins import find_function
from model import ModelConfig, Transformer

ALPHA = 0.1  # a token with at least this share of the largest probability is plausible (Li 2022, section 3.2)


class TraceView(Protocol):
    """The trace that a confidence function is given: the newest position of a pass, at the layers that it has
    gone through. (A protocol, because the class Trace in decoding/trace.py imports this file.)"""

    model: Transformer
    layer: int  # the newest layer l
    n: int  # number of candidates
    confidences: dict[int, float]  # layer checked before -> its confidence
    amateurs: dict[int, int]  # exit layer -> the layer that it was contrasted with, for the record

    def state(self, layer: int) -> Tensor:
        """h_j of any layer j <= l; layer 0 is the embedding: (d,)."""

    def logits(self, layer: int) -> Tensor:
        """z_j of any layer j <= l over the candidates, computed once, when it is first needed: (n,)
        float32."""

    def log_probs(self, layer: int) -> Tensor:
        """log p_j over the candidates: (n,) float32."""

    def stack(self, layers: list[int]) -> list[Tensor]:
        """z_j of several layers, which reads W only once: (n,) each."""


# ---------------------------------------------------------------- confidence functions

Confidence = Callable[[TraceView, int], Tensor | float]
FUNCTIONS: dict[str, Confidence] = {}


def register(name: str, reads_logits: bool = True) -> Callable[[Confidence], Confidence]:
    """Registers a confidence function (trace, layer) -> a number in [0, 1] under `name`. A function that
    reads only hidden states says reads_logits=False, so that its checks run no exit head."""

    def add(function: Confidence) -> Confidence:
        function.reads_logits = reads_logits
        FUNCTIONS[name] = function
        return function

    return add


def resolve(name: str | Confidence) -> Confidence:
    """The function registered under `name`, imported from "package.module:function", or `name` itself if it
    is a function. Raises UserError."""
    return name if callable(name) else find_function("confidence", name, FUNCTIONS, ("trace", "layer"))


@register("softmax")
def softmax(trace: TraceView, layer: int) -> float:
    """p_l(1st) - p_l(2nd) (CALM, Schuster 2022, section 3.5, softmax response)."""
    return margin(trace.logits(layer).softmax(-1))


@register("hidden", reads_logits=False)
def hidden(trace: TraceView, layer: int) -> Tensor:
    """max(0, cos(h_l, h_{l-1})) (CALM, section 3.5, hidden-state saturation; the max is ours)."""
    now, before = trace.state(layer).float(), trace.state(layer - 1).float()
    return F.cosine_similarity(now, before, dim=0).clamp(0, 1)


@register("classifier", reads_logits=False)
def classifier(trace: TraceView, layer: int) -> Tensor:
    """sigmoid(w_l norm_l(h_l) + b_l), trained to predict whether argmax p_l = argmax p_L (CALM, section 3.5,
    early-exit classifier; the norm and weights for each layer are ours). Raises UserError for a layer
    without one."""
    check_classifiers(trace.model.config, [layer])
    return classifier_logit(trace.model, trace.state(layer), layer).sigmoid()


def classifier_logit(model: Transformer, state: Tensor, layer: int) -> Tensor:
    """w_l norm_l(h_l) + b_l, whose gradient reaches only the classifier: (.., d) -> (..)."""
    weight = model.classifiers[str(layer)]  # (d + 1,): w, b
    normed = model.exit_norm(state, layer).detach().to(weight.dtype)
    return (normed @ weight[:-1] + weight[-1]).float()


def check_classifiers(config: ModelConfig, layers: list[int]) -> None:
    """Raises UserError for a layer that has no classifier."""
    for layer in layers:
        if layer not in config.classifiers:
            have = ", ".join(map(str, config.classifiers)) or "none"
            raise UserError(f"layer {layer} has no confidence classifier; layers with one: {have}")


@register("entropy")
def entropy(trace: TraceView, layer: int) -> Tensor:
    """1 - H(p_l) / log n."""
    log_p = trace.log_probs(layer)
    return (1 + (log_p.exp() * log_p).sum() / math.log(len(log_p))).clamp(0, 1)


@register("weighted")
def weighted(trace: TraceView, layer: int) -> float:
    """Margin of p_l contrasted with the fixed amateur layer m = max(1, floor(l/2)) (the Amsterdam study,
    Abdel Sadek 2024, after ACD, Gera 2023). Layer 1 is its own amateur: there all plausible tokens become
    equal, so the margin is 0 unless there is only one."""
    return margin(contrasted(trace, layer, halfway(layer)))


@register("jsd")
def jsd(trace: TraceView, layer: int) -> float:
    """Margin of p_l contrasted with the layer that `most_different` finds (the Amsterdam study, after DoLa,
    Chuang 2023); of p_l alone if there is none."""
    amateur = most_different(trace, layer)
    return margin(trace.log_probs(layer).exp() if amateur is None else contrasted(trace, layer, amateur))


def margin(probs: Tensor) -> float:
    """Difference of the two largest probabilities of (n,), in [0, 1]."""
    first, second = probs.topk(2).values.tolist()
    return first - second


# ---------------------------------------------------------------- contrast with an amateur layer


def halfway(layer: int) -> int:
    """max(1, floor(l/2))."""
    return max(1, layer // 2)


def most_different(trace: TraceView, layer: int, by_distance: bool = True) -> int | None:
    """The amateur (DoLa: premature) layer: argmax over j = 2 .. l-1 of JSD(p_l, p_j) / (l - j) (the Amsterdam
    study), or of JSD(p_l, p_j) alone (DoLa, Eq. 4). None if there is no such layer."""
    premature = list(range(2, layer))
    if len(premature) < 2:
        return premature[0] if premature else None
    log_q = torch.stack(trace.stack(premature)).log_softmax(-1)  # (l - 2, n)
    distance = layer - torch.tensor(premature, device=log_q.device) if by_distance else 1
    return premature[int((jensen_shannon(trace.log_probs(layer), log_q) / distance).argmax())]


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JSD(p, q) = KL(p‖m)/2 + KL(q‖m)/2 with m = (p + q)/2, natural logarithm, of finite log-probabilities
    (.., n): in [0, log 2]."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return (terms.sum(-1) / 2).clamp(0, math.log(2))


def plausible(log_p: Tensor) -> Tensor:
    """V_head = {x : p(x) >= ALPHA max p} of log-probabilities (n,), as a mask (Li 2022, section 3.2)."""
    return log_p >= log_p.max() + math.log(ALPHA)


def contrast(log_expert: Tensor, log_amateur: Tensor) -> Tensor:
    """The contrasted distribution of log-probabilities (n,), (n,): over V_head the softmax of log p - log q,
    scaled to the mass that p has there; p elsewhere (ACD, Gera 2023, Eq. 3-5). It sums to 1."""
    p, kept = log_expert.exp(), plausible(log_expert)
    log_ratio = (log_expert - log_amateur).masked_fill(~kept, -math.inf)
    return torch.where(kept, log_ratio.softmax(-1) * (p * kept).sum().clamp(max=1), p)


def contrasted(trace: TraceView, layer: int, amateur: int) -> Tensor:
    """The distribution of `layer` contrasted with that of `amateur`, (n,); the trace notes the choice."""
    trace.amateurs[layer] = amateur
    return contrast(trace.log_probs(layer), trace.log_probs(amateur))


# ---------------------------------------------------------------- vocabulary pruning


def decaying(trace: TraceView, k: int, k_min: int) -> int:
    """The first check keeps k of the candidates, if there are more. Otherwise, and at later checks, k_now of
    them shrink to k_next = max(k_min, k_now / (1 + (k_now - k_min) / k_min * l/L)) (the Amsterdam study)."""
    if not trace.confidences and k < trace.n:  # the first layer checked
        return k
    shrink = 1 + (trace.n - k_min) / k_min * trace.layer / trace.model.config.n_layers
    return max(k_min, math.ceil(trace.n / shrink))


def adaptive(trace: TraceView, k: int, k_min: int) -> int:
    """min(k, V (1 - 0.9 c)), but at least k_min; c is the confidence of the previous check (the Amsterdam
    study). V (1 - 0.9 c) is never below V/10, so the result is k if k <= V/10; k = V removes the cap."""
    sure = list(trace.confidences.values())[-1] if trace.confidences else 0.0
    return max(k_min, min(k, math.ceil(trace.model.config.vocab_size * (1 - 0.9 * sure))))


def fixed(trace: TraceView, k: int) -> int:
    """k at every layer (the Amsterdam study)."""
    return k


K = Number("K", 64, {"least": 2})
MIN = Number("MIN", 16, {"least": 2})
# Name -> a function (trace, *numbers) that returns how many candidates a confidence check keeps (None keeps
# all of them), and a description of its numbers.
SCHEDULES: dict[str, tuple[Callable[..., int] | None, tuple[Number, ...]]] = {
    "none": (None, ()),
    "fixed": (fixed, (K,)),
    "decaying": (decaying, (K, MIN)),
    "adaptive": (adaptive, (K, MIN)),
}


@functools.cache
def read_pruning(text: str) -> tuple[Callable[..., int] | None, list[int]]:
    """The schedule named by a text such as "decaying:64:16", and its numbers. Raises UserError."""
    name, numbers = read_choice("prune", text, {name: numbers for name, (_, numbers) in SCHEDULES.items()})
    if len(numbers) == 2 and numbers[1] > numbers[0]:
        raise UserError(f"prune is {text}; MIN is {numbers[1]}, above K, which is {numbers[0]}; lower it")
    return SCHEDULES[name][0], numbers
