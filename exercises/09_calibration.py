"""9. Calibrating a threshold: how bold may an exit be?

Somebody asks for "at most 10 % loss, and be wrong about that at most once in ten times". Take n inputs,
measure the loss of each at a threshold (0: the full model's text, 1: nothing in common), and ask: if the true
mean were above the tolerance t, how likely would a mean r as small as this be? Hoeffding's inequality
answers, for independent losses in [0, 1]:

    p = exp(-2 n (t - r)²)    where r < t, else 1

Then walk through the thresholds from cautious to bold, and stop at the first whose p is above the error
level; the answer is the last one that passed, or None (Learn then Test, Angelopoulos 2021; CALM, section 4).

    python -m pytest exercises/09_calibration.py

(To think about: why may the walk not continue after a failure, and pick the boldest threshold that passes?
And why must the order of the thresholds be settled before the losses are seen? The project's own p-value is
sharper: look for it.)"""

import math
import random


def p_value(losses, tolerance):
    """Hoeffding's p-value of a list of losses in [0, 1]."""
    raise NotImplementedError("your turn")


def calibrate(losses, candidates, tolerance, error):
    """The last of the candidates, in their order, before the first failure, or None. losses: a function,
    threshold -> list."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def test_the_p_value_by_hand():
    assert abs(p_value([0.0] * 100, 0.1) - math.exp(-2)) < 1e-9
    assert abs(p_value([0.0, 0.1] * 50, 0.25) - math.exp(-8)) < 1e-9
    assert p_value([0.3] * 100, 0.1) == 1


def test_the_walk_stops_at_the_first_failure():
    means = {0.9: 0.0, 0.7: 0.02, 0.5: 0.2, 0.3: 0.0}  # 0.3 looks good, but comes after a failure
    asked = []

    def losses(threshold):
        asked.append(threshold)
        return [means[threshold]] * 500

    assert calibrate(losses, (0.9, 0.7, 0.5, 0.3), 0.1, 0.1) == 0.7
    assert asked == [0.9, 0.7, 0.5]
    assert calibrate(losses, (0.5, 0.9), 0.1, 0.1) is None


def test_the_guarantee_holds():
    """The true mean loss at threshold c is 1 - c, the tolerance 0.3. Of 300 trials, 10 % may choose too
    boldly, give or take chance (fixed seed). Nor must the choice be needlessly timid."""
    draw, candidates = random.Random(0), [step / 20 for step in range(20, -1, -1)]

    def losses(threshold):
        return [float(draw.random() < 1 - threshold) for _ in range(200)]

    chosen = [calibrate(losses, candidates, 0.3, 0.1) for _ in range(300)]
    assert sum(1 - threshold > 0.3 + 1e-9 for threshold in chosen) / 300 < 0.13
    assert sum(chosen) / 300 < 0.85
