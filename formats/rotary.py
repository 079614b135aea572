"""Rotary positions (Su 2021), with what checkpoints ask for: frequencies slowed for long texts, a base of
their own for layers with a window. And a second form of them, in one product, for weights that are folded
(formats/weights.py).

Dimensions: T positions, C width of a head.
"""

import math

import torch
from torch import Tensor


def rope_table(config) -> Tensor:
    """Rotary position embedding (Su 2021): cos and signed sin (-sin for the first half of a head, sin for the
    second) of every position, (1, 2, max_len, C); (2, 2, max_len, C) where layers with a window have a base
    of their own."""
    exponent = -torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
    frequency = config.rope_base**exponent
    if (
        config.rope_factor != 1
    ):  # slowed for long texts, as in Llama 3 (llama-models, `apply_scaling`); or all alike
        kept = torch.zeros_like(frequency)  # share of the frequency that is not slowed
        if config.rope_bands:
            low, high, length = config.rope_bands
            turns = length * frequency / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / config.rope_factor)
    frequencies = [frequency]
    if config.window is not None and config.local_rope_base is not None:  # Gemma 3
        frequencies.append(config.local_rope_base**exponent)
    positions = torch.arange(config.max_len, dtype=torch.float64)
    angle = positions[:, None] * torch.stack(frequencies)[:, None]  # (1 or 2, max_len, C/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)


def rotation(rope: Tensor, slides: bool, first: int, stop: int, config) -> Tensor:
    """What turns the heads of the positions first .. stop - 1, from the last table for a layer with a window,
    else from the first: cos and signed sin (2, T, C); or for pairs that are neighbours (T, H + 2K, C/2)."""
    rows = rope[-1 if slides else 0, ..., first:stop, :]
    if not rope.is_complex():
        return rows
    rows = rows[:, None].expand(-1, config.n_heads + config.n_kv_heads, -1)
    return torch.cat([rows, torch.ones_like(rows[:, : config.n_kv_heads])], 1)  # values are not turned


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns every pair (x1, x2) of a head by the angle of its position: (x1 cos - x2 sin, x2 cos + x1 sin);
    the pair is (i, i + C/2). x (B, heads, T, C), `rope` from `rotation`."""
    cos, signed_sin = rope
    other = x.roll(x.shape[-1] // 2, -1)  # x2 beside x1, x1 beside x2
    return torch.addcmul(x * cos, other, signed_sin).type_as(x)


# ---------------------------------------------------------------- pairs side by side


def pair_table(rope: Tensor) -> Tensor:
    """cos + i sin of every position and pair, (1 or 2, max_len, C/2) complex, from the table of
    `rope_table`."""
    cos, sin = rope[..., rope.shape[-1] // 2 :].unbind(1)  # of the second half, whose sign is +
    return torch.complex(cos, sin)


def pair_order(config) -> Tensor:
    """Of the rows of queries, keys and values, (H + 2K) C in all, those that make the pairs (i, i + C/2) of
    queries and keys neighbours: 0, C/2, 1, C/2 + 1, .."""
    C, turned = config.head_dim, config.n_heads + config.n_kv_heads
    rows = torch.arange((turned + config.n_kv_heads) * C).view(-1, 2, C // 2)
    return torch.cat([rows[:turned].mT.flatten(), rows[turned:].flatten()])


def split_pairs(qkv: Tensor, batch: int, config, turns: Tensor) -> tuple[Tensor, Tensor]:
    """`split_heads` where pairs are neighbours: one product of complex numbers, (x1 + i x2) e^(i angle),
    turns all heads. qkv (B T, (H + 2K) C) -> q (B, H, T, C), and k above v (B, 2K, T, C), float32 or finer.
    `turns` from `rotation`."""
    H, K, C = config.n_heads, config.n_kv_heads, config.head_dim
    heads = qkv.float() if qkv.element_size() < 4 else qkv
    pairs = torch.view_as_complex(heads.view(batch, -1, H + 2 * K, C // 2, 2))
    heads = torch.view_as_real(pairs * turns).view(batch, -1, H + 2 * K, C).transpose(1, 2)
    return heads.narrow(1, 0, H), heads.narrow(1, H, 2 * K)
