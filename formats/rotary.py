"""The table of rotary positions, with what checkpoints ask for: frequencies slowed for long texts, a base of their
own for layers with a window.

Dimensions: C width of a head.
"""

import math

import torch
from torch import Tensor


def rope_table(config) -> Tensor:
    """Rotary position embedding (Su 2021): cos and signed sin (-sin for the first half of a head, sin for the second)
    of every position, (1, 2, max_len, C); (2, 2, max_len, C) where layers with a window have a base of their own."""
    exponent = -torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
    frequency = config.rope_base**exponent
    if config.rope_factor != 1:  # slowed for long texts, as in Llama 3 (llama-models, `apply_scaling`); or all alike
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
