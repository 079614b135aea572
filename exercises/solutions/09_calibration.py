"""Of many thresholds that are all too bold, one passes by luck sooner or later. The walk tests a threshold
only after all those before it have passed: to be wrong, it must let the first one that is too bold pass, and
the error level of this one test limits the probability of that. An order chosen after a look at the losses
would put the lucky one first."""

import math


def p_value(losses, tolerance):
    risk = sum(losses) / len(losses)
    if risk >= tolerance:
        return 1.0
    return math.exp(-2 * len(losses) * (tolerance - risk) ** 2)


def calibrate(losses, candidates, tolerance, error):
    chosen = None
    for threshold in candidates:
        if p_value(losses(threshold), tolerance) > error:
            break
        chosen = threshold
    return chosen
