"""The staircase: a cache whose layers store keys and values up to different positions, and the states of the
positions that are still owed to them.

Dimensions: R rows of a pass, S visible positions, d model width, K key/value heads, C width of a head.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import torch
from torch import Tensor

from model import Seen, Transformer, visible


class KVCache:
    """The staircase of one text (batch size 1): how far each layer, the embedding below them and the LM head
    above them are filled.

    filled[1 .. L]   number of positions whose keys and values the layer has stored (filled[0] is not used)
    begun            number of positions that have been read; above filled[1] only during a pass
    head_filled      number of positions whose row is not owed to the LM head, the step above layer L, because
                     it has processed them or need not (as with most of a prompt); may exceed filled[L]
    hidden           states of the positions that wait below the top, at the depth reached: (1, length, d)

    `extend` updates `filled`; a pass (`run_pass` in decode.py) updates the others.

    filled[l + 1] is never larger than filled[l]. A position that stopped below the top waits in `hidden` and
    is *owed* to the layers above. Therefore the positions owed to a layer are the newest ones, without a gap,
    and all of them have gone through the layer below when a pass reaches the layer. For example, if position
    7 stopped at layer 4 and position 8 at layer 2, the next pass includes position 8 from layer 3 on, and
    position 7 from layer 5 on."""

    def __init__(self, model: Transformer, length: int):
        """Allocates room for `length` positions."""
        layers = range(model.config.n_layers + 1)
        shape = (1, model.config.n_kv_heads, length, model.config.head_dim)
        self.keys = [model.new_states(*shape) if layer else None for layer in layers]
        self.values = [model.new_states(*shape) if layer else None for layer in layers]
        self.hidden = model.new_states(1, length, model.config.d_model)
        self.filled = [0 for _ in layers]
        self.begun = self.head_filled = 0
        self._mask_of, self._mask = None, None  # the last mask made: most layers of a pass share it

    def heights(self) -> list[int]:
        """All steps of the staircase, from bottom to top: begun, filled[1 .. L], head_filled."""
        return [self.begun, *self.filled[1:], self.head_filled]

    def join(self, start: int, first: int, x: Tensor) -> Tensor:
        """The rows from position `start` on, in a pass whose rows x (1, R, d) are the positions from `first`
        on. If start < first, owed rows are added: if x is position 9 and a layer is owed 6 and later ones,
        the rows are 6 to 9. If start > first, rows are dropped: only the LM head does not need them all."""
        if start < first:
            return torch.cat([self.hidden[:, start:first], x], dim=1)
        return x if start == first else x[:, start - first :]

    def first(self, layer: int) -> int:
        """The position of the first row that the layer processes next: it has stored those before it."""
        return self.filled[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> Seen:
        """Stores keys and values (1, K, R, C) of the next R positions. Returns all that these rows may see,
        (1, K, S, C) each, and a mask of which row sees which position, (R, S), or None for a single row."""
        rows = k.shape[2]
        first = self.filled[layer]
        stop = self.filled[layer] = first + rows
        keys, values = self.keys[layer], self.values[layer]
        # keys[:, :, first:stop] = k, but slicing takes a tenth of a block's time:
        keys.narrow(2, first, rows).copy_(k)
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
