"""The decoder-only transformer and its one-file checkpoints. It asks nothing: it offers the heads that exits
read.

Dimensions: B batch, T time, N rows, d model width, H query heads, K key/value heads, C width of a head, V
vocabulary. Layers count from 1 to L; index 0 stands for the embedding. Positions count from 0.
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

from common.config import option
from common.errors import UserError
from formats.adapters import adapt, make_adapters
from formats.checkpoint import check_finite, check_size, fitting, read_tokenizer
from formats.frequent_ids import find_frequent_ids
from formats.heads import read_model
from formats.rotary import rope_table, rotate, rotation, split_pairs
from formats.shape import check_shape, one_or_several
from formats.weights import default_dtype, linear, load_weights, lookup, rms_norm

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer of the Llama family, or of Gemma's; the defaults are the embedded
    model's."""

    vocab_size: int = option(4096, "pieces of the vocabulary")
    n_layers: int = option(12, "blocks")
    d_model: int = option(256, "width of the residual stream")
    n_heads: int = option(4, "query heads")
    n_kv_heads: int = option(
        4, "key and value heads; fewer than n_heads, and dividing it: grouped-query attention"
    )
    d_ff: int = option(512, "width of the gated MLP")
    max_len: int = option(512, "most positions in one sequence")
    rope_base: float = option(10000.0, "base of the rotary frequencies")
    norm_eps: float = option(1e-6, "added to the mean square in the norms")
    tie_embeddings: bool = option(True, "unembed with the embedding")
    exit_norms: tuple[int, ...] = option(
        (), "exit layers with a norm of their own; the others share the final norm"
    )
    classifiers: tuple[int, ...] = option((), "exit layers with a confidence classifier")
    exit_layers: tuple[int, ...] = option((), "layers that the model was trained to exit at")
    adapter: str | None = option(None, "before norms in exit_norms: lowrank:RANK, mlp:WIDTH, or none")
    eos_id: tuple[int, ...] | int | None = option(2, "token that ends a text, or several; none: nothing does")
    head_dim: int | None = option(None, "width of a head, even; none: d_model / n_heads")
    activation: str = option("silu", "of the gated MLP: silu, or gelu_tanh (Gemma)")
    embedding_scale: float = option(1.0, "factor of the embeddings (Gemma: sqrt d_model)")
    query_scale: float | None = option(None, "factor of q k before the softmax; none: 1 / sqrt head_dim")
    qk_norm: bool = option(False, "norm the queries and keys of every head (Gemma 3, Qwen 3)")
    qkv_bias: bool = option(False, "add a bias to queries, keys and values (Qwen 2)")
    post_norms: bool = option(False, "norm what attention and MLP add, too (Gemma 2 and 3)")
    attention_cap: float | None = option(None, "soft cap of q k (Gemma 2); none: no cap")
    logit_cap: float | None = option(None, "soft cap of the logits (Gemma 2); none: no cap")
    window: int | None = option(
        None,
        "newest positions, its own included, that a position sees (Mistral 0.1, Gemma 2 and 3); none: all",
    )
    global_layers: tuple[int, ...] = option((), "layers that see all positions in spite of a window")
    local_rope_base: float | None = option(
        None, "rope_base of the layers with a window (Gemma 3); none: the same"
    )
    unrotated_layers: tuple[int, ...] = option(
        (), "layers whose queries and keys know no positions (SmolLM3)"
    )
    rope_factor: float = option(1.0, "divides the rotary frequencies, but for those of local_rope_base")
    rope_bands: tuple[float, ...] = option(
        (),
        "Llama 3: low, high, length; rope_factor divides frequencies of fewer than low turns in length positions, "
        "not those of more than high, and in part those between",
    )

    def __post_init__(self):
        for name in (
            "exit_norms",
            "classifiers",
            "exit_layers",
            "global_layers",
            "unrotated_layers",
            "rope_bands",
        ):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "eos_id", one_or_several(self.eos_id))
        check_shape(self)
        object.__setattr__(self, "head_dim", self.head_dim or self.d_model // self.n_heads)

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a text."""
        if self.eos_id is None:
            return frozenset()
        return frozenset(self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,))

    def slides(self, layer: int) -> bool:
        """Whether the layer has a window."""
        return self.window is not None and layer not in self.global_layers

    def rotates(self, layer: int) -> bool:
        """Whether the layer's queries and keys are rotated by their positions."""
        return layer not in self.unrotated_layers


# ---------------------------------------------------------------- positions and attention


def split_heads(qkv: Tensor, batch: int, config: ModelConfig, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B T, (H + 2K) C) -> q (B, H, T, C), and k above v (B, 2K, T, C); q and k are rotated by their
    positions. rope: from `rotation`; None: not rotated."""
    if rope is not None and rope.is_complex():  # folded weights, a CPU's default: the same function, by pairs
        return split_pairs(qkv, batch, config, rope)
    H, K, C = config.n_heads, config.n_kv_heads, config.head_dim
    heads = qkv.view(batch, -1, H + 2 * K, C).transpose(1, 2)  # (B, H + 2K, T, C)
    if rope is None:  # SmolLM3 has layers without
        return heads[:, :H], heads[:, H:]
    qk, v = rotate(heads[:, : H + K], rope), heads[:, H + K :]
    return qk[:, :H], torch.cat([qk[:, H:], v], 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: ModelConfig, causal=False
) -> Tensor:
    """softmax(q k * query_scale) v where `mask` (.., T, S) allows, or everywhere: q (B, H, T, C), k and v (B,
    K, S, C) -> (B T, H C)."""
    if config.attention_cap is None:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=config.query_scale, enable_gqa=grouped
        )  # (B, H, T, C)
    else:
        out = capped_attention(q, k, v, mask, config)
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, config: ModelConfig) -> Tensor:
    """Gemma 2: q k softly capped before the softmax, which the library's attention does not know. -> (B, H,
    T, C)."""
    B, H, T, C = q.shape
    q = q.view(B, k.shape[1], -1, T, C)  # (B, K, H/K, T, C)
    similarity = (q @ k[:, :, None].mT).float() * (config.query_scale or C**-0.5)
    similarity = soft_cap(similarity, config.attention_cap).view(B, H, T, -1)
    if mask is not None:
        similarity = similarity.masked_fill(~mask, -math.inf)
    weights = similarity.softmax(-1).type_as(v).view(*q.shape[:-1], -1)  # (B, K, H/K, T, S)
    return (weights @ v[:, :, None]).view(B, H, T, C)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): x, kept within -cap .. cap (Gemma 2, section 2)."""
    return cap * torch.tanh(x / cap)


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which of the positions `columns` (S,) the positions `rows` (T,) see: those up to their own, the newest
    `window` of them. (T, S)."""
    distance = rows[:, None] - columns
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


# ---------------------------------------------------------------- the transformer


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). It treats every row alike; what depends on
    positions is in `attend`, which a full pass and the cache do in their own ways. The weights of queries,
    keys and values lie one above the other, so do those of gate and up: one product reads them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, C, H, K = config.d_model, config.head_dim, config.n_heads, config.n_kv_heads
        self.config, self.activation = config, ACTIVATIONS[config.activation]
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.qkv = nn.Parameter(torch.empty((H + 2 * K) * C, d))
        self.out = nn.Parameter(torch.empty(d, H * C))
        self.mlp_norm = nn.Parameter(torch.ones(d))
        self.gate_up = nn.Parameter(torch.empty(2 * config.d_ff, d))
        self.down = nn.Parameter(torch.empty(d, config.d_ff))
        if config.post_norms:
            self.attn_post_norm, self.mlp_post_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        if config.qkv_bias:
            self.qkv_bias = nn.Parameter(torch.zeros((H + 2 * K) * C))
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """x (N, d) -> (N, d); `attend` takes queries, keys and values side by side, (N, (H + 2K) C), to (N, H
        C)."""
        w, eps = self._parameters, self.config.norm_eps  # w["out"] is self.out, found in a third of the time
        a = linear(attend(self.project(x)), w["out"])  # attend: split_heads, then attention
        if self.config.post_norms:  # Gemma 2 and 3
            a = rms_norm(a, w["attn_post_norm"], eps)
        x = x + a
        gate, up = linear(rms_norm(x, w["mlp_norm"], eps), w["gate_up"]).chunk(2, dim=-1)  # (N, d_ff) each
        m = linear(self.activation(gate) * up, w["down"])
        if self.config.post_norms:
            m = rms_norm(m, w["mlp_post_norm"], eps)
        return x + m

    def project(self, x: Tensor) -> Tensor:
        """x (N, d) -> queries, keys and values before rotation, (N, (H + 2K) C)."""
        w = self._parameters
        qkv = linear(rms_norm(x, w["attn_norm"], self.config.norm_eps), w["qkv"])
        if self.config.qkv_bias:  # Qwen 2
            qkv = (qkv + w["qkv_bias"]).type_as(qkv)  # the bias may be finer
        return self.norm_heads(qkv) if self.config.qk_norm else qkv  # Gemma 3, Qwen 3

    def norm_heads(self, qkv: Tensor) -> Tensor:
        """Gemma 3, Qwen 3: a norm over every head of the queries, and one over every head of the keys."""
        H, K, eps = self.config.n_heads, self.config.n_kv_heads, self.config.norm_eps
        heads = qkv.view(-1, H + 2 * K, self.config.head_dim)
        q = rms_norm(heads[:, :H], self.q_norm, eps)
        k = rms_norm(heads[:, H : H + K], self.k_norm, eps)
        return torch.cat([q, k, heads[:, H + K :]], 1).view_as(qkv)


class Transformer(nn.Module):
    """Embedding, L blocks, final norm, unembedding. Exit heads read the state after any layer as the final
    head reads the last."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.config = config
        self.form = "plain"  # how the weights are stored, see formats/weights.py
        self.packed_unembed: Tensor | None = None  # the unembedding so stored, where that is a second copy
        self.frequent_ids: Tensor | None = (
            None  # (n,) by falling frequency in a corpus, see decoding/shortlist.py
        )
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(d))
        if not config.tie_embeddings:
            self.unembedding = nn.Parameter(torch.empty(config.vocab_size, d))
        self.exit_norms = nn.ParameterDict({str(layer): torch.ones(d) for layer in config.exit_norms})
        self.adapters = make_adapters(config)
        self.classifiers = nn.ParameterDict(
            {str(layer): torch.zeros(d + 1) for layer in config.classifiers}
        )  # w, b
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Normal matrices; what writes into the residual stream starts smaller, by depth (GPT-2, Radford
        2019)."""
        for name, weight in self.named_parameters():
            if weight.dim() > 1 and not name.startswith("adapters"):  # these have begun, as the identity
                residual = name.endswith(("out", "down"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
                nn.init.normal_(weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Final-layer logits of a full pass without a cache: tokens (B, T) int64 -> (B, T, V) float32."""
        return self.head(self.hidden_states(tokens)[-1]).view(*tokens.shape, -1)

    def hidden_states(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        skipped: Collection[int] = (),
        recompute: bool = False,
    ) -> list[Tensor]:
        """h_0 .. h_L of a full pass over tokens (B, T): L + 1 tensors (B T, d). `documents` (B, T) numbers
        the documents packed into a row; none sees another. Layers in `skipped` hand their input on; with
        `recompute` a block's inner states are made again for the gradient instead of kept. Raises UserError
        for more tokens than the model has positions."""
        if tokens.shape[1] > self.config.max_len:
            raise UserError(
                f"{tokens.shape[1]} tokens do not fit into the model's {self.config.max_len} positions; "
                "shorten the text"
            )
        attend_all = functools.cache(
            functools.partial(self.attend_all, tokens, documents)
        )  # once for alike layers
        x = self.embed(tokens.flatten())
        states = [x]
        for layer, block in enumerate(self.blocks, 1):
            if layer not in skipped:
                inputs = (x, attend_all(self.config.slides(layer), self.config.rotates(layer)))
                x = recomputed(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            states.append(x)
        return states

    def attend_all(
        self, tokens: Tensor, documents: Tensor | None, slides: bool, rotates: bool
    ) -> Callable[[Tensor], Tensor]:
        """`attend` of a block in a full pass over tokens (B, T): every position sees those before it, within
        its own document and, where the layer slides, its window; queries and keys are rotated or not."""
        (B, T), config, mask = tokens.shape, self.config, None
        rope = rotation(self.rope, slides, 0, T, config) if rotates else None
        if documents is not None or slides or config.attention_cap is not None:
            positions = torch.arange(T, device=tokens.device)
            mask = visible(positions, positions, config.window if slides else None)  # (T, T)
        if documents is not None:
            mask = (mask & (documents[:, :, None] == documents[:, None, :]))[:, None]  # (B, 1, T, T)

        def attend(qkv: Tensor) -> Tensor:
            q, kv = split_heads(qkv, B, config, rope)
            return attention(q, *kv.chunk(2, 1), mask, config, causal=mask is None).type_as(qkv)

        return attend

    def embed(self, tokens: Tensor) -> Tensor:
        """h_0 of tokens (N,): (N, d)."""
        x = lookup(self.embedding, tokens)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale  # Gemma

    @property
    def unembed(self) -> Tensor:
        """The unembedding W (V, d)."""
        return self.embedding if self.config.tie_embeddings else self.unembedding

    @property
    def head_weight(self) -> Tensor:
        """The unembedding as the heads multiply with it."""
        return self.unembed if self.packed_unembed is None else self.packed_unembed

    def exit_norm(self, hidden: Tensor, layer: int) -> Tensor:
        """norm_l(h_l), (N, d): the layer's own norm, after its adapter; else the final
        norm."""
        gain = self.exit_norms[str(layer)] if layer in self.config.exit_norms else self.norm
        return rms_norm(self.before_norm(hidden, layer), gain, self.config.norm_eps)

    def before_norm(self, hidden: Tensor, layer: int) -> Tensor:
        """What norm_l gets, (N, d): h_l after the layer's adapter."""
        if not self.config.adapter or layer not in self.config.exit_norms:
            return hidden
        return adapt(hidden, self.adapters[str(layer)], self.config.norm_eps)

    def score(self, normed: Tensor, weight: Tensor) -> Tensor:
        """Logits of the tokens whose rows of the unembedding are `weight` (n, d): norm_l(h_l) (N, d) -> (N,
        n) float32."""
        logits = linear(normed, weight).float()
        return logits if self.config.logit_cap is None else soft_cap(logits, self.config.logit_cap)  # Gemma 2

    def head(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """z_l = W norm_l(h_l): what exit `layer` (None: the last) reads, (N, d) -> logits (N, V) float32."""
        return self.score(self.exit_norm(hidden, layer or self.config.n_layers), self.head_weight)


# ---------------------------------------------------------------- from a file


def load_checkpoint(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    form: str | None = None,
    check: bool = False,
    frequent_ids: str | None = None,
    heads: str | None = None,
):
    """Returns (model, tokenizer) ready to decode: tokenizer as formats/tokenizer.py says, or None if the file
    holds none. `dtype`, of the matrices (vectors keep at least the file's precision), None: float32 on the
    CPU for float16 files (CPUs are slow at several rows in half precision), else the file's own. `form`: how
    a CPU stores the weights (formats/weights.py; None: by its rule). `check`: compare the file with its
    checksums first. `frequent_ids`: a file of ids for shortlists (tools/shortlist.py), `heads` one of heads
    (formats/heads.py), each in place of those inside. Raises UserError."""
    content, device, source = read_model(path, heads, check), torch.device(device), heads or path
    check_finite(path)
    with fitting(source):
        config = ModelConfig(**content["config"])
        check_size(content["weights"], config)
        with torch.device("meta"):
            model = Transformer(config).eval()
        model.rope = rope_table(config).to(device)
        load_weights(model, path, heads, content, device, dtype or default_dtype(content, device), form)
    model.frequent_ids = find_frequent_ids(frequent_ids, path, heads, content, config.vocab_size)
    blob = content.get("tokenizer")
    tokenizer = (
        None if blob is None else read_tokenizer(path, blob.numpy().tobytes(), model.config.vocab_size)
    )
    return model, tokenizer
