"""The staircase: keys and values, stored up to another position in every layer, and the states of positions
that are still owed.

Dimensions: R rows of a pass, S positions that are seen, d model width, K key/value heads, C width of a head.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import torch
from torch import Tensor

from model import Transformer, Visible, visible


class KVCache:
    """The staircase of one text (batch size 1): how far each layer is filled, and the same for the embedding
    below them and the LM head above them.

    filled[1 .. L]   how many positions have their keys and values stored at that layer (filled[0]: not used)
    begun            how many positions have been read; above filled[1] only within a pass
    head_filled      positions below it owe no row to the LM head, the step above layer L: it has run on them,
                     or need not, as on most of a prompt
    hidden           the state of every position, at the depth that it reached: (1, length, d)

    `extend` updates `filled`; a pass (`run_pass` in decode.py) updates the others.

    filled never increases from a layer to the next. A position that stopped below the top waits in `hidden`,
    and is *owed* to the layers above. So the positions owed to a layer are the newest ones, without a gap,
    and all of them have run the layer below by the time a pass comes there: if position 7
    stopped at layer 4 and position 8 at layer 2, the next pass takes 8 along from layer 3 on, and 7 from
    layer 5 on."""

    def __init__(self, model: Transformer, length: int):
        """Room for `length` positions."""
        layers = range(model.config.n_layers + 1)
        shape = (1, model.config.n_kv_heads, length, model.config.head_dim)
        self.keys = [model.new_states(*shape) if layer else None for layer in layers]
        self.values = [model.new_states(*shape) if layer else None for layer in layers]
        self.hidden = model.new_states(1, length, model.config.d_model)
        self.filled = [0 for _ in layers]
        self.begun = self.head_filled = 0
        self._mask_of, self._mask = None, None  # of the layer before: in one pass most layers share theirs

    def heights(self) -> list[int]:
        """All steps of the staircase from below: begun, filled[1 .. L], head_filled."""
        return [self.begun, *self.filled[1:], self.head_filled]

    def join(self, start: int, first: int, x: Tensor) -> Tensor:
        """The rows from position `start` on, for a pass that brings x (1, R, d), the positions from `first`
        on. If start < first, owed rows join: if x is position 9 and a layer is owed 6 and later ones, the
        rows are 6 to 9. If start > first, rows are left out: only the LM head does not need them all."""
        if start < first:
            return torch.cat([self.hidden[:, start:first], x], dim=1)
        return x if start == first else x[:, start - first :]

    def first(self, layer: int) -> int:
        """The position of the first row that a pass brings to the layer: how many it has stored."""
        return self.filled[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> Visible:
        """Stores keys and values (1, K, R, C) of the next R positions. Returns all that these rows may see,
        (1, K, S, C) each, and which row sees which, (R, S); None for a single row, which sees them all."""
        rows = k.shape[2]
        first = self.filled[layer]
        stop = self.filled[layer] = first + rows
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, first, rows).copy_(k)  # keys[:, :, first:stop] = k, but slices cost a tenth of a block
        values.narrow(2, first, rows).copy_(v)
        oldest = 0 if window is None else max(0, first + 1 - window)  # the oldest that any of these rows sees
        mask = None if rows == 1 else self.mask(oldest, first, stop, window)
        return keys.narrow(2, oldest, stop - oldest), values.narrow(2, oldest, stop - oldest), mask

    def mask(self, oldest: int, first: int, stop: int, window: int | None) -> Tensor:
        """Which of the positions oldest .. stop - 1 the rows first .. stop - 1 see."""
        if self._mask_of != (oldest, first, stop, window):
            positions = torch.arange(oldest, stop, device=self.hidden.device)
            self._mask_of = oldest, first, stop, window
            self._mask = visible(positions[first - oldest :], positions, window)
        return self._mask

    def rollback(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.begun = min(self.begun, length)
        self.filled = [min(count, length) for count in self.filled]
        self.head_filled = min(self.head_filled, length)
