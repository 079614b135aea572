"""Of many thresholds that are all too bold, one passes by luck sooner or later. The walk asks a second
question only after a right answer to the first: to be wrong it must fail at the first threshold that is too
bold, one test, and that has the error level of one test. An order chosen after a look at the losses would put
the lucky one first."""

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
