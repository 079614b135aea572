"""The families of public models: what their config.json means in our terms, and what they call their tensors.

To add a family:
1. FAMILIES: its model_type, with what its config.json may leave out.
2. `config_fields`: what is new about its blocks, as a field of ModelConfig, which model.py uses where it enters.
3. `name_table`: the names of tensors that are new, and ours.
4. For GGUF: ARCHITECTURES in formats/gguf.py.
5. convert.py: PARTS, for tensors that lie fused in ours, and `copy_weights`, for what is stored in another way (Gemma's
   norms, minus one).
"""

import math
import re
from collections.abc import Iterable

from common.errors import UserError

MAX_LEN = 8192  # positions kept unless asked for more: the rotary table takes memory for each

# What a config.json may leave out, by model_type (the defaults of transformers' configuration classes).
LLAMA = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "eos_token_id": 2,
}  # fmt: skip
MISTRAL = {**LLAMA, "num_key_value_heads": 8, "sliding_window": 4096}
GEMMA = {
    **LLAMA,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
GEMMA_2 = {
    **GEMMA, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA_3 = {
    **GEMMA_2, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
QWEN_2 = {
    **LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 32, "eos_token_id": None,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
QWEN_3 = {**QWEN_2, "head_dim": 128}
SMOLLM_3 = {
    **LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
    "tie_word_embeddings": True, "eos_token_id": 128001, "use_sliding_window": False, "no_rope_layer_interval": 4,
}  # fmt: skip
FAMILIES = {
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN_2, "qwen3": QWEN_3, "smollm3": SMOLLM_3,
    "gemma": GEMMA, "gemma2": GEMMA_2, "gemma3_text": GEMMA_3,
}  # fmt: skip

# What people will try and what this project has no blocks for: model_type, or an architecture of GGUF, by the
# reason.
UNSUPPORTED = {
    "a mixture of experts": (
        "mixtral", "qwen2_moe", "qwen2moe", "qwen3_moe", "qwen3moe", "olmoe", "phimoe", "granitemoe", "gpt_oss",
        "gpt-oss", "deepseek_v2", "deepseek2", "deepseek_v3", "glm4_moe", "glm4moe", "ernie4_5_moe", "hunyuan_v1_moe",
        "minimax_m2", "dbrx", "grok",
    ),
    "a model with linear attention or a recurrent state": (
        "qwen3_next", "qwen3next", "qwen3_5", "qwen35", "qwen3_5_text", "qwen3_5_moe", "mamba", "mamba2",
        "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "rwkv", "rwkv6", "rwkv7",
        "recurrent_gemma", "nemotron_h", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "minimax",
        "olmo_hybrid",
    ),
    "a model of several modalities (images, sound)": (
        "llava", "llava_next", "mllama", "llama4", "mistral3", "pixtral", "voxtral", "qwen2_vl", "qwen2vl",
        "qwen2_5_vl", "qwen3_vl", "qwen3vl", "qwen3_vl_moe", "qwen2_audio", "qwen2_5_omni", "qwen3_omni_moe",
        "smolvlm", "idefics2", "idefics3", "paligemma", "gemma3n", "gemma4", "internvl", "phi4_multimodal",
    ),
}  # fmt: skip
REASONS = {name: reason for reason, names in UNSUPPORTED.items() for name in names}

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COUNTS = (
    *NEEDED, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "sliding_window_pattern",
    "no_rope_layer_interval",
)  # fmt: skip
NUMBERS = (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip


# ---------------------------------------------------------------- the configuration


def config_fields(words: dict, max_len: int | None) -> dict:
    """The fields of ModelConfig that a config.json means. Raises UserError for a family that is not known,
    and for what is missing, of the wrong type or not supported."""
    if words.get("model_type") == "gemma3":  # with images: the text's configuration lies inside
        words = {**words, **table(words, "text_config"), "model_type": "gemma3_text"}
    family = known_family(words.get("model_type"), "model_type", FAMILIES)
    stated = words.get("max_position_embeddings")
    words = {**FAMILIES[family], **words}
    check_words(words)
    if stated and max_len is not None and max_len > stated:
        raise UserError(f"--max-len is {max_len}, but the model was made for {stated} positions")
    gemma = family.startswith("gemma")
    d_model, n_layers, n_heads = (
        words[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = words.get("head_dim") or d_model // n_heads
    scalar = words.get("query_pre_attn_scalar")
    return {
        "vocab_size": words["vocab_size"],
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": words.get("num_key_value_heads") or n_heads,
        "head_dim": head_dim,
        "d_ff": words["intermediate_size"],
        "max_len": min(words["max_position_embeddings"], MAX_LEN) if max_len is None else max_len,
        "norm_eps": words["rms_norm_eps"],
        "tie_embeddings": words["tie_word_embeddings"],
        "eos_id": end_ids(words["eos_token_id"]),
        "activation": activation(words, gemma),
        "embedding_scale": math.sqrt(d_model) if gemma else 1.0,
        "query_scale": scalar**-0.5 if scalar and scalar != head_dim else None,
        "qk_norm": family in ("gemma3_text", "qwen3"),
        "qkv_bias": family == "qwen2",
        "post_norms": family in ("gemma2", "gemma3_text"),
        "attention_cap": words.get("attn_logit_softcapping"),
        "logit_cap": words.get("final_logit_softcapping"),
        "unrotated_layers": without_rotation(words, n_layers) if family == "smollm3" else (),
        **windows(words, n_layers),
        **rotation(words, local=family == "gemma3_text"),
    }


def known_family(name, what: str, known: Iterable[str]) -> str:
    """The name of a family if it is among those known, which `what` (model_type, architecture) gives. Raises
    UserError that says why for one that is not supported."""
    if isinstance(name, str) and name in known:
        return name
    listed = ", ".join(known)
    if isinstance(name, str) and name in REASONS:
        raise UserError(f"{what} {name} is {REASONS[name]}, which is not supported; supported are {listed}")
    raise UserError(f"unknown {what} {name!r:.40}; known are {listed}")


def check_words(words: dict) -> None:
    """Raises UserError for sizes that are missing, for values that are no number where there must be one, and
    for parts that no block here has."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if words.get(name):
            mixture = f"{words['model_type']} as a mixture of experts"
            raise UserError(f"{name} is {words[name]!r:.40}: {mixture} is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if words.get(name):
            raise UserError(
                f"{name} is set: biases are supported on the queries, keys and values of qwen2 alone"
            )
    if words.get("quantization_config"):
        method = table(words, "quantization_config").get("quant_method")
        raise UserError(
            f"the weights are quantized ({method!s:.40}); take the model as it was before, or its GGUF"
        )
    for name in NEEDED:
        if words.get(name) is None:
            raise UserError(f"the configuration lacks {name!r}")
    for name in COUNTS:
        value = words.get(name)
        if value is not None and not (type(value) is int and 1 <= value < 2**31):
            raise UserError(f"{name} is {value!r:.40}; it must be a whole number above 0")
    for name in NUMBERS:
        value = words.get(name)
        if value is not None and not is_positive(value):
            raise UserError(f"{name} is {value!r:.40}; it must be a number above 0")


def is_positive(value) -> bool:
    """Whether it is a number above 0 and finite."""
    return type(value) in (int, float) and 0 < value < 1e300


def table(words: dict, name: str) -> dict:
    """The object of this name in a configuration, {} if there is none. Raises UserError for anything else."""
    value = words.get(name) or {}
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value!r:.40}; it must be an object")
    return value


def end_ids(value) -> tuple | int | None:
    """The ids that end a text, each once: of one, of a list, or of nothing."""
    if not isinstance(value, list):
        return value
    return tuple(token for at, token in enumerate(value) if token not in value[:at])


def activation(words: dict, gemma: bool) -> str:
    """Gemma's is GELU-tanh, whatever its first config.json called it."""
    name = words.get("hidden_act", "silu")
    if gemma:
        name = words.get("hidden_activation") or "gelu_pytorch_tanh"
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if not isinstance(name, str) or name not in known:
        raise UserError(f"unknown activation {name!r:.40}; known are {', '.join(known)}")
    return known[name]


def windows(words: dict, n_layers: int) -> dict:
    """The fields on sliding windows: by the kinds of layers listed, else every so many layers one without,
    else all with one."""
    if words.get("sliding_window") is None or words.get("use_sliding_window") is False:
        return {}
    if words.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is set: an embedding model, which cannot decode")
    kinds, every = words.get("layer_types"), words.get("sliding_window_pattern")
    layers = range(1, n_layers + 1)
    if kinds:
        if not isinstance(kinds, list) or len(kinds) != n_layers:
            raise UserError(
                f"layer_types is {kinds!r:.40}; it must be a list of {n_layers} kinds, one a layer"
            )
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(
                    f"layer_types has {kind!r:.40}; supported are full_attention and sliding_attention"
                )
        whole = [layer for layer in layers if kinds[layer - 1] == "full_attention"]
    elif "max_window_layers" in words:  # Qwen: how many layers, from the first, have none
        first = words["max_window_layers"]
        if type(first) is not int or first < 0:
            raise UserError(f"max_window_layers is {first!r:.40}; it must be a whole number")
        whole = [layer for layer in layers if layer <= first]
    elif "no_rope_layer_interval" in words:  # SmolLM3: the layers that rotate have none
        whole = [layer for layer in layers if layer not in without_rotation(words, n_layers)]
    else:
        whole = [layer for layer in layers if every and layer % every == 0]
    return {"window": words["sliding_window"], "global_layers": tuple(whole)}


def without_rotation(words: dict, n_layers: int) -> tuple[int, ...]:
    """SmolLM3: the layers whose queries and keys are not rotated, which no_rope_layers marks with 0, or else
    every so many."""
    marks, every = words.get("no_rope_layers"), words.get("no_rope_layer_interval") or 4
    if marks is None:
        marks = [int(layer % every != 0) for layer in range(1, n_layers + 1)]
    if not isinstance(marks, list) or len(marks) < n_layers or not all(mark in (0, 1) for mark in marks):
        raise UserError(
            f"no_rope_layers is {marks!r:.40}; it must be a list of {n_layers} times 0 or 1, one a layer"
        )
    return tuple(layer for layer in range(1, n_layers + 1) if marks[layer - 1] == 0)


def rotation(words: dict, local: bool) -> dict:
    """The fields on rotary embedding: rope_theta and rope_scaling, or rope_parameters, which hold both,
    perhaps for each kind of layer."""
    whole = table(words, "rope_parameters")
    sliding = table(whole, "sliding_attention")
    if "full_attention" in whole:
        whole = table(whole, "full_attention")
    scaling = table(words, "rope_scaling") or whole
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope_scaling {kind!r:.40} is not supported; known are default, linear and llama3")
    bands = (
        ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if kind == "llama3"
        else ()
    )
    fields = {
        "rope_base": positive(whole, "rope_theta", words["rope_theta"]),
        "rope_factor": 1.0 if kind == "default" else positive(scaling, "factor"),
        "rope_bands": tuple(positive(scaling, name) for name in bands),
    }
    if local:
        fields["local_rope_base"] = positive(sliding, "rope_theta", words["rope_local_base_freq"])
    return fields


def positive(words: dict, name: str, default: float | None = None) -> float:
    """A number above 0 from a part of the configuration. Raises UserError."""
    value = words.get(name, default)
    if not is_positive(value):
        raise UserError(f"{name} is {value!r:.40}; it must be a number above 0")
    return float(value)


# ---------------------------------------------------------------- names

BLOCK = ("attn_norm", "q", "k", "v", "out", "mlp_norm", "gate", "up", "down")
HF = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
META = (
    "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm",
    "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
)  # fmt: skip
GGUF = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
HF_FURTHER = {
    "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm",
    "self_attn.q_proj.bias": "q_bias", "self_attn.k_proj.bias": "k_bias", "self_attn.v_proj.bias": "v_bias",
}  # fmt: skip
HF_SANDWICH = {
    "post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}  # fmt: skip
GGUF_FURTHER = {
    "post_attention_norm": "attn_post_norm", "post_ffw_norm": "mlp_post_norm",
    "attn_q_norm": "q_norm", "attn_k_norm": "k_norm",
    "attn_q.bias": "q_bias", "attn_k.bias": "k_bias", "attn_v.bias": "v_bias",
}  # fmt: skip
SKIPPED = re.compile(r"rotary_emb\.inv_freq|rope\.freqs|rope_freqs|vision_tower\.|multi_modal_projector\.")


def name_table(names: str, post_norms: bool) -> dict[str, str]:
    """Their names -> ours, without .weight, # for the number of a block, from 0. What lies fused in ours goes
    by its parts: q, k, v; gate, up."""
    if names == "hf":
        prefix, outer = "model.layers", ("model.embed_tokens", "model.norm", "lm_head")
        block = dict(zip(HF, BLOCK)) | HF_FURTHER
        if post_norms:
            block |= HF_SANDWICH
    elif names == "meta":
        prefix, outer = "layers", ("tok_embeddings", "norm", "output")
        block = dict(zip(META, BLOCK))
    else:
        prefix, outer = "blk", ("token_embd", "output_norm", "output")
        block = dict(zip(GGUF, BLOCK)) | GGUF_FURTHER
    table = dict(zip(outer, ("embedding", "norm", "unembedding")))
    for theirs, ours in block.items():
        table[f"{prefix}.#.{theirs}"] = f"blocks.#.{ours}"
    return table


def pattern(name: str) -> str:
    """A tensor's name as the table has it: without .weight, # for the number of a block, and of a model for
    images too only the text's."""
    for prefix in ("language_model.model.", "model.language_model."):
        name = name.replace(prefix, "model.")
    name = name.replace("language_model.", "")
    return re.sub(r"\.\d+\.", ".#.", name.removesuffix(".weight"), count=1)
