"""The decoder-only transformer, its staircase cache and its one-file checkpoints. It knows nothing of confidence.

Dimensions: B batch, T time, R rows of a pass, d model width, H query heads, K key/value heads, C width of a head, V vocabulary.
Layers count from 1 to L; index 0 stands for the embedding. Positions count from 0.
"""

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import option, whole_file

FORMAT = "early-exit checkpoint 1"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family transformer; the defaults are the embedded model's."""

    vocab_size: int = option(4096, "pieces of the vocabulary")
    n_layers: int = option(12, "blocks")
    d_model: int = option(256, "width of the residual stream")
    n_heads: int = option(4, "query heads")
    n_kv_heads: int = option(4, "key and value heads; fewer than n_heads, and dividing it: grouped-query attention")
    d_ff: int = option(512, "width of the gated MLP")
    max_len: int = option(512, "most positions in one sequence")
    rope_base: float = option(10000.0, "base of the rotary frequencies")
    norm_eps: float = option(1e-6, "added to the mean square in the norms")
    tie_embeddings: bool = option(True, "unembed with the embedding")
    exit_norms: tuple[int, ...] = option((), "exit layers with a norm of their own; the others share the final norm")
    classifiers: tuple[int, ...] = option((), "exit layers with a confidence classifier")
    eos_id: int | None = option(2, "token that ends a text; none: nothing does")

    def __post_init__(self):
        for name in ("exit_norms", "classifiers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(f"d_model {self.d_model} must be an even multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        for name in ("exit_norms", "classifiers"):
            check_layers(name, getattr(self, name), self.n_layers)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


def check_layers(name: str, layers, n_layers: int) -> None:
    """Raises ValueError unless every exit layer lies in 1..L-1 (layer L is not an exit: it is the full model)."""
    bad = [layer for layer in layers if not 1 <= layer < n_layers]
    if bad:
        raise ValueError(f"{name}: layer {bad[0]} is not an exit of a model of {n_layers} layers; choose from 1 to {n_layers - 1}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of (N, d) (Zhang 2019). On the few rows of decoding, small kernels beat the library's."""
    if x.is_cpu and x.dtype == torch.float32 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        scale, floor = _rms_constants(x.shape[-1], eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True) * scale, floor) * weight
    return F.rms_norm(x, weight.shape, weight, eps)


@functools.cache
def _rms_constants(d: int, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt d and sqrt eps, as tensors: rms(x) = hypot(|x| / sqrt d, sqrt eps)."""
    return torch.tensor([d**-0.5, eps**0.5]).unbind()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, d_in) times a weight in one of the FORMS, logically (d_out, d_in): (N, d_out)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if weight.dim() == 3:  # (blocks, d_in, d_out / blocks)
        if len(x) > 16:
            return F.linear(x, weight.transpose(1, 2).flatten(0, 1))
        return torch.bmm(x.expand(len(weight), -1, -1), weight).transpose(0, 1).reshape(len(x), -1)
    return F.linear(x, weight)


def split(weight: Tensor) -> Tensor:
    """A view of the weight in as many blocks of its rows as there are threads, one for each; the weight itself if that does not fit."""
    blocks = torch.get_num_threads()
    return weight if blocks == 1 or len(weight) % blocks else weight.view(blocks, -1, weight.shape[1]).transpose(1, 2)


def packed(weight: Tensor) -> Tensor:
    """A copy in oneDNN's own order, laid out for a few rows; the weight itself where oneDNN is missing or does not know the dtype."""
    known = torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16)
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4) if known else weight


# How a CPU model's weights are kept for `linear`, the form telling the kernel: `choose_form` takes the fastest.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda weight: weight, "split": split, "packed": packed}


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). It treats every row alike; what depends on positions is in `attend`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, C, H, K = config.d_model, config.head_dim, config.n_heads, config.n_kv_heads
        self.eps = config.norm_eps
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.qkv = nn.Parameter(torch.empty((H + 2 * K) * C, d))
        self.out = nn.Parameter(torch.empty(d, H * C))
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.gate_up = nn.Parameter(torch.empty(2 * config.d_ff, d))
        self.down = nn.Parameter(torch.empty(d, config.d_ff))

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x (N, d) -> (N, d); `attend` takes the queries, keys and values side by side, (N, (H + 2K) C), to (N, H C)."""
        w = self._parameters  # not self.qkv: a Module's attribute access is slow enough to show in decoding
        x = x + linear(attend(self.project(x)), w["out"])
        gate, up = linear(rms_norm(x, w["mlp_norm"], self.eps), w["gate_up"]).chunk(2, dim=-1)
        return x + linear(F.silu(gate) * up, w["down"])

    def project(self, x: Tensor) -> Tensor:
        """x (N, d) -> queries, keys and values before rotation, (N, (H + 2K) C)."""
        w = self._parameters
        return linear(rms_norm(x, w["attn_norm"], self.eps), w["qkv"])


def rope_table(config: ModelConfig) -> Tensor:
    """cos and signed sin of every position: (2, max_len, C)."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.max_len, dtype=torch.float64)[:, None] * frequency  # (max_len, C/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).float()


def split_heads(qkv: Tensor, batch: int, config: ModelConfig, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(B T, (H + 2K) C) -> q (B, H, T, C), k and v (B, K, T, C), with rotary position embedding (Su 2021) of q and k, the pairs being
    (i, i + C/2). rope: cos and signed sin of the T positions, (T, C) each."""
    H, K, C = config.n_heads, config.n_kv_heads, config.head_dim
    heads = qkv.view(batch, -1, H + 2 * K, C).transpose(1, 2)  # (B, H + 2K, T, C)
    qk, v = heads[:, : H + K], heads[:, H + K :]
    qk = torch.addcmul(qk * rope[0], qk.roll(C // 2, -1), rope[1]).type_as(v)
    return qk[:, :H], qk[:, H:], v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k / sqrt C) v where `mask` (.., T, S) allows: q (B, H, T, C), k and v (B, K, S, C) -> (B T, H C)."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


class Transformer(nn.Module):
    """Embedding, L blocks, final norm, unembedding. Exit heads read the state after any layer as the final head reads the last."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.form = "plain"  # of the weights, see FORMS
        self._head_weight: Tensor | None = None
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.exit_norms = nn.ParameterDict({str(layer): torch.ones(config.d_model) for layer in config.exit_norms})
        self.classifiers = nn.ParameterDict({str(layer): torch.zeros(config.d_model + 1) for layer in config.classifiers})  # w, then b
        if not config.tie_embeddings:
            self.unembedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.register_buffer("rope", rope_table(config), persistent=False)
        for name, weight in self.named_parameters():  # what writes into the residual stream starts smaller, by depth (GPT-2)
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layers) if name.endswith(("out", "down")) else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Final-layer logits of a full pass without a cache: tokens (B, T) int64 -> (B, T, V) float32."""
        return self.head(self.hidden_states(tokens)[-1]).view(*tokens.shape, -1)

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None) -> list[Tensor]:
        """h_0 .. h_L of a full pass over tokens (B, T): L + 1 tensors (B T, d). `documents` (B, T) numbers the documents packed into a row;
        none sees another. Raises ValueError for more tokens than the model has positions."""
        B, T = tokens.shape
        if T > self.config.max_len:
            raise ValueError(f"{T} tokens do not fit into the model's {self.config.max_len} positions; shorten the text")
        mask = None
        if documents is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            mask = (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]  # (B, 1, T, T)
        rope = self.rope[:, :T].unbind()

        def attend(qkv: Tensor) -> Tensor:
            return attention(*split_heads(qkv, B, self.config, rope), mask, causal=mask is None)

        states = [F.embedding(tokens.flatten(), self.embedding)]
        for block in self.blocks:
            states.append(block(states[-1], attend))
        return states

    @property
    def unembed(self) -> Tensor:
        """The unembedding W (V, d)."""
        return self.embedding if self.config.tie_embeddings else self.unembedding

    @property
    def head_weight(self) -> Tensor:
        """The unembedding in the form that the heads multiply with."""
        return self.unembed if self._head_weight is None else self._head_weight

    def exit_norm(self, hidden: Tensor, layer: int) -> Tensor:
        """norm_l(h_l): the layer's own norm if it has one, else the final norm; (N, d) -> (N, d)."""
        return rms_norm(hidden, self.exit_norms[str(layer)] if layer in self.config.exit_norms else self.norm, self.config.norm_eps)

    def head(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """z_l = W norm_l(h_l): hidden (N, d) after `layer` (None: the last) -> logits (N, V) float32."""
        return linear(self.exit_norm(hidden, layer or self.config.n_layers), self.head_weight).float()

    def classify(self, hidden: Tensor, layer: int) -> Tensor:
        """sigmoid(w_l norm_l(h_l) + b_l), the classifier's belief that exit `layer` agrees with the last layer: (N, d) -> (N,) float32.
        Raises ValueError if this layer has none."""
        if layer not in self.config.classifiers:
            have = ", ".join(map(str, self.config.classifiers)) or "none"
            raise ValueError(f"layer {layer} has no confidence classifier (layers with one: {have}); train it, or ask another confidence")
        w = self.classifiers[str(layer)]
        return (self.exit_norm(hidden, layer) @ w[:-1] + w[-1]).float().sigmoid()

    def block_flops(self, first: int, stop: int) -> int:
        """Floating-point operations of one block on the positions first .. stop - 1: 2 a weight and row, 4 H C a row and position seen."""
        c = self.config
        weights = c.d_model * (2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.d_ff)
        return 2 * weights * (stop - first) + 4 * c.n_heads * c.head_dim * ((first + 1 + stop) * (stop - first) // 2)


SAMPLE = 2**26     # bytes of weights that a trial multiplies with: more than caches hold
COPY_LIMIT = 2**28  # bytes: a larger unembedding is not kept a second time, packed


@torch.no_grad()
def choose_form(model: Transformer, repeats: int = 5) -> None:
    """Times, on this machine, one row and four rows through weights of a CPU model in each of the FORMS, and keeps the clearly fastest.
    (The library's product of one row may run on one thread, at a fifth of what memory gives.)"""
    weights, size = [], 0
    for weight in (weight for block in model.blocks for weight in block.parameters() if weight.dim() > 1):
        if size < SAMPLE:
            weights.append(weight)
            size += weight.numel() * weight.element_size()
    forms = {name: [form(weight) for weight in weights] for name, form in FORMS.items()}
    inputs = [[weight.new_ones(rows, weight.shape[1]) for weight in weights] for rows in (1, 4)]

    def seconds(made: list[Tensor]) -> float:
        started = time.perf_counter()
        for rows in inputs:
            for x, weight in zip(rows, made):
                linear(x, weight)
        return time.perf_counter() - started

    times = {name: min(seconds(made) for _ in range(repeats)) * (0.9 if name == "plain" else 1) for name, made in forms.items()}
    model.form = min(times, key=times.get)
    for block in model.blocks:
        for name, weight in block._parameters.items():
            if weight.dim() > 1:
                block._parameters[name] = FORMS[model.form](weight)
    large = model.unembed.numel() * model.unembed.element_size() > COPY_LIMIT
    model._head_weight = FORMS["split" if model.form == "packed" and large else model.form](model.unembed)


class KVCache:
    """The staircase: `filled[l]` positions have their key and value stored at layer l, and filled never increases with l; filled[0]
    counts the positions begun. A position that stopped below the top keeps its state in `hidden`, at the depth it reached, and is *owed*
    to the layers above. Rows owed to a layer are the newest ones, one contiguous run. Batch size 1."""

    def __init__(self, model: Transformer, length: int):
        """Room for `length` positions."""
        self.config, self.rope_table = model.config, model.rope
        shape = (1, self.config.n_kv_heads, length, self.config.head_dim)
        self.keys = [model.embedding.new_empty(shape) for _ in model.blocks]    # (1, K, length, C) a layer
        self.values = [model.embedding.new_empty(shape) for _ in model.blocks]
        self.hidden = model.embedding.new_empty(length, self.config.d_model)
        self.filled = [0] * (self.config.n_layers + 1)
        self._span, self._rope, self._mask = None, None, None

    def owed(self, layer: int, stop: int) -> Tensor:
        """Hidden states of the positions filled[layer] .. stop - 1: (R, d)."""
        return self.hidden[self.filled[layer] : stop]

    def store(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Appends the keys and values of the R rows that follow filled[layer], from qkv (R, (H + 2K) C). Returns the rows' queries
        (1, H, R, C) and all keys and values of the layer, (1, K, filled[layer], C)."""
        first = self.filled[layer]
        stop = self.filled[layer] = first + qkv.shape[0]
        if self._span != (first, stop):  # the layers of a pass mostly share their rows
            self._span, self._rope, self._mask = (first, stop), self.rope_table[:, first:stop].unbind(), None
            if stop - first > 1:  # row i, at position first + i, sees the positions up to its own
                positions = torch.arange(stop, device=qkv.device)
                self._mask = positions <= positions[first:, None]  # (R, stop)
        q, k, v = split_heads(qkv, 1, self.config, self._rope)
        keys, values = self.keys[layer - 1], self.values[layer - 1]
        keys[:, :, first:stop] = k
        values[:, :, first:stop] = v
        return q, keys[:, :, :stop], values[:, :, :stop]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """`attend` of a block: stores the rows' keys and values, then attends to all positions so far. (R, (H + 2K) C) -> (R, H C)."""
        return attention(*self.store(layer, qkv), self._mask)

    def rollback(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        self.filled = [min(count, length) for count in self.filled]


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path: str | os.PathLike, model: Transformer, tokenizer: bytes | None, dtype: torch.dtype | None = None, **extra):
    """Writes config, weights (as `dtype`), the sentencepiece model and `extra` (plain values, tensors) to one file, whole or not at all."""
    weights = {name: weight.detach().to(dtype or weight.dtype).contiguous() for name, weight in model.state_dict().items()}
    blob = None if tokenizer is None else torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    content = {"format": FORMAT, "config": asdict(model.config), "weights": weights, "tokenizer": blob, **extra}
    try:
        with whole_file(path) as part:
            torch.save(content, part)
    except RuntimeError as error:  # what torch makes of a full disk
        reason = str(error).splitlines()[0][:80]
        raise OSError(f"{path}: could not be written, the old file is kept; is the disk full? ({reason})") from None


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint file, memory-mapped. Raises ValueError for a file that is not one."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint; train one with train.py or name another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint, or cut short ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project")
    return content


def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, plain: bool = False):
    """Returns (model, tokenizer) ready to decode: tokenizer is a SentencePieceProcessor, or None if the file holds none. `dtype` None:
    float32 on the CPU for float16 files (CPUs are slow at several rows in half precision), else the file's own. On a CPU the weights
    take the form that is fastest there (`choose_form`) unless `plain`. Raises ValueError."""
    content, device = read_checkpoint(path), torch.device(device)
    try:
        with torch.device("meta"):
            model = Transformer(ModelConfig(**content["config"]))
        model.load_state_dict(content["weights"], assign=True)
        blob = content["tokenizer"]
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: the weights do not fit the model ({str(error).splitlines()[-1].strip()[:120]})") from None
    if dtype is None:
        dtype = torch.float32 if model.embedding.dtype == torch.float16 and device.type == "cpu" else model.embedding.dtype
    model.rope = rope_table(model.config)
    for module in model.modules():  # weight by weight, so that only one lies twice in memory; the rotary table stays float32
        for name, weight in module._parameters.items():
            module._parameters[name] = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    model.rope = model.rope.to(device)
    model.eval()
    if device.type == "cpu" and not plain:
        choose_form(model)
    return model, None if blob is None else read_tokenizer(path, blob, model.config.vocab_size)


def read_tokenizer(path: str | os.PathLike, blob: Tensor, vocab_size: int):
    """The SentencePieceProcessor of a checkpoint's bytes. Raises ValueError for one that is damaged or too large for the model."""
    import sentencepiece

    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=blob.numpy().tobytes())
    except RuntimeError:
        raise ValueError(f"{path}: its tokenizer is damaged") from None
    if tokenizer.vocab_size() > vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size()} pieces, the model only {vocab_size}")
    return tokenizer
