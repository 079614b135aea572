"""How good every exit is, on data that is not trained on."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from model import Transformer
from training.batches import Batch, batches
from training.losses import sum_of_losses
from training.settings import TrainConfig

VALIDATION_BATCHES = 16


def on_device(batch: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """inputs (B, T), targets (B T), documents (B, T)."""
    inputs, targets, documents = (
        torch.from_numpy(part).to(device) for part in (batch.inputs, batch.targets, batch.documents)
    )
    return inputs, targets.flatten(), documents


def autocast(config: TrainConfig):
    """Matrix products in the dtype of training, what is summed in float32."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, torch.bfloat16)


@torch.no_grad()
def validate(
    model: Transformer, records: np.ndarray, config: TrainConfig, progress: Callable[[int], None] | None = None
) -> dict[int, list[float]]:
    """[loss in nats per target, agreement with the last layer's argmax in [0, 1]] of every trained exit and of the last
    layer, over the first batches of a validation set. `progress` is told how many batches are done."""
    last = model.config.n_layers
    layers = [*config.exits, last]
    losses, agreed, count = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0), 0
    packed = batches(records, config.rows, config.length, seed=None)
    for number, batch in enumerate(itertools.islice(packed, VALIDATION_BATCHES)):
        if progress:
            progress(number)
        inputs, targets, documents = on_device(batch, config.device)
        learned = (targets >= 0).nonzero()[:, 0]
        N = len(learned)
        with autocast(config):
            states = model.hidden_states(inputs, documents)
            rows = {layer: states[layer][learned] for layer in layers}
            equal = dict.fromkeys(layers, 1.0)
            _, means, same = sum_of_losses(model, rows, targets[learned], equal, compare=True)
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
