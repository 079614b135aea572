"""Forms of a model's weights for decoding on a CPU. `prepare` replaces modules of a plain model (model.py) by
faster ones; its blocks do not notice.

    plain    as in the file
    packed   every matrix in oneDNN's own order
    int8     every matrix in int8: one byte per weight (two in a large matrix) and one scale per row

In packed and int8, a row of a product gets, bit for bit, what it would get alone, if at most 32 rows (16 in
bfloat16) are multiplied together. In plain it does not: the library's float32 product does not work row by
row.

Only this file calls private functions of torch, each after a trial call.

Dimensions: R rows, o outputs and i inputs of a matrix (o, i).
"""

import copy
import functools
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from common.errors import UserError
from model import RMSNorm, Transformer

FORMS = ("plain", "packed")  # what --weights may name; int8 is a dtype
MOST_INPUTS = 1024  # of a part of a packed matrix: with more, its rows depend on each other
FEW = 32  # rows up to which the int8 kernel treats every row alike, and is fast
GROUP = 16  # the int8 kernel reads so many numbers of a row at a time, even past its end
LARGE = 2**22  # weights: in an int8 matrix of this size, products of integers are the fastest for any rows
STEPS = 127  # of int8, on each side of 0
UNDIVIDED = 2**15  # numbers: torch divides larger elementwise operations among its threads
# What torch raises if it has no such function, or the CPU has no such instructions:
UNSUPPORTED = (RuntimeError, AttributeError)


def prepare(model: Transformer, form: str, dtype: torch.dtype, scales: dict[nn.Parameter, Tensor]) -> None:
    """Replaces the matrices and norms of a plain model on the CPU by modules of this form, whose products are
    in `dtype`. `scales` holds the scales of the weights that are int8 already. Raises UserError for a form
    that this CPU cannot multiply."""
    if form == "packed" and not packs(dtype):
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"cannot multiply packed weights of {name}; store them plain")
    model.form = form
    if form == "plain":
        return

    @functools.cache  # the LM head and the embedding may share a matrix
    def in_int8(weight: nn.Parameter) -> list[nn.Parameter]:
        matrix = (weight, scales[weight]) if weight in scales else quantized(weight)
        return [nn.Parameter(part, requires_grad=False) for part in matrix]

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, RMSNorm):
            return FastNorm(module)
        if isinstance(module, nn.Embedding) and form == "int8":
            return Int8Embedding(*in_int8(module.weight))
        if not isinstance(module, nn.Linear):
            return module
        if module.bias is not None:
            module.bias.data = module.bias.data.to(torch.float32 if form == "int8" else dtype)
        if form == "int8":
            return Int8Linear(*in_int8(module.weight), module.bias)
        return PackedLinear(module.weight.to(dtype), module.bias, is_copy=module is model.lm_head)

    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):  # also twice the same, as a tied embedding
            setattr(parent, name, replaced(module))
            parent.__dict__[name] = parent._modules[name]  # found at once: nn.Module looks there last
    model._apply = refuse
    for block in model.blocks:
        if FEW * model.config.d_ff > UNDIVIDED:
            block.activation = EXACT[model.config.activation]


def refuse(*_, **__):
    raise UserError("packed and int8 weights cannot be moved, converted or replaced; load the model as plain")


def head_part(model: Transformer, ids: Tensor) -> nn.Module | Tensor:
    """The part of the LM head for some tokens (n,), in the model's form, as `Transformer.score` takes it."""
    if isinstance(model.unembedding, Int8Embedding):
        return Int8Linear(model.unembedding.rows[ids], model.unembedding.scale[ids])
    rows = model.unembedding(ids)
    return PackedLinear(rows) if isinstance(model.lm_head, PackedLinear) else rows


def default_form(dtype: torch.dtype) -> str:
    """The form in which a CPU stores weights of this dtype by default: packed if that works, but plain in
    float32 on an Intel CPU with AVX-512, where the library's own product of one row is faster."""
    intel = "GenuineIntel" in cpu() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "plain" if (intel and dtype == torch.float32) or not packs(dtype) else "packed"


@functools.cache
def cpu() -> str:
    """The vendor of the CPU and its instructions, as the system calls them."""
    info = Path("/proc/cpuinfo")
    return platform.processor() + (info.read_text().split("\n\n")[0] if info.is_file() else "")


def slow_dtype(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in this dtype no faster than in float32: bfloat16 without instructions for
    it."""
    flags = cpu().split()
    return dtype == torch.bfloat16 and "flags" in flags and not {"avx512_bf16", "amx_bf16"} & set(flags)


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies packed weights of this dtype; tried once. (oneDNN packs bfloat16 only
    for CPUs with certain instructions, and float32 wherever oneDNN is available.)"""
    ones = torch.ones(32, 32, dtype=dtype)
    try:
        return bool((packed_product(ones, pack(ones)) == 32).all())
    except UNSUPPORTED:
        return False


@functools.cache
def has_kernel() -> bool:
    """Whether torch has a product of a few rows with an int8 matrix on this machine; tried once."""
    ones = torch.ones(32, 32)
    try:
        out = torch._weight_int8pack_mm(ones.bfloat16(), ones.to(torch.int8), torch.ones(32).bfloat16())
        return bool((out == 32).all())
    except UNSUPPORTED:
        return False


@functools.cache
def multiplies_integers() -> bool:
    """Whether this machine multiplies int8 by int8 without loss; tried once. (Without VNNI instructions, sums
    of two products overflow 16 bits.)"""
    most = torch.full((32, 64), STEPS, dtype=torch.int8)
    try:
        sums = [torch._int_mm(most, most.mT), packed_integer_product(most, pack_integers(most))]
        return all(bool((found == 64 * STEPS**2).all()) for found in sums)
    except UNSUPPORTED:
        return False


def pack(weight: Tensor) -> Tensor:
    """A matrix (o, i) in oneDNN's order, laid out for four rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 4)


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (.., i) times a packed matrix (o, i): (.., o)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack_integers(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (o, i) in int8 in oneDNN's order, with a scale of 1 and a zero point of 0 for each row."""
    packed_rows = torch.ops.onednn.qlinear_prepack(rows, [4, rows.shape[1]])
    return packed_rows, torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.int32)


def packed_integer_product(x: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x (R, i) int8 times a matrix (o, i) from `pack_integers`: (R, o) float32. oneDNN is fast only for
    unsigned x, whose zero point is then 128."""
    unsigned = x.view(torch.uint8) ^ 128  # x + 128
    call = torch.ops.onednn.qlinear_pointwise
    return call(unsigned, 1.0, 128, *weight, None, 1.0, 0, torch.float32, "none", [], "")


# ---------------------------------------------------------------- the modules of a prepared model


def silu(x: Tensor) -> Tensor:
    """F.silu, whose last bit depends on where torch divides a large tensor among its threads. That of these
    operations does not."""
    return x / (1 + (-x).exp())


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu with tanh, likewise, in float32."""
    exact = x.float()
    return (
        0.5 * exact * (1 + torch.tanh((2 / math.pi) ** 0.5 * (exact + 0.044715 * exact * exact * exact)))
    ).type_as(x)


EXACT = {"silu": silu, "gelu_tanh": gelu_tanh}


class Stored(nn.Module):
    """A module whose weights are in a form for this CPU alone. Its `state_dict` is that of the plain module,
    so that the model can be saved. Calling it calls `forward` at once: nn.Module's search for hooks takes as
    long as a small operation."""

    def dense(self) -> dict[str, Tensor]:
        """The state of the plain module."""
        raise NotImplementedError

    def register_forward_hook(self, *_, **__):
        raise UserError("packed and int8 modules take no hooks; hook a block, or load the model as plain")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update({prefix + name: weight for name, weight in self.dense().items()})

    _apply = _load_from_state_dict = refuse


class FastNorm(Stored):
    """RMSNorm in fewer operations: |x| = sqrt d rms(x), and hypot(|x|, sqrt(d eps)) is never 0."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.weight, d = norm.weight, len(norm.weight)
        self.gain = norm.weight.detach().float() * d**0.5
        self.least = torch.tensor((d * norm.eps) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self.forward(x.float()).type_as(x)
        return x / torch.hypot(vector_norm(x, dim=-1, keepdim=True), self.least) * self.gain

    __call__ = forward

    def dense(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


class PackedLinear(Stored):
    """nn.Linear with its matrix in oneDNN's order, in parts of at most MOST_INPUTS inputs, whose products are
    added."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, is_copy: bool = False):
        """`is_copy`: another module has these weights as its parameters, so that they do not count here."""
        super().__init__()
        parts = weight.detach().chunk(math.ceil(weight.shape[1] / MOST_INPUTS), dim=1)
        self.widths = [part.shape[1] for part in parts]
        self._parts = tuple(nn.Parameter(pack(part), requires_grad=False) for part in parts)
        for number, part in enumerate(() if is_copy else self._parts):
            self.register_parameter(f"part{number}", part)
        self.bias, self.is_copy = bias, is_copy

    def forward(self, x: Tensor) -> Tensor:
        if len(self._parts) == 1:
            y = packed_product(x, self._parts[0])
        else:
            parts = zip(x.split(self.widths, dim=-1), self._parts)
            y = functools.reduce(torch.add, [packed_product(*part) for part in parts])
        return y if self.bias is None else y + self.bias

    __call__ = forward

    def dense(self) -> dict[str, Tensor]:
        state = {"weight": torch.cat([part.to_dense() for part in self._parts], dim=1)}
        return state if self.bias is None else {**state, "bias": self.bias}

    def __deepcopy__(self, memo):
        return PackedLinear(**self.dense(), is_copy=self.is_copy)


# ---------------------------------------------------------------- int8


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest int8 matrix: rows (o, i) int8 and their scale (o,) bfloat16, as the kernel reads it. A row
    w is kept as round(w / s) with s = max |w| / 127. Made in parts, so that no float32 copy is needed."""
    rows = torch.empty_like(weight, dtype=torch.int8)
    scale = weight.new_empty(len(weight), dtype=torch.bfloat16)
    for start in range(0, len(weight), 4096):
        part = weight[start : start + 4096].float()
        step = (part.abs().amax(1) / STEPS).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        scale[start : start + 4096] = step
        rows[start : start + 4096] = (part / step.float()[:, None]).round().clamp(-STEPS, STEPS)
    return rows, scale


def dequantized(rows: Tensor, scale: Tensor) -> Tensor:
    """Rows (.., i) of an int8 matrix with their scales (..,), in float32."""
    return rows.float() * scale.float()[..., None]


class Int8Embedding(Stored):
    """nn.Embedding whose rows are int8."""

    def __init__(self, rows: Tensor, scale: Tensor):
        super().__init__()
        self.rows, self.scale = rows, scale

    def forward(self, ids: Tensor) -> Tensor:
        return dequantized(self.rows[ids], self.scale[ids])

    __call__ = forward

    def dense(self) -> dict[str, Tensor]:
        return {"weight": dequantized(self.rows, self.scale)}


class Int8Linear(Stored):
    """nn.Linear whose matrix is int8. Inputs and outputs are float32.

    A few rows go through torch's kernel, which reads bfloat16. Many rows, and all rows of a LARGE matrix, are
    multiplied in integers, where the CPU has instructions for it: a row x becomes s (a + b / 254) with a =
    round(x / s) and b in int8. Two such products, which do not round, are more precise than bfloat16."""

    def __init__(self, rows: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.rows, self.scale, self.bias = rows, scale, bias
        large = rows.numel() >= LARGE and multiplies_integers()
        self._packed = pack_integers(rows) if large else None
        self._few = not large and rows.shape[1] % GROUP == 0 and has_kernel()  # use the kernel for few rows
        self._rows, self._scale = rows.data, scale.data  # found faster than parameters

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (R, i)
        if len(flat) <= FEW and self._few:
            y = torch._weight_int8pack_mm(flat.bfloat16(), self._rows, self._scale).float()
        elif multiplies_integers():
            y = self.in_integers(flat)
        else:
            dense = self.rows.float()
            alone = flat.split(1 if len(flat) <= FEW else len(flat))  # a few rows one by one
            y = torch.cat([F.linear(rows, dense) for rows in alone]) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def in_integers(self, x: Tensor) -> Tensor:
        """x (R, i) times the matrix: (R, o)."""
        size = vector_norm(x, math.inf, dim=-1, keepdim=True)
        step = size.clamp(min=torch.finfo(torch.float32).tiny) / STEPS  # s, (R, 1)
        high = (x / step).round()
        low = ((x / step - high) * 2 * STEPS).round()
        halves = torch.cat([high, low]).to(torch.int8)  # (2R, i)
        if self._packed is None:
            y = torch._int_mm(halves, self.rows.mT)
        else:
            y = packed_integer_product(halves, self._packed)
        high, low = y.float().chunk(2)
        return torch.add(high, low, alpha=1 / (2 * STEPS)) * step * self.scale

    __call__ = forward

    def dense(self) -> dict[str, Tensor]:
        state = {"weight": dequantized(self.rows, self.scale)}
        return state if self.bias is None else {**state, "bias": self.bias}

    def __deepcopy__(self, memo):
        return Int8Linear(*(copy.deepcopy(part, memo) for part in (self.rows, self.scale, self.bias)))
