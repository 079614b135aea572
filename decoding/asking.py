"""Asking a confidence function, perhaps a user's own: its mistakes are told with its name, its file and the
layer."""

import math

from common.errors import UserError
from common.plugins import name_and_file

ROUNDING = 1e-4  # by so much a confidence may lie outside [0, 1]


def ask(function, trace) -> float:
    """The confidence after the newest layer of a trace. Raises UserError for an answer that is none; what the
    function raises itself keeps its traceback."""
    try:
        value = function(trace, trace.layer)
    except UserError:
        raise
    except Exception as error:
        raise RuntimeError(f"{whose(function, trace.layer)} failed") from error
    try:
        confidence = float(value)
    except (TypeError, ValueError, RuntimeError):  # None, text, several numbers
        confidence = math.nan
    if not -ROUNDING <= confidence <= 1 + ROUNDING:
        said = " ".join(repr(value).split())  # a tensor's has several lines
        raise UserError(
            f"{whose(function, trace.layer)} returned {said:.60}; it must be one number from 0 to 1"
        )
    return confidence


def whose(function, layer: int) -> str:
    """The function asked, its file, and the layer, in words."""
    name = getattr(function, "__name__", repr(function))
    return f"{name_and_file('confidence', name, function)} at layer {layer}"


def ask_alone(run, states: list):
    """The trace of a position that was asked at one layer alone, whatever it answered: `states` are its h_0 ..
    h_l, (1, d) each, `run` a decode.Run."""
    trace = run.new_trace()
    for state in states:
        trace.hidden.append(state)
    trace.decided(math.inf)
    return trace
