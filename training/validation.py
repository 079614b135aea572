"""How good every exit is, on data that is not trained on."""

import itertools
from collections.abc import Callable

import numpy as np
import torch

from model import Transformer
from training.batches import batches
from training.device import autocast, to_device
from training.losses import sum_of_losses
from training.part import part_of_vocabulary
from training.settings import TrainConfig

VALIDATION_BATCHES = 16


@torch.no_grad()
def validate(
    model: Transformer,
    records: np.ndarray,
    config: TrainConfig,
    progress: Callable[[int], None] | None = None,
) -> dict[int, list[float]]:
    """[loss in nats per target, agreement with the last layer's argmax in [0, 1]] of every trained exit and
    of the last layer, over the first batches of a validation set; with a shortlist over the part of the
    vocabulary that is trained over, so that losses are lower. `progress` is told how many batches are
    done."""
    last = model.config.n_layers
    layers = [*config.exits, last]
    losses, agreed, count = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0), 0
    packed = batches(records, config.rows, config.length, seed=None)
    for number, batch in enumerate(itertools.islice(packed, VALIDATION_BATCHES)):
        if progress:
            progress(number)
        here = to_device(batch, config.device)
        N = len(here.targets)
        with autocast(config):
            states = model.hidden_states(here.inputs, here.documents)
            rows = {layer: states[layer][here.learned] for layer in layers}
            equal = dict.fromkeys(layers, 1.0)
            unembed, targets = part_of_vocabulary(model, config.shortlist, here)
            _, means, same = sum_of_losses(model, rows, targets, equal, compare=True, unembed=unembed)
        for layer in layers:
            losses[layer] += means[layer].item() * N
            agreed[layer] += N if layer == last else same[layer].sum().item()
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
