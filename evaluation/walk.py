"""How a threshold is chosen with a guarantee: fixed-sequence testing, with the p-value of a risk.

Candidates are tested from cautious to bold, and the walk ends at the first that does not pass. With
probability 1 - `error` or more, every candidate that passed has the property it was tested for, although many
were tested: a candidate is tested only if all before it passed. This holds for one walk whose candidates,
inputs and limits were fixed before it began. A second walk over the same inputs, chosen in view of the first,
has no such guarantee.
"""

import math
from collections.abc import Callable, Iterable
from itertools import takewhile


def walk(candidates: Iterable, p_value: Callable[..., float], error: float) -> list:
    """Returns the candidates that passed, from cautious to bold; none if the first fails."""
    return list(takewhile(lambda candidate: p_value(candidate) <= error, candidates))


def risk_p_value(losses: list[float], tolerance: float) -> float:
    """Hoeffding-Bentkus, as in Learn then Test (Angelopoulos 2021): for independent losses in [0, 1] whose
    expectation exceeds the tolerance, the probability of a mean as small as theirs is at most
    min(exp(-n h(min(r, t), t)), e P(Binomial(n, t) <= ceil(n r))), with h(a, b) = a log(a/b) +
    (1-a) log((1-a)/(1-b)) (Bates 2021, section 3.1)."""
    n, risk = len(losses), sum(losses) / len(losses)
    a = min(risk, tolerance)
    hoeffding = math.exp(-n * (xlogx(a, tolerance) + xlogx(1 - a, 1 - tolerance)))
    bentkus = math.e * binomial_cdf(math.ceil(n * risk - 1e-9), n, tolerance)
    return min(1.0, hoeffding, bentkus)


def fewest_inputs(tolerance: float, error: float) -> int:
    """Returns how many inputs without any loss pass `risk_p_value`. With fewer, nothing can pass."""
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
