"""The token that is emitted: contrastive prediction, repetition penalty, sampling, and the judgement of
drafts.

Dimensions: n candidates, V vocabulary, R rows. "Logits" are whatever softmax turns into the distribution that
a token is taken from, contrasted or not.
"""

import math

import torch
from torch import Tensor

from cache import KVCache
from common.errors import UserError
from confidence import contrast, halfway, most_different, plausible
from decoding.record import Counters, Token, block_flops
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from model import Transformer

AMATEUR_TEMPERATURE = 0.5  # of the second model's distribution (Contrastive Decoding, Li 2022)


# ---------------------------------------------------------------- contrast


def contrast_logits(trace: Trace, layer: int, predict: str, other: Tensor | None = None) -> Tensor:
    """Logits (n,) of `layer` over the candidates, contrasted as `predict` says. `other` holds the logits (V,)
    of the second model of Contrastive Decoding."""
    log_p = trace.log_probs(layer)
    if predict == "cd":
        logits = other if trace.candidates is None else other[trace.candidates]
        return log_ratio(log_p, (logits / AMATEUR_TEMPERATURE).log_softmax(-1))
    amateur = halfway(layer) if predict == "acd" else most_different(trace, layer, by_distance=False)
    if amateur is None or amateur >= layer:
        return log_p
    trace.amateurs[layer] = amateur
    log_q = trace.log_probs(amateur)
    return contrast(log_p, log_q).log() if predict == "acd" else log_ratio(log_p, log_q)


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q over V_head, -inf outside (Contrastive Decoding, Li 2022; DoLa, Chuang 2023,
    Eq. 5)."""
    return (log_p - log_q).masked_fill(~plausible(log_p), -math.inf)


class Companion:
    """A second model in step with the first, the amateur of Contrastive Decoding: always at full depth, with
    a cache of its own."""

    def __init__(self, model: Transformer, length: int, counters: Counters):
        self.model, self.cache, self.counters = model, KVCache(model, length), counters

    def logits(self, text: list[int]) -> Tensor:
        """The companion's logits (V,) after `text`, which begins with the tokens that it has already read."""
        first, shape = self.cache.begun, self.model.config
        self.cache.begin(self.model.embed(torch.tensor([text[first:]], device=self.model.device)))
        for block in self.model.blocks:
            x = self.cache.climb(block)
        self.counters.block_flops += shape.n_layers * block_flops(shape, first, len(text))
        self.counters.head_flops += 2 * shape.vocab_size * shape.d_model
        return self.model.head(x[0, -1:])[0]


def check_amateur(amateur: Transformer | None, model: Transformer, predict: str, length: int) -> None:
    """Raises UserError if `predict` is cd without an amateur or the reverse, and for an amateur whose
    vocabulary has another size than the model's, or that has fewer than `length` positions."""
    if (predict == "cd") != (amateur is not None):
        there = "no amateur" if amateur is None else "an amateur"
        raise UserError(f"predict is {predict}, but there is {there}; --predict cd and --amateur go together")
    if amateur is None:
        return
    ours, theirs = model.config.vocab_size, amateur.config.vocab_size
    if ours != theirs:
        raise UserError(f"the amateur has {theirs} tokens and the model {ours}; use one with {ours}")
    room = amateur.config.max_len
    if room < length:
        raise UserError(f"the amateur has {room} positions of {length} needed; shorten prompt or answer")


# ---------------------------------------------------------------- from logits to a token


class Predictor:
    """Takes the next token from the distribution of the layer that a pass reached."""

    def __init__(self, config: DecodeConfig, companion: Companion | None, counters: Counters, device):
        self.config, self.companion, self.counters = config, companion, counters
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def token(self, trace: Trace, layer: int, text: list[int]) -> Token:
        """The token after `text`, from the exit head of `layer`, or from the LM head if the pass reached
        it."""
        source = trace
        if trace.final is not None:
            source, layer = trace.at_the_top(), trace.model.config.n_layers
        if self.config.predict == "own":
            logits = source.logits(layer)  # (n,)
        else:
            other = self.companion.logits(text) if self.companion else None
            logits = contrast_logits(source, layer, self.config.predict, other)
        logits = penalize(logits, text, self.config.repetition_penalty, source.candidates)
        choice, probs = pick(logits, self.config, self.generator)
        drawn_from = source.spread(probs) if self.config.verify else None
        token = Token(int(source.token(choice)), layer, drawn_from, amateurs=source.amateurs)
        token.explain(trace)
        if source is not trace:  # the heads of the trace itself are counted with its pass
            self.counters.head_flops += sum(source.flops.values())
        return token

    def judge(self, logits: Tensor, drafts: list[Token], seen: list[int]) -> tuple[int, int | None]:
        """How many drafts the full model keeps, and the token that follows them. Row i of its logits (R, V)
        judges draft i. Greedy: a draft is kept if it is the argmax. Sampling: it is kept with probability
        min(1, p/q), else replaced by a sample of max(p - q, 0) (Leviathan 2023, Chen 2023). The row after the
        last draft, if there is one, yields one more token. seen: the tokens before the drafts."""
        seen, penalty = list(seen), self.config.repetition_penalty
        for i, (row, draft) in enumerate(zip(logits, drafts)):
            row = penalize(row, seen, penalty)
            seen.append(draft.id)
            replacement = self.replacement(row, draft)
            if replacement is not None:
                return i, replacement
        if len(logits) == len(drafts):
            return len(drafts), None
        return len(drafts), pick(penalize(logits[-1], seen, penalty), self.config, self.generator)[0]

    def replacement(self, logits: Tensor, draft: Token) -> int | None:
        """The token that replaces a draft, by the full model's logits (V,); None if the draft is kept."""
        if self.config.temperature == 0:
            best = int(logits.argmax())
            return None if best == draft.id else best
        p, q = distribution(logits, self.config), draft.probs
        if torch.rand((), generator=self.generator, device=p.device) * q[draft.id] < p[draft.id]:
            return None  # with probability min(1, p/q)
        rest = (p - q).clamp(min=0)
        rest = rest if rest.sum() > 0 else p  # nothing is left where p and q differ by rounding alone
        return int(torch.multinomial(rest, 1, generator=self.generator))


def penalize(logits: Tensor, seen: list[int], penalty: float, candidates: Tensor | None = None) -> Tensor:
    """Logits (n,) in which those of tokens that occurred are divided by the penalty if they are positive, and
    multiplied by it if not (after CTRL, Keskar 2019, which always divides)."""
    if penalty == 1:
        return logits
    tokens = torch.arange(len(logits), device=logits.device) if candidates is None else candidates
    occurred = torch.isin(tokens, torch.tensor(seen, device=logits.device))
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def pick(logits: Tensor, config: DecodeConfig, generator: torch.Generator) -> tuple[int, Tensor | None]:
    """The index of the chosen candidate, from logits (n,): the argmax at temperature 0, else a sample, with
    the distribution (n,) that it was drawn from."""
    if config.temperature == 0:
        return int(logits.argmax()), None
    probs = distribution(logits, config)
    return int(torch.multinomial(probs, 1, generator=generator)), probs


def distribution(logits: Tensor, config: DecodeConfig) -> Tensor:
    """The distribution to sample from: softmax(logits / temperature), (n,), cut to the top_k most probable,
    then to the smallest set with a mass of at least top_p, renormalized."""
    probs, index = ((logits - logits.max()) / config.temperature).softmax(-1).sort(descending=True)
    if config.top_k is not None:
        probs[config.top_k :] = 0
    if config.top_p < 1:
        probs = probs / probs.sum()
        before = probs.cumsum(-1) - probs  # the mass of more probable candidates
        beyond = before >= config.top_p
        beyond[0] = False  # the best one stays
        probs = probs.masked_fill(beyond, 0)
    return torch.zeros_like(probs).scatter(0, index, probs / probs.sum())
