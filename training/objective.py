"""What a training step minimizes, as a module: the full pass, the loss of its exits, the confidence
classifiers.

Layers are numbered from 1 to L.
"""

import random

import torch
from torch import Tensor, nn

from model import Transformer
from training.device import DeviceBatch
from training.losses import Exits, call_loss, classifier_loss
from training.settings import TrainConfig


class Objective(nn.Module):
    """The training loss of a model; a module, so that torch can distribute it over several processes."""

    def __init__(self, model: Transformer, config: TrainConfig):
        super().__init__()
        self.model, self.config = model, config
        if config.compile:
            for block in model.blocks:
                block.compile()

    def forward(self, batch: DeviceBatch, step: int) -> tuple[Tensor, Tensor]:
        """The loss, and that of the deepest layer trained (without gradient), as means over the targets."""
        model, config = self.model, self.config
        with autocast(config):
            skipped = skipped_layers(config, model.config.n_layers, batch.number)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not config.heads_alone):
                states = model.hidden_states(batch.inputs, batch.documents, skipped, config.recompute)
            exits = Exits(model, config, batch, states, step)
            loss = call_loss(config.loss, exits)
            deepest = exits.losses[max(exits.losses)] if exits.losses else loss.detach()
            if config.classifier:
                layers = sorted(exits.used & set(model.config.classifiers))
                for layer in layers:
                    labels = exits.agreement(layer)
                    loss = loss + classifier_loss(model, exits.state(layer), layer, labels) / len(layers)
        return loss, deepest


def autocast(config: TrainConfig):
    """Matrix products in the dtype of training, sums in float32."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype != "float32")


def skipped_layers(config: TrainConfig, n_layers: int, number: int) -> frozenset[int]:
    """Layers that micro-batch `number` leaves out: layer l with probability layer_dropout
    (2^((l-1)/(L-1)) - 1), so the first never and the last with layer_dropout (LayerSkip, Eq. 3; there, each
    batch row has its own draw; here, all rows share one, which is simpler). The draw depends only on the seed
    and the number, so a resumed run repeats it."""
    draw, skipped = random.Random(f"{config.seed} {number}"), set()
    for layer in range(1, n_layers + 1):
        depth = (layer - 1) / max(1, n_layers - 1)  # 0 for the first, 1 for the last
        if draw.random() < config.layer_dropout * (2**depth - 1):
            skipped.add(layer)
    return frozenset(skipped)
