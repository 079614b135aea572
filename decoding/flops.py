"""Floating-point operations of the model's parts, multiply-adds counted twice."""

from formats.adapters import adapter_weights
from model import ModelConfig


def head_flops(config: ModelConfig, layer: int, n: int) -> int:
    """One row's head over n tokens: 2 a weight, those of the layer's adapter included if it is no block."""
    return 2 * config.d_model * n + (2 * adapter_weights(config) if layer in config.exit_norms else 0)


def block_weights(config: ModelConfig) -> int:
    """How many weights the matrices of one block have."""
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    return config.d_model * (attention + 3 * config.d_ff)


def block_flops(config: ModelConfig, first: int, stop: int) -> int:
    """One block on the positions first .. stop - 1: 2 a weight and row, 4 H C a row and position seen
    (without a window)."""
    seen = (first + 1 + stop) * (stop - first) // 2
    return 2 * block_weights(config) * (stop - first) + 4 * config.n_heads * config.head_dim * seen


def blocks_of_head(config: ModelConfig) -> float:
    """The head over the vocabulary in blocks: its weights over those of one block."""
    return config.vocab_size * config.d_model / block_weights(config)
