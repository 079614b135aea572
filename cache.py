"""The staircase: keys and values of every layer, each filled up to a height of its own, and the states of
owed rows.

Dimensions: R rows of a pass, S positions seen, d model width, H query heads, K key/value heads, C width of a
head.
"""

import common.threads  # noqa: F401  before torch

import torch
from torch import Tensor

from formats.rotary import rotation
from model import Transformer, attention, split_heads, visible


class KVCache:
    """The staircase of one text (batch size 1), told by one number a step:

    filled[0]        positions begun; ahead of filled[1] only within a pass
    filled[1 .. L]   positions whose keys and values are stored at that layer
    filled[L + 1]    positions that owe nothing to the head over the vocabulary

    From 0 to L filled never increases: a position that stopped below the top waits in `hidden`, at the depth
    that it reached, and is *owed* to the layers above. So the rows owed to a layer are one run, the newest
    ones, and all have the depth below it by the time a pass comes there: if position 7 stopped at layer 4 and
    8 at layer 2, the next pass takes 8 along from layer 3 on, and 7 from layer 5 on, where all three stand
    side by side."""

    def __init__(self, model: Transformer, length: int):
        """Room for `length` positions."""
        self.config, self.rope = model.config, model.rope
        shape = (
            1,
            2 * self.config.n_kv_heads,
            length,
            self.config.head_dim,
        )  # of a layer: its keys, then its values
        self.keys_values = [model.embedding.new_empty(shape) for _ in model.blocks]
        self.hidden = model.embedding.new_empty(length, self.config.d_model)
        self.filled = [0] * (self.config.n_layers + 2)
        self._slides = [False] + [self.config.slides(layer) for layer in range(1, self.config.n_layers + 1)]
        self._rotates = [True] + [self.config.rotates(layer) for layer in range(1, self.config.n_layers + 1)]
        self._rows, self._kept = None, {}

    def owed(self, layer: int, stop: int) -> Tensor:
        """States of the positions filled[layer] .. stop - 1, as deep as they got: (R, d)."""
        return self.hidden[self.filled[layer] : stop]

    def join(self, layer: int, first: int, x: Tensor) -> tuple[int, Tensor]:
        """The rows to run through `layer`, and where they begin, for a pass that brings x (R, d), the
        positions from `first` on. Those owed from earlier passes join: where x is position 9 and
        filled[layer] is 6, the rows are 6 to 9."""
        start = self.filled[layer]
        if start < first:
            x = torch.cat([self.owed(layer, first), x])
        elif start > first:  # the head needs no rows of tokens that are settled
            x = x[start - first :]
        return start, x

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """`attend` of a block: stores the rows' keys and values, then attends to what they may see. (R, (H + 2K) C)
        -> (R, H C)."""
        return attention(*self.store(layer, qkv), self.config)

    def store(self, layer: int, qkv: Tensor) -> tuple[Tensor | None, ...]:
        """Appends the keys and values of the R rows that follow filled[layer], from qkv (R, (H + 2K) C).
        Returns the rows' queries (1, H, R, C), the S keys and values of the layer that they may see, (1, K,
        S, C), and who sees which (R, S); None for a single row, which sees them all."""
        rows = qkv.shape[0]  # len(qkv) takes ten times as long
        first = self.filled[layer]
        stop = self.filled[layer] = first + rows
        start, rope, mask = self._seen(first, stop, self._slides[layer])
        rope = rope if self._rotates[layer] else None
        q, kv = split_heads(qkv, 1, self.config, rope)
        stored, K = self.keys_values[layer - 1], self.config.n_kv_heads
        stored.narrow(2, first, rows).copy_(kv)  # stored[:, :, first:stop] = kv, in two thirds of the time
        seen = stored.narrow(2, start, stop - start)
        return q.type_as(seen), seen.narrow(1, 0, K), seen.narrow(1, K, K), mask

    def _seen(self, first: int, stop: int, slides: bool) -> tuple[int, Tensor, Tensor | None]:
        """Of the rows first .. stop - 1 in a layer: the first position that one of them sees, their rotation,
        and who sees which. Kept for the layers that follow: in one pass most share their rows."""
        if self._rows != (first, stop):
            self._rows, self._kept = (first, stop), {}
        if slides not in self._kept:
            window = self.config.window if slides else None
            start = max(0, first + 1 - window) if slides else 0
            mask = None
            if stop - first > 1:
                positions = torch.arange(start, stop, device=self.hidden.device)
                mask = visible(positions[first - start :], positions, window)  # (R, stop - start)
            self._kept[slides] = start, rotation(self.rope, slides, first, stop, self.config), mask
        return self._kept[slides]

    def waive(self, length: int) -> None:
        """The first `length` positions owe the head over the vocabulary nothing: their next tokens are
        settled."""
        self.filled[-1] = length

    def rollback(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.filled = [min(count, length) for count in self.filled]
