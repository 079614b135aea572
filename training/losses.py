"""What training minimizes at the exits. A loss is one function of `Exits`, what one micro-batch left after
every layer.

To try a loss of your own, write a file, and name it: `python train.py --loss my_file:smooth`.

    import torch.nn.functional as F

    def smoothed(logits, targets, final):     # logits (n, V), targets (n,) -> a loss for each target, (n,)
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)

    def smooth(exits):                        # Exits -> scalar
        return exits.weighted_sum(exits.in_turn(), smoothed)

1. Choose layers: `exits.every()`, `exits.in_turn()` (some of them, in rotation), or a list. The model's last layer,
   `exits.last`, is among those of the first two, unless --train heads leaves it alone.
2. Say what one target costs there, from its logits alone, and `exits.weighted_sum` does the rest, in little memory.
   `final()` gives the last layer's logits (n, V) without a gradient; at the last layer itself `final` is None.
3. Add what else you like: `exits.state(layer)` is h_l (N, d), `exits.logits(layer)` (N, V), `exits.targets` (N,),
   `exits.config` the settings, `exits.step` the number of the step. Return the mean over the N targets, so that
   micro-batches weigh by theirs.

`@register_loss("smooth")` above the function gives it a name of its own, as the losses below have.

Dimensions: N learned targets of a micro-batch, n some of these, d model width, V vocabulary. Layers count
from 1 to L. With --shortlist V is a part of the vocabulary (training/part.py), and targets are places in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import option
from common.errors import UserError
from common.plugins import find_function, name_and_file
from model import Transformer
from training.chunked import LastLogits, Summed, TargetLoss, chunk_size, chunked_sum, losses_of_targets

# ---------------------------------------------------------------- the sum over exits


def cross_entropy(logits: Tensor, targets: Tensor, final: LastLogits | None) -> Tensor:
    """-log p_l(target), in nats: (n,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def divergence(logits: Tensor, targets: Tensor, final: LastLogits | None) -> Tensor:
    """KL(p_L‖p_l) from the last layer's distribution, which gets no gradient from it; the last layer's own is
    its cross-entropy. (n,)."""
    if final is None:
        return cross_entropy(logits, targets, None)
    log_p, log_q = final().log_softmax(-1), logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def plain_sum(
    model: Transformer,
    rows: dict[int, Tensor],
    targets: Tensor,
    weights: dict[int, float],
    each: TargetLoss,
    compare: bool,
    unembed: Tensor,
) -> Summed:
    """The weighted sum of the losses of the layers in `weights`: a loss is the mean over the N targets of
    what `each` gives. Returns it, the losses by layer without gradient, and with `compare` where each exit's
    argmax is the last layer's, (N,) bool. rows: states (N, d) of the layers in `weights` and of the last;
    unembed (V, d)."""
    last, losses, agreed = max(rows), {}, {}
    final = LastLogits(model, rows[last], unembed)
    for layer in weights:
        logits = model.score(model.exit_norm(rows[layer], layer), unembed)  # (N, V)
        losses[layer] = losses_of_targets(each, logits, targets, None if layer == last else final).mean()
        if compare and layer != last:
            agreed[layer] = logits.argmax(-1) == final().argmax(-1)
    total = sum(weights[layer] * losses[layer] for layer in weights)
    return total, {layer: loss.detach() for layer, loss in losses.items()}, agreed


def sum_of_losses(
    model: Transformer,
    rows: dict[int, Tensor],
    targets: Tensor,
    weights: dict[int, float],
    each: TargetLoss = cross_entropy,
    compare: bool = False,
    unembed: Tensor | None = None,
) -> Summed:
    """`plain_sum`, or where its logits would be many the chunked form of it, which gives the same in less
    memory. unembed (V, d), or the rows of a part of the vocabulary, whose places the targets are; None: all
    of the model's."""
    unembed = model.unembed if unembed is None else unembed
    numbers = len(targets) * len(unembed) * len(weights)  # logits in all
    form = plain_sum if numbers <= chunk_size(targets.device) else chunked_sum
    return form(model, rows, targets, weights, each, compare, unembed)


# ---------------------------------------------------------------- what a loss sees


@dataclass(frozen=True)
class LossConfig:
    """Which loss, at which exits."""

    loss: str = option(
        "rotate",
        "none: the last layer alone; weighted: every exit, every step; rotate: some exits a step, "
        "in turn; distill: so, towards the last layer's distribution; hidden: rotate, and states to deeper; "
        "or one of your own, my_file:function (training/losses.py says how)",
    )
    exits: tuple[int, ...] = option((2, 3, 4, 6, 8, 10), "exit layers to train")
    exit_weights: tuple[float, ...] = option(
        (),
        "weights of the exits' losses, lowest first, then the last layer's; none: by depth",
        group="losses",
    )
    per_step: int = option(2, "rotate, distill, hidden: exits a step", group="losses", least=1, most=10_000)
    hidden_weight: float = option(
        1.0, "hidden: weight of the distance between states", group="losses", least=0, most=10**6
    )
    classifier: bool = option(False, "also train a confidence classifier at every exit", group="losses")
    shortlist: int | None = option(
        None,
        "train heads: learn over so many frequent ids and those of the batch; none: over the whole vocabulary",
        group="losses",
        least=2,
        most=10**9,
    )

    def __post_init__(self):
        object.__setattr__(self, "exits", tuple(sorted(set(self.exits))))
        find_loss(self.loss)
        count = len(self.exits) + 1
        usable = all(0 < weight < math.inf for weight in self.exit_weights)
        if len(self.exit_weights) not in (0, count) or not usable:
            raise UserError(
                f"exit_weights are {self.exit_weights}; give {count} above 0, one an exit and the last layer's"
            )
        if self.classifier and self.loss == "none":
            raise UserError("classifier is True, but loss is none, which asks no exit; choose another loss")
        if not self.exits and (self.loss in ("distill", "hidden") or self.classifier):
            raise UserError(
                f"loss {self.loss}, classifier {self.classifier}: there must be exits to train; give --exits"
            )


def exits_in_turn(exits: tuple[int, ...], per_step: int, step: int) -> tuple[int, ...]:
    """Every stride-th exit, at most `per_step`, from an offset that moves on by one each step (LayerSkip,
    Elhoushi 2024, section 4.1.2, rotational early exit)."""
    stride = max(1, math.ceil(len(exits) / per_step))
    return exits[step % stride :: stride]


def shares(config: LossConfig, layers: list[int], n_layers: int) -> dict[int, float]:
    """The weight of each layer's loss, in sum 1: by `exit_weights`, or rising with depth, w_l = l / sum
    (CALM, Schuster 2022, Eq. 6). Raises UserError for a layer that `exit_weights` say nothing of."""
    weights = {layer: layer for layer in layers}
    if config.exit_weights:
        given = dict(zip((*config.exits, n_layers), config.exit_weights))
        unknown = [layer for layer in layers if layer not in given]
        if unknown:
            raise UserError(f"exit_weights say nothing of layer {unknown[0]}; they are for {list(given)}")
        weights = {layer: given[layer] for layer in layers}
    return {layer: weight / sum(weights.values()) for layer, weight in weights.items()}


class Exits:
    """What a loss sees of one micro-batch: states after every layer at the N learned positions, and the
    tokens to predict."""

    def __init__(
        self,
        model: Transformer,
        config: LossConfig,
        step: int,
        states: list[Tensor],
        learned: Tensor,
        targets: Tensor,
        train_last: bool = True,
        unembed: Tensor | None = None,
    ):
        """states: h_0 .. h_L (B T, d); which of their rows learn, and what comes next there: (N,), (N,);
        `unembed` as in `sum_of_losses`."""
        self.model, self.config, self.step = model, config, step
        self.last = model.config.n_layers
        self.learned, self.targets = learned, targets
        self.asked: set[int] = set()  # layers whose logits the loss has used
        self.deepest: Tensor | None = (
            None  # of the last weighted sum the deepest layer's loss: what the log shows
        )
        self._unembed = model.unembed if unembed is None else unembed
        self._states, self._learned_states, self._agreed = states, {}, {}
        self._top = [self.last] if train_last else []

    def every(self) -> list[int]:
        """All exits, and the last layer where it is trained."""
        return [*self.config.exits, *self._top]

    def in_turn(self) -> list[int]:
        """The exits whose turn it is at this step, and the last layer where it is trained."""
        return [*exits_in_turn(self.config.exits, self.config.per_step, self.step), *self._top]

    def state(self, layer: int) -> Tensor:
        """h_l at the learned positions: (N, d)."""
        if layer not in self._learned_states:
            self._learned_states[layer] = self._states[layer][self.learned]
        return self._learned_states[layer]

    def logits(self, layer: int) -> Tensor:
        """z_l: (N, V), with gradient; kept until the backward pass, which for a large V is much memory."""
        self.asked.add(layer)
        return self.model.score(self.model.exit_norm(self.state(layer), layer), self._unembed)

    def weighted_sum(self, layers: list[int], each: TargetLoss = cross_entropy) -> Tensor:
        """The mean over the targets of `each`, summed over these layers by their `shares`: a scalar."""
        rows = {layer: self.state(layer) for layer in {*layers, self.last}}
        weights = shares(self.config, layers, self.last)
        compare = self.config.classifier
        summed = sum_of_losses(self.model, rows, self.targets, weights, each, compare, self._unembed)
        total, losses, agreed = summed
        self.asked.update(layers)
        self._agreed.update(agreed)
        self.deepest = losses[max(losses)]
        return total

    @torch.no_grad()
    def agreement(self, layer: int) -> Tensor:
        """Where the exit's argmax is the last layer's: (N,) bool."""
        if layer not in self._agreed:
            self._agreed[layer] = self.logits(layer).argmax(-1) == self.logits(self.last).argmax(-1)
        return self._agreed[layer]


# ---------------------------------------------------------------- the losses

Loss = Callable[[Exits], Tensor]
LOSSES: dict[str, Loss] = {}


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Registers a loss, Exits -> scalar, under `name`."""

    def add(function: Loss) -> Loss:
        LOSSES[name] = function
        return function

    return add


def find_loss(name: str) -> Loss:
    """The loss registered under `name`, or that "package.module:function" imports. Raises UserError."""
    return find_function("loss", name, LOSSES, ("exits",))


def ask_loss(name: str, exits: Exits) -> Tensor:
    """What the loss called `name` says: a scalar. An error of a function of the user's names it and its
    file."""
    function = find_loss(name)
    called = name_and_file("loss", name, function)
    try:
        value = function(exits)
    except UserError as error:
        raise UserError(f"{called}: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(f"{called} failed; see the error above") from error
    if not isinstance(value, Tensor):
        raise UserError(f"{called} gave {type(value).__name__}; it must give a scalar tensor")
    if value.dim() or not value.is_floating_point():
        raise UserError(
            f"{called} gave {value.dtype} of shape {tuple(value.shape)}; it must give a scalar, for example .mean()"
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise UserError(f"{called} gave a value without a gradient, from which nothing learns")
    return value


@register_loss("none")
def none(exits: Exits) -> Tensor:
    """Cross-entropy of the last layer alone: no exit is trained."""
    return exits.weighted_sum([exits.last])


@register_loss("weighted")
def weighted(exits: Exits) -> Tensor:
    """Cross-entropy of every exit at every step (CALM, Schuster 2022, Eq. 6)."""
    return exits.weighted_sum(exits.every())


@register_loss("rotate")
def rotate(exits: Exits) -> Tensor:
    """Cross-entropy of some exits a step, in turn (LayerSkip, Elhoushi 2024, section 4.1.2)."""
    return exits.weighted_sum(exits.in_turn())


@register_loss("distill")
def distill(exits: Exits) -> Tensor:
    """KL from the last layer's distribution to some exits' a step, in turn; cross-entropy at the last
    layer."""
    return exits.weighted_sum(exits.in_turn(), divergence)


@register_loss("hidden")
def hidden(exits: Exits) -> Tensor:
    """As `rotate`, and the distance of the states up to the step's first exit to deeper ones (FREE, Bae
    2023)."""
    layers = exits.in_turn()
    states = [exits.state(layer) for layer in range(1, exits.last + 1)]
    return exits.weighted_sum(layers) + exits.config.hidden_weight * hidden_loss(states, layers[0])


def hidden_loss(states: list[Tensor], shallow: int) -> Tensor:
    """Mean over the layers up to `shallow` of the mean squared distance to the closest deeper layer, which
    gets no gradient; of two layers the higher is matched no lower (FREE, section 3.2, layerwise
    distillation). states: h_1 .. h_L, (N, d)."""
    low, high = states[:shallow], [state.detach() for state in states[shallow:]]
    with torch.no_grad():
        points = [torch.stack(part).float().flatten(1) for part in (low, high)]  # (layers, N d)
        costs = torch.cdist(*points).square().tolist()
    pairs = zip(low, monotone(costs))
    return sum(F.mse_loss(state.float(), high[match].float()) for state, match in pairs) / shallow


def monotone(costs: list[list[float]]) -> list[int]:
    """The column of each row, never falling from row to row, of least total cost."""
    best = [(0.0, [])] * len(costs[0])  # of the rows so far, ending at or before each column: total, columns
    for row in costs:
        ending = [(total + cost, [*columns, j]) for j, (cost, (total, columns)) in enumerate(zip(row, best))]
        best = [min(ending[: j + 1]) for j in range(len(row))]
    return best[-1][1]


# ---------------------------------------------------------------- the classifiers


def classifier_loss(model: Transformer, hidden: Tensor, layer: int, labels: Tensor) -> Tensor:
    """Cross-entropy of the layer's classifier with `labels` (N,), whether the exit agrees with the last layer
    (CALM, section 3.5: each layer independent of the others), both labels weighing the same however rare one
    is (FREE). Only the classifier learns from it. hidden (N, d)."""
    w = model.classifiers[str(layer)]
    logits = (model.exit_norm(hidden, layer).detach() @ w[:-1] + w[-1]).float()
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    means = [(losses * side).sum() / side.sum().clamp(min=1) for side in (labels, ~labels)]
    return sum(means) / 2
