"""The token that is emitted: contrastive prediction, repetition penalty, sampling, and judging drafts.

Dimensions: n candidates, V vocabulary, R rows. "Logits" here are whatever softmax turns into the distribution
that a token is taken from, contrasted ones among them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache import KVCache
from confidence import Trace, contrast, halfway, most_different, plausible
from decoding.flops import block_flops
from decoding.record import Counters, Token
from model import Transformer

# How the amateur layer of an expert layer is chosen: name -> (trace, layer) -> layer, or None for no
# contrast.
AMATEURS: dict[str, Callable[[Trace, int], int | None]] = {
    "half": halfway,
    "jsd": most_different,
    "dola": lambda trace, layer: most_different(trace, layer, by_distance=False),  # DoLa, Eq. 4
}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the fields are those of DecodeConfig."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    drafts: bool = False  # verified mode: what an early token was drawn from is kept, to judge it


@dataclass(frozen=True)
class Contrast:
    """How logits are contrasted with an amateur's; `amateur` is DecodeConfig.contrast, the rest its
    fields."""

    amateur: str = "half"
    form: str = "dcd"
    alpha: float = 0.1
    beta: float = 0.5
    amateur_temperature: float = 1.0


# ---------------------------------------------------------------- contrast


def dcd(log_p: Tensor, log_q: Tensor, settings: Contrast) -> Tensor:
    """log of the contrasted distribution, which sums to 1 (ACD, Gera 2023)."""
    return contrast(log_p, log_q, settings.alpha).log()


def ratio(log_p: Tensor, log_q: Tensor, settings: Contrast) -> Tensor:
    """log p - log q over V_head, nothing outside (Contrastive Decoding, Li 2022, Eq. 2; DoLa, Chuang 2023,
    Eq. 5)."""
    return (log_p - log_q).masked_fill(~plausible(log_p, settings.alpha), -math.inf)


def weighed(log_p: Tensor, log_q: Tensor, settings: Contrast) -> Tensor:
    """(1 + beta) log p - beta log q over V_head, nothing outside (O'Brien and Lewis 2023)."""
    mixed = (1 + settings.beta) * log_p - settings.beta * log_q
    return mixed.masked_fill(~plausible(log_p, settings.alpha), -math.inf)


# DecodeConfig.form -> (log p, log q, settings) -> logits (n,)
CONTRASTS = {"dcd": dcd, "ratio": ratio, "beta": weighed}


def contrast_logits(trace: Trace, layer: int, settings: Contrast, other: Tensor | None = None) -> Tensor:
    """Logits (n,) of `layer` over the candidates, contrasted. `other`: logits (V,) of a second model, the
    amateur then."""
    if other is not None:
        logits = other if trace.candidates is None else other[trace.candidates]
        log_q = (logits / settings.amateur_temperature).log_softmax(-1)
    else:
        fixed = settings.amateur.isdecimal()
        amateur = int(settings.amateur) if fixed else AMATEURS[settings.amateur](trace, layer)
        if amateur is None or amateur >= layer:
            return trace.log_probs(layer)
        trace.amateurs[layer] = amateur
        log_q = trace.log_probs(amateur)
    return CONTRASTS[settings.form](trace.log_probs(layer), log_q, settings)


class Companion:
    """A second model in step with the first, the amateur of Contrastive Decoding: always at full depth, with
    a staircase of its own, that `run_pass` of decode.py advances."""

    def __init__(self, model: Transformer, length: int, run_pass: Callable, counters: Counters):
        self.model, self.cache, self.run_pass, self.counters = (
            model,
            KVCache(model, length),
            run_pass,
            counters,
        )

    def logits(self, text: list[int]) -> Tensor:
        """Its logits (V,) for the token after `text`, which begins with what it has read already."""
        trace, first, shape = Trace(self.model), self.cache.filled[0], self.model.config
        self.cache.waive(len(text) - 1)  # only its newest position predicts
        self.run_pass(self.model, self.cache, text[first:], trace, {})
        self.counters.block_flops += shape.n_layers * block_flops(shape, first, len(text))
        self.counters.head_flops += 2 * self.model.unembed.numel()
        return trace.final[-1]


# ---------------------------------------------------------------- from logits to a token


class Predictor:
    """Takes the next token from the distribution of the layer that a pass reached."""

    def __init__(
        self,
        sampling: Sampling,
        contrast: Contrast | None,
        companion: Companion | None,
        counters: Counters,
        device: torch.device,
    ):
        self.sampling, self.contrast, self.companion, self.counters = sampling, contrast, companion, counters
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def token(self, trace: Trace, layer: int, text: list[int]) -> Token:
        """The token after `text` from the exit head of `layer`, or, from layer L + 1, from the head over the
        vocabulary."""
        source = trace
        if trace.final is not None:  # the pass reached the top
            source, layer = trace.whole(), trace.model.config.n_layers
        if self.contrast is None:
            logits = source.logits(layer)  # (n,)
        else:
            other = self.companion.logits(text) if self.companion else None
            logits = contrast_logits(source, layer, self.contrast, other)
        logits = penalize(logits, text, self.sampling.repetition_penalty, source.candidates)
        choice, probs = pick(logits, self.sampling, self.generator)
        drawn_from = source.spread(probs) if self.sampling.drafts else None
        token = Token(int(source.token(choice)), layer, drawn_from, amateurs=source.amateurs)
        token.explain(trace)
        if source is not trace:
            self.counters.head_flops += sum(
                source.flops.values()
            )  # those of the trace are counted with its pass
        return token

    def judge(self, logits: Tensor, drafts: list[Token], seen: list[int]) -> tuple[int, int | None]:
        """How many drafts the full model keeps, and the token that follows them. Row i of its logits (R, V)
        judges draft i: kept if it is the argmax; sampled, with probability min(1, p/q), else replaced by a
        sample of max(p - q, 0) (Leviathan 2023, Chen 2023). The row after the last draft, if there is one,
        gives one more token. seen: the tokens before the drafts."""
        seen, penalty = list(seen), self.sampling.repetition_penalty
        for i, (row, draft) in enumerate(zip(logits, drafts)):
            row = penalize(row, seen, penalty)
            seen.append(draft.id)
            replacement = self.replacement(row, draft)
            if replacement is not None:
                return i, replacement
        if len(logits) == len(drafts):
            return len(drafts), None
        return len(drafts), pick(penalize(logits[-1], seen, penalty), self.sampling, self.generator)[0]

    def replacement(self, logits: Tensor, draft: Token) -> int | None:
        """The token in a draft's place, by the full model's logits (V,); None: the draft stays."""
        if self.sampling.temperature == 0:
            best = int(logits.argmax())
            return None if best == draft.id else best
        p, q = distribution(logits, self.sampling), draft.probs
        if torch.rand((), generator=self.generator, device=p.device) * q[draft.id] < p[draft.id]:
            return None  # with probability min(1, p/q)
        rest = (p - q).clamp(min=0)
        rest = rest if rest.sum() > 0 else p  # nothing is left where p and q differ by rounding alone
        return int(torch.multinomial(rest, 1, generator=self.generator))


def penalize(logits: Tensor, seen: list[int], penalty: float, candidates: Tensor | None = None) -> Tensor:
    """Logits (n,) of tokens that occurred, divided by the penalty where positive, else times it (after CTRL,
    Keskar 2019, which divides)."""
    if penalty == 1:
        return logits
    tokens = torch.arange(len(logits), device=logits.device) if candidates is None else candidates
    occurred = torch.isin(tokens, torch.tensor(seen, device=logits.device))
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, Tensor | None]:
    """Index of the chosen candidate of logits (n,): the argmax at temperature 0, else a sample; and what it
    was drawn from, (n,)."""
    if sampling.temperature == 0:
        return int(logits.argmax()), None
    probs = distribution(logits, sampling)
    return int(torch.multinomial(probs, 1, generator=generator)), probs


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is sampled from: softmax(logits / temperature) of (n,), cut to the top k, then to the fewest of
    mass >= top_p, renormalized."""
    probs, index = ((logits - logits.max()) / sampling.temperature).softmax(-1).sort(descending=True)
    if sampling.top_k is not None:
        probs[sampling.top_k :] = 0
    if sampling.top_p < 1:
        probs = probs / probs.sum()
        before = probs.cumsum(-1) - probs  # mass of the more probable ones
        beyond = before >= sampling.top_p
        beyond[0] = False  # the best one stays
        probs = probs.masked_fill(beyond, 0)
    return torch.zeros_like(probs).scatter(0, index, probs / probs.sum())
