"""Adapters: what an exit may do to the state before its own norm, so that one head reads layers of different
depth.

    lowrank:r   h + up(down(h)), by r numbers in between (Belrose 2023, tuned lens, of low rank)
    mlp:f       x + down(silu(gate(x)) up(x)) with f numbers in between (EE-Tuning, Pan 2024: norm, gated MLP, residual;
                the norm's gain is part of gate and up)
    block:f     a block of the model's own kind on x, its MLP of width f (Kangaroo, Liu 2024): beside the staircase, it
                sees the earlier positions as they were at this exit, and keeps keys and values of its own

with x = h / |h|, |h| the root mean square of h: states grow with depth, in Gemma to hundreds, and the norm
that follows asks for no size. All begin as the identity: the matrices that write start at zero. The first two
see one position at a time. A block sees a text, so it runs wherever a pass runs the layer, asked or not.

Dimensions: N rows, d model width, r or f the size of an adapter.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

MATRICES = {"lowrank": 2, "mlp": 3}  # of an adapter, (size, d) each, the one that writes last
KINDS = (*MATRICES, "block")


def read_adapter(adapter: str | None) -> tuple[str | None, int]:
    """The kind of an adapter and its size, from a text like "mlp:64"; None and 0 for none. Raises UserError
    for a text that names no adapter."""
    if adapter is None:
        return None, 0
    kind, _, size = adapter.partition(":")
    if kind not in KINDS or not (size.isascii() and size.isdigit()) or not 1 <= int(size) <= 2**16:
        known = ", ".join(f"{name}:SIZE" for name in KINDS)
        raise UserError(
            f"adapter is {adapter!r:.40}; it must be one of {known}, with a size from 1 to 65536, or none"
        )
    return kind, int(size)


def make_adapters(config, block_type: type[nn.Module]) -> nn.ParameterDict | nn.ModuleDict:
    """The adapters of a model, each the identity, by exit layer: (2, r, d) of a low-rank one, down and up;
    (3, f, d) of an MLP, gate, up and down; or a block."""
    kind, size = read_adapter(config.adapter)
    if kind is None:
        return nn.ParameterDict()
    if kind == "block":
        return nn.ModuleDict({str(layer): side_block(config, block_type) for layer in config.exit_norms})
    adapters = {str(layer): torch.zeros(MATRICES[kind], size, config.d_model) for layer in config.exit_norms}
    for weight in adapters.values():
        nn.init.normal_(weight[:-1], std=0.02)
    return nn.ParameterDict(adapters)


def side_shape(config):
    """The configuration of an adapter's block: the model's, with an MLP of its own width. What it adds is not
    normed (Gemma), for a norm would make much of the little that it begins with."""
    return replace(config, d_ff=read_adapter(config.adapter)[1], post_norms=False)


def side_block(config, block_type: type[nn.Module]) -> nn.Module:
    """An adapter's block, the identity."""
    block = block_type(side_shape(config))
    for weight in (block.qkv, block.gate_up):
        nn.init.normal_(weight, std=0.02)
    for weight in (block.out, block.down):
        nn.init.zeros_(weight)
    return block


def adapter_weights(config) -> int:
    """How many numbers an adapter that is no block multiplies with, a row; 0 where there are none."""
    kind, size = read_adapter(config.adapter)
    return MATRICES.get(kind, 0) * size * config.d_model


def adapt(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The state as the exit's norm gets it, by an adapter that is no block: hidden (N, d) -> (N, d)."""
    hidden = hidden.to(weight.dtype)  # in training heads may be finer than the blocks
    if len(weight) == 2:
        down, up = weight
        return hidden + hidden @ down.T @ up
    gate, up, down = weight
    x = at_size_one(hidden, eps)
    return x + F.silu(x @ gate.T) * (x @ up.T) @ down


def at_size_one(hidden: Tensor, eps: float) -> Tensor:
    """h / |h|, |h| the root mean square of h: (N, d)."""
    return hidden / (hidden.float().square().mean(-1, keepdim=True) + eps).sqrt().type_as(hidden)


def exit_state(model, layer: int, x: Tensor, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """What the exit at `layer` reads of x (B T, d), h_l of a full pass over tokens (B, T), packed `documents`
    or one text a row: x itself, or what the adapter's block makes of it."""
    if layer not in model.side_blocks:
        return x
    attend = model.attend_all(tokens, documents, model.config.slides(layer), model.config.rotates(layer))
    return model.beside(layer, x, attend)


def exit_states(model, tokens: Tensor) -> list[Tensor]:
    """What exits read of h_0 .. h_L of a full pass over tokens (B, T): (B T, d) each."""
    return [exit_state(model, layer, x, tokens) for layer, x in enumerate(model.hidden_states(tokens))]
