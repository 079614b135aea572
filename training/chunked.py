"""The exits' losses in little memory: the same value and gradients as the plain sum in training/losses.py.

The plain sum keeps the logits of every layer, N V numbers each, until the backward pass. Here only the logits
of one layer, for a few rows, are alive: their gradient is made at once, and with it what the layer's state
and the unembedding will get. n = max(CHUNK, FEWEST V) numbers at a time take 4 n bytes each for logits,
log-probabilities, their gradient and the last layer's logits, whatever N: 16 MiB on a CPU, 512 MiB on a GPU,
and 256 MiB on a CPU for V = 262,144; and there is one gradient of the unembedding, (V, d).

Dimensions: N learned targets of a micro-batch, n of them in a chunk, d model width, V vocabulary, or the part
of it that is trained over (training/part.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from model import Transformer

CHUNK = {
    "cpu": 2**20,
    "cuda": 2**25,
}  # logits alive at a time: few enough for a CPU's cache, enough to keep a GPU busy
FEWEST = 64  # rows at a time, whatever the vocabulary: the unembedding is read once for all of them


def chunk_size(device: torch.device) -> int:
    """How many logits are alive at a time."""
    return CHUNK.get(device.type, CHUNK["cuda"])


class LastLogits:
    """The last layer's logits of some rows, without a gradient, made when they are first asked for: most
    losses never do."""

    def __init__(self, model: Transformer, hidden: Tensor, unembed: Tensor):
        self.model, self.hidden, self.unembed = model, hidden, unembed  # (n, d), (V, d)
        self.known: Tensor | None = None

    def __call__(self) -> Tensor:
        """(n, V)."""
        if self.known is None:
            with torch.no_grad():
                last = self.model.config.n_layers
                self.known = self.model.score(self.model.exit_norm(self.hidden, last), self.unembed)
        return self.known


# Logits (n, V) of one layer, targets (n,), and the last layer's logits (None at the last layer itself) ->
# losses (n,).
TargetLoss = Callable[[Tensor, Tensor, LastLogits | None], Tensor]
# A weighted sum, the losses in it by layer, and by exit where its argmax is the last layer's.
Summed = tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]


def losses_of_targets(each: TargetLoss, logits: Tensor, targets: Tensor, final: LastLogits | None) -> Tensor:
    """(n,). Raises UserError if `each`, which may be the user's, gives another shape."""
    losses = each(logits, targets, final)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(
            f"{each.__name__} gave {found}; it must give one loss a target, {tuple(targets.shape)}"
        )
    return losses


class KnownGradient(torch.autograd.Function):
    """A value whose gradients are known: forward is the value, and backward hands each input its gradient."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, slope: Tensor):
        return None, None, *(gradient.mul_(slope) for gradient in ctx.gradients)


def chunked_sum(
    model: Transformer,
    rows: dict[int, Tensor],
    targets: Tensor,
    weights: dict[int, float],
    each: TargetLoss,
    compare: bool,
    vocabulary: Tensor,
) -> Summed:
    """As `losses.plain_sum`, chunk by chunk."""
    last, learns, N = max(rows), torch.is_grad_enabled(), len(targets)
    unembed = vocabulary.detach().requires_grad_(learns and vocabulary.requires_grad)
    deepest_first = sorted(weights, reverse=True)
    normed = {layer: model.exit_norm(rows[layer], layer) for layer in deepest_first}  # (N, d)
    slopes = {layer: torch.empty_like(x) for layer, x in normed.items()}  # gradients of the sum
    losses = {layer: targets.new_zeros((), dtype=torch.float32) for layer in weights}
    agreed = {layer: [] for layer in weights if layer != last}
    size = max(FEWEST, chunk_size(targets.device) // len(unembed))
    for start in range(0, N, size):
        part = slice(start, start + size)
        final = LastLogits(model, rows[last][part], unembed)
        for layer in deepest_first:
            x = normed[layer].detach()[part].requires_grad_(learns)
            logits = model.score(x, unembed)  # (n, V)
            loss = losses_of_targets(each, logits, targets[part], None if layer == last else final).sum() / N
            losses[layer] += loss.detach()
            if layer == last:
                final.known = logits.detach()
            elif compare:
                agreed[layer].append(logits.argmax(-1) == final().argmax(-1))
            if learns:
                (weights[layer] * loss).backward(inputs=[x, unembed] if unembed.requires_grad else [x])
                slopes[layer][part] = x.grad
    total = sum(weights[layer] * losses[layer] for layer in weights)
    if learns:
        inputs, gradients = [*normed.values()], [*slopes.values()]
        if unembed.requires_grad:
            inputs.append(vocabulary)
            gradients.append(unembed.grad)
        total = KnownGradient.apply(total, gradients, *inputs)
    return total, losses, {layer: torch.cat(parts) for layer, parts in agreed.items()} if compare else {}
