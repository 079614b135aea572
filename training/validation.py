"""How good every exit is, on data that is not trained on."""

import itertools

import numpy as np
import torch

from model import Transformer
from training.batches import batches
from training.device import to_device
from training.losses import Exits
from training.objective import autocast
from training.settings import TrainConfig

MOST_BATCHES, STEPS_PER_BATCH = 16, 25  # of each validation file, fewer in a short training run


def validation_batches(config: TrainConfig) -> int:
    """The number of batches of each validation file, at most: a run of 50 steps should not validate
    longer than it learns."""
    return max(1, min(MOST_BATCHES, config.max_steps // STEPS_PER_BATCH))


@torch.no_grad()
def validate(model: Transformer, records: np.ndarray, config: TrainConfig) -> dict[int, list[float]]:
    """[loss in nats per target, agreement with the last layer's argmax in [0, 1]] of every exit in --exits
    and of the last layer, over the first batches of a validation set. With --train all:N or heads:N, an
    exit's values are over the part of the vocabulary that it is trained on, so that its loss is lower."""
    layers = [*config.exits, model.config.n_layers]
    losses, agreed, count = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0), 0
    packed = batches(records, config.rows, config.length, seed=None)
    for batch in itertools.islice(packed, validation_batches(config)):
        here = to_device(batch, config.device)
        N = len(here.targets)
        with autocast(config):
            exits = Exits(model, config, here, model.hidden_states(here.inputs, here.documents), step=0)
            exits.weighted_sum(layers, compare=True)
        for layer in layers:
            losses[layer] += exits.losses[layer].item() * N
            agreed[layer] += N if layer == exits.last else exits.agreement(layer).sum().item()
        count += N
    return {layer: [round(losses[layer] / count, 4), round(agreed[layer] / count, 4)] for layer in layers}


def result_table(step: int, results: dict[str, dict[int, list[float]]]) -> str:
    """Loss and agreement of every layer on each validation file."""
    lines = []
    for file, layers in results.items():
        losses, agreements = zip(*layers.values())
        lines.append(f"step {step}, {file}")
        lines.append("  layer     " + "".join(f"{layer:7}" for layer in layers))
        lines.append("  loss      " + "".join(f"{loss:7.3f}" for loss in losses))
        lines.append("  agreement " + "".join(f"{same:7.3f}" for same in agreements))
    return "\n".join(lines)
