"""The staircase: keys and values of every layer, each filled up to a height of its own, and the states of the rows that are owed.

Dimensions: R rows of a pass, S positions seen, d model width, H query heads, K key/value heads, C width of a head.
"""

import common.threads  # noqa: F401  before torch

import torch
from torch import Tensor

from model import Transformer, attention, split_heads, visible


class KVCache:
    """The staircase: `filled[l]` positions have their key and value stored at layer l, and filled never increases with l; filled[0]
    counts the positions begun. A position that stopped below the top keeps its state in `hidden`, at the depth it reached, and is *owed*
    to the layers above. Rows owed to a layer are the newest ones, one contiguous run. Batch size 1."""

    def __init__(self, model: Transformer, length: int):
        """Room for `length` positions."""
        self.config, self.rope = model.config, model.rope
        shape = (1, self.config.n_kv_heads, length, self.config.head_dim)
        self.keys = [model.embedding.new_empty(shape) for _ in model.blocks]    # (1, K, length, C) a layer
        self.values = [model.embedding.new_empty(shape) for _ in model.blocks]
        self.hidden = model.embedding.new_empty(length, self.config.d_model)
        self.filled = [0] * (self.config.n_layers + 1)
        self._slides = [False, *(self.config.slides(layer) for layer in range(1, self.config.n_layers + 1))]
        self._span, self._views = None, []

    def owed(self, layer: int, stop: int) -> Tensor:
        """Hidden states of the positions filled[layer] .. stop - 1: (R, d)."""
        return self.hidden[self.filled[layer] : stop]

    def store(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Appends the keys and values of the R rows that follow filled[layer], from qkv (R, (H + 2K) C). Returns the rows' queries
        (1, H, R, C), the S keys and values of the layer that they may see, (1, K, S, C), and who sees which (R, S); None: all see all."""
        first = self.filled[layer]
        stop = self.filled[layer] = first + qkv.shape[0]
        if self._span != (first, stop):  # the layers of a pass mostly share their rows
            self._span, self._views = (first, stop), [self._view(first, stop, slides) for slides in sorted(set(self._slides))]
        start, rope, mask = self._views[self._slides[layer]]
        q, k, v = split_heads(qkv, 1, self.config, rope)
        keys, values = self.keys[layer - 1], self.values[layer - 1]
        keys[:, :, first:stop] = k
        values[:, :, first:stop] = v
        return q, keys[:, :, start:stop], values[:, :, start:stop], mask

    def _view(self, first: int, stop: int, slides: bool) -> tuple[int, tuple[Tensor, Tensor], Tensor | None]:
        """Of the rows first .. stop - 1 in a layer: the first position that one of them sees, their rotation, and who sees which."""
        start, mask = max(0, first + 1 - self.config.window) if slides else 0, None
        if stop - first > 1:
            positions = torch.arange(start, stop, device=self.hidden.device)
            mask = visible(positions[first - start :], positions, self.config.window if slides else None)  # (R, stop - start)
        return start, self.rope[-slides, :, first:stop].unbind(), mask

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """`attend` of a block: stores the rows' keys and values, then attends to what they may see. (R, (H + 2K) C) -> (R, H C)."""
        return attention(*self.store(layer, qkv), self.config)

    def rollback(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.filled = [min(count, length) for count in self.filled]
