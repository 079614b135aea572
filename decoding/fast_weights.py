"""A faster form of a model for decoding on a CPU: the same function in fewer operations, with its matrices
stored in the form that the CPU multiplies fastest. Tests check that every form computes the same as the plain
model, and that int8 comes close to it.

    plain    as in the file: model.py's Transformer
    folded   the gains of norms multiplied into the matrices that follow, W (g x) = (W g) x; the two numbers
             of a rotary pair side by side, so that one complex product turns all heads of queries and keys
    packed   folded, and the matrices in oneDNN's own order
    int8     folded, and every matrix in int8: one byte per weight and one scale per row

Only this file calls private functions of torch, each after a trial call.

Dimensions: B batch, T time, N = B T rows, d model width, H query heads, K key/value heads, C width of a head.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from model import Block, KeysValues, ModelConfig, Transformer, attention, rms_norm, soft_cap

FEW = 32  # up to this many rows, the kernel is faster than a float32 product with the dequantized matrix
WHOLE = 16  # the kernel reads the numbers of a row in groups of this size, even past the end of a row
# What torch raises if it has no such function, or the CPU has no such instructions:
UNSUPPORTED = (RuntimeError, AttributeError)
FORMS = ("plain", "folded", "packed")  # what --weights may name; int8 is a dtype


# ---------------------------------------------------------------- int8


class Int8Matrix:
    """A matrix (d_out, d_in) in int8: `rows` (d_out, d_in) int8, `scale` (d_out,) bfloat16. A row w is kept
    as round(w / s) with s = max |w| / 127, rounded to bfloat16, as the kernel reads it. For up to FEW rows of
    input, the kernel reads and returns bfloat16; more rows, or all if there is no kernel, are multiplied in
    float32."""

    def __init__(self, rows: Tensor, scale: Tensor):
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Matrix":
        """The nearest matrix in int8, made in parts, so that no float32 copy of the whole is needed."""
        rows = torch.empty_like(weight, dtype=torch.int8)
        scale = weight.new_empty(len(weight), dtype=torch.bfloat16)
        for start in range(0, len(weight), 4096):
            part = weight[start : start + 4096].float()
            step = (part.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
            scale[start : start + 4096] = step
            rows[start : start + 4096] = (part / step.float()[:, None]).round().clamp(-127, 127)
        return cls(rows, scale)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """The rows of these ids (n,) in float32, (n, d_in)."""
        return self.rows[ids].float() * self.scale[ids].float()[..., None]

    def product(self, x: Tensor) -> Tensor:
        """x (.., d_in) times the matrix, (.., d_out). The kernel treats every row alike, so up to FEW rows
        yield bit for bit what each would yield alone."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= FEW and self.rows.shape[1] % WHOLE == 0 and has_kernel():
            out = torch._weight_int8pack_mm(rows.bfloat16(), self.rows, self.scale)
            return out.view(*x.shape[:-1], -1)
        return F.linear(x.float(), self.rows.float()) * self.scale


@functools.cache
def has_kernel() -> bool:
    """Whether torch multiplies int8 matrices on this machine; tried once."""
    ones = torch.ones(32, 32)
    try:
        out = torch._weight_int8pack_mm(ones.bfloat16(), ones.to(torch.int8), torch.ones(32).bfloat16())
        return bool((out == 32).all())
    except UNSUPPORTED:
        return False


def dequantized(weights: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint, all of them float."""
    floats = {name: weights[name].float() * scale.float()[:, None] for name, scale in scales.items()}
    return weights | floats


# ---------------------------------------------------------------- matrices and norms in every form

Matrix = Tensor | Int8Matrix


def default_form(dtype: torch.dtype) -> str:
    """The form in which a CPU stores weights by default: packed if that works, otherwise folded; but float32
    is folded if there is AVX-512, with which the library's own product of one row is faster (0.75 ms against
    1.32 for the included model's blocks; without it, packed is up to 2.6 times as fast)."""
    if dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "folded"
    return "packed" if packs(dtype) else "folded"


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies packed weights of this dtype; tried once. (oneDNN packs bfloat16 only
    for CPUs with certain instructions, and float32 wherever oneDNN is available.)"""
    ones = torch.ones(32, 32, dtype=dtype)
    try:
        return bool((product(ones, stored(ones, "packed")) == 32).all())
    except UNSUPPORTED:
        return False


def stored(weight: Matrix, form: str) -> Matrix:
    """A matrix (d_out, d_in) in one of the forms."""
    if form == "int8" and isinstance(weight, Tensor):
        return Int8Matrix.of(weight)
    if form == "packed":
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)  # laid out for four rows
    return weight


def product(x: Tensor, weight: Matrix) -> Tensor:
    """x (.., d_in) times a stored matrix: (.., d_out)."""
    if type(weight) is Int8Matrix:
        return weight.product(x)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def fast_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """rms_norm in fewer operations, if x is float32: then `gain` has been multiplied by sqrt d, and is None
    if it is folded into the matrix that follows."""
    if x.dtype != torch.float32:
        return rms_norm(x, gain, eps)
    x = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), smallest_norm(x.shape[-1], eps))
    return x if gain is None else x * gain


@functools.cache
def smallest_norm(d: int, eps: float) -> Tensor:
    """sqrt(d eps), which keeps rms_norm from dividing by zero: sqrt d rms(x) = hypot(|x|, sqrt(d eps))."""
    return torch.tensor((d * eps) ** 0.5)


def kept_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight in a model of `dtype`: a vector keeps at least the file's precision."""
    return dtype if weight.dim() > 1 else torch.promote_types(weight.dtype, dtype)


def fast_gain(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """The gain of a norm as fast_norm expects it, for states of this dtype."""
    gain = gain.detach().to(kept_dtype(gain, dtype))
    return gain * gain.shape[-1] ** 0.5 if dtype == torch.float32 else gain


# ---------------------------------------------------------------- the model


class Turns:
    """The rotary positions of some blocks as complex numbers, from the table (2, max_len, C) of model.py."""

    def __init__(self, rope: Tensor, config: ModelConfig):
        cos, sin = rope[..., rope.shape[-1] // 2 :]  # of the second half of a head, whose sign is +
        self.table = torch.complex(cos, sin)  # (max_len, C/2)
        self.turned, self.unturned = config.n_heads + config.n_kv_heads, config.n_kv_heads  # heads
        self._rows, self._at = None, None

    def at(self, first: int, rows: int) -> Tensor:
        """The factors (rows, H + 2K, C/2) of the positions from `first` on: queries and keys are turned,
        values are multiplied by 1. The factors are kept for the blocks that follow in the same pass."""
        if self._at != (first, rows):
            turns = self.table[first : first + rows, None].expand(-1, self.turned, -1)
            ones = torch.ones_like(turns[:, : self.unturned])
            self._at, self._rows = (first, rows), torch.cat([turns, ones], 1)
        return self._rows


class FastBlock:
    """A block in one of the forms."""

    def __init__(self, block: Block, form: str, dtype: torch.dtype, turns: Turns | None, scales: dict):
        """`scales` holds the scales of all the model's weights that are int8 in the file, by name."""
        self.config, self.layer, self.window, self.turns = block.config, block.layer, block.window, turns
        self.activation, self.dtype = block.activation, torch.float32 if form == "int8" else dtype
        weights: dict[str, Matrix | None] = {}
        for name, weight in block.named_parameters():
            scale = scales.get(f"blocks.{block.layer - 1}.{name}")
            if scale is not None:
                weights[name] = Int8Matrix(weight.detach(), scale)
            elif name.endswith("norm"):
                weights[name] = fast_gain(weight, self.dtype)
            else:
                weights[name] = weight.detach().to(kept_dtype(weight, self.dtype))
        self.fold(weights, norms=form != "int8" and self.dtype == torch.float32)
        for name, weight in weights.items():
            matrix = isinstance(weight, Int8Matrix) or (weight is not None and weight.dim() > 1)
            setattr(self, name, stored(weight, form) if matrix else weight)

    def fold(self, weights: dict[str, Matrix | None], norms: bool) -> None:
        """Puts the rows of queries and keys into the order in which the numbers of a rotary pair, i and i +
        C/2, are neighbours: the products q k do not change. With `norms`, also multiplies the gains of the
        norms before attention and MLP into the matrices that follow; in half precision and in int8 that would
        add a rounding."""
        C, turned = self.config.head_dim, self.config.n_heads + self.config.n_kv_heads
        rows = torch.arange((turned + self.config.n_kv_heads) * C).view(-1, 2, C // 2)
        order = torch.cat([rows[:turned].mT.flatten(), rows[turned:].flatten()])  # 0, C/2, 1, C/2 + 1, ..
        qkv = weights["qkv"]
        in_int8 = isinstance(qkv, Int8Matrix)
        weights["qkv"] = Int8Matrix(qkv.rows[order], qkv.scale[order]) if in_int8 else qkv[order]
        if self.config.qkv_bias:
            weights["qkv_bias"] = weights["qkv_bias"][order]
        if self.config.qk_norm:
            for name in ("q_norm", "k_norm"):
                weights[name] = weights[name][order[:C]]
        if norms:
            for norm, matrix in (("attn_norm", "qkv"), ("mlp_norm", "gate_up")):
                weights[matrix] = weights[matrix] * weights[norm]
                weights[norm] = None

    def __call__(self, x: Tensor, kv: KeysValues) -> Tensor:
        """As Block.forward: x (B, T, d) -> (B, T, d)."""
        eps = self.config.norm_eps
        q, k, v = self.heads(x, kv.first(self.layer))
        k, v, mask = kv.extend(self.layer, k, v, self.window)
        a = product(attention(q, k, v, mask, self.config), self.out)
        x = x + (fast_norm(a, self.attn_post_norm, eps) if self.config.post_norms else a)
        gate, up = product(fast_norm(x, self.mlp_norm, eps), self.gate_up).chunk(2, dim=-1)
        m = product(self.activation(gate) * up, self.down)
        return x + (fast_norm(m, self.mlp_post_norm, eps) if self.config.post_norms else m)

    def heads(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Block.heads: queries (B, H, T, C), keys and values (B, K, T, C)."""
        (B, T, _), eps = x.shape, self.config.norm_eps
        H, K, C = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        qkv = product(fast_norm(x, self.attn_norm, eps), self.qkv)  # (B, T, (H + 2K) C)
        if self.config.qkv_bias:
            qkv = (qkv + self.qkv_bias).type_as(qkv)
        if self.config.qk_norm:
            q, k, v = qkv.view(B, T, -1, C).split([H, K, K], 2)
            qkv = torch.cat([fast_norm(q, self.q_norm, eps), fast_norm(k, self.k_norm, eps), v], 2)
        if self.turns is not None:
            pairs = qkv.float() if qkv.element_size() < 4 else qkv
            pairs = torch.view_as_complex(pairs.view(B, T, H + 2 * K, C // 2, 2))
            qkv = torch.view_as_real(pairs * self.turns.at(first, T))  # (x1 + i x2) e^(i angle)
        if qkv.dtype != self.dtype:
            qkv = qkv.to(self.dtype)
        heads = qkv.view(B, T, H + 2 * K, C).transpose(1, 2)
        return heads.narrow(1, 0, H), heads.narrow(1, H, K), heads.narrow(1, H + K, K)  # faster than slices


class FastTransformer(Transformer):
    """A Transformer in one of the forms, for decoding alone: its weights are not parameters that could be
    trained."""

    @torch.no_grad()
    def __init__(self, model: Transformer, form: str | None, dtype: torch.dtype, scales: dict[str, Tensor]):
        """Takes over the weights of a plain model on the CPU; `scales` belong to those that are int8. Raises
        UserError for a form that this machine cannot multiply."""
        nn.Module.__init__(self)
        self.config, self.frequent_ids = model.config, model.frequent_ids
        self.form = form or default_form(dtype)
        if self.form == "packed" and not packs(dtype):
            name = str(dtype).removeprefix("torch.")
            raise UserError(f"cannot multiply packed weights of {name}; store them folded or plain")
        tables = {id(block.rope): block.rope for block in model.blocks}  # most blocks share theirs
        turns = {key: rope if rope is None else Turns(rope, self.config) for key, rope in tables.items()}
        self.blocks = []
        for block in model.blocks:
            self.blocks.append(FastBlock(block, self.form, dtype, turns[id(block.rope)], scales))
        state_dtype = torch.float32 if self.form == "int8" else dtype
        self.norm, self.exit_norms, self.classifiers = model.norm, model.exit_norms, model.classifiers
        self.adapters = {layer: weight.to(state_dtype) for layer, weight in model.adapters.items()}
        self.gains = {int(layer): fast_gain(gain, state_dtype) for layer, gain in self.exit_norms.items()}
        self.final_gain = fast_gain(self.norm, state_dtype)
        for name in ("embedding", "unembedding"):
            if hasattr(model, name):
                weight = getattr(model, name).detach()
                weight = Int8Matrix(weight, scales[name]) if name in scales else weight.to(state_dtype)
                setattr(self, name, stored(weight, self.form) if self.form == "int8" else weight)
        self._states = torch.empty(0, dtype=state_dtype)
        self.lay_side_by_side()
        # The matrix of the LM head; if packed, it is a second copy, since rows are read from the first.
        self.lm_head = stored(self.unembed, self.form)

    def lay_side_by_side(self) -> None:
        """Moves all matrices into one piece of memory, which the system can map in huge pages
        (common/threads.py): reading them then causes fewer TLB misses. (Packed matrices stay where they
        are.)"""
        values = [value for holder in (*self.blocks, self) for value in vars(holder).values()]
        values = [value.rows if isinstance(value, Int8Matrix) else value for value in values]
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 1]
        tensors = [tensor for tensor in tensors if not tensor.is_mkldnn]
        room = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
        for tensor, part in zip(tensors, room.split([tensor.numel() for tensor in tensors])):
            tensor.data = part.view(tensor.shape).copy_(tensor)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding[tokens] if self.form == "int8" else F.embedding(tokens, self.embedding)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def head_rows(self, ids: Tensor) -> Tensor:
        return self.unembed[ids] if self.form == "int8" else F.embedding(ids, self.unembed)

    def exit_norm(self, hidden: Tensor, layer: int) -> Tensor:
        gain = self.gains.get(layer, self.final_gain)
        return fast_norm(self.adapted(hidden, layer), gain, self.config.norm_eps)

    def score(self, normed: Tensor, weight: Matrix | None = None) -> Tensor:
        logits = product(normed, self.lm_head if weight is None else weight).float()
        return logits if self.config.logit_cap is None else soft_cap(logits, self.config.logit_cap)

    def prepared(self, rows: Tensor) -> Matrix:
        return stored(rows, self.form)

    def new_states(self, *shape: int) -> Tensor:
        return self._states.new_empty(shape)
