"""Drafting by measurement (`draft = auto`): the exit layer, the threshold and the number of drafts that
promise most tokens a second, from what was seen so far and a table of costs; where none promises more than
the full model, its depth. After DEL (Entezari Zarch 2025), which chooses layer and number; costs in seconds
take the place of layers.

What is seen: for every exit layer, by confidence, how often the full model would have put the token that this
exit drafted or would have drafted. The exit in use tells it with every draft that is judged, up to the first
that is not kept, and with every answer below the threshold, since that pass goes to the top. The others are
asked now and then, once a round is judged, about each of its positions: its passes have left the states of
all layers there (DEL calls these shadow tokens). A round begins with the first pass after a judgement and
ends with the next judgement.

All this decides only how long to draft, from what lies in the past, so verification stays exact.

Dimensions: E exit layers, B bins of confidence, N drafts at most.
"""

from dataclasses import dataclass

import numpy as np

from decoding.asking import ask_alone
from decoding.costs import Costs
from decoding.prediction import distribution, penalize
from decoding.record import Token

BINS = 16  # of confidence
DRAFTS = 15  # at most, in a round
DOUBT = (
    1.0  # drafts not kept, as if seen before, so that an exit has to show its worth; not one after all blocks
)
MARGIN = 0.01  # so much more than full depth drafting must promise
FADING = 0.998  # weight of an observation at each that follows: about the last 500 of an exit count
START, SHARE = (
    2.0,
    0.01,
)  # exploring: seconds for it, in full-depth tokens at first, then as a share of the time
RENEWAL = 16  # observations after which the plan is made anew
ASKED = 1e-9  # the lowest threshold: at 0 nothing would be asked, and nothing learned


@dataclass(frozen=True)
class Plan:
    """How a round is drafted: up to `drafts` tokens from the exit at `layer`, each while its confidence
    reaches the threshold; then a pass to the top. Without drafts, full depth. `pace`: seconds a token
    expected of it."""

    layer: int
    threshold: float
    drafts: int
    pace: float


class Drafting:
    """What has been learned, and the plan that follows from it. It may go on from text to text of one kind,
    under one setting: what it does follows from the costs and from the texts alone."""

    def __init__(self, costs: Costs):
        self.costs, self.layers = costs, list(costs.ask)
        self.asked = np.zeros((len(self.layers), BINS))  # positions at which a confidence fell into a bin
        self.agreed = np.zeros(
            (len(self.layers), BINS)
        )  # of these, where the full model would keep the draft
        self.full = Plan(0, 1.0, 0, pace=costs.layers * costs.block[1] + costs.top[1])
        certain = np.full((len(self.layers), BINS), 1e9)
        self.ideal = expected_paces(costs, certain, certain).min(
            (1, 2)
        )  # (E,) seconds a token if all drafts were kept
        self.plan, self.news = self.full, 0  # observations since the plan was made
        self.spent, self.explored = (
            0.0,
            0.0,
        )  # seconds by the table: of decoding, and what exploring added to them
        self.exploring = self.affordable()  # whether this round is asked about, once it is judged

    def exits(self, drafts: int) -> dict[int, float]:
        """The exit of the next pass with its threshold, in a round of so many drafts so far; none: to the
        top."""
        if drafts >= self.plan.drafts:
            return {}
        return {self.plan.layer: self.plan.threshold}

    def learn(self, run, passes: list, drafts: list[Token], settled: list[Token], kept: int) -> None:
        """Learns from a round of a decode.Run that has been judged: `passes` are the confidence.Trace of each
        of its passes, the last one to the top; `settled` its tokens, the first of which are the drafts
        kept."""
        deep, first = passes[-1], len(run.text) - len(settled)  # where its tokens begin in the text
        for number, draft in enumerate(
            drafts[: kept + 1]
        ):  # those after the first that was not kept tell nothing
            self.observe(self.plan.layer, draft.confidences[self.plan.layer], float(number < kept))
        known = sum(deep.flops.values())
        if kept == len(drafts):  # then the last pass was about a token of the text, too
            for layer, confidence in deep.confidences.items():
                self.observe(layer, confidence, agreement(run, deep, layer, deep.final[-1], first + kept))
        run.counters.confidence_flops += sum(deep.flops.values()) - known  # of functions that read no head
        self.spent += len(settled) * self.plan.pace
        if self.exploring:
            for number in range(min(kept + 1, len(deep.final))):
                states = position_states(passes, number)
                self.explore(run, states, deep.final[number], first + number)
        if self.news >= RENEWAL:
            self.plan, self.news = self.best(), 0
        self.exploring = self.affordable()

    def affordable(self) -> bool:
        """Whether exploring one position keeps within what may be spent on it."""
        cost = sum(self.costs.ask[layer] for layer in self.rivals())
        return self.explored + cost <= START * self.full.pace + SHARE * self.spent

    def rivals(self) -> list[int]:
        """The exits that are not in use and could be better, if all of their drafts were kept."""
        better = [layer for layer, ideal in zip(self.layers, self.ideal) if ideal < self.plan.pace]
        return [layer for layer in better if layer != self.plan.layer]

    def explore(self, run, states: list, final, at: int) -> None:
        """Asks every rival about one position, by itself."""
        for layer in self.rivals():
            trace = ask_alone(run, states[: layer + 1])
            self.observe(layer, trace.confidences[layer], agreement(run, trace, layer, final, at))
            self.explored += self.costs.ask[layer]
            run.counters.head_flops += sum(trace.flops.values())
            run.counters.confidence_flops += sum(trace.flops.values())

    def observe(self, layer: int, confidence: float, agreed: float) -> None:
        """Takes in what one exit said, and the chance that the full model keeps it."""
        row, column = self.layers.index(layer), min(int(confidence * BINS), BINS - 1)
        self.asked[row] *= FADING
        self.agreed[row] *= FADING
        self.asked[row, column] += 1
        self.agreed[row, column] += agreed
        self.news += 1

    def best(self) -> Plan:
        """The plan that promises most."""
        paces = expected_paces(self.costs, self.asked, self.agreed)
        row, column, number = np.unravel_index(paces.argmin(), paces.shape)
        pace = float(paces[row, column, number])
        if pace * (1 + MARGIN) > self.full.pace:
            return self.full
        return Plan(self.layers[row], max(ASKED, float(column) / BINS), int(number) + 1, pace)


def expected_paces(costs: Costs, asked: np.ndarray, agreed: np.ndarray) -> np.ndarray:
    """Seconds a token of drafting at every exit, from every bin on, 1 to N drafts: (E, B, N); from how often
    each bin was seen, and agreed with the full model, (E, B) both.

    Let q be the share of positions whose confidence reaches the threshold, a the share of these at which the
    draft is kept, both independent from token to token; e the exit layer, b(r) a block of r rows, t(r) the
    top. A round has at least k drafts with probability q^k up to k = n, its bound, and its k-th draft is
    kept, with all before it, with (q a)^k. So it yields 1 + sum over k = 1 .. n of (q a)^k tokens. It asks in
    the passes 0 .. n - 1, which cost (e b(1) + ask) sum over k < n of q^k; its last pass brings k + 1 rows
    from layer e on, (L - e) b(k + 1) + t(k + 1), with probability q^k (1 - q) for k < n, and q^n for k = n,
    where e b(1) comes to it without a question.
    """
    reached, right = from_bin_on(asked), from_bin_on(agreed)
    q = (reached / np.maximum(reached[:, :1], 1e-9))[..., None]  # (E, B, 1)
    doubt = DOUBT * (np.array(list(costs.ask)) < costs.layers)[:, None]
    a = (right / np.maximum(reached + doubt, 1e-9))[..., None]
    k = np.arange(DRAFTS + 1)
    powers = q**k  # (E, B, N + 1)
    tokens = ((q * a) ** k).cumsum(-1)[..., 1:]  # (E, B, N)
    block, top = by_rows(costs.block), by_rows(costs.top)
    layer = np.array(list(costs.ask))[:, None, None]  # (E, 1, 1)
    ask = np.array(list(costs.ask.values()))[:, None, None]
    below = layer * block[0]
    last = (costs.layers - layer) * block + top  # (E, 1, N + 1) by drafts before it
    asking = (below + ask) * powers.cumsum(-1)[..., :-1]
    stopped = (powers * (1 - q) * last).cumsum(-1)[..., :-1]
    bounded = powers[..., 1:] * (last[..., 1:] + below)
    return (asking + stopped + bounded) / tokens


def from_bin_on(counts: np.ndarray) -> np.ndarray:
    """Sums over each bin and those above it."""
    return counts[:, ::-1].cumsum(1)[:, ::-1]


def by_rows(costs: dict[int, float]) -> np.ndarray:
    """Seconds of 1 .. N + 1 rows: between the rows that were measured, in a straight line."""
    return np.interp(np.arange(1, DRAFTS + 2), list(costs), list(costs.values()))


def position_states(passes: list, number: int) -> list:
    """h_0 .. h_L, (1, d) each, of a position of a round, counted from 0: up to the layer that its own pass
    reached from that pass, from there on from the last one, whose head took a row for every position."""
    own, deep = passes[number], passes[-1]
    row = number - len(deep.final)  # from the end
    above = [state[row:][:1] for state in deep.hidden[len(own.hidden) :]]
    return [state[-1:] for state in own.hidden] + above


def agreement(run, trace, layer: int, final, at: int) -> float:
    """The chance that the full model keeps what the exit at `layer` says of the token at place `at` of the
    text: 0 or 1; sampled, the sum of min(p, q) (Leviathan 2023). final: the full model's logits (V,)."""
    sampling, seen = run.predictor.sampling, run.text[:at]
    drafted = penalize(trace.logits(layer), seen, sampling.repetition_penalty, trace.candidates)
    if sampling.temperature == 0:
        return float(int(trace.token(drafted.argmax())) == run.text[at])
    p = distribution(penalize(final, seen, sampling.repetition_penalty), sampling)
    q = trace.spread(distribution(drafted, sampling))
    return float(p.minimum(q).sum())
