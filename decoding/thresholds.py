"""How confident is confident enough: the threshold of every exit layer, step by step.

A new schedule is a class like `Decaying`: derive it from Constant, say in `at` what the thresholds are at a
step, and name it in THRESHOLDS below. `tau` and `target`, of DecodeConfig, are there for those that want
them.
"""

import math
from statistics import fmean, pvariance

from confidence import Trace


class Constant:
    """The same at every step: `thresholds` maps an exit layer to its threshold."""

    learns = False  # whether it wants to be told what the full model says of early tokens, too

    def __init__(self, thresholds: dict[int, float], tau: float = 4.0, target: float = 0.9):
        self.thresholds, self.tau, self.target = thresholds, tau, target

    def at(self, step: int, steps: int) -> dict[int, float]:
        """The threshold of every exit layer at `step` of at most `steps`."""
        return self.thresholds


class Decaying(Constant):
    """clip(0.9 t + 0.1 exp(-tau i / N), 0, 1) at step i of at most N: early tokens influence all that follow,
    so they meet a higher bar (CALM, Schuster 2022, Eq. 5). A threshold of 0, a static exit, stays 0."""

    def at(self, step: int, steps: int) -> dict[int, float]:
        extra = 0.1 * math.exp(-self.tau * step / steps)
        return {
            layer: min(1.0, max(0.0, 0.9 * t + extra)) if t else 0.0 for layer, t in self.thresholds.items()
        }


class Adaptive(Constant):
    """The lowest confidence from which on P(agreed | c) stays at `target` or above, one for all exit layers,
    learned while decoding (FREE, Bae 2023, adaptive threshold estimator). Confidences of exit heads that
    agree with the full model follow one Beta distribution, the others a second; both are fitted by moments to
    the pairs that deep passes yield. One text is one run: it begins at the threshold given. A threshold of 0,
    a static exit, stays 0."""

    learns = True
    LOW, HIGH = 0.05, 0.99  # its range; a threshold of 1 would be asked for ever and never reached
    PRIOR = (
        (0.1, 0.5),
        (0.6, 0.9),
    )  # disagreed, agreed: as if seen before, so that a fit exists from the start

    def __init__(self, thresholds: dict[int, float], tau: float = 4.0, target: float = 0.9):
        super().__init__(thresholds, tau, target)
        self.disagreed, self.agreed = map(list, self.PRIOR)
        self.held: list[tuple[float | None, int]] = []

    def hold(self, trace: Trace, layer: int) -> None:
        """Notes what an early exit said, until the full model says what is right."""
        self.held.append((trace.confidences.get(layer), trace.guess(layer)))

    def compare(self, trace: Trace) -> None:
        """Learns from a pass that reached the top: of the early tokens held, and of every layer asked in it,
        the confidence and whether the exit head's token was the full model's. Row i of trace.final is that of
        token i held; one more, of the newest position, follows unless the pass only paid what was owed."""
        truth = trace.final.argmax(-1).tolist()
        for (confidence, guess), token in zip(self.held, truth):
            if confidence is not None:
                self.learn(confidence, guess == token)
        for layer, confidence in trace.confidences.items():
            self.learn(confidence, trace.guess(layer) == truth[-1])
        self.held = []
        self.update()

    def learn(self, confidence: float, agreed: bool) -> None:
        """Takes in the confidence of one exit head and whether its token was the full model's."""
        (self.agreed if agreed else self.disagreed).append(confidence)

    def update(self) -> None:
        """Fits both distributions and moves the threshold."""
        (a1, b1), (a0, b0) = fit_beta(self.agreed), fit_beta(self.disagreed)
        odds = math.log(len(self.agreed) / len(self.disagreed)) - log_beta(a1, b1) + log_beta(a0, b0)
        wanted = math.log(self.target / (1 - self.target))
        threshold = self.HIGH
        for percent in range(round(100 * self.HIGH), round(100 * self.LOW) - 1, -1):
            c = percent / 100
            if odds + (a1 - a0) * math.log(c) + (b1 - b0) * math.log(1 - c) < wanted:
                break
            threshold = c
        self.thresholds = {layer: threshold if t else 0.0 for layer, t in self.thresholds.items()}


def fit_beta(values: list[float]) -> tuple[float, float]:
    """a and b of the Beta distribution with the mean and the variance of values in [0, 1]: with m and v, a + b = m (1
    - m) / v - 1."""
    mean = min(0.99, max(0.01, fmean(values)))
    variance = min(max(pvariance(values), 1e-3), 0.9 * mean * (1 - mean))
    total = mean * (1 - mean) / variance - 1
    return mean * total, (1 - mean) * total


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


THRESHOLDS: dict[str, type[Constant]] = {"constant": Constant, "decaying": Decaying, "adaptive": Adaptive}
