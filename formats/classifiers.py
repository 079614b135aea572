"""The confidence classifier of an exit: sigmoid(w norm(h) + b) of one state, in as few operations as it
takes. A question must cost little beside a block, and on a CPU an operation on a few hundred numbers costs
what a Python call does. So the norm's gain is multiplied into w beforehand, and what is left are two scalar
products.

Dimensions: d model width.
"""

import math

import torch
from torch import Tensor

from common.errors import UserError


def belief(model, state: Tensor, layer: int, ready: dict[int, tuple[Tensor, Tensor]]) -> float:
    """The classifier's belief that exit `layer` agrees with the last layer, of what the exit reads, (1, d);
    `ready` keeps what is made for that from question to question. Raises UserError if this layer has no
    classifier."""
    if layer not in ready:
        ready[layer] = made_ready(model, layer)
    row, b = ready[layer]
    x = model.before_norm(state, layer)[0].detach().to(row.dtype)
    square, score, bias = numbers(x.dot(x), x.dot(row), b)
    return sigmoid(score / math.sqrt(square / len(row) + model.config.norm_eps) + bias)


def made_ready(model, layer: int) -> tuple[Tensor, Tensor]:
    """w times the gain of the layer's norm, (d,) float32 or finer, and b, a scalar."""
    check_classifiers(model.config, [layer])
    w = model.classifiers[str(layer)].detach().float()
    gain = model.exit_norms[str(layer)] if layer in model.config.exit_norms else model.norm
    row = w[:-1] * gain.detach()
    return row, w[-1].to(row.dtype)


def numbers(*scalars: Tensor) -> list[float]:
    """Scalar tensors as numbers; those of a GPU together, for it is waited for each time."""
    if scalars[0].is_cpu:
        return [float(scalar) for scalar in scalars]  # a third of the time of stacking them
    return torch.stack(scalars).tolist()


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def check_classifiers(shape, layers: list[int]) -> None:
    """Raises UserError for a layer that has no classifier."""
    for layer in layers:
        if layer not in shape.classifiers:
            have = ", ".join(map(str, shape.classifiers)) or "none"
            raise UserError(
                f"layer {layer} has no confidence classifier (layers with one: {have}); train it, or ask "
                "another confidence"
            )
