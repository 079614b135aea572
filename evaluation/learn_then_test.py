"""Learn then Test (Angelopoulos 2021): the boldest threshold whose risk is below a tolerance, but for a small
chance of error.

With probability of at least 1 - error over the draw of the calibration prompts, the expected loss at the
chosen threshold is at most the tolerance, on prompts from the same source. That holds for one walk, whose
tolerance, candidates and prompts were settled before it began; a second walk over the same prompts, chosen in
view of the first, has no such guarantee.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import UserError

CANDIDATES = tuple(step / 20 for step in range(20, -1, -1))  # thresholds, from cautious to bold


@dataclass(frozen=True)
class Tested:
    """One threshold, its mean loss on the calibration prompts, and how likely so small a mean is if the true
    one is above the tolerance."""

    threshold: float
    risk: float
    p_value: float


def walk(
    losses: Callable[[float], list[float]],
    tolerance: float,
    error: float,
    candidates: tuple[float, ...] = CANDIDATES,
) -> tuple[float | None, list[Tested]]:
    """The last of the candidates, walked in their order until one fails, whose risk is significantly below
    the tolerance (fixed-sequence testing: a failure ends the walk, so that no correction for many tests is
    due); None if the first fails. And all that were tested. losses(threshold): the loss in [0, 1] on every
    calibration prompt."""
    chosen, tested = None, []
    for threshold in candidates:
        values = losses(threshold)
        tested.append(Tested(threshold, sum(values) / len(values), p_value(values, tolerance)))
        if tested[-1].p_value > error:
            break
        chosen = threshold
    return chosen, tested


def p_value(losses: list[float], tolerance: float) -> float:
    """Hoeffding-Bentkus: for independent losses in [0, 1] whose expectation exceeds the tolerance, the
    probability of a mean as small as theirs is at most min(exp(-n h(min(r, t), t)), e P(Binomial(n, t) <=
    ceil(n r))), h(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b)) (Bates 2021, section 3.1). Raises UserError for
    no losses, losses outside [0, 1] and a tolerance outside (0, 1)."""
    n = len(losses)
    if not n or not 0 < tolerance < 1 or not all(0 <= loss <= 1 for loss in losses):
        raise UserError(
            f"{n} losses from {min(losses, default=0)} to {max(losses, default=0)}, tolerance {tolerance}: losses, "
            "at least one, must lie in 0 to 1, and the tolerance between"
        )
    risk = sum(losses) / n
    a = min(risk, tolerance)
    hoeffding = math.exp(-n * (xlogx(a, tolerance) + xlogx(1 - a, 1 - tolerance)))
    bentkus = math.e * binomial_cdf(math.ceil(n * risk - 1e-9), n, tolerance)
    return min(1.0, hoeffding, bentkus)


def fewest(tolerance: float, error: float) -> int:
    """How many prompts without any loss pass: with fewer, nothing can. That is known before any is looked
    at."""
    return math.ceil(math.log(error) / math.log1p(-tolerance) - 1e-9)


def xlogx(a: float, b: float) -> float:
    """a log(a / b), 0 for a = 0."""
    return a * math.log(a / b) if a else 0.0


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    total = 0.0
    for i in range(min(k, n) + 1):
        log_choose = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        total += math.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p))
    return min(1.0, total)
