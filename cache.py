"""The staircase: keys and values of every layer, each filled up to a height of its own, and the states of owed rows.

Dimensions: R rows of a pass, S positions seen, d model width, H query heads, K key/value heads, C width of a head.
"""

import common.threads  # noqa: F401  before torch

import torch
from torch import Tensor

from model import Transformer, attention, split_heads, visible


class KVCache:
    """The staircase of one text (batch size 1). `filled[l]` positions have run layer l, their keys and values are
    stored there; filled[0] counts the positions begun, and filled[L + 1] those that owe the head over the vocabulary
    nothing. From layer 0 to L filled never increases: a position that stopped below the top waits in `hidden`, at the
    depth that it reached, and is *owed* to the layers above. So the rows owed to a layer are one contiguous run, the
    newest ones."""

    def __init__(self, model: Transformer, length: int):
        """Room for `length` positions."""
        self.config, self.rope = model.config, model.rope
        shape = (1, self.config.n_kv_heads, length, self.config.head_dim)
        self.keys = [model.embedding.new_empty(shape) for _ in model.blocks]    # (1, K, length, C) a layer
        self.values = [model.embedding.new_empty(shape) for _ in model.blocks]
        self.hidden = model.embedding.new_empty(length, self.config.d_model)
        self.filled = [0] * (self.config.n_layers + 2)
        self._slides = [False] + [self.config.slides(layer) for layer in range(1, self.config.n_layers + 1)]
        self._rotates = [True] + [self.config.rotates(layer) for layer in range(1, self.config.n_layers + 1)]
        self._span, self._views = None, {}

    def owed(self, layer: int, stop: int) -> Tensor:
        """Hidden states of the positions filled[layer] .. stop - 1, which wait at the depth of the layer below: (R,
        d)."""
        return self.hidden[self.filled[layer] : stop]

    def join(self, layer: int, first: int, x: Tensor) -> tuple[int, Tensor]:
        """Of a pass that carries x (R, d), the positions from `first` on: the rows to run through `layer`, those from
        filled[layer] on, and where they begin. Rows that stopped below in earlier passes join."""
        start = self.filled[layer]
        if start < first:
            x = torch.cat([self.owed(layer, first), x])
        elif start > first:  # only at the head, which settled tokens owe nothing
            x = x[start - first :]
        return start, x

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """`attend` of a block: stores the rows' keys and values, then attends to what they may see.
        (R, (H + 2K) C) -> (R, H C)."""
        return attention(*self.store(layer, qkv), self.config)

    def store(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Appends the keys and values of the R rows that follow filled[layer], from qkv (R, (H + 2K) C). Returns the
        rows' queries (1, H, R, C), the S keys and values of the layer that they may see, (1, K, S, C), and who sees
        which (R, S); None: all see all."""
        first = self.filled[layer]
        stop = self.filled[layer] = first + qkv.shape[0]
        start, rope, mask = self._view(first, stop, self._slides[layer])
        q, k, v = split_heads(qkv, 1, self.config, rope if self._rotates[layer] else None)
        keys, values = self.keys[layer - 1], self.values[layer - 1]
        keys[:, :, first:stop] = k
        values[:, :, first:stop] = v
        return q, keys[:, :, start:stop], values[:, :, start:stop], mask

    def _view(self, first: int, stop: int, slides: bool) -> tuple[int, tuple[Tensor, Tensor], Tensor | None]:
        """Of the rows first .. stop - 1 in a layer: the first position that one of them sees, their rotation, and who
        sees which. Made once for all layers that share the rows."""
        if self._span != (first, stop):
            self._span, self._views = (first, stop), {}
        if slides not in self._views:
            window = self.config.window if slides else None
            start, mask = max(0, first + 1 - window) if slides else 0, None
            if stop - first > 1:
                positions = torch.arange(start, stop, device=self.hidden.device)
                mask = visible(positions[first - start :], positions, window)  # (R, stop - start)
            self._views[slides] = start, self.rope[-1 if slides else 0, :, first:stop].unbind(), mask
        return self._views[slides]

    def waive(self, length: int) -> None:
        """The first `length` positions owe the head over the vocabulary nothing: their next tokens are settled."""
        self.filled[-1] = length

    def rollback(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.filled = [min(count, length) for count in self.filled]
