"""What updates the weights, and how fast."""

import math

import torch
from torch import nn

from training.settings import TrainConfig

LOWEST_RATE = 0.02  # learning rate at the last step, as a share of the peak
WEIGHT_DECAY = 0.1  # of matrices, as GPT-3 (Brown 2020, appendix B) and Llama 2 (Touvron 2023, section 2.2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; only matrices decay."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.dim() > 1]
    vectors = [weight for weight in trained if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to LOWEST_RATE · lr at max_steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    return config.lr * (LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))
