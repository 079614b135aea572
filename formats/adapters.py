"""Adapters: what an exit may do to the state before its own norm, so that one head reads layers of different
depth.

    lowrank:r   h + up(down(h)) with r numbers in between (tuned lens, Belrose 2023, of low rank)
    mlp:f       x + down(silu(gate(x)) up(x)) with f numbers in between (EE-Tuning, Pan 2024: norm, gated MLP,
                residual; the norm's gain is part of gate and up)

with x = h / |h|, |h| the root mean square of h: states grow with depth, in Gemma to hundreds, and the norm
that follows does not depend on their size. Both begin as the identity: the matrices that write start at zero.

Dimensions: N rows, d model width, r or f the size of an adapter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

MATRICES = {"lowrank": 2, "mlp": 3}  # of an adapter, (size, d) each, the one that writes last


def read_adapter(adapter: str | None) -> tuple[str | None, int]:
    """The kind of an adapter and its size, from a text like "mlp:64"; None and 0 for none. Raises UserError
    for a text that names no adapter."""
    if adapter is None:
        return None, 0
    kind, _, size = adapter.partition(":")
    if kind not in MATRICES or not (size.isascii() and size.isdigit()) or not 1 <= int(size) <= 2**16:
        known = ", ".join(f"{name}:SIZE" for name in MATRICES)
        raise UserError(
            f"adapter is {adapter!r:.40}; it must be one of {known}, with a size from 1 to 65536, or none"
        )
    return kind, int(size)


def make_adapters(config) -> nn.ParameterDict:
    """The adapters of a model, each the identity, by exit layer: (2, r, d) of a low-rank one, down and up;
    (3, f, d) of an MLP, gate, up and down."""
    kind, size = read_adapter(config.adapter)
    if kind is None:
        return nn.ParameterDict()
    adapters = {str(layer): torch.zeros(MATRICES[kind], size, config.d_model) for layer in config.exit_norms}
    for weight in adapters.values():
        nn.init.normal_(weight[:-1], std=0.02)
    return nn.ParameterDict(adapters)


def adapter_weights(config) -> int:
    """The number of weights that an adapter multiplies each row with; 0 where there are none."""
    kind, size = read_adapter(config.adapter)
    return MATRICES.get(kind, 0) * size * config.d_model


def adapt(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The state as the exit's norm gets it: hidden (N, d) -> (N, d)."""
    hidden = hidden.to(weight.dtype)  # in training heads may be finer than the blocks
    if len(weight) == 2:
        down, up = weight
        return hidden + hidden @ down.T @ up
    gate, up, down = weight
    x = hidden / (hidden.float().square().mean(-1, keepdim=True) + eps).sqrt().type_as(hidden)
    return x + F.silu(x @ gate.T) * (x @ up.T) @ down
