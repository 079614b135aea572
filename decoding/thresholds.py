"""How confident is confident enough: the threshold of every exit layer, step by step.

To add a schedule, derive a class from Constant, as `Decaying` does, return the thresholds of a step from
`at`, and add the class to THRESHOLDS below. List its parameters in `numbers`, with defaults and limits.
"""

import math
from statistics import fmean, pvariance

import torch
from torch.distributions import Beta

from common.config import Number, read_choice


class Constant:
    """The same thresholds at every step: `thresholds` maps an exit layer to its threshold."""

    numbers: tuple[Number, ...] = ()  # its parameters besides the thresholds
    learns = False  # whether it learns from what the full model says about early tokens

    def __init__(self, thresholds: dict[int, float]):
        self.thresholds = thresholds

    def at(self, step: int, steps: int) -> dict[int, float]:
        """The threshold of every exit layer at `step` of at most `steps`."""
        return self.thresholds


class Decaying(Constant):
    """clip(0.9 t + 0.1 exp(-tau i / N), 0, 1) at step i of at most N: the first tokens influence all others,
    so their threshold is higher (CALM, Schuster 2022, Eq. 5). A threshold of 0, a static exit, stays 0."""

    numbers = (Number("TAU", 4.0, {"above": 0, "most": 10**9}, float),)

    def __init__(self, thresholds: dict[int, float], tau: float = 4.0):
        super().__init__(thresholds)
        self.tau = tau

    def at(self, step: int, steps: int) -> dict[int, float]:
        extra = 0.1 * math.exp(-self.tau * step / steps)
        decayed = {layer: min(1.0, 0.9 * t + extra) for layer, t in self.thresholds.items() if t}
        return {**self.thresholds, **decayed}


class Adaptive(Constant):
    """The lowest confidence c above which P(agreed | c) stays at `target` or higher, one for all exit layers,
    learned while decoding (FREE, Bae 2023, adaptive threshold estimator). The confidences of exits that agree
    with the full model follow one Beta distribution, the others a second one; both are fitted by moments to
    the pairs that deep passes yield. Every text begins anew with the given threshold. A threshold of 0, a
    static exit, stays 0."""

    numbers = (Number("TARGET", 0.9, {"above": 0, "most": 0.999}, float),)
    learns = True
    GRID = torch.arange(99, 4, -1) / 100  # the thresholds that it may choose; 1 would never be reached

    def __init__(self, thresholds: dict[int, float], target: float = 0.9):
        super().__init__(thresholds)
        self.target = target
        self.disagreed, self.agreed = [0.1, 0.5], [0.6, 0.9]  # pseudo-observations, for a fit from the start
        self.held: list[tuple[float | None, int]] = []

    def hold(self, confidence: float | None, guess: int) -> None:
        """Notes the confidence (None: not checked) and the token of an early exit, until the full model
        judges it."""
        self.held.append((confidence, guess))

    def compare(self, truth: list[int], newest: list[tuple[float, int]]) -> None:
        """Learns from a pass that reached the top, whose LM head predicted the tokens `truth`: compares these
        with every early exit held, and with `newest`, the (confidence, token) of every layer checked in this
        pass. truth[i] judges the early exit i; one more token, for the newest position, follows unless the
        pass only computed what was owed."""
        for (confidence, guess), token in zip(self.held, truth):
            if confidence is not None:
                self.learn(confidence, guess == token)
        for confidence, guess in newest:
            self.learn(confidence, guess == truth[-1])
        self.held = []
        self.update()

    def learn(self, confidence: float, agreed: bool) -> None:
        """Records the confidence of one exit head and whether its token was the full model's."""
        (self.agreed if agreed else self.disagreed).append(confidence)

    def update(self) -> None:
        """Fits both distributions and moves the threshold."""
        log_odds = fit_beta(self.agreed).log_prob(self.GRID) - fit_beta(self.disagreed).log_prob(self.GRID)
        log_odds += math.log(len(self.agreed) / len(self.disagreed))
        enough = log_odds >= math.log(self.target / (1 - self.target))
        # From the highest threshold down to the first that is not enough:
        count = int(enough.cumprod(0).sum())
        threshold = self.GRID[max(0, count - 1)].item()
        self.thresholds = {layer: threshold if t else 0.0 for layer, t in self.thresholds.items()}


def fit_beta(values: list[float]) -> Beta:
    """The Beta distribution with the mean m and the variance v of values in [0, 1]: a + b = m (1 - m) / v -
    1."""
    mean = min(0.99, max(0.01, fmean(values)))
    variance = min(max(pvariance(values), 1e-3), 0.9 * mean * (1 - mean))
    total = mean * (1 - mean) / variance - 1
    return Beta(torch.tensor(mean * total), torch.tensor((1 - mean) * total), validate_args=False)


THRESHOLDS: dict[str, type[Constant]] = {"constant": Constant, "decaying": Decaying, "adaptive": Adaptive}


def read_schedule(text: str) -> tuple[type[Constant], list[float]]:
    """The schedule that a text such as "decaying:4" names, and its numbers. Raises UserError."""
    known = {name: schedule.numbers for name, schedule in THRESHOLDS.items()}
    name, numbers = read_choice("threshold_schedule", text, known)
    return THRESHOLDS[name], numbers
