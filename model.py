"""The decoder-only transformer and its one-file checkpoints. It knows nothing of confidence.

Dimensions: B batch, T time, N rows, d model width, H query heads, K key/value heads, C width of a head, V vocabulary.
Layers count from 1 to L; index 0 stands for the embedding. Positions count from 0.
"""

import common.threads  # noqa: F401  before torch

import functools
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from common.config import check_kinds, option
from common.errors import UserError
from formats.checkpoint import check_finite, check_size, fitting, read_checkpoint, read_tokenizer
from formats.weights import choose_form, choose_head, linear, rms_norm

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer of the Llama family, or of Gemma's; the defaults are the embedded model's."""

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
    adapter_rank: int = option(0, "rank of the adapter before every norm in exit_norms; 0: no adapters")
    eos_id: tuple[int, ...] | int | None = option(2, "token that ends a text, or several; none: nothing does")
    head_dim: int | None = option(None, "width of a head, even; none: d_model / n_heads")
    activation: str = option("silu", "of the gated MLP: silu, or gelu_tanh (Gemma)")
    embedding_scale: float = option(1.0, "factor of the embeddings (Gemma: sqrt d_model)")
    query_scale: float | None = option(None, "factor of q k before the softmax; none: 1 / sqrt head_dim")
    qk_norm: bool = option(False, "norm the queries and keys of every head (Gemma 3)")
    post_norms: bool = option(False, "norm what attention and MLP add, too (Gemma 2 and 3)")
    attention_cap: float | None = option(None, "soft cap of q k (Gemma 2); none: no cap")
    logit_cap: float | None = option(None, "soft cap of the logits (Gemma 2); none: no cap")
    window: int | None = option(None, "newest positions, its own included, that a position sees (Mistral 0.1, Gemma 2 and 3); none: all")
    global_layers: tuple[int, ...] = option((), "layers that see all positions in spite of a window")
    local_rope_base: float | None = option(None, "rope_base of the layers with a window (Gemma 3); none: the same")
    rope_factor: float = option(1.0, "divides the rotary frequencies, but for those of local_rope_base")
    rope_bands: tuple[float, ...] = option((), "Llama 3: low, high and length; rope_factor divides fully what turns less than low times in "
                                               "length positions, not at all what turns more than high times")  # fmt: skip

    def __post_init__(self):
        for name in ("exit_norms", "classifiers", "global_layers", "rope_bands"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "eos_id", one_or_several(self.eos_id))
        check_kinds(self)
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "max_len", "head_dim", "window"):
            limit = LIMITS.get(name, 2**31)
            if (value := getattr(self, name)) is not None and not 1 <= value <= limit:
                raise UserError(f"{name} is {value}; it must be at least 1 and at most {limit}")
        factors = ("norm_eps", "query_scale", "embedding_scale", "rope_base", "local_rope_base", "rope_factor")
        for name in (*factors, "attention_cap", "logit_cap"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} is {value}; it must be above 0")
        if self.adapter_rank < 0 or (self.adapter_rank and not self.exit_norms):
            raise UserError(f"adapter_rank is {self.adapter_rank}; it must be at least 0, and above 0 only with exit_norms")
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                raise UserError(f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}, or head_dim given")
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim} (d_model / n_heads if not given); it must be even")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {self.activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if self.rope_bands and (len(self.rope_bands) != 3 or not 0 < self.rope_bands[0] < self.rope_bands[1]):
            raise UserError(f"rope_bands is {self.rope_bands}; it must be low, high and length, low below high, or nothing")
        for name in ("exit_norms", "classifiers"):
            check_layers(name, getattr(self, name), self.n_layers)
        for layer in self.global_layers:
            if not 1 <= layer <= self.n_layers:
                raise UserError(f"global_layers: there is no layer {layer}; choose from 1 to {self.n_layers}")
        for token in self.ends:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"eos_id is {token}; it must lie in 0 to {self.vocab_size - 1}")

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a text."""
        if self.eos_id is None:
            return frozenset()
        return frozenset(self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,))

    def slides(self, layer: int) -> bool:
        """Whether the layer has a window."""
        return self.window is not None and layer not in self.global_layers


LIMITS = {"n_layers": 10_000, "max_len": 2**20}  # every layer is an object, every position a row of the rotary table


def one_or_several(ids) -> tuple[int, ...] | int | None:
    """The ids that end a text in the form of the config: None, one, or a tuple of several."""
    if not isinstance(ids, (tuple, list)):
        return ids
    if len(ids) > 1:
        return tuple(ids)
    return ids[0] if ids else None


def check_layers(name: str, layers, n_layers: int) -> None:
    """Raises ValueError unless every exit layer lies in 1..L-1 (layer L is not an exit: it is the full model)."""
    bad = [layer for layer in layers if not 1 <= layer < n_layers]
    if bad:
        raise UserError(f"{name}: layer {bad[0]} is not an exit of a model of {n_layers} layers; choose from 1 to {n_layers - 1}")


def rope_table(config: ModelConfig) -> Tensor:
    """cos and signed sin of every position: (1, 2, max_len, C), or (2, 2, max_len, C) where the layers with a window, last, have their own
    base. Frequencies are slowed as in Llama 3 (llama-models, `apply_scaling`), or all alike where there are no bands."""
    exponent = -torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
    frequency = config.rope_base**exponent
    if config.rope_factor != 1:
        kept = torch.zeros_like(frequency)  # share of the frequency that is not slowed
        if config.rope_bands:
            low, high, length = config.rope_bands
            kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / config.rope_factor)
    own = config.window is not None and config.local_rope_base is not None
    frequencies = torch.stack([frequency, config.local_rope_base**exponent] if own else [frequency])
    angle = torch.arange(config.max_len, dtype=torch.float64)[:, None] * frequencies[:, None]  # (1 or 2, max_len, C/2)
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1)


def split_heads(qkv: Tensor, batch: int, config: ModelConfig, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(B T, (H + 2K) C) -> q (B, H, T, C), k and v (B, K, T, C), with rotary position embedding (Su 2021) of q and k, the pairs being
    (i, i + C/2). rope: cos and signed sin of the T positions, (T, C) each."""
    H, K, C = config.n_heads, config.n_kv_heads, config.head_dim
    heads = qkv.view(batch, -1, H + 2 * K, C).transpose(1, 2)  # (B, H + 2K, T, C)
    qk, v = heads[:, : H + K], heads[:, H + K :]
    qk = torch.addcmul(qk * rope[0], qk.roll(C // 2, -1), rope[1]).type_as(v)
    return qk[:, :H], qk[:, H:], v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: ModelConfig, causal: bool = False) -> Tensor:
    """softmax(q k * query_scale) v where `mask` (.., T, S) allows, or everywhere: q (B, H, T, C), k and v (B, K, S, C) -> (B T, H C)."""
    if config.attention_cap is None:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=config.query_scale, enable_gqa=gqa)
    else:  # the library's attention knows no cap
        B, H, T, C = q.shape
        grouped = q.view(B, k.shape[1], -1, T, C)  # (B, K, H/K, T, C)
        scores = soft_cap((grouped @ k[:, :, None].mT).float() * (config.query_scale or C**-0.5), config.attention_cap).view(B, H, T, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        out = (scores.softmax(-1).type_as(v).view(*grouped.shape[:-1], -1) @ v[:, :, None]).view(B, H, T, C)
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): x, kept within -cap .. cap (Gemma 2, section 2)."""
    return cap * torch.tanh(x / cap)


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which of the positions `columns` (S,) the positions `rows` (T,) see: those up to their own, the newest `window` of them. (T, S)."""
    distance = rows[:, None] - columns
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); with post_norms x + norm(attention(norm(x))), and so on. It treats every
    row alike; what depends on positions is in `attend`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, C, H, K = config.d_model, config.head_dim, config.n_heads, config.n_kv_heads
        self.eps, self.activation = config.norm_eps, ACTIVATIONS[config.activation]
        self.post_norms, self.qk_norm, self.sizes = config.post_norms, config.qk_norm, (H * C, K * C, K * C)
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.qkv = nn.Parameter(torch.empty((H + 2 * K) * C, d))
        self.out = nn.Parameter(torch.empty(d, H * C))
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.gate_up = nn.Parameter(torch.empty(2 * config.d_ff, d))
        self.down = nn.Parameter(torch.empty(d, config.d_ff))
        if config.post_norms:
            self.attn_post_norm, self.mlp_post_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x (N, d) -> (N, d); `attend` takes the queries, keys and values side by side, (N, (H + 2K) C), to (N, H C)."""
        w = self._parameters  # not self.qkv: a Module's attribute access is slow enough to show in decoding
        y = linear(attend(self.project(x)), w["out"])
        x = x + (rms_norm(y, w["attn_post_norm"], self.eps) if self.post_norms else y)
        gate, up = linear(rms_norm(x, w["mlp_norm"], self.eps), w["gate_up"]).chunk(2, dim=-1)
        y = linear(self.activation(gate) * up, w["down"])
        return x + (rms_norm(y, w["mlp_post_norm"], self.eps) if self.post_norms else y)

    def project(self, x: Tensor) -> Tensor:
        """x (N, d) -> queries, keys and values before rotation, (N, (H + 2K) C)."""
        w = self._parameters
        qkv = linear(rms_norm(x, w["attn_norm"], self.eps), w["qkv"])
        if self.qk_norm:
            q, k, v = qkv.split(self.sizes, -1)
            q, k = (rms_norm(y.reshape(-1, len(w[name])), w[name], self.eps).view_as(y) for y, name in ((q, "q_norm"), (k, "k_norm")))
            qkv = torch.cat([q, k, v], -1)
        return qkv


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
        adapted = config.exit_norms if config.adapter_rank else ()  # down, then up, which starts at zero: the adapter as identity
        self.adapters = nn.ParameterDict({str(layer): torch.zeros(2, config.adapter_rank, config.d_model) for layer in adapted})
        self.classifiers = nn.ParameterDict({str(layer): torch.zeros(config.d_model + 1) for layer in config.classifiers})  # w, then b
        if not config.tie_embeddings:
            self.unembedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.register_buffer("rope", rope_table(config), persistent=False)
        for name, weight in self.named_parameters():  # what writes into the residual stream starts smaller, by depth (GPT-2)
            if weight.dim() > 1:
                weight = weight[0] if name.startswith("adapters") else weight
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layers) if name.endswith(("out", "down")) else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Final-layer logits of a full pass without a cache: tokens (B, T) int64 -> (B, T, V) float32."""
        return self.head(self.hidden_states(tokens)[-1]).view(*tokens.shape, -1)

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None, skipped: Collection[int] = (),
                      recompute: bool = False) -> list[Tensor]:  # fmt: skip
        """h_0 .. h_L of a full pass over tokens (B, T): L + 1 tensors (B T, d). `documents` (B, T) numbers the documents packed into a row;
        none sees another. Layers in `skipped` hand their input on; with `recompute` a block's inner states are made again for the gradient
        instead of kept. Raises ValueError for more tokens than the model has positions."""
        B, T = tokens.shape
        if T > self.config.max_len:
            raise UserError(f"{T} tokens do not fit into the model's {self.config.max_len} positions; shorten the text")
        config, positions = self.config, torch.arange(T, device=tokens.device)

        def attend_as(slides: bool) -> Callable[[Tensor], Tensor]:
            mask, rope = None, self.rope[-slides, :, :T].unbind()
            if documents is not None or slides or config.attention_cap is not None:
                mask = visible(positions, positions, config.window if slides else None)  # (T, T)
            if documents is not None:
                mask = (mask & (documents[:, :, None] == documents[:, None, :]))[:, None]  # (B, 1, T, T)
            return lambda qkv: attention(*split_heads(qkv, B, config, rope), mask, config, causal=mask is None)

        slides = [config.slides(layer) for layer in range(1, config.n_layers + 1)]
        attend = {kind: attend_as(kind) for kind in set(slides)}
        states = [self.embed(tokens.flatten())]
        for layer, (block, kind) in enumerate(zip(self.blocks, slides), 1):
            if layer in skipped:
                states.append(states[-1])
            elif recompute:
                states.append(recomputed(block, states[-1], attend[kind], use_reentrant=False))
            else:
                states.append(block(states[-1], attend[kind]))
        return states

    def embed(self, tokens: Tensor) -> Tensor:
        """h_0 of tokens (N,): (N, d)."""
        x = F.embedding(tokens, self.embedding)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    @property
    def unembed(self) -> Tensor:
        """The unembedding W (V, d)."""
        return self.embedding if self.config.tie_embeddings else self.unembedding

    @property
    def head_weight(self) -> Tensor:
        """The unembedding in the form that the heads multiply with."""
        return self.unembed if self._head_weight is None else self._head_weight

    def exit_norm(self, hidden: Tensor, layer: int) -> Tensor:
        """norm_l(h_l): the layer's own norm if it has one, after its adapter h + up(down(h)) if it has one; else the final norm. (N, d) ->
        (N, d)."""
        if layer not in self.config.exit_norms:
            return rms_norm(hidden, self.norm, self.config.norm_eps)
        if self.config.adapter_rank:
            down, up = self.adapters[str(layer)]
            hidden = hidden.to(down.dtype)  # in training heads may be finer than the blocks
            hidden = hidden + hidden @ down.T @ up
        return rms_norm(hidden, self.exit_norms[str(layer)], self.config.norm_eps)

    def head(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """z_l = W norm_l(h_l): hidden (N, d) after `layer` (None: the last) -> logits (N, V) float32."""
        return self.score(self.exit_norm(hidden, layer or self.config.n_layers), self.head_weight)

    def classify(self, hidden: Tensor, layer: int) -> Tensor:
        """sigmoid(w_l norm_l(h_l) + b_l), the classifier's belief that exit `layer` agrees with the last layer: (N, d) -> (N,) float32.
        Raises ValueError if this layer has none."""
        if layer not in self.config.classifiers:
            have = ", ".join(map(str, self.config.classifiers)) or "none"
            raise UserError(f"layer {layer} has no confidence classifier (layers with one: {have}); train it, or ask another confidence")
        w = self.classifiers[str(layer)]
        return (self.exit_norm(hidden, layer).to(w.dtype) @ w[:-1] + w[-1]).float().sigmoid()

    def score(self, normed: Tensor, weight: Tensor) -> Tensor:
        """Logits of the tokens whose rows of the unembedding are `weight` (n, d): norm_l(h_l) (N, d) -> (N, n) float32."""
        logits = linear(normed, weight).float()
        return logits if self.config.logit_cap is None else soft_cap(logits, self.config.logit_cap)

    def head_flops(self, layer: int, n: int) -> int:
        """Floating-point operations of one row's head over n tokens: 2 a weight, those of the layer's adapter included."""
        rank = self.config.adapter_rank if layer in self.config.exit_norms else 0
        return 2 * self.config.d_model * (n + 2 * rank)

    def block_flops(self, first: int, stop: int) -> int:
        """Floating-point operations of one block on the positions first .. stop - 1: 2 a weight and row, 4 H C a row and position seen
        (without a window)."""
        c = self.config
        weights = c.d_model * (2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.d_ff)
        return 2 * weights * (stop - first) + 4 * c.n_heads * c.head_dim * ((first + 1 + stop) * (stop - first) // 2)


# ---------------------------------------------------------------- from a file


def load_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, plain: bool = False,
    check: bool = False,
):  # fmt: skip
    """Returns (model, tokenizer) ready to decode: tokenizer is a SentencePieceProcessor, or None if the file holds none.
    `dtype` None: float32 on the CPU for float16 files (CPUs are slow at several rows in half precision), else the file's
    own. Vectors, the norms among them, keep at least the precision of the file. On a CPU the weights take the form that is
    fastest there (`choose_form`) unless `plain`. `check`: compare the file with its checksums first. Raises UserError for
    a file that holds no model, or one whose weights are not finite."""
    content, device = read_checkpoint(path, check), torch.device(device)
    check_finite(path)
    with fitting(path):
        config = ModelConfig(**content["config"])
        check_size(content["weights"], config)
        with torch.device("meta"):
            model = Transformer(config).eval()
        model.load_state_dict(content["weights"], assign=True)
        blob = content["tokenizer"]
    tokenizer = None if blob is None else read_tokenizer(path, blob.numpy().tobytes(), model.config.vocab_size)
    if dtype is None:
        dtype = torch.float32 if model.embedding.dtype == torch.float16 and device.type == "cpu" else model.embedding.dtype
    model.rope = rope_table(model.config).to(device)
    adopt(model, content["weights"], device, dtype)
    if device.type == "cpu" and not plain:
        choose_form(model)
        if model.form == "packed":  # the rest anew: the first mapping goes, and with it the pages that packing has read
            del content, blob
            adopt(model, read_checkpoint(path)["weights"], device, dtype)
        choose_head(model)
    return model, tokenizer


def adopt(model: Transformer, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Gives the model all weights that are not packed, one by one, so that only one lies twice in memory; the rotary table is none."""
    for prefix, module in model.named_modules():
        for name, weight in module._parameters.items():
            if not weight.is_mkldnn:
                new = weights[f"{prefix}.{name}" if prefix else name]
                new = new.to(device, dtype if new.dim() > 1 else torch.promote_types(new.dtype, dtype))
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
