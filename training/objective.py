"""The training loss of a model, as a module: the full pass, the loss of its exits, the confidence
classifiers.

Dimensions: B rows, T positions. Layers count from 1 to L.
"""

import random
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.processes import processes
from model import Transformer
from training.device import DeviceBatch
from training.losses import Exits, ask_loss, classifier_loss
from training.part import part_of_vocabulary
from training.settings import TrainConfig
from training.sharding import shard
from training.utilization import batch_flops


class Objective(nn.Module):
    """The training loss of a model; a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Transformer, config: TrainConfig):
        super().__init__()
        self.model, self.config = model, config
        self.flops = 0  # of all micro-batches so far, see training/utilization.py

    def forward(
        self, batch: DeviceBatch, step: int, skipped: frozenset[int] = frozenset()
    ) -> tuple[Tensor, Tensor]:
        """The loss, and without gradient that of the deepest layer trained; means over the learned targets.
        Layers in `skipped` hand their input on."""
        model, config = self.model, self.config
        frozen = config.train == "heads"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states = model.hidden_states(
                batch.inputs, batch.documents, skipped, config.recompute
            )  # L + 1 times (B T, d)
        unembed, targets = part_of_vocabulary(model, config.shortlist, batch)
        exits = Exits(model, config, step, states, batch.learned, targets, not frozen, unembed)
        loss = ask_loss(config.loss, exits)
        deepest = loss.detach() if exits.deepest is None else exits.deepest
        if config.classifier:
            layers = sorted(exits.asked & set(model.config.classifiers))
            for layer in layers:
                labels = exits.agreement(layer)
                loss = loss + classifier_loss(model, exits.state(layer), layer, labels) / len(layers)
        layers = model.config.n_layers - len(skipped)
        counted = len(targets), exits.asked, frozen, len(unembed)
        self.flops += batch_flops(model.config, *batch.inputs.shape, layers, *counted)
        return loss, deepest


def make_objective(model: Transformer, config: TrainConfig) -> nn.Module:
    """What is minimized: compiled if asked, and with several processes exchanging gradients, or sharded."""
    if config.compile:
        for block in model.blocks:
            block.compile()
    objective = Objective(model, config)
    if config.shard:
        return shard(objective, config)
    if processes()[1] == 1:
        return objective
    unused = bool(
        config.layer_dropout or model.config.exit_norms or model.config.classifiers
    )  # in some steps
    return DistributedDataParallel(objective, find_unused_parameters=unused, gradient_as_bucket_view=True)


def unwrapped(objective: nn.Module) -> Objective:
    """The objective inside DistributedDataParallel, or itself."""
    return getattr(objective, "module", objective)


def synced(objective: nn.Module, last: bool):
    """With several processes, gradients are exchanged in the backward pass of a step's `last` micro-batch
    alone; of a sharded model in each, for whole gradients would not fit."""
    return nullcontext() if last or isinstance(objective, Objective) else objective.no_sync()


def skipped_layers(config: TrainConfig, n_layers: int, batch: int) -> frozenset[int]:
    """Layers that micro-batch number `batch` leaves out: layer l with probability layer_dropout
    (2^((l-1)/(L-1)) - 1), so the first never and the last with layer_dropout (LayerSkip, Eq. 1-2; there drawn
    for each row by itself, here for all rows, which saves their time)."""
    if not config.layer_dropout or n_layers == 1:
        return frozenset()
    draw, skipped = random.Random(f"{config.seed} {batch}"), set()
    for layer in range(1, n_layers + 1):
        chance = config.layer_dropout * (2 ** ((layer - 1) / (n_layers - 1)) - 1)
        if draw.random() < chance:
            skipped.add(layer)
    return frozenset(skipped)
