"""Adapters: what an exit may do to the state before its own norm, so that one head reads layers of different depth.

    lowrank:r   h + up(down(h)), by r numbers in between (Belrose 2023, tuned lens, of low rank)
    mlp:f       h + |h| down(silu(gate(x)) up(x)) with x = h / |h|, |h| the root mean square of h, and f numbers in
                between (EE-Tuning, Pan 2024: norm, gated MLP, residual; the norm's gain is part of gate and up)

Both see one position at a time, and begin as the identity: the matrix that writes starts at zero. The MLP works on a
state of size 1 and writes in units of its size, since states grow with depth, in Gemma to hundreds.

Dimensions: N rows, d model width, r or f the size of an adapter.
"""

import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError

MATRICES = {"lowrank": 2, "mlp": 3}  # of an adapter, (size, d) each, the one that writes last


def adapter_shape(adapter: str | None, d: int) -> tuple[int, int, int] | None:
    """The shape of an adapter's weight for a model of width d: (matrices, size, d); None for none. Raises UserError for
    a text that names no adapter."""
    if adapter is None:
        return None
    kind, _, size = adapter.partition(":")
    if kind not in MATRICES or not (size.isascii() and size.isdigit()) or not 1 <= int(size) <= 2**16:
        known = ", ".join(f"{name}:SIZE" for name in MATRICES)
        raise UserError(f"adapter is {adapter!r:.40}; it must be one of {known}, with a size from 1 to 65536, or none")
    return MATRICES[kind], int(size), d


def adapt(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The state as the exit's norm gets it: hidden (N, d) -> (N, d). weight: (2, r, d) of a low-rank adapter, down and
    up; (3, f, d) of an MLP, gate, up and down."""
    hidden = hidden.to(weight.dtype)  # in training heads may be finer than the blocks
    if len(weight) == 2:
        down, up = weight
        return hidden + hidden @ down.T @ up
    gate, up, down = weight
    size = (hidden.float().square().mean(-1, keepdim=True) + eps).sqrt().type_as(hidden)  # |h|, (N, 1)
    x = hidden / size
    return hidden + size * (F.silu(x @ gate.T) * (x @ up.T) @ down)
