"""Public checkpoints of every layout, written in tiny form from a known model."""

import json
import math

import torch

import convert
from decode import load_checkpoint
from formats.checkpoint import weights_of
from model import Transformer

LLAMA = {"tie_embeddings": False, "head_dim": 8, "eos_id": 2}
SANDWICH = {"head_dim": 6, "activation": "gelu_tanh", "embedding_scale": math.sqrt(32), "post_norms": True, "window": 4, "eos_id": 1}
FAMILIES = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "eos_id": (2, 9), "tie_embeddings": True, "rope_factor": 8.0, "rope_bands": (1.0, 4.0, 32.0)},
    "mistral": {**LLAMA, "window": 5},
    "qwen2": {**LLAMA, "qkv_bias": True, "rope_base": 1e6},
    "qwen2 tied": {**LLAMA, "qkv_bias": True, "tie_embeddings": True, "window": 3, "global_layers": (1, 2)},
    "qwen3": {**LLAMA, "head_dim": 16, "qk_norm": True, "tie_embeddings": True, "eos_id": (2, 9)},
    "smollm3": {**LLAMA, "tie_embeddings": True, "unrotated_layers": (4,), "rope_base": 5e6},
    "smollm3 marked": {**LLAMA, "unrotated_layers": (2, 3)},
    "gemma": {"head_dim": 6, "activation": "gelu_tanh", "embedding_scale": math.sqrt(32), "eos_id": 1},
    "gemma2": {**SANDWICH, "global_layers": (2, 4), "attention_cap": 50.0, "logit_cap": 30.0, "query_scale": 0.25},
    "gemma3_text": {**SANDWICH, "global_layers": (3,), "qk_norm": True, "local_rope_base": 100.0, "rope_factor": 8.0},
}
TOKENS = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
HF = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias",
}  # fmt: skip
HF_SANDWICH = {
    "mlp_norm": "pre_feedforward_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
GGUF = {
    "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "out": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "attn_post_norm": "post_attention_norm",
    "mlp_post_norm": "post_ffw_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias",
}  # fmt: skip


# ---------------------------------------------------------------- writers


def named(model: Transformer, block: dict, layer: str, outer: tuple[str, str, str], interleaved: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights under other names, the fused ones in parts."""
    c, out = model.config, {}
    q, k, ff = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_ff
    for name, weight in weights_of(model).items():
        _, _, rest = name.partition("blocks.")
        if not rest:
            out[dict(zip(("embedding", "norm", "unembedding"), outer))[name] + ".weight"] = weight
            continue
        number, kind = rest.split(".")
        fused = {
            "qkv": (("q", q), ("k", k), ("v", k)),
            "qkv_bias": (("q_bias", q), ("k_bias", k), ("v_bias", k)),
            "gate_up": (("gate", ff), ("up", ff)),
        }
        sizes = fused.get(kind, ((kind, len(weight)),))
        for (part, _), rows in zip(sizes, weight.split([size for _, size in sizes])):
            if interleaved and part in ("q", "k"):  # row i of a head goes to 2i, row i + C/2 to 2i + 1
                heads = rows.view(-1, c.head_dim, rows.shape[1])
                rows = torch.empty_like(heads)
                rows[:, 0::2], rows[:, 1::2] = heads.chunk(2, dim=1)
                rows = rows.flatten(0, 1)
            ending = "" if part.endswith("bias") else ".weight"
            out[f"{layer}.{number}.{block[part]}{ending}"] = rows.contiguous()
    return out


def hf_tensors(model: Transformer, family: str) -> dict[str, torch.Tensor]:
    block = HF | (HF_SANDWICH if model.config.post_norms else {})
    tensors = named(model, block, "model.layers", ("model.embed_tokens", "model.norm", "lm_head"))
    return {name: tensor - 1 if family.startswith("gemma") and "norm" in name else tensor for name, tensor in tensors.items()}


def hf_config(model: Transformer, family: str) -> dict:
    c = model.config
    words = {
        "model_type": family, "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_len, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base,
        "tie_word_embeddings": c.tie_embeddings, "sliding_window": c.window,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
    }  # fmt: skip
    if family in ("gemma2", "gemma3_text"):
        words |= {"query_pre_attn_scalar": c.query_scale**-2 if c.query_scale else c.head_dim,
                  "sliding_window_pattern": c.global_layers[0], "attn_logit_softcapping": c.attention_cap,
                  "final_logit_softcapping": c.logit_cap, "rope_local_base_freq": c.local_rope_base}  # fmt: skip
    if family == "qwen2" and c.window:
        words |= {"use_sliding_window": True, "max_window_layers": len(c.global_layers)}
    if family == "smollm3" and c.unrotated_layers != (4,):  # every fourth is what it means where it says nothing
        words["no_rope_layers"] = [int(layer not in c.unrotated_layers) for layer in range(1, c.n_layers + 1)]
    if c.rope_bands:
        low, high, length = c.rope_bands
        words["rope_scaling"] = {"rope_type": "llama3", "factor": c.rope_factor, "low_freq_factor": low,
                                 "high_freq_factor": high,
                                 "original_max_position_embeddings": length}  # fmt: skip
    elif c.rope_factor != 1:
        words["rope_scaling"] = {"rope_type": "linear", "factor": c.rope_factor}
    return words


def safetensors(tensors: dict[str, torch.Tensor]) -> tuple[dict, bytes]:
    """Header and data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write_safetensors(path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def write_hf(folder, model: Transformer, family: str = "llama", kind: str = "safetensors", shards: int = 1, dtype=torch.float32) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model, family)))
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(model, family).items()}
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"{stem}-{shard}.{ending}" if shards > 1 else f"{stem}.{ending}"
        places |= dict.fromkeys(part, name)
        if kind == "safetensors":
            write_safetensors(folder / name, *safetensors(part))
        else:
            torch.save(part, folder / name)
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def convert_and_compare(path, model: Transformer, tmp_path, exact: bool = False, **options) -> str:
    """Converts, loads and compares configuration and logits; returns the report."""
    report = convert.convert(path, tmp_path / "out.pt", **options)
    loaded, _ = load_checkpoint(tmp_path / "out.pt", dtype=torch.float32)
    different = {name for name in vars(model.config) if getattr(loaded.config, name) != getattr(model.config, name)}
    assert different <= ({"eos_id", "max_len", "norm_eps"} if not exact else set()), different
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    return report
