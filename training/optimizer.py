"""What updates the weights, and how fast."""

import math

import torch

from model import Transformer
from training.settings import TrainConfig


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; only matrices decay."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = {
        "params": [weight for weight in trained if weight.dim() > 1],
        "weight_decay": config.weight_decay,
    }
    vectors = {"params": [weight for weight in trained if weight.dim() == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=config.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr · lr at max_steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
