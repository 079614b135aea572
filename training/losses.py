"""What training minimizes at the exits. A loss is one function of `Exits`, the states of one micro-batch
after every layer.

To try a loss of your own, write a file, and name it: `python train.py --loss my_file:smooth`.

    import torch.nn.functional as F

    def smoothed(logits, targets, final):     # logits (n, V), targets (n,) -> a loss for each target, (n,)
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)

    def smooth(exits):                        # Exits -> scalar
        return exits.weighted_sum(exits.in_turn(), smoothed)

1. Choose layers: `exits.every()`, `exits.in_turn()` (some of them, in rotation), or a list. The first two
   include the model's last layer, `exits.last`, except with --train heads, which leaves it as it is.
2. Say what one target costs there, from its logits alone, and `exits.weighted_sum` does the rest, in little
   memory. `final()` gives the last layer's logits (n, V) without a gradient; at the last layer itself `final`
   is None.
3. Add anything else: `exits.state(layer)` is h_l (N, d), `exits.logits(layer)` (N, V), `exits.targets`
   (N,), `exits.config` the settings, `exits.step` the number of the step. Return the mean over the N targets,
   so that each micro-batch is weighted by its number of targets.

Dimensions: N targets of a micro-batch (in a document with a prompt, the tokens of its completion), n some of
these, d model width, V vocabulary. Layers are numbered from 1 to L. With --train all:N or heads:N exits are
trained on a part of the vocabulary (`part_of_vocabulary`), and `exits.targets` are indices into it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from common.config import Number, option, read_choice
from common.errors import UserError
from common.plugins import find_function
from confidence import classifier_logit
from model import Transformer
from training.device import DeviceBatch

# Returns the last layer's logits (n, V) for the same targets, without a gradient.
LastLogits = Callable[[], Tensor]
# Logits (n, V) of one layer, targets (n,), and the last layer's logits (None at the last layer itself) ->
# losses (n,).
TargetLoss = Callable[[Tensor, Tensor, LastLogits | None], Tensor]

# Layers -> the weights of their losses, which add up to 1.
Weigh = Callable[[list[int]], dict[int, float]]

PER_STEP = 2  # exits that `rotate`, `layerskip`, `distill` and `hidden` train at each step
E_SCALE = 0.2  # weight of the exits' losses in `layerskip` (LayerSkip uses 0.1 to 1)
HIDDEN_WEIGHT = 1.0  # weight of the distance between states in `hidden` (FREE's scripts use 0.5)
# How many logits of one layer are alive at a time: few enough for a CPU's cache, enough to keep a GPU busy.
CHUNK = {"cpu": 2**20, "cuda": 2**25}
FEWEST = 128  # targets at a time, whatever V: they share one reading of the unembedding
# What --train may be, and its number; N = 0 stands for the whole vocabulary.
TRAIN = dict.fromkeys(["all", "heads"], (Number("N", 0, {"least": 2}),))


# ---------------------------------------------------------------- what one target costs


def cross_entropy(logits: Tensor, targets: Tensor, final: LastLogits | None) -> Tensor:
    """-log p_l(target), in nats: (n,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def divergence(logits: Tensor, targets: Tensor, final: LastLogits | None) -> Tensor:
    """KL(p_L‖p_l) from the last layer's distribution, which gets no gradient from it; the loss of the last
    layer itself is its cross-entropy. (n,)."""
    if final is None:
        return cross_entropy(logits, targets, None)
    log_p, log_q = final().log_softmax(-1), logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


# ---------------------------------------------------------------- what a loss sees


@dataclass(frozen=True)
class LossConfig:
    """The choice of a loss, of the exits to train, and of the weights to train."""

    loss: str = option(
        "rotate",
        "none: only the last layer learns; weighted: every exit learns at every step; rotate: exits take "
        "turns, at most two at a time; layerskip: the same with LayerSkip's weights; distill: rotate, but "
        "exits learn the last layer's distribution; hidden: rotate, and their states learn to resemble "
        "deeper ones; or your own as my_file:function (see training/losses.py)",
    )
    exits: tuple[int, ...] = option((2, 3, 4, 6, 8, 10), "layers to train as exits")
    train: str = option(
        "all",
        "all: train every weight and write model.pt; heads: freeze the model, train only the norm, adapter "
        "and classifier of each exit, and write heads.pt, a few MB; all:N or heads:N: the same, but exits "
        "learn only the N most frequent tokens and those of the batch: faster if the vocabulary is large",
        choices=lambda text: read_choice("train", text, TRAIN),
    )
    classifier: bool = option(False, "also train a confidence classifier at every exit", group="losses")

    def __post_init__(self):
        object.__setattr__(self, "exits", tuple(sorted(set(self.exits))))
        find_loss(self.loss)
        if self.classifier and self.loss == "none":
            raise UserError("classifier is True, but loss is none, which trains no exit; choose another loss")
        needs_exits = self.loss in ("distill", "hidden") or self.classifier or self.heads_alone
        if needs_exits and not self.exits:
            raise UserError("loss, classifier or train needs exits to train; give --exits")

    @property
    def heads_alone(self) -> bool:
        """Whether the model stays as it is, and its exit heads alone are trained."""
        return self.train.startswith("heads")

    @property
    def shortlist(self) -> int | None:
        """How many frequent ids exits are trained on, with --train all:N or heads:N; None for all ids."""
        _, (size,) = read_choice("train", self.train, TRAIN)
        return size or None


def exits_in_turn(exits: tuple[int, ...], step: int) -> tuple[int, ...]:
    """Every stride-th exit, at most PER_STEP, from an offset that moves on by one each step (LayerSkip,
    Elhoushi 2024, section 4.1.2, rotational early exit)."""
    stride = max(1, math.ceil(len(exits) / PER_STEP))
    return exits[step % stride :: stride]


def shares(layers: list[int]) -> dict[int, float]:
    """The weight of each layer's loss: w_l = l / sum of the layers, which adds up to 1 (CALM, Schuster
    2022, Eq. 6)."""
    return {layer: layer / sum(layers) for layer in layers}


def part_of_vocabulary(model: Transformer, size: int | None, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """The unembedding of the `size` most frequent ids and of those in the batch's texts, (n, d), and the
    targets as indices into it, (N,). If V is large, heads over the whole vocabulary take most of a step's
    time, and decoding checks exits over a shortlist (decoding/shortlist.py) anyway. With size None: the whole
    unembedding, and the targets as they are."""
    weight = model.unembedding.weight
    if size is None:  # a view: autocast keeps one bfloat16 copy of a leaf, and sums its gradients in bfloat16
        return weight.view_as(weight), batch.targets
    frequent = model.frequent_ids[:size].to(batch.targets.device)
    ids = torch.cat([frequent, batch.inputs.flatten(), batch.targets]).unique()  # (n,), ascending
    return weight[ids], torch.searchsorted(ids, batch.targets)


class Exits:
    """What a loss sees of one micro-batch: states after every layer at the N positions whose next token is
    a target, and these targets."""

    def __init__(
        self, model: Transformer, config: LossConfig, batch: DeviceBatch, states: list[Tensor], step: int
    ):
        """states: h_0 .. h_L (B, T, d) of the batch."""
        self.model, self.config, self.step = model, config, step
        self.last = model.config.n_layers
        self.unembed, self.targets = part_of_vocabulary(model, config.shortlist, batch)  # (V, d), (N,)
        self._whole = part_of_vocabulary(model, None, batch)
        self.used: set[int] = set()  # layers whose logits the loss has used: their classifiers learn, too
        self.losses: dict[int, Tensor] = {}  # by layer, without gradient
        self._states, self._learned, self._learned_states = states, batch.learned, {}
        self._agreed: dict[int, Tensor] = {}
        self._last_if_trained = [] if config.heads_alone else [self.last]

    def every(self) -> list[int]:
        """All exits, and the last layer where it is trained."""
        return [*self.config.exits, *self._last_if_trained]

    def in_turn(self) -> list[int]:
        """The exits whose turn it is at this step, and the last layer where it is trained."""
        return [*exits_in_turn(self.config.exits, self.step), *self._last_if_trained]

    def state(self, layer: int) -> Tensor:
        """h_l at the positions whose next token is a target: (N, d)."""
        if layer not in self._learned_states:
            self._learned_states[layer] = self._states[layer].flatten(0, 1)[self._learned]
        return self._learned_states[layer]

    def vocabulary(self, layer: int) -> tuple[Tensor, Tensor]:
        """The unembedding (V, d) that a layer is trained on, and the targets as indices into it (N,). That of
        the last layer has all ids; otherwise, ids that are in no batch would become its most probable."""
        return self._whole if layer == self.last else (self.unembed, self.targets)

    def logits(self, layer: int) -> Tensor:
        """z_l over the ids that exits are trained on: (N, V), with gradient. They are kept until the backward
        pass, which needs much memory if V is large. With --train all:N, the last layer's logits are over
        these ids, too: train it with `weighted_sum`, which scores all ids."""
        self.used.add(layer)
        return self.model.score(self.model.exit_norm(self.state(layer), layer), self.unembed)

    def weighted_sum(
        self, layers: list[int], each: TargetLoss = cross_entropy, weigh: Weigh = shares, compare=False
    ) -> Tensor:
        """The sum of the losses of these layers, with the weights that `weigh` returns, a scalar; the loss of
        a layer is the mean of `each` over the N targets. With `compare`, or if classifiers are trained, this
        also notes where each exit agrees with the last layer, for `agreement`.

        If there are many logits, they are computed for n = max(FEWEST, CHUNK / V) targets of one layer at a
        time, and again for the backward pass (torch's checkpoint), so that only these are in memory: 4 n V
        bytes each for logits, log-probabilities, their gradient and the last layer's logits. For V = 131,072
        that is 4 x 64 MiB on a CPU and 4 x 128 MiB on a GPU.
        """
        self.used.update(layers)
        weights = weigh(layers)
        compare = compare or self.config.classifier
        model, last, N = self.model, self.last, len(self.targets)
        vocabularies = {layer: self.vocabulary(layer) for layer in weights}
        V = max(len(unembed) for unembed, _ in vocabularies.values())
        most = CHUNK.get(self.targets.device.type, CHUNK["cuda"])
        few = N * V * len(weights) <= most
        size = N if few else max(FEWEST, most // V)  # n, the targets of a chunk
        last_states = self.state(last).split(size)
        normed = {layer: model.exit_norm(self.state(layer), layer).split(size) for layer in weights}

        @functools.lru_cache(1)  # the exits of a chunk share it
        @torch.no_grad()
        def last_logits(chunk: int) -> Tensor:
            return model.score(model.exit_norm(last_states[chunk], last), self.unembed)

        def of_chunk(x: Tensor, layer: int, chunk: int) -> tuple[Tensor, Tensor | None]:
            """The sum of the losses of a chunk at one layer, and where its argmax is the last layer's."""
            unembed, targets = vocabularies[layer]
            targets = targets.split(size)[chunk]  # (n,)
            logits = model.score(x, unembed)  # (n, V)
            final = None if layer == last else functools.partial(last_logits, chunk)
            losses = each(logits, targets, final)
            if getattr(losses, "shape", None) != targets.shape:
                name = getattr(each, "__name__", each)
                raise UserError(f"{name} must return a tensor with one loss for each target")
            same = (logits.argmax(-1) == final().argmax(-1)) if compare and final else None
            return losses.sum(), same

        again = functools.partial(recomputed, of_chunk, use_reentrant=False, preserve_rng_state=False)
        compute = of_chunk if few else again
        total, losses = 0.0, dict.fromkeys(weights, 0.0)
        agreed = {layer: [] for layer in weights}
        for chunk in range(len(last_states)):
            for layer in weights:
                loss, same = compute(normed[layer][chunk], layer, chunk)
                total = total + weights[layer] * (loss / N)
                losses[layer] = losses[layer] + loss.detach() / N
                agreed[layer].append(same)
        self.losses |= losses
        if compare:
            self._agreed |= {layer: torch.cat(parts) for layer, parts in agreed.items() if layer != last}
        return total

    @torch.no_grad()
    def agreement(self, layer: int) -> Tensor:
        """Where the exit's argmax is the last layer's: (N,) bool."""
        if layer not in self._agreed:
            self._agreed[layer] = self.logits(layer).argmax(-1) == self.logits(self.last).argmax(-1)
        return self._agreed[layer]


# ---------------------------------------------------------------- the losses

Loss = Callable[[Exits], Tensor]


def find_loss(name: str) -> Loss:
    """The loss with this name in LOSSES, or imported as "package.module:function". Raises UserError."""
    return find_function("loss", name, LOSSES, ("exits",))


def call_loss(name: str, exits: Exits) -> Tensor:
    """The value of the loss called `name`. Raises UserError unless it is a scalar tensor with a gradient."""
    value = find_loss(name)(exits)
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"loss {name} returned {found}; it must return a scalar tensor with a gradient")
    return value


def none(exits: Exits) -> Tensor:
    """Cross-entropy of the last layer alone: no exit is trained."""
    return exits.weighted_sum([exits.last])


def weighted(exits: Exits) -> Tensor:
    """Cross-entropy of every exit at every step (CALM, Schuster 2022, Eq. 6)."""
    return exits.weighted_sum(exits.every())


def rotate(exits: Exits) -> Tensor:
    """Cross-entropy of some exits a step, in turn (LayerSkip, Elhoushi 2024, section 4.1.2)."""
    return exits.weighted_sum(exits.in_turn())


def layerskip(exits: Exits) -> Tensor:
    """As `rotate`, but the weights grow with the square of the depth: e_l = E_SCALE (0 + 1 + .. + l - 1), at
    the last layer e_L = L - 1 + E_SCALE (0 + 1 + .. + L - 2), over their sum (LayerSkip, section 4.1.2)."""
    L = exits.last

    def by_depth(layers: list[int]) -> dict[int, float]:
        terms = {layer: E_SCALE * layer * (layer - 1) / 2 for layer in layers}
        terms[L] = max(1, L - 1) * (1 + E_SCALE * (L - 2) / 2)
        return {layer: term / sum(terms.values()) for layer, term in terms.items()}

    return exits.weighted_sum(exits.in_turn(), weigh=by_depth)


def distill(exits: Exits) -> Tensor:
    """KL from the last layer's distribution to those of some exits a step, in turn; cross-entropy at the last
    layer."""
    return exits.weighted_sum(exits.in_turn(), divergence)


def hidden(exits: Exits) -> Tensor:
    """As `rotate`, plus the distance from the states up to the step's first exit to those of deeper layers
    (FREE, Bae 2023)."""
    layers = exits.in_turn()
    states = [exits.state(layer) for layer in range(1, exits.last + 1)]
    return exits.weighted_sum(layers) + HIDDEN_WEIGHT * hidden_loss(states, layers[0])


def hidden_loss(states: list[Tensor], shallow: int) -> Tensor:
    """Mean over the layers up to `shallow` of the mean squared distance to the closest deeper layer,
    which gets no gradient. The matching is monotone: a higher layer never matches a lower one than the
    layer below it does (FREE, section 3.2, layerwise distillation). states: h_1 .. h_L, (N, d)."""
    low, high = states[:shallow], [state.detach() for state in states[shallow:]]
    with torch.no_grad():
        points = [torch.stack(part).float().flatten(1) for part in (low, high)]  # (layers, N d)
        costs = torch.cdist(*points).square().tolist()
    pairs = zip(low, monotone(costs))
    return sum(F.mse_loss(state.float(), high[match].float()) for state, match in pairs) / shallow


def monotone(costs: list[list[float]]) -> list[int]:
    """A column for each row such that columns never fall from row to row and the total cost is least."""
    # The best choice for the rows so far that ends at or before each column: total cost, columns.
    best = [(0.0, [])] * len(costs[0])
    for row in costs:
        ending = [(total + cost, [*columns, j]) for j, (cost, (total, columns)) in enumerate(zip(row, best))]
        best = [min(ending[: j + 1]) for j in range(len(row))]
    return best[-1][1]


LOSSES = {loss.__name__: loss for loss in (none, weighted, rotate, layerskip, distill, hidden)}


# ---------------------------------------------------------------- the classifiers


def classifier_loss(model: Transformer, hidden: Tensor, layer: int, labels: Tensor) -> Tensor:
    """Cross-entropy of the layer's classifier with `labels` (N,): whether the exit agrees with the last layer
    (CALM, section 3.5, where all layers share one classifier). Both labels weigh the same, however rare one
    is (FREE balances them by logit adjustment). Only the classifier learns from it. hidden (N, d)."""
    logits = classifier_logit(model, hidden, layer)
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    means = [(losses * side).sum() / side.sum().clamp(min=1) for side in (labels, ~labels)]
    return sum(means) / 2
