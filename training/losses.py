"""What training minimizes: losses over exits, paid only by the exits of a step; layer dropout; the confidence classifiers.

Dimensions: B rows, T positions, N learned targets of a batch, d model width, V vocabulary. Layers count from 1 to L.
"""

import math
import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer

if TYPE_CHECKING:
    from train import TrainConfig

LOSSES = ("none", "weighted", "rotate", "distill", "hidden")
CHUNK = {"cpu": 2**20, "cuda": 2**25}  # logits that are alive at a time: few enough for a CPU's cache, enough to keep a GPU busy
FEWEST = 64  # rows at a time, whatever the vocabulary: the unembedding is read once for all of them


# ---------------------------------------------------------------- what a step trains


def layers_of_step(config: "TrainConfig", n_layers: int, step: int) -> list[int]:
    """Layers whose heads are trained at `step`, the last one always. `none`: no other; `weighted`: every exit; the others rotate: every
    R-th exit, from an offset that moves on by one each step (LayerSkip, Elhoushi 2024, section 4.1.2, rotational early exit)."""
    count = len(config.exits)
    stride = {"none": count + 1, "weighted": 1}.get(config.loss, max(1, math.ceil(count / config.per_step)))
    exits = config.exits[step % stride :: stride] if config.loss != "none" else ()
    return [*exits, n_layers]


def shares(config: "TrainConfig", layers: list[int], n_layers: int) -> dict[int, float]:
    """The weight of each layer's loss, in sum 1: by `exit_weights`, or rising with depth, w_l = l / sum (CALM, Schuster 2022, Eq. 6)."""
    given = dict(zip((*config.exits, n_layers), config.exit_weights))
    weights = {layer: given.get(layer, layer) for layer in layers}
    return {layer: weight / sum(weights.values()) for layer, weight in weights.items()}


def skipped_layers(config: "TrainConfig", n_layers: int, batch: int) -> frozenset[int]:
    """Layers that micro-batch number `batch` leaves out: layer l with probability layer_dropout (2^((l-1)/(L-1)) - 1), so the first never
    and the last with layer_dropout (LayerSkip, Eq. 1-2; there drawn for each row by itself, here for all rows, which saves their time)."""
    if not config.layer_dropout or n_layers == 1:
        return frozenset()
    draw = random.Random(f"{config.seed} {batch}")
    chances = {layer: config.layer_dropout * (2 ** ((layer - 1) / (n_layers - 1)) - 1) for layer in range(1, n_layers + 1)}
    return frozenset(layer for layer, chance in chances.items() if draw.random() < chance)


class Objective(nn.Module):
    """The training loss of a model; a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Transformer, config: "TrainConfig"):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor, layers: list[int],
                skipped: frozenset[int] = frozenset()) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The loss, and without gradient that of the deepest layer trained. inputs and documents (B, T); targets (B T), -1 where nothing is
        learned; layers from `layers_of_step`."""
        config, frozen = self.config, self.config.train == "heads"
        learned = (targets >= 0).nonzero()[:, 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            states = self.model.hidden_states(inputs, documents, skipped, config.recompute)
        rows = {layer: states[layer][learned] for layer in layers}
        weights = shares(config, layers[:-1] if frozen else layers, layers[-1])
        loss, losses, agreed = exit_loss(self.model, rows, targets[learned], weights, config.loss == "distill", config.classifier)
        if config.loss == "hidden":
            loss = loss + config.hidden_weight * hidden_loss([state[learned] for state in states[1:]], layers[0])
        for layer, labels in agreed.items():
            loss = loss + classifier_loss(self.model, rows[layer], layer, labels) / len(agreed)
        return loss, losses[max(losses)]


# ---------------------------------------------------------------- the losses


class Given(torch.autograd.Function):
    """A value whose gradients are known: forward(value, gradients, *inputs) is the value, and backward hands each input its gradient."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, slope: Tensor):
        return None, None, *(gradient.mul_(slope) for gradient in ctx.gradients)


def exit_loss(model: Transformer, rows: dict[int, Tensor], targets: Tensor, weights: dict[int, float], distill: bool = False,
              compare: bool = False) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:  # fmt: skip
    """Returns the weighted sum of the losses of the layers in `weights`, these losses without gradient, and with `compare` where each
    exit's argmax is the last layer's, (N,) bool. A loss is the mean over the N targets, in nats, of the cross-entropy or, with `distill`,
    at all layers but the last, of KL(p_L‖p_l) from the last layer's distribution, which gets no gradient from it.

    Only logits of one layer and of at most n = max(CHUNK, FEWEST V) numbers are alive, and the last layer's: the gradients of a chunk are
    made at once, so that nothing of it is kept for, or made again in, the backward pass. That is 4 n bytes for each of logits,
    log-probabilities, their gradient and the last layer's logits, whatever N: 16 MiB on a CPU and 512 MiB on a GPU, for V = 262,144 on a
    CPU 256 MiB; and one gradient of the unembedding, (V, d).
    rows: states of the layers in `weights` and of the last, (N, d)."""
    last, taught = max(rows), torch.is_grad_enabled()
    unembed = model.unembed.detach().requires_grad_(taught and model.unembed.requires_grad)
    normed = {layer: model.exit_norm(rows[layer], layer) for layer in sorted(weights, reverse=True)}  # (N, d), the last layer first
    losses = {layer: targets.new_zeros((), dtype=torch.float32) for layer in weights}
    slopes, agreed = {layer: torch.empty_like(x) for layer, x in normed.items()}, {layer: [] for layer in weights if layer != last}
    for part in torch.arange(len(targets), device=targets.device).split(max(FEWEST, CHUNK[targets.device.type] // model.config.vocab_size)):
        final = None
        if last not in weights and (distill or compare):
            final = model.head(rows[last][part]).detach()
        for layer, x in normed.items():
            x = x.detach()[part].requires_grad_(taught)
            logits = model.score(x, unembed)
            if distill and layer != last:
                loss = F.kl_div(logits.log_softmax(-1), final.log_softmax(-1), reduction="sum", log_target=True) / len(targets)
            else:
                loss = F.cross_entropy(logits, targets[part], reduction="sum") / len(targets)
            losses[layer] += loss.detach()
            if layer == last:
                final = logits.detach()
            elif compare:
                agreed[layer].append(logits.argmax(-1) == final.argmax(-1))
            if taught:
                (weights[layer] * loss).backward(inputs=[x, unembed] if unembed.requires_grad else [x])
                slopes[layer][part] = x.grad
    total = sum(weights[layer] * loss for layer, loss in losses.items())
    if taught:
        known = list(zip(slopes.values(), normed.values())) + ([(unembed.grad, model.unembed)] if unembed.requires_grad else [])
        total = Given.apply(total, [gradient for gradient, _ in known], *(value for _, value in known))
    return total, losses, {layer: torch.cat(parts) for layer, parts in agreed.items()} if compare else {}


def hidden_loss(states: list[Tensor], shallow: int) -> Tensor:
    """Mean over the layers up to `shallow` of the mean squared distance to the closest deeper layer, which gets no gradient; of two
    layers the higher is matched no lower (FREE, Bae 2023, section 3.2, layerwise distillation). states: h_1 .. h_L, (N, d)."""
    low, high = states[:shallow], [state.detach() for state in states[shallow:]]
    with torch.no_grad():
        costs = torch.cdist(*(torch.stack(part).float().flatten(1) for part in (low, high))).square().tolist()
    return sum(F.mse_loss(low[i].float(), high[j].float()) for i, j in enumerate(monotone(costs))) / shallow


def monotone(costs: list[list[float]]) -> list[int]:
    """The column of each row, never falling from row to row, of least total cost."""
    best = [(0.0, [])] * len(costs[0])  # of the rows so far, ending at or before each column: total, columns
    for row in costs:
        ending = [(total + cost, [*columns, j]) for j, (cost, (total, columns)) in enumerate(zip(row, best))]
        best = [min(ending[: j + 1]) for j in range(len(row))]
    return best[-1][1]


def classifier_loss(model: Transformer, hidden: Tensor, layer: int, labels: Tensor) -> Tensor:
    """Cross-entropy of the layer's classifier with `labels` (N,), whether the exit agrees with the last layer (CALM, section 3.5: each
    layer independent of the others), both labels weighing the same however rare one is (FREE). Only the classifier learns from it."""
    w = model.classifiers[str(layer)]
    logits = (model.exit_norm(hidden, layer).detach() @ w[:-1] + w[-1]).float()
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    sides = [side.sum() for side in (labels, ~labels)]
    return sum((losses * side).sum() / count.clamp(min=1) for side, count in zip((labels, ~labels), sides)) / 2
