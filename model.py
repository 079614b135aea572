"""The decoder-only transformer. It makes no exit decisions; it only provides the exit heads.

Dimensions: B batch, T time, d model width, H query heads, K key/value heads, C width of a head, S positions
that are visible, V vocabulary. Layers are numbered from 1 to L, 0 stands for the embedding; positions from 0.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from common.config import Number, check_fields, option, read_choice
from common.errors import UserError

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}
ADAPTER_SIZE = {"least": 1, "most": 2**16}
ADAPTERS = {"lowrank": (Number("RANK", limits=ADAPTER_SIZE),), "mlp": (Number("WIDTH", limits=ADAPTER_SIZE),)}
MATRICES = {"lowrank": 2, "mlp": 3}  # in an adapter, (size, d) each; the last one writes into the state
read_adapter = functools.partial(read_choice, "adapter", known=ADAPTERS)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer of the Llama family or of Gemma's; the defaults are the included model's."""

    vocab_size: int = option(4096, "tokens in the vocabulary", least=2)
    n_layers: int = option(12, "number of blocks", least=1, most=10_000)
    d_model: int = option(256, "width of the residual stream", least=1)
    n_heads: int = option(4, "number of query heads", least=1)
    n_kv_heads: int = option(4, "number of key/value heads (fewer: grouped-query attention)", least=1)
    d_ff: int = option(512, "width of the gated MLP", least=1)
    max_len: int = option(512, "most positions that a sequence may have", least=1, most=2**20)
    rope_base: float = option(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = option(1e-6, "added to the mean square in every norm", above=0)
    tie_embeddings: bool = option(True, "use the embedding as the unembedding, too")
    exit_norms: tuple[int, ...] = option((), "exit layers with a norm of their own")
    classifiers: tuple[int, ...] = option((), "exit layers with a confidence classifier")
    exit_layers: tuple[int, ...] = option((), "layers that the model was trained to exit at")
    adapter: str | None = option(None, "before exit norms: lowrank:RANK or mlp:WIDTH", choices=read_adapter)
    eos_id: tuple[int, ...] | int | None = option(2, "ids of the tokens that end a text")
    head_dim: int | None = option(None, "width of a head, even (none: d_model / n_heads)", least=1)
    activation: str = option("silu", "in the MLP: silu, or gelu_tanh (Gemma)", choices=tuple(ACTIVATIONS))
    embedding_scale: float = option(1.0, "factor for the embeddings (in Gemma: sqrt d_model)", above=0)
    query_scale: float | None = option(None, "factor for q k in softmax (none: 1 / sqrt head_dim)", above=0)
    qk_norm: bool = option(False, "normalize the queries and keys of every head (Gemma 3, Qwen 3)")
    qkv_bias: bool = option(False, "add a bias to queries, keys and values (Qwen 2)")
    post_norms: bool = option(False, "normalize the outputs of attention and MLP, too (Gemma 2 and 3)")
    attention_cap: float | None = option(None, "soft cap for q k (Gemma 2)", above=0)
    logit_cap: float | None = option(None, "soft cap for the logits (Gemma 2)", above=0)
    window: int | None = option(None, "newest positions that a layer sees (none: all)", least=1)
    global_layers: tuple[int, ...] = option((), "layers that see all positions although there is a window")
    local_rope_base: float | None = option(None, "rope_base of window layers (none: the same)", above=0)
    unrotated_layers: tuple[int, ...] = option((), "layers without rotary positions (SmolLM3)")
    rope_factor: float = option(1.0, "divisor of the frequencies (except those of local_rope_base)", above=0)
    rope_bands: tuple[float, ...] = option((), "low, high, length: which frequencies it divides (Llama 3)")

    def __post_init__(self):
        check_fields(self)
        if self.head_dim is None and self.d_model % self.n_heads:
            raise UserError(f"n_heads {self.n_heads} must divide d_model {self.d_model}; or give head_dim")
        object.__setattr__(self, "head_dim", self.head_dim or self.d_model // self.n_heads)
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim} (d_model / n_heads if not given); it must be even")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}")
        bands = self.rope_bands
        if bands and (len(bands) != 3 or not 0 < bands[0] < bands[1]):
            raise UserError(f"rope_bands is {bands}; it must be low, high, length with low below high")
        for token in self.ends:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"eos_id is {token}; it must lie in 0 to {self.vocab_size - 1}")
        for name in ("exit_norms", "classifiers", "exit_layers"):
            check_exit_layers(name, getattr(self, name), self.n_layers)
        for name in ("global_layers", "unrotated_layers"):
            for layer in getattr(self, name):
                if not 1 <= layer <= self.n_layers:
                    raise UserError(f"{name}: there is no layer {layer}; choose from 1 to {self.n_layers}")
        if self.adapter and not self.exit_norms:
            raise UserError(f"adapter is {self.adapter}, but there are no exit_norms to put it before")

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a text."""
        ids = self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)
        return frozenset(ids) - {None}


def check_exit_layers(name: str, layers: Collection[int], n_layers: int) -> None:
    """Raises UserError unless every layer lies in 1 .. L-1: an exit after layer L needs a shortlist."""
    for layer in layers:
        if not 1 <= layer < n_layers:
            raise UserError(f"{name}: layer {layer} is not an exit; this model's are 1 to {n_layers - 1}")


# ---------------------------------------------------------------- norm, rotary positions, attention


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang 2019), computed in the wider dtype of the two."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding (Su 2021): turns every pair (i, i + C/2) of the numbers of a head by the
    angle position * frequency. `factor` divides the frequencies, so that texts may be longer: all of them
    alike, or in the bands of Llama 3 (`apply_scaling` in its code)."""

    def __init__(self, config: ModelConfig, base: float, factor: float = 1.0):
        super().__init__()
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim  # (C/2,)
        frequency = base**-exponent
        kept = torch.zeros_like(frequency)  # the share of each frequency that is not divided
        if config.rope_bands:
            low, high, length = config.rope_bands
            turns = length * frequency / (2 * math.pi)  # below low divided, above high kept, in between mixed
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        if factor != 1:
            frequency = frequency * (kept + (1 - kept) / factor)
        angle = torch.arange(config.max_len, dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])[:, :, None]
        self.register_buffer("table", table, persistent=False)  # (2, max_len, 1, C)

    def factors(self, first: int, rows: int) -> Tensor:
        """cos and signed sin (-sin for the first half of a head) of the positions from `first` on: (2, T, 1,
        C)."""
        return self.table.narrow(1, first, rows)

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        """(x1 cos - x2 sin, x2 cos + x1 sin) for every pair of heads x (B, T, heads, C). (Complex numbers or
        addcmul would be faster, but their last bit depends on the number of rows.)"""
        cos, signed_sin = factors
        swapped = x.roll(x.shape[-1] // 2, -1)  # x2 in the place of x1, x1 in the place of x2
        return (x * cos + swapped * signed_sin).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: ModelConfig) -> Tensor:
    """softmax(q k * query_scale + mask) v: q (B, H, T, C), k and v (B, K, S, C), mask 0 or -inf, (.., T, S)
    -> (B, T, H C). Without a mask, T = S rows are causal.

    In decoding, a cache gives every row of its one text keys, values and a mask of its own, (T, K, S, C) and
    (T, 1, 1, S). Then each row is a batch item, so that its result does not depend, in a single bit, on the
    rows that are computed with it."""
    each_alone = k.shape[0] > q.shape[0]
    if each_alone:
        q = q.transpose(0, 2)  # (T, H, 1, C)
    if config.attention_cap is None:
        grouped = config.n_heads != config.n_kv_heads
        out = F.scaled_dot_product_attention(
            q.to(k.dtype), k, v, mask, is_causal=mask is None, scale=config.query_scale, enable_gqa=grouped
        )  # (B, H, T, C)
    else:
        out = capped_attention(q.to(k.dtype), k, v, mask, config)
    out = out.transpose(0, 2) if each_alone else out
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: ModelConfig) -> Tensor:
    """Gemma 2: q k softly capped before the softmax, which the library's attention cannot do. -> (B, H, T,
    C)."""
    if mask is None:
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf, device=q.device).triu(1)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, H, S, C)
    scores = (q @ k.mT).float() * (config.query_scale or q.shape[-1] ** -0.5)
    return (soft_cap(scores, config.attention_cap) + mask).softmax(-1).type_as(v) @ v


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): x, kept within -cap .. cap (Gemma 2, section 2)."""
    return cap * torch.tanh(x / cap)


def hiding(rows: Tensor, columns: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """The mask (T, S) that hides from each position of `rows` (T,) the positions of `columns` (S,) that it
    does not see, by -inf: it sees the newest `window` positions (None: all) up to itself."""
    distance = rows[:, None] - columns
    hidden = (distance < 0) | (distance >= (window or math.inf))
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)


Seen = tuple[Tensor, Tensor, Tensor | None]  # keys, values, and the mask of what each row sees


class KeysValues(Protocol):
    """Where a block stores and reads keys and values: FullPass below or, in decoding, KVCache (cache.py)."""

    def factors(self, layer: int, rotary: Rotary, rows: int) -> Tensor:
        """The rotary factors of the next rows of a layer."""

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> Seen:
        """Stores keys and values (B, K, T, C) of the rows. Returns keys, values and a mask of what these rows
        see, as `attention` takes them."""


class FullPass:
    """The keys and values that the rows of a full pass see: those of the pass itself. `documents` (B, T)
    numbers the documents packed into a row of the batch; no document sees another."""

    def __init__(self, documents: Tensor | None = None):
        self.documents = documents
        self.masks: dict[int | None, Tensor | None] = {}  # window -> mask of the layers with it
        self.made: dict[Rotary, Tensor] = {}  # factors of the layers with this rotary embedding

    def factors(self, layer: int, rotary: Rotary, rows: int) -> Tensor:
        if rotary not in self.made:
            self.made[rotary] = rotary.factors(0, rows)
        return self.made[rotary]

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> Seen:
        if window not in self.masks:
            self.masks[window] = self.mask(k, window)
        return k, v, self.masks[window]

    def mask(self, k: Tensor, window: int | None) -> Tensor | None:
        """What each row does not see, (T, T) or (B, 1, T, T); None: what follows it."""
        if window is None and self.documents is None:
            return None
        positions = torch.arange(k.shape[2], device=k.device)
        mask = hiding(positions, positions, window, k.dtype)
        if self.documents is None:
            return mask
        other = self.documents[:, None, :, None] != self.documents[:, None, None, :]
        return mask.masked_fill(other, -math.inf)


# ---------------------------------------------------------------- the transformer


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). One matrix makes queries, keys and values
    (`qkv`), and one makes gate and up, so that one product reads each."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        d, C, H, K, eps = config.d_model, config.head_dim, config.n_heads, config.n_kv_heads, config.norm_eps
        self.config, self.layer, self.activation = config, layer, ACTIVATIONS[config.activation]
        self.window = None if layer in config.global_layers else config.window
        self.attn_norm = RMSNorm(d, eps)
        self.qkv = nn.Linear(d, (H + 2 * K) * C, bias=config.qkv_bias)  # Qwen 2 has the bias
        self.rotary: Rotary | None = None  # None: no rotary positions (see Transformer.make_rotary)
        self.out = nn.Linear(H * C, d, bias=False)
        self.mlp_norm = RMSNorm(d, eps)
        self.gate_up = nn.Linear(d, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d, bias=False)
        if config.post_norms:
            self.attn_post_norm, self.mlp_post_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(C, eps), RMSNorm(C, eps)

    def forward(self, x: Tensor, kv: KeysValues) -> Tensor:
        """x (B, T, d) -> (B, T, d). `kv` stores the keys and values of these T positions and returns those
        that they may see: their own in a full pass, those stored (within the window) in decoding."""
        q, k, v = self.heads(x, kv)
        k, v, mask = kv.extend(self.layer, k, v, self.window)  # (B, K, S, C)
        a = self.out(attention(q, k, v, mask, self.config))
        x = x + (self.attn_post_norm(a) if self.config.post_norms else a)  # Gemma 2 and 3
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # (B, T, d_ff) each
        m = self.down(self.activation(gate) * up)
        return x + (self.mlp_post_norm(m) if self.config.post_norms else m)

    def heads(self, x: Tensor, kv: KeysValues) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, C), keys and values (B, K, T, C) of x (B, T, d)."""
        H, K = self.config.n_heads, self.config.n_kv_heads
        heads = self.qkv(self.attn_norm(x)).view(*x.shape[:2], H + 2 * K, -1)  # (B, T, H + 2K, C)
        qk, v = heads.narrow(2, 0, H + K), heads.narrow(2, H + K, K)
        if self.config.qk_norm:  # Gemma 3, Qwen 3
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], dim=2)
        if self.rotary is not None:
            qk = self.rotary(qk, kv.factors(self.layer, self.rotary, x.shape[1]))
        return *qk.transpose(1, 2).split_with_sizes((H, K), dim=1), v.transpose(1, 2)


class Transformer(nn.Module):
    """Embedding, L blocks, final norm, LM head. An exit head reads the state after its layer as the LM head
    reads the last one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, V, eps = config.d_model, config.vocab_size, config.norm_eps
        self.config = config
        self.frequent_ids: Tensor | None = None  # (n,) by falling frequency in a corpus, for shortlists
        self.embedding = nn.Embedding(V, d)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(1, config.n_layers + 1))
        self.norm = RMSNorm(d, eps)
        self.unembedding = self.embedding if config.tie_embeddings else nn.Embedding(V, d)  # rows W (V, d)
        self.lm_head = nn.Linear(d, V, bias=False)  # the product with W
        self.exit_norms = nn.ModuleDict({str(layer): RMSNorm(d, eps) for layer in config.exit_norms})
        self.adapters = nn.ParameterDict()
        if config.adapter:
            kind, (size,) = read_adapter(config.adapter)
            for layer in config.exit_norms:
                reading = torch.randn(MATRICES[kind] - 1, size, d) * 0.02
                writing = torch.zeros(1, size, d)  # so that a new adapter changes nothing after the norm
                self.adapters[str(layer)] = nn.Parameter(torch.cat([reading, writing]))
        # The weights and the bias of each classifier:
        self.classifiers = nn.ParameterDict({str(layer): torch.zeros(d + 1) for layer in config.classifiers})
        self.tie()
        self.make_rotary()
        self.initialize()

    def tie(self) -> None:
        """Makes the LM head multiply by the rows of the unembedding, which is the embedding if tied."""
        self.lm_head.weight = self.unembedding.weight

    def _apply(self, *arguments, **options):  # moving or converting a module may replace its parameters
        super()._apply(*arguments, **options)
        self.tie()
        return self

    def make_rotary(self) -> None:
        """Gives every block its rotary positions; all blocks with the same base share one table."""
        config, made = self.config, {}
        for block in self.blocks:
            local = block.window is not None and config.local_rope_base is not None  # Gemma 3
            base, factor = (config.local_rope_base, 1.0) if local else (config.rope_base, config.rope_factor)
            if local not in made:
                made[local] = Rotary(config, base, factor).to(self.device)
            if block.layer not in config.unrotated_layers:
                block.rotary = made[local]

    def initialize(self) -> None:
        """Draws matrices from normal distributions; those that write into the residual stream are scaled down
        by the depth (GPT-2, Radford 2019)."""
        for name, weight in self.named_parameters():
            if weight.dim() > 1 and not name.startswith("adapters"):
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layers) if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Final-layer logits of a full pass without a cache: tokens (B, T) int64 -> (B, T, V) float32."""
        return self.head(self.hidden_states(tokens)[-1])

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None, skipped=(), recompute=False):
        """h_0 .. h_L of a full pass over tokens (B, T): L + 1 tensors (B, T, d). `documents` as in FullPass.
        Layers in `skipped` return their input; with `recompute` the inner states of a block are computed
        again for the gradient instead of kept. Raises UserError for more tokens than the model has
        positions."""
        T = tokens.shape[1]
        if T > self.config.max_len:
            raise UserError(f"{T} tokens, but only {self.config.max_len} positions; shorten the text")
        x, kv = self.embed(tokens), FullPass(documents)
        states = [x]
        for layer, block in enumerate(self.blocks, 1):
            if layer not in skipped:
                x = recomputed(block, x, kv, use_reentrant=False) if recompute else block(x, kv)
            states.append(x)
        return states

    def embed(self, tokens: Tensor) -> Tensor:
        """h_0 of tokens (B, T): (B, T, d)."""
        x = self.embedding(tokens)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale  # Gemma

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def exit_norm(self, hidden: Tensor, layer: int) -> Tensor:
        """norm_l(h_l), (.., d): the layer's own norm, after its adapter; the final norm if it has none."""
        norm = self.exit_norms[str(layer)] if layer in self.config.exit_norms else self.norm
        return norm(self.adapted(hidden, layer))

    def adapted(self, hidden: Tensor, layer: int) -> Tensor:
        """The input of norm_l: h_l (.., d) itself, or what the layer's adapter makes of it. `lowrank:r`:
        h + up(down(h)) (tuned lens, Belrose 2023, of low rank). `mlp:f`: x + down(silu(gate(x)) up(x)) with x
        = h / rms(h) (after EE-Tuning, Pan 2024, whose head is a copy of the layer's own MLP)."""
        if not self.config.adapter or layer not in self.config.exit_norms:
            return hidden
        weight = self.adapters[str(layer)]
        hidden = hidden.to(weight.dtype)  # in training heads may be more precise than the blocks
        if len(weight) == 2:
            down, up = weight  # (r, d) each
            return hidden + hidden @ down.T @ up
        gate, up, down = weight  # (f, d) each
        x = F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.config.norm_eps).type_as(hidden)
        return x + F.silu(x @ gate.T) * (x @ up.T) @ down

    def score(self, normed: Tensor, head: nn.Module | Tensor | None = None) -> Tensor:
        """Logits norm_l(h_l) (.., d) -> (.., n) float32 of all tokens (None), or of those whose rows of the
        unembedding are `head`, (n, d) or a module that multiplies by them."""
        head = self.lm_head if head is None else head
        logits = (F.linear(normed, head) if isinstance(head, Tensor) else head(normed)).float()
        return logits if self.config.logit_cap is None else soft_cap(logits, self.config.logit_cap)  # Gemma 2

    def head(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """z_l = W norm_l(h_l), the exit head of `layer`, or the LM head (None): (.., d) -> logits (.., V)
        float32."""
        return self.score(self.exit_norm(hidden, layer or self.config.n_layers))
