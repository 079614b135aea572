"""Rotary positions and attention, as plain functions: who sees whom, and how strongly.

Dimensions: B batch, T rows, S positions seen, H query heads, K key/value heads, C width of a head.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model import ModelConfig


def rope_table(config: "ModelConfig") -> Tensor:
    """cos and signed sin of every position: (1, 2, max_len, C), or (2, 2, max_len, C) where the layers with a window, last, have their own
    base. Frequencies are slowed as in Llama 3 (llama-models, `apply_scaling`), or all alike where there are no bands."""
    exponent = -torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
    frequency = config.rope_base**exponent
    if config.rope_factor != 1:
        kept = torch.zeros_like(frequency)  # share of the frequency that is not slowed
        if config.rope_bands:
            low, high, length = config.rope_bands
            kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / config.rope_factor)
    own = config.window is not None and config.local_rope_base is not None
    frequencies = torch.stack([frequency, config.local_rope_base**exponent] if own else [frequency])
    angle = torch.arange(config.max_len, dtype=torch.float64)[:, None] * frequencies[:, None]  # (1 or 2, max_len, C/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)


def split_heads(qkv: Tensor, batch: int, config: "ModelConfig", rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(B T, (H + 2K) C) -> q (B, H, T, C), k and v (B, K, T, C), with rotary position embedding (Su 2021) of q and k, the pairs being
    (i, i + C/2). rope: cos and signed sin of the T positions, (T, C) each."""
    H, K, C = config.n_heads, config.n_kv_heads, config.head_dim
    heads = qkv.view(batch, -1, H + 2 * K, C).transpose(1, 2)  # (B, H + 2K, T, C)
    qk, v = heads[:, : H + K], heads[:, H + K :]
    qk = torch.addcmul(qk * rope[0], qk.roll(C // 2, -1), rope[1]).type_as(v)
    return qk[:, :H], qk[:, H:], v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: "ModelConfig", causal: bool = False) -> Tensor:
    """softmax(q k * query_scale) v where `mask` (.., T, S) allows, or everywhere: q (B, H, T, C), k and v (B, K, S, C) -> (B T, H C)."""
    if config.attention_cap is None:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=config.query_scale, enable_gqa=gqa)
    else:  # the library's attention knows no cap
        B, H, T, C = q.shape
        grouped = q.view(B, k.shape[1], -1, T, C)  # (B, K, H/K, T, C)
        scores = soft_cap((grouped @ k[:, :, None].mT).float() * (config.query_scale or C**-0.5), config.attention_cap).view(B, H, T, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        out = (scores.softmax(-1).type_as(v).view(*grouped.shape[:-1], -1) @ v[:, :, None]).view(B, H, T, C)
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): x, kept within -cap .. cap (Gemma 2, section 2)."""
    return cap * torch.tanh(x / cap)


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which of the positions `columns` (S,) the positions `rows` (T,) see: those up to their own, the newest `window` of them. (T, S)."""
    distance = rows[:, None] - columns
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
