"""Adaptive drafting (`draft = auto`): chooses the exit layer, the threshold and the number of drafts with the
most expected tokens per second, based on what was observed so far and on a table of costs. If nothing beats
the full model, it decodes at full depth. After DEL (Entezari Zarch 2025), which chooses layer and number of
drafts; here, costs are in seconds, not in numbers of layers.

It counts, for every exit layer and range of confidence, how often the full model agreed with the exit. The
exit in use is observed with every draft that is judged, up to the first wrong one, and with every
confidence below the threshold, because such a pass goes to the top. The other exits are checked now and
then, after a round has been judged, at each of its positions: the passes of the round have left the states
of all layers there (DEL calls these shadow tokens). A round begins with the first pass after a judgement
and ends with the next judgement.

This only decides how long to draft, so the output stays exact.

Dimensions: E exit layers, B bins of confidence, N largest number of drafts.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from decoding.costs import Costs, costs_of
from decoding.prediction import distribution, penalize
from decoding.record import Token
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from model import Transformer

BINS = 16  # of confidence
DRAFTS = 15  # the largest number of drafts in a round
DOUBT = 1.0  # pseudo-count of rejected drafts at each exit below layer L, a pessimistic prior
MARGIN = 0.01  # drafting must promise to be faster than full depth by this share
FADING = 0.998  # each observation multiplies older weights by this: about the last 500 of an exit count
START = 2.0  # what exploring may cost at first, in full-depth tokens
SHARE = 0.01  # what exploring may cost afterwards, as a share of the decoding time
RENEWAL = 16  # observations until the plan is made anew
LOWEST = 1e-9  # the lowest threshold: at 0 there would be no check, and nothing to learn from


@dataclass(frozen=True)
class Plan:
    """How a round is drafted: up to `drafts` tokens from the exit at `layer`, as long as the confidence
    reaches the threshold, then a pass to the top. `drafts` = 0 means full depth. `pace` is the expected time
    per token in seconds."""

    layer: int
    threshold: float
    drafts: int
    pace: float


class Drafting:
    """What has been learned, and the plan that follows from it. One object may serve several texts of one
    kind, under the same settings: its choices depend only on the costs and on the texts."""

    def __init__(self, costs: Costs):
        self.costs, self.layers = costs, list(costs.check)
        self.observed = np.zeros((len(self.layers), BINS))  # how often a confidence fell into a bin
        self.agreed = np.zeros((len(self.layers), BINS))  # how often the full model agreed there
        self.full = Plan(0, 1.0, 0, pace=costs.layers * costs.block[1] + costs.top[1])
        certain = np.full((len(self.layers), BINS), 1e9)
        # Seconds per token if all drafts were kept, (E,):
        self.ideal = expected_paces(costs, certain, certain).min((1, 2))
        self.plan = self.full
        self.news = 0  # observations since the plan was made
        self.spent = 0.0  # seconds of decoding, by the table of costs
        self.explored = 0.0  # seconds that exploring has added to them

    @classmethod
    def of(cls, model: Transformer, config: DecodeConfig) -> "Drafting":
        """A new object, which has observed nothing yet and has only the costs of passes."""
        return cls(costs_of(model, config))

    def exits(self, drafts: int) -> dict[int, float]:
        """The exit of the next pass with its threshold; none once the round has all the drafts planned, so
        that the pass goes to the top."""
        if drafts >= self.plan.drafts:
            return {}
        return {self.plan.layer: self.plan.threshold}

    def learn(self, run, passes: list[Trace], drafts: list[Token], settled: list[Token], kept: int) -> None:
        """Learns from a round of a run (Run in decode.py) that has been judged: from its passes, the last of
        which went to the top, its drafts, and the tokens that it settled: the `kept` drafts, then the full
        model's own. The run's text ends with these."""
        deep = passes[-1]
        first = len(run.text) - len(settled)  # where the tokens of the round begin in the text
        for number, draft in enumerate(drafts[: kept + 1]):  # those after a wrong one tell nothing
            self.observe(self.plan.layer, draft.confidences[self.plan.layer], float(number < kept))
        known = sum(deep.flops.values())
        if kept == len(drafts):  # then the checks of the last pass were about the settled text, too
            for layer, confidence in deep.confidences.items():
                agreed = agreement(run.config, run.text, deep, layer, deep.final[-1], first + kept)
                self.observe(layer, confidence, agreed)
        run.counters.confidence_flops += sum(deep.flops.values()) - known  # heads that `agreement` needed
        if self.affordable():
            for number in range(min(kept + 1, len(deep.final))):
                self.explore(run, passes, number, first + number)
        self.spent += len(settled) * self.plan.pace
        if self.news >= RENEWAL:
            self.plan, self.news = self.best(), 0

    def affordable(self) -> bool:
        """Whether the cost of exploring one more position is within what may be spent on exploring."""
        cost = sum(self.costs.check[layer] for layer in self.rivals())
        return self.explored + cost <= START * self.full.pace + SHARE * self.spent

    def rivals(self) -> list[int]:
        """The exits that are not in use and could be better, if all of their drafts were kept."""
        better = [layer for layer, ideal in zip(self.layers, self.ideal) if ideal < self.plan.pace]
        return [layer for layer in better if layer != self.plan.layer]

    def explore(self, run, passes: list[Trace], number: int, at: int) -> None:
        """Checks the confidence of every rival at position `number` of a round, counted from 0, whose token
        is at index `at` of the text."""
        deep, states = passes[-1], states_of(passes, number)
        for layer in self.rivals():
            trace = deep.checked_at(states[: layer + 1])
            agreed = agreement(run.config, run.text, trace, layer, deep.final[number], at)
            self.observe(layer, trace.confidences[layer], agreed)
            self.explored += self.costs.check[layer]
            run.counters.head_flops += sum(trace.flops.values())
            run.counters.confidence_flops += sum(trace.flops.values())

    def observe(self, layer: int, confidence: float, agreed: float) -> None:
        """Records the confidence at one exit, and the probability that the full model keeps its token."""
        row, column = self.layers.index(layer), min(int(confidence * BINS), BINS - 1)
        self.observed[row] *= FADING
        self.agreed[row] *= FADING
        self.observed[row, column] += 1
        self.agreed[row, column] += agreed
        self.news += 1

    def best(self) -> Plan:
        """The plan with the least expected time per token; full depth if no other is faster by MARGIN."""
        paces = expected_paces(self.costs, self.observed, self.agreed)
        row, column, number = np.unravel_index(paces.argmin(), paces.shape)
        pace = float(paces[row, column, number])
        if pace * (1 + MARGIN) > self.full.pace:
            return self.full
        return Plan(self.layers[row], max(LOWEST, float(column) / BINS), int(number) + 1, pace)


def expected_paces(costs: Costs, checked: np.ndarray, agreed: np.ndarray) -> np.ndarray:
    """Seconds per token when drafting at each exit, with the lower end of each bin as threshold and at most 1
    to N drafts: (E, B, N). `checked` and `agreed` count observations and agreements by bin, (E, B) both.

    Let q be the share of positions whose confidence reaches the threshold and a the share of these at which
    the draft is kept, both independent from token to token; e the exit layer, n the largest number of drafts,
    b(r) the cost of a block with r rows, t(r) that of the top. A round has at least k <= n drafts with
    probability q^k, and its first k drafts are all kept with probability (q a)^k. So it yields 1 + sum over k
    = 1 .. n of (q a)^k tokens. The passes 0 .. n - 1 end with a check and cost (e b(1) + check) sum over k <
    n of q^k. The last pass has k + 1 rows above layer e, which costs (L - e) b(k + 1) + t(k + 1), with
    probability q^k (1 - q) for k < n and q^n for k = n; in the latter case it has no check, and e b(1) is
    added.
    """
    reached, right = from_bin_on(checked), from_bin_on(agreed)
    q = (reached / np.maximum(reached[:, :1], 1e-9))[..., None]  # (E, B, 1)
    doubt = DOUBT * (np.array(list(costs.check)) < costs.layers)[:, None]
    a = (right / np.maximum(reached + doubt, 1e-9))[..., None]
    k = np.arange(DRAFTS + 1)
    powers = q**k  # (E, B, N + 1)
    tokens = ((q * a) ** k).cumsum(-1)[..., 1:]  # (E, B, N)
    block, top = by_rows(costs.block), by_rows(costs.top)
    layer = np.array(list(costs.check))[:, None, None]  # (E, 1, 1)
    check = np.array(list(costs.check.values()))[:, None, None]
    below = layer * block[0]
    last = (costs.layers - layer) * block + top  # (E, 1, N + 1), by the number of drafts before it
    checking = (below + check) * powers.cumsum(-1)[..., :-1]
    stopped = (powers * (1 - q) * last).cumsum(-1)[..., :-1]
    bounded = powers[..., 1:] * (last[..., 1:] + below)
    return (checking + stopped + bounded) / tokens


def from_bin_on(counts: np.ndarray) -> np.ndarray:
    """Sums over each bin and those above it."""
    return counts[:, ::-1].cumsum(1)[:, ::-1]


def by_rows(costs: dict[int, float]) -> np.ndarray:
    """Seconds for 1 .. N + 1 rows, interpolated linearly between the rows that were measured."""
    return np.interp(np.arange(1, DRAFTS + 2), list(costs), list(costs.values()))


def states_of(passes: list[Trace], number: int) -> list[Tensor]:
    """h_0 .. h_L, (1, 1, d) each, of position `number` of a round, from 0: those of its own pass and, above
    the layer that it reached, those of the last pass, whose LM head ran on every position."""
    own, deep = passes[number], passes[-1]
    row = number - len(deep.final)  # counted from the end
    above = [state[:, row, None] for state in deep.hidden[len(own.hidden) :]]
    return [state[:, -1:] for state in own.hidden] + above


def agreement(
    config: DecodeConfig, text: list[int], trace: Trace, layer: int, final: Tensor, at: int
) -> float:
    """The probability that the full model keeps a draft from the exit at `layer` for index `at` of the text:
    0 or 1 if greedy, else the sum of min(p, q) (Leviathan 2023). final: the full model's logits (V,)."""
    seen = text[:at]
    drafted = penalize(trace.logits(layer), seen, config.repetition_penalty, trace.candidates)
    if config.temperature == 0:
        return float(int(trace.token(drafted.argmax())) == text[at])
    p = distribution(penalize(final, seen, config.repetition_penalty), config)
    q = trace.spread(distribution(drafted, config))
    return float(p.minimum(q).sum())
