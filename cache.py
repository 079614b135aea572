"""The staircase: a cache whose layers store keys and values up to different positions, and the states of the
positions that are still owed to them.

A layer computes its rows in *pieces*. The prompt is one piece; the positions after it are cut into pieces of
32 (16 in half precision), and every row of such a piece gets, bit for bit, what it would get alone. So keys,
values and logits do not depend on which rows were owed together, that is, on the exits taken.

Dimensions: R rows of a piece, S visible positions, d model width, K key/value heads, C width of a head.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model import Block, Rotary, Seen, Transformer, hiding

PIECE, HALF_PIECE = 32, 16  # rows, in half precision the latter: products treat up to so many alike
COLUMNS = 64  # a row attends to whole groups of so many positions, in which a mask hides what it may not see


def whole_groups(positions: int) -> int:
    """A number of positions, rounded up to whole groups of COLUMNS."""
    return math.ceil(positions / COLUMNS) * COLUMNS


class KVCache:
    """The staircase of one text (batch size 1): how far each layer, the embedding below them and the LM head
    above them are filled.

    filled[1 .. L]   number of positions whose keys and values the layer has stored (filled[0] is not used)
    begun            number of positions that have been read; above filled[1] only during a pass
    head_filled      number of positions whose row is not owed to the LM head, the step above layer L, because
                     it has processed them or need not (as with most of a prompt); may exceed filled[L]
    hidden           states of the positions that have been read, at the depth reached: (1, length, d)
    prompt           number of positions that the first pass has read

    `climb` and `extend` update `filled`; a pass (`run_pass` in decode.py) updates the others.

    filled[l + 1] is never larger than filled[l]. A position that stopped below the top waits in `hidden` and
    is *owed* to the layers above. Therefore the positions owed to a layer are the newest ones, without a gap,
    and all of them have gone through the layer below when a pass reaches the layer. For example, if position
    7 stopped at layer 4 and position 8 at layer 2, the next pass includes position 8 from layer 3 on, and
    position 7 from layer 5 on."""

    def __init__(self, model: Transformer, length: int):
        """Allocates room for `length` positions."""
        config = model.config
        states = model.embed(torch.zeros(1, 1, dtype=torch.int64, device=model.device))
        self.hidden = states.new_zeros(1, length, config.d_model)
        self.piece = HALF_PIECE if states.element_size() == 2 else PIECE
        self.room = whole_groups(length + PIECE)
        shape = (2, config.n_layers + 1, 1, config.n_kv_heads, self.room, config.head_dim)
        dtype = states.dtype
        if model.device.type == "cpu":  # there, attention is faster in float32, also for states in bfloat16
            dtype = torch.promote_types(dtype, torch.float32)
        # All zeros, because attention multiplies the values that a mask hides by 0:
        self.keys, self.values = (part.unbind() for part in states.new_zeros(shape, dtype=dtype))
        self.filled = [0] * (config.n_layers + 1)
        self.begun = self.head_filled = self.prompt = 0
        self._lines = {}  # window -> the line that masks are a part of
        self._made = {}  # function and arguments -> result (see `once`)

    def heights(self) -> list[int]:
        """All steps of the staircase, from bottom to top: begun, filled[1 .. L], head_filled."""
        return [self.begun, *self.filled[1:], self.head_filled]

    def begin(self, x: Tensor) -> None:
        """Puts the next positions below the first layer: x = h_0 (1, R, d)."""
        first, rows = self.begun, x.shape[1]
        self.begun = first + rows
        self.prompt = self.prompt or rows
        self._made.clear()
        self.hidden.narrow(1, first, rows).copy_(x)

    def pieces(self, first: int) -> Iterator[Tensor]:
        """The states of the positions from `first` on, piece by piece: views of `hidden`, (1, R, d) each."""
        while first < self.begun:
            stop = self.prompt
            if first >= self.prompt:
                stop = min(self.begun, self.start_of_piece(first) + self.piece)
            yield self.hidden.narrow(1, first, stop - first)
            first = stop

    def start_of_piece(self, position: int) -> int:
        """The first position of the piece in which a position after the prompt lies."""
        return position - (position - self.prompt) % self.piece

    def climb(self, block: Block) -> Tensor:
        """Runs a block on the rows that are owed to it, if any. Returns their new states, (1, R, d), the
        newest last; of a long prompt, only the last one."""
        states = []
        for rows in self.pieces(self.filled[block.layer]):
            x = block(rows, self)
            rows.copy_(x)
            states.append(x if x.shape[1] <= self.piece else x[:, -1:].clone())
        return states[0] if len(states) == 1 else torch.cat([self.hidden[:, :0], *states], dim=1)

    def factors(self, layer: int, rotary: Rotary, rows: int) -> Tensor:
        """The rotary factors of the rows that the layer processes next: it has stored those before them."""
        return self.once(Rotary.factors, rotary, self.filled[layer], rows)

    def once(self, make: Callable, *arguments):
        """make(*arguments), made once a pass: most layers of a pass need the same."""
        key = make.__name__, *arguments
        if key not in self._made:
            self._made[key] = make(*arguments)
        return self._made[key]

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> Seen:
        """Stores keys and values (1, K, R, C) of the next piece. Returns the keys, values and mask of what it
        sees, as `attention` takes them: of a prompt, the prompt itself; of each later row, the groups of
        positions up to its own, which are the same whichever rows are computed with it."""
        first, rows = self.filled[layer], k.shape[2]
        self.filled[layer] = first + rows
        keys, values = self.keys[layer], self.values[layer]
        # keys[:, :, first : first + rows] = k, but slicing takes a tenth of a block's time:
        keys.narrow(2, first, rows).copy_(k)
        values.narrow(2, first, rows).copy_(v)
        start, count, mask = self.once(self.visible, first, rows, window)
        keys, values = keys.narrow(2, start, count), values.narrow(2, start, count)
        if rows == 1 or first < self.prompt:
            return keys, values, mask
        return keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), mask

    def visible(self, first: int, rows: int, window: int | None) -> tuple[int, int, Tensor | None]:
        """What the piece that begins at `first` sees: the first position, the number S of positions, and the
        mask, (S, S) for a prompt (None: each row sees those before it), (R, 1, 1, S) for later rows."""
        if first < self.prompt:
            if window is None:
                return 0, rows, None
            positions = torch.arange(rows, device=self.hidden.device)
            return 0, rows, hiding(positions, positions, window, self.keys[0].dtype)
        begin = self.start_of_piece(first)  # what is seen depends on the piece, not on the rows present
        oldest = 0 if window is None else max(0, begin + 1 - window)
        start, stop = oldest - oldest % COLUMNS, whole_groups(begin + self.piece)
        if window not in self._lines:
            self._lines[window] = self.line(window)
        masks = self._lines[window].unfold(0, stop - start, 1)
        newest = self.room - first - rows + start  # where the mask of the newest row begins in the line
        return start, stop - start, masks.narrow(0, newest, rows).flip(0)[:, None, None]

    def line(self, window: int | None) -> Tensor:
        """Of which every row's mask is a part: -inf, 0 for what it sees, -inf for what follows it."""
        line = self.keys[0].new_full((2 * self.room,), -math.inf)
        line[max(0, self.room - (window or self.room)) : self.room] = 0
        return line

    def rollback(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.begun = min(self.begun, length)
        self.filled = [min(count, length) for count in self.filled]
        self.head_filled = min(self.head_filled, length)
        self.prompt = min(self.prompt, length)
