"""How weights are stored, and the two operations that decoding spends its time in, norm and matrix product,
for each way.

The model calls `rms_norm` and `linear`; the plain forms are `F.rms_norm` and `F.linear`, and tests hold the
other forms equal to them, int8 near them. Private functions of torch are called here and in formats/int8.py
alone, after a trial; where they are missing or raise, weights are folded alone, or multiplied as plain ones.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from formats.heads import read_model
from formats.int8 import Int8Matrix, dequantized, lay_side_by_side
from formats.rotary import pair_order, pair_table

FORMS = ("plain", "folded", "packed")  # of float matrices on a CPU, see `store`; int8 is a dtype of its own


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of (N, d) (Zhang 2019); without the factor where the weight
    is folded into the matrix that follows. On the few rows of decoding, small kernels beat the library's."""
    if weight is None or _small(x, weight):
        scale, floor = _rms_constants(x.shape[-1], eps)
        x = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True) * scale, floor)
        return x if weight is None else x * weight
    if x.dtype != weight.dtype:  # norms in float32 between blocks in half precision
        return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def _small(x: Tensor, weight: Tensor) -> bool:
    """Whether x is one of the rows of decoding."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.is_cpu:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


@functools.cache
def _rms_constants(d: int, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt d and sqrt eps, as tensors: rms(x) = hypot(|x| / sqrt d, sqrt eps)."""
    return torch.tensor([d**-0.5, eps**0.5]).unbind()


def linear(x: Tensor, weight: Tensor | Int8Matrix) -> Tensor:
    """x (N, d_in) times a weight in one of the FORMS or in int8, logically (d_out, d_in): (N, d_out)."""
    if type(weight) is Int8Matrix:
        return weight.product(x)
    return _packed_product(x, weight) if weight.is_mkldnn else F.linear(x, weight)


def lookup(weight: Tensor | Int8Matrix, ids: Tensor) -> Tensor:
    """Rows of a matrix that is not packed: (n, d_in)."""
    return weight[ids] if type(weight) is Int8Matrix else F.embedding(ids, weight)


def _packed_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _pack(weight: Tensor) -> Tensor:
    """A copy of the weight in oneDNN's own order, laid out for four rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies packed weights of this dtype: tried once. (oneDNN packs bfloat16 only
    for CPUs with certain instructions, and float32 wherever it is there.)"""
    ones = torch.ones(32, 32, dtype=dtype)
    try:
        return bool((_packed_product(ones, _pack(ones)) == 32).all())
    except (
        RuntimeError,
        AttributeError,
        NotImplementedError,
    ):  # no oneDNN, no such function, no such instructions
        return False


def default_form(dtype: torch.dtype) -> str:
    """The rule by which a CPU stores weights: packed where that works, but float32 folded alone where there
    is AVX-512, with which the library's own product of one row is faster (0.75 ms against 1.32 for the
    embedded model's blocks; without it, packed is up to 2.6 times as fast)."""
    if dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "folded"
    return "packed" if packs(dtype) else "folded"


def as_form(weight: Tensor | Int8Matrix, form: str) -> Tensor | Int8Matrix:
    """A matrix (d_out, d_in), stored in one of the FORMS or in int8."""
    if form == "int8" and type(weight) is not Int8Matrix:
        return Int8Matrix.of(weight)
    return _pack(weight) if form == "packed" else weight


@torch.no_grad()
def store(model, form: str | None) -> None:
    """Stores the matrices of a CPU model in one of the FORMS (None: by `default_form`), or in int8:

    plain   as in the file, what is read and trained
    folded  the same function in fewer operations, see `fold`
    packed  folded, the blocks' matrices and the unembedding in oneDNN's own order
    int8    folded, every matrix in int8, see formats/int8.py

    The embedding stays plain beside a packed unembedding: its rows are looked up. Raises UserError."""
    dtype = model.embedding.dtype
    model.form = form or default_form(dtype)
    if model.form not in (*FORMS, "int8"):
        raise UserError(f"unknown form of weights {form!r}; choose from {', '.join(FORMS)}")
    if model.form == "plain":
        return
    if model.form == "packed" and not packs(dtype):
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"this machine cannot multiply packed weights of {name}; store them folded or plain")
    for block in model.blocks:
        fold(block._parameters, model.config, norms=model.form != "int8" and dtype == torch.float32)
        for name, weight in block._parameters.items():
            if weight is not None and weight.dim() > 1:
                block._parameters[name] = as_form(weight, model.form)
            elif weight is not None and model.form == "int8":
                block._parameters[name] = weight.float()  # as what they meet there
    model.rope = pair_table(model.rope)
    if model.form == "packed":
        model.packed_unembed = as_form(model.unembed, model.form)
    elif model.form == "int8":
        for name in ("embedding", "unembedding"):
            if name in model._parameters:
                model._parameters[name] = as_form(model._parameters[name], model.form)
        lay_side_by_side([weight for weight in model.parameters() if type(weight) is Int8Matrix])


def fold(block: dict[str, Tensor | Int8Matrix], config, norms: bool) -> None:
    """Folds into the matrices of a block, by name, what decoding would else compute for every token. The rows
    of queries and keys are put into the order in which the two numbers of a rotary pair are neighbours: one
    complex product then turns them, and q k stays what it was. With `norms`, the weights of the norms before
    attention and MLP are multiplied into the matrices that follow, W (w x) = (W w) x; in half precision and
    in int8 that would round once more."""
    order = pair_order(config)
    for name in ("qkv", "qkv_bias"):
        if name in block:
            weight = block[name]
            block[name] = weight.reordered(order) if type(weight) is Int8Matrix else weight[order]
    for name in ("q_norm", "k_norm"):
        if name in block:
            block[name] = block[name][order[: config.head_dim]]
    if norms:
        for norm, matrix in (("attn_norm", "qkv"), ("mlp_norm", "gate_up")):
            block[matrix] = block[matrix] * block[norm]
            block[norm] = None


# ---------------------------------------------------------------- from a file


def default_dtype(content: dict, device: torch.device) -> torch.dtype:
    """The file's own, int8 among them, but float32 where a float16 file meets a CPU: slow at several rows in
    half precision."""
    if content.get("scales"):
        return torch.int8
    stored = content["weights"]["embedding"].dtype
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def load_weights(
    model, path, heads, content: dict, device: torch.device, dtype: torch.dtype, form: str | None
) -> None:
    """Gives a model on the meta device the weights of the file at `path`, with those of the file `heads` (or
    None), as their mapped `content` has them, stored as `store` says. Raises UserError."""
    weights, scales = content["weights"], content.get("scales", {})
    if form is not None and form not in FORMS:
        raise UserError(f"unknown form of weights {form!r}; choose from {', '.join(FORMS)}")
    if form is not None and device.type != "cpu":
        raise UserError("--weights says how a CPU stores them; leave it out on a GPU")
    if dtype == torch.int8:
        if device.type != "cpu" or form is not None:
            raise UserError(
                "int8 is for a CPU, in a form of its own; take --dtype bfloat16, or leave --weights out"
            )
        form = "int8"
    elif scales:
        weights = dequantized(weights, scales)
    model.requires_grad_(False).load_state_dict(weights, assign=True)
    if form == "int8":
        for name, scale in scales.items():
            module, _, own = name.rpartition(".")
            place = model.get_submodule(module)._parameters
            place[own] = Int8Matrix(place[own], scale)
    else:
        adopt(model, weights, weights, device, dtype)
    if device.type == "cpu":
        store(model, form)
        if form == "int8" or (model.form != "plain" and not scales):
            # What is left comes from a new mapping of the file: the old one keeps all that was read.
            rest = torch.float32 if form == "int8" else dtype
            adopt(model, weights, read_model(path, heads)["weights"], device, rest)


def adopt(
    model, old: dict[str, Tensor], new: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Moves every weight of the model that lies in the tensors `old` to those in `new`, one by one, so that
    only one lies twice in memory; matrices become `dtype`, vectors keep at least the file's precision."""
    for prefix, module in model.named_modules():
        for name, weight in module._parameters.items():
            full = f"{prefix}.{name}" if prefix else name
            if (
                isinstance(weight, Tensor)
                and not weight.is_mkldnn
                and weight.data_ptr() == old[full].data_ptr()
            ):
                kind = dtype if weight.dim() > 1 else torch.promote_types(weight.dtype, dtype)
                module._parameters[name] = torch.nn.Parameter(new[full].to(device, kind), requires_grad=False)
