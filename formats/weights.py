"""How weights are stored, and the two operations that decoding spends its time in, norm and matrix product, for each
way.

The model calls `rms_norm` and `linear`; the plain forms are `F.rms_norm` and `F.linear`, and tests hold the others
equal to them. Private functions of torch are called here alone, after a trial; where they are missing or raise,
weights stay plain.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError

FORMS = ("plain", "packed")  # plain: as in the file; packed: in oneDNN's own order, for the few rows of decoding


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of (N, d) (Zhang 2019). On the few rows of decoding, small kernels
    beat the library's."""
    if x.dtype != weight.dtype:  # norms in float32 between blocks in half precision
        return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)
    if x.is_cpu and x.dtype == torch.float32 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        scale, floor = _rms_constants(x.shape[-1], eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True) * scale, floor) * weight
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)  # the weight may be finer


@functools.cache
def _rms_constants(d: int, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt d and sqrt eps, as tensors: rms(x) = hypot(|x| / sqrt d, sqrt eps)."""
    return torch.tensor([d**-0.5, eps**0.5]).unbind()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, d_in) times a weight in one of the FORMS, logically (d_out, d_in): (N, d_out)."""
    return _packed_product(x, weight) if weight.is_mkldnn else F.linear(x, weight)


def _packed_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _pack(weight: Tensor) -> Tensor:
    """A copy of the weight in oneDNN's own order, laid out for four rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies packed weights of this dtype: tried once. (oneDNN packs bfloat16 only for CPUs
    with certain instructions, and float32 wherever it is there.)"""
    ones = torch.ones(32, 32, dtype=dtype)
    try:
        return bool((_packed_product(ones, _pack(ones)) == 32).all())
    except (RuntimeError, AttributeError, NotImplementedError):  # no oneDNN, no such function, no such instructions
        return False


def default_form(dtype: torch.dtype) -> str:
    """The rule by which a CPU stores weights: packed where that works, but float32 plain where there is AVX-512, with
    which the library's own product of one row is faster (0.75 ms against 1.32 for the embedded model's blocks;
    without it, packed is up to 2.6 times as fast as plain)."""
    if dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "plain"
    return "packed" if packs(dtype) else "plain"


def as_form(weight: Tensor, form: str) -> Tensor:
    """A weight (d_out, d_in), stored in one of the FORMS."""
    return _pack(weight) if form == "packed" else weight


@torch.no_grad()
def store(model, form: str | None) -> None:
    """Stores the matrices of a CPU model's blocks, and its unembedding for the heads, in one of the FORMS (None: by
    `default_form`). The embedding stays plain beside a packed unembedding: its rows are looked up. Raises UserError."""
    dtype = model.embedding.dtype
    model.form = form or default_form(dtype)
    if model.form not in FORMS:
        raise UserError(f"unknown form of weights {form!r}; choose from {', '.join(FORMS)}")
    if model.form == "plain":
        return
    if not packs(dtype):
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"this machine cannot multiply packed weights of {name}; store them plain")
    for block in model.blocks:
        for name, weight in block._parameters.items():
            if weight.dim() > 1:
                block._parameters[name] = as_form(weight, model.form)
    model.packed_unembed = as_form(model.unembed, model.form)


def adopt(model, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Gives the model all weights that are not packed, one by one, so that only one lies twice in memory."""
    for prefix, module in model.named_modules():
        for name, weight in module._parameters.items():
            if not weight.is_mkldnn:
                new = weights[f"{prefix}.{name}" if prefix else name]
                new = new.to(device, dtype if new.dim() > 1 else torch.promote_types(new.dtype, dtype))
                module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
