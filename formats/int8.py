"""Matrices in int8: a byte a weight and one scale a row, so that decoding, which reads every weight once a
token, reads a quarter of float32's bytes.

A row w is kept as round(w / s), with s = max |w| / 127 rounded to bfloat16, as the kernel reads it. The
kernel, for up to FEW rows, takes and gives bfloat16; more rows, or all where it is missing, are multiplied in
float32. The residual stream is float32.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 32  # rows up to which the kernel is faster than a float32 product with the matrix dequantized
WHOLE = 16  # the kernel reads a row by so many numbers


class Int8Matrix:
    """A matrix (d_out, d_in) where a float one may stand: `rows` int8, `scale` (d_out,) bfloat16."""

    dtype, is_mkldnn, is_cuda = torch.int8, False, False

    def __init__(self, rows: Tensor, scale: Tensor):
        self.rows, self.scale = rows, scale
        self.shape, self.device = rows.shape, rows.device
        self.nbytes = rows.nbytes + scale.nbytes

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Matrix":
        """The nearest matrix in int8."""
        matrix = cls(
            torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.bfloat16)
        )
        for rows, scale, part in zip(matrix.rows.split(4096), matrix.scale.split(4096), weight.split(4096)):
            largest = part.abs().amax(1).float()
            scale.copy_(
                (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
            )  # a row of zeros has one, too
            rows.copy_((part.float() / scale.float()[:, None]).round().clamp(-127, 127))
        return matrix

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The rows of these ids (n,) in float32, (n, d_in)."""
        return self.rows[ids].float() * self.scale[ids].float()[:, None]

    def reordered(self, order: Tensor) -> "Int8Matrix":
        """The same rows in another order (d_out,)."""
        return Int8Matrix(self.rows[order], self.scale[order])

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.rows.numel()

    def new_empty(self, *shape) -> Tensor:
        """For states: float32."""
        return self.scale.new_empty(*shape, dtype=torch.float32)

    def product(self, x: Tensor) -> Tensor:
        """x (N, d_in) times the matrix: (N, d_out), bfloat16 of up to FEW rows where there is a kernel (which
        reads WHOLE numbers at a time, past the end of a row that is no multiple of these), else float32. The
        kernel treats every row alike, so that up to FEW rows give bit for bit what each gives alone."""
        if x.shape[0] <= FEW and self.rows.shape[1] % WHOLE == 0 and has_kernel():
            return torch._weight_int8pack_mm(x.bfloat16(), self.rows, self.scale)
        return F.linear(x.float(), self.rows.float()) * self.scale


def lay_side_by_side(matrices: list[Int8Matrix]) -> None:
    """Moves the rows of all matrices into one piece of memory, which the system can map in huge pages
    (common/threads.py): read once a token, they are then 1.2 times as fast as strewn over small pages."""
    room, start = torch.empty(sum(matrix.numel() for matrix in matrices), dtype=torch.int8), 0
    for matrix in matrices:
        part = room.narrow(0, start, matrix.numel()).view(matrix.shape)
        matrix.rows = part.copy_(matrix.rows)
        start += matrix.numel()


@functools.cache
def has_kernel() -> bool:
    """Whether torch multiplies int8 matrices here: tried once."""
    ones = torch.ones(32, 32)
    try:
        out = torch._weight_int8pack_mm(ones.bfloat16(), ones.to(torch.int8), torch.ones(32).bfloat16())
        return bool((out == 32).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def dequantized(weights: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint, all of them float."""
    return {
        name: weight.float() * scales[name].float()[:, None] if name in scales else weight
        for name, weight in weights.items()
    }
