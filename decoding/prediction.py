"""The token that is emitted: contrastive prediction, repetition penalty, sampling, and judging drafts.

Dimensions: n candidates, V vocabulary, R rows. "Scores" are what softmax turns into the distribution that a token is taken from.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from confidence import Trace, contrast, halfway, most_different, plausible

if TYPE_CHECKING:
    from decoding.record import Token
    from decoding.settings import DecodeConfig

# How the amateur layer of an expert layer is chosen: name -> (trace, layer) -> layer, or None for no contrast.
AMATEURS: dict[str, Callable[[Trace, int], int | None]] = {
    "half": halfway,
    "jsd": most_different,
    "dola": lambda trace, layer: most_different(trace, layer, by_distance=False),  # DoLa, Eq. 4
}


def _ratio(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """log p - log q over V_head, nothing outside (Contrastive Decoding, Li 2022, Eq. 2; DoLa, Chuang 2023, Eq. 5)."""
    return (log_p - log_q).masked_fill(~plausible(log_p, alpha), -math.inf)


def _beta(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + beta) log p - beta log q over V_head, nothing outside (O'Brien and Lewis 2023)."""
    return ((1 + beta) * log_p - beta * log_q).masked_fill(~plausible(log_p, alpha), -math.inf)


# Contrasted scores: name -> (log p, log q, alpha, beta) -> (n,).
FORMS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "dcd": lambda log_p, log_q, alpha, beta: contrast(log_p, log_q, alpha).log(),
    "ratio": _ratio,
    "beta": _beta,
}


def scores(trace: Trace, layer: int, config: "DecodeConfig", other: Tensor | None = None) -> Tensor:
    """What the token of `layer` is taken from, over the candidates: (n,). `other`: logits (V,) of a second model, the amateur then."""
    if config.predict == "own":
        return trace.logits(layer)
    if other is not None:
        log_q = (other if trace.candidates is None else other[trace.candidates]).div(config.amateur_temperature).log_softmax(-1)
    else:
        amateur = int(config.contrast) if config.contrast.isdecimal() else AMATEURS[config.contrast](trace, layer)
        if amateur is None or amateur >= layer:
            return trace.log_probs(layer)
        trace.amateurs[layer] = amateur
        log_q = trace.log_probs(amateur)
    return FORMS[config.form](trace.log_probs(layer), log_q, config.alpha, config.beta)


def penalize(scores: Tensor, seen: list[int], penalty: float, candidates: Tensor | None = None) -> Tensor:
    """Scores (n,) of tokens that occurred, divided by the penalty where positive, else times it (CTRL, Keskar 2019, section 4.1)."""
    if penalty == 1:
        return scores
    ids = torch.tensor(seen, device=scores.device)
    occurred = torch.isin(torch.arange(len(scores), device=scores.device) if candidates is None else candidates, ids)
    return torch.where(occurred, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def pick(scores: Tensor, config: "DecodeConfig", generator: torch.Generator) -> tuple[int, Tensor | None]:
    """Index of the chosen candidate of scores (n,): the argmax at temperature 0, else a sample; and what it was drawn from, (n,)."""
    if config.temperature == 0:
        return int(scores.argmax()), None
    probs = distribution(scores, config)
    return int(torch.multinomial(probs, 1, generator=generator)), probs


def judge(
    logits: Tensor, drafts: list["Token"], seen: list[int], config: "DecodeConfig", generator: torch.Generator
) -> tuple[int, int | None]:
    """How many drafts the full model keeps, and the token that follows them. Row i of its logits (R, V) judges draft i: kept if it is the
    argmax; sampled, with probability min(1, p/q), else replaced by a sample of max(p - q, 0) (Leviathan 2023, Chen 2023). The row after
    the last draft, if there is one, gives one more token. seen: the tokens before the drafts."""
    seen = list(seen)
    for i, (row, draft) in enumerate(zip(logits, drafts)):
        row = penalize(row, seen, config.repetition_penalty)
        seen.append(draft.id)
        if config.temperature == 0:
            if (best := int(row.argmax())) != draft.id:
                return i, best
            continue
        p = distribution(row, config)
        if torch.rand((), generator=generator, device=p.device) * draft.probs[draft.id] >= p[draft.id]:
            rest = (p - draft.probs).clamp(min=0)
            return i, int(torch.multinomial(rest if rest.sum() > 0 else p, 1, generator=generator))
    if len(logits) == len(drafts):
        return len(drafts), None
    return len(drafts), pick(penalize(logits[-1], seen, config.repetition_penalty), config, generator)[0]


def distribution(scores: Tensor, config: "DecodeConfig") -> Tensor:
    """What is sampled from: softmax(scores / temperature) of (n,), cut to the top k, then to the fewest of mass >= top_p, renormalized."""
    probs, index = ((scores - scores.max()) / config.temperature).softmax(-1).sort(descending=True)
    if config.top_k is not None:
        probs[config.top_k :] = 0
    if config.top_p < 1:
        probs = probs / probs.sum()
        probs[probs.cumsum(-1) - probs >= config.top_p] = 0
    return torch.zeros_like(probs).scatter(0, index, probs / probs.sum())
