"""Walks with a guarantee: the bound against independent numbers, the walk, and the guarantee in simulation."""

import math
import random
from fractions import Fraction

import pytest

from evaluation.walk import binomial_cdf, fewest_inputs, risk_p_value, walk


def test_the_binomial_is_exact():
    for n, k, p in ((5, 2, Fraction(1, 3)), (30, 0, Fraction(1, 20)), (30, 30, Fraction(1, 2)), (200, 9, Fraction(1, 20))):
        exact = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert binomial_cdf(k, n, float(p)) == pytest.approx(float(exact), rel=1e-9)


def test_p_values_by_hand():
    """Without any loss, Hoeffding gives (1 - t)^n, which is below e (1 - t)^n; at a risk of the tolerance or
    more, there is no evidence."""
    assert risk_p_value([0.0] * 100, 0.05) == pytest.approx(0.95**100)
    assert risk_p_value([0.05] * 100, 0.05) == pytest.approx(1) == risk_p_value([1.0] * 3, 0.5)
    values = [1.0] * 2 + [0.0] * 98
    hoeffding = math.exp(-100 * (0.02 * math.log(0.02 / 0.1) + 0.98 * math.log(0.98 / 0.9)))
    bentkus = math.e * sum(math.comb(100, i) * 0.1**i * 0.9 ** (100 - i) for i in range(3))
    assert bentkus < hoeffding and risk_p_value(values, 0.1) == pytest.approx(bentkus)
    spread = [0.02] * 100  # the same mean: the bound knows no more
    assert risk_p_value(spread, 0.1) == pytest.approx(bentkus)


@pytest.mark.parametrize("tolerance, error", [(0.05, 0.05), (0.1, 0.1), (0.5, 0.25), (0.2, 0.01)])
def test_with_fewer_prompts_nothing_passes(tolerance, error):
    enough = fewest_inputs(tolerance, error)
    assert risk_p_value([0.0] * enough, tolerance) <= error * (1 + 1e-9) and risk_p_value([0.0] * (enough - 1), tolerance) > error


def test_the_walk_stops_at_the_first_failure_though_a_later_one_would_pass():
    p_values = {1.0: 0.01, 0.9: 0.05, 0.8: 0.06, 0.7: 0.0}
    tested = []
    assert walk([*p_values], lambda threshold: tested.append(threshold) or p_values[threshold], 0.05) == [1.0, 0.9]
    assert tested == [1.0, 0.9, 0.8] and walk([0.8, 0.7], p_values.get, 0.05) == []


def test_the_guarantee_holds_over_many_random_splits():
    """A population of prompts whose losses grow as the threshold falls; 400 calibrations on 150 of them. The
    true risk at the chosen threshold exceeds the tolerance in at most the share `error` of them: were that
    the true rate, 0.1, more than 58 of 400 would be seen by chance less than once in 500 times, and the draw
    is fixed."""
    draw, tolerance, error, thresholds = random.Random(0), 0.1, 0.1, tuple(step / 20 for step in range(20, -1, -1))
    people = [(draw.random(), draw.random()) for _ in range(4000)]  # how soon a prompt goes wrong, and how much then

    def loss(person, threshold):
        return person[1] if person[0] > 0.55 + 0.45 * threshold else 0.0

    true = {threshold: sum(loss(person, threshold) for person in people) / len(people) for threshold in thresholds}
    exceeded, found = 0, []
    for _ in range(400):
        some = draw.choices(people, k=150)
        passed = walk(thresholds, lambda bar, some=some: risk_p_value([loss(each, bar) for each in some], tolerance), error)
        chosen = passed[-1] if passed else None
        exceeded += chosen is not None and true[chosen] > tolerance
        found.append(chosen)
    assert exceeded <= 58
    assert sum(chosen is not None and chosen < 1 for chosen in found) > 200  # and it is not bought by never choosing
    assert true[0.0] > 2 * tolerance  # there was something to exceed
