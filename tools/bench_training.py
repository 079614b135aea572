"""How fast training is: `python -m tools.bench --training`. Tokens a second of a step with every loss, beside
a plain PyTorch model.

Dimensions: B rows, T positions, d model width.
"""

import common.threads  # noqa: F401  before torch

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats.rotary import rope_table
from model import ModelConfig
from tools.timing import seconds
from train import train_step
from training.batches import Batch
from training.device import autocast, on_device, to_device
from training.losses import LOSSES
from training.objective import Objective
from training.optimizer import make_optimizer
from training.settings import TrainConfig
from training.start import make_model

PRODUCTS, WIDTH, OUT = (
    20,
    256,
    1024,
)  # matrix products of every token by 256 x 1024, for the rate of the machine


class PlainBlock(nn.Module):
    """One layer from the library's parts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, d_ff = config.d_model, config.d_ff
        self.heads = config.n_heads
        self.attn_norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.gate, self.up = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        B, T, d = x.shape
        parts = self.qkv(self.attn_norm(x)).chunk(3, -1)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in parts)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, d))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Queries or keys, rotated by their positions (model.rope_table)."""
    half = x.shape[-1] // 2
    return (x * cos + x.roll(half, -1) * signed_sin).type_as(x)


class Plain(nn.Module):
    """The embedded model's shape, trained on the last layer alone, as one writes it first (cf. nanoGPT):
    every position learned, documents seeing each other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rope = rope_table(config)[0]
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of tokens (B, T) and their targets (B T,)."""
        cos, sin = self.rope[:, : tokens.shape[1]].to(tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets)


def plain_step(model: Plain, batch: Batch, config: TrainConfig) -> Callable[[], None]:
    """A step of the plain model on this batch."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        here = to_device(batch, config.device)
        with autocast(config):
            loss = model(here.inputs, here.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(batch: Batch, config: TrainConfig, shape: ModelConfig) -> Callable[[], float]:
    """A step of this project on this batch."""
    model = make_model(config, shape)
    objective, optimizer = Objective(model, config), make_optimizer(model, config)
    stream, numbers = on_device(itertools.repeat(batch), config), itertools.count()
    return lambda: train_step(objective, optimizer, stream, config, next(numbers))


def print_training(config: TrainConfig, repeat: int) -> None:
    """Tokens a second of a step with each loss, all positions learned, beside the plain model, and what share
    that is of the rate of matrix products here."""
    shape, N = ModelConfig(), config.rows * config.length
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (config.rows, config.length + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones_like(tokens[:, 1:]))
    plain = Plain(shape).to(config.device)
    dtype = getattr(torch, config.dtype)
    left = torch.randn(N, WIDTH, device=config.device, dtype=dtype)
    right = torch.randn(WIDTH, OUT, device=config.device, dtype=dtype)

    actions = {"products": lambda: [left @ right for _ in range(PRODUCTS)]}
    actions["plain PyTorch"] = plain_step(plain, batch, config)
    for loss in LOSSES:
        actions[loss] = our_step(batch, replace(config, loss=loss), shape)
    actions["rotate, layer dropout 0.2"] = our_step(batch, replace(config, layer_dropout=0.2), shape)
    spent = seconds(actions, config.device, repeat)

    rate = PRODUCTS * 2 * N * WIDTH * OUT / spent.pop("products")
    print(
        f"{torch.get_num_threads()} threads, {config.dtype}, {config.rows} x {config.length} tokens a step, all of "
        f"them learned; products of {N} x {WIDTH} and {WIDTH} x {OUT}: {rate / 1e9:.0f} GFLOP/s"
    )
    work = 6 * N * sum(weight.numel() for weight in plain.parameters())
    for name, value in spent.items():
        line = f"  {name}: {N / value:.0f} tokens/s, {value / spent['none']:.2f} times the time of none"
        if name in ("none", "plain PyTorch"):
            line += f", {work / value / rate:.0%} of the products' rate"
        print(line)
