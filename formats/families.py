"""The families of public models: what their config.json means in our terms, and what they call their tensors.

To add a family:
1. FAMILIES: add its model_type, with what its config.json may leave out.
2. `model_config`: add what is new about its blocks, as a field of ModelConfig that model.py uses.
3. HF and GGUF: add the names of new tensors, and our names for them.
4. For GGUF files: add it to ARCHITECTURES in formats/gguf.py.
5. convert.py: add tensors that our model fuses to PARTS, and make `copy_weights` convert what is stored
   differently (such as Gemma's norms, from which 1 is subtracted).
"""

import math
import re
from collections.abc import Iterable

from common.errors import UserError
from model import ModelConfig

# The most positions that a model has without --max-len: the rotary table needs memory for each position.
MAX_LEN = 8192

# transformers' defaults for the keys that a config.json may omit, by model_type.
LLAMA = {
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "eos_token_id": 2,
}  # fmt: skip
MISTRAL = {**LLAMA, "num_key_value_heads": 8, "sliding_window": 4096}
GEMMA = {
    **LLAMA, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": 1,
}  # fmt: skip
GEMMA_2 = {
    **GEMMA, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA_3 = {
    **GEMMA_2, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip
QWEN_2 = {
    **LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 32, "eos_token_id": None,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
QWEN_3 = {**QWEN_2, "head_dim": 128}
SMOLLM_3 = {
    **LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
    "tie_word_embeddings": True, "eos_token_id": 128001, "use_sliding_window": False,
    "no_rope_layer_interval": 4,
}  # fmt: skip
FAMILIES = {
    "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN_2, "qwen3": QWEN_3, "smollm3": SMOLLM_3,
    "gemma": GEMMA, "gemma2": GEMMA_2, "gemma3_text": GEMMA_3,
}  # fmt: skip

# ---------------------------------------------------------------- the configuration


def model_config(words: dict, max_len: int | None) -> ModelConfig:
    """The ModelConfig that a config.json describes. Raises UserError for a family that is not known and for
    what is not supported; KeyError, TypeError and the like for what is missing or of the wrong type."""
    if words.get("model_type") == "gemma3":  # reads images, too; the text model's configuration is nested
        words = {**words, **words["text_config"], "model_type": "gemma3_text"}
    family = check_family(words.get("model_type"), "model_type", FAMILIES)
    stated = words.get("max_position_embeddings")
    words = {**FAMILIES[family], **words}
    if words.get("quantization_config"):
        raise UserError("the weights are quantized; use the unquantized model, or its GGUF file")
    if words.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is set: this is an embedding model, which cannot decode")
    if stated and max_len is not None and max_len > stated:
        raise UserError(f"--max-len is {max_len}, but the model was made for {stated} positions")
    gemma, ends = family.startswith("gemma"), words["eos_token_id"]
    d_model = words["hidden_size"]
    n_layers = words["num_hidden_layers"]
    n_heads = words["num_attention_heads"]
    head_dim = words.get("head_dim") or d_model // n_heads
    scalar = words.get("query_pre_attn_scalar")
    return ModelConfig(
        vocab_size=words["vocab_size"],
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=words.get("num_key_value_heads") or n_heads,
        head_dim=head_dim,
        d_ff=words["intermediate_size"],
        max_len=min(words["max_position_embeddings"], MAX_LEN) if max_len is None else max_len,
        norm_eps=words["rms_norm_eps"],
        tie_embeddings=words["tie_word_embeddings"],
        eos_id=tuple(dict.fromkeys(ends)) if isinstance(ends, list) else ends,
        activation=activation(words, gemma),
        embedding_scale=math.sqrt(d_model) if gemma else 1.0,
        query_scale=scalar**-0.5 if scalar and scalar != head_dim else None,
        qk_norm=family in ("gemma3_text", "qwen3"),
        qkv_bias=family == "qwen2",
        post_norms=family in ("gemma2", "gemma3_text"),
        attention_cap=words.get("attn_logit_softcapping"),
        logit_cap=words.get("final_logit_softcapping"),
        unrotated_layers=without_rotation(words, n_layers) if family == "smollm3" else (),
        **window_fields(words, n_layers),
        **rope_fields(words, local=family == "gemma3_text"),
    )


def check_family(name, what: str, known: Iterable[str]) -> str:
    """Returns `name`, the value of `what` (model_type, architecture). Raises UserError if it is not among the
    known families."""
    if name not in list(known):
        raise UserError(f"{what} {name!r:.40} is not supported; choose from {', '.join(known)}")
    return name


def activation(words: dict, gemma: bool) -> str:
    """The activation of the MLP; Gemma's is GELU-tanh, whatever its first config.json called it."""
    name = words.get("hidden_activation") or "gelu_tanh" if gemma else words.get("hidden_act", "silu")
    return name.replace("gelu_pytorch_tanh", "gelu_tanh")


def window_fields(words: dict, n_layers: int) -> dict:
    """The fields of ModelConfig on sliding windows. The list layer_types says which layers have no window;
    without it, every n-th layer has none, or the family has a rule of its own."""
    if words.get("sliding_window") is None or words.get("use_sliding_window") is False:
        return {}
    kinds, every = words.get("layer_types"), words.get("sliding_window_pattern")
    layers = range(1, n_layers + 1)
    if kinds:
        if other := set(kinds) - {"full_attention", "sliding_attention"}:
            raise UserError(f"layer_types has {min(other)}; only full_ and sliding_attention are supported")
        whole = [layer for layer in layers if kinds[layer - 1] == "full_attention"]
    elif "max_window_layers" in words:  # Qwen: how many layers, from the first, have none
        whole = layers[: words["max_window_layers"]]
    elif "no_rope_layer_interval" in words:  # SmolLM3: the layers that rotate have none
        whole = [layer for layer in layers if layer not in without_rotation(words, n_layers)]
    else:
        whole = layers[every - 1 :: every] if every else ()
    return {"window": words["sliding_window"], "global_layers": tuple(whole)}


def without_rotation(words: dict, n_layers: int) -> tuple[int, ...]:
    """SmolLM3: the layers whose queries and keys are not rotated. no_rope_layers marks them with 0; without
    that list, they are every n-th layer."""
    marks, every = words.get("no_rope_layers"), words.get("no_rope_layer_interval") or 4
    layers = range(1, n_layers + 1)
    if marks is None:
        return tuple(layers[every - 1 :: every])
    return tuple(layer for layer in layers if not marks[layer - 1])


def rope_fields(words: dict, local: bool) -> dict:
    """The fields of ModelConfig on rotary embedding, from rope_theta and rope_scaling, or from
    rope_parameters, which holds both, perhaps for each kind of layer."""
    whole = words.get("rope_parameters") or {}
    sliding = whole.get("sliding_attention") or {}
    whole = whole.get("full_attention") or whole
    scaling = words.get("rope_scaling") or whole
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope_scaling {kind!r:.40} is not supported; only default, linear and llama3 are")
    factor = 1.0 if kind == "default" else float(scaling["factor"])
    fields = {"rope_base": float(whole.get("rope_theta", words["rope_theta"])), "rope_factor": factor}
    if kind == "llama3":
        bands = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        fields["rope_bands"] = tuple(float(scaling[name]) for name in bands)
    if local:
        fields["local_rope_base"] = float(sliding.get("rope_theta", words["rope_local_base_freq"]))
    return fields


# ---------------------------------------------------------------- names

HF = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm", "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias", "self_attn.v_proj.bias": "v_bias", "self_attn.o_proj": "out",
    "post_attention_layernorm": "mlp_norm", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}  # fmt: skip
HF_SANDWICH = {
    "post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}  # fmt: skip
GGUF = {
    "attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm", "attn_q.bias": "q_bias", "attn_k.bias": "k_bias", "attn_v.bias": "v_bias",
    "attn_output": "out", "post_attention_norm": "attn_post_norm", "ffn_norm": "mlp_norm", "ffn_gate": "gate",
    "ffn_up": "up", "ffn_down": "down", "post_ffw_norm": "mlp_post_norm",
}  # fmt: skip
SKIPPED = re.compile(r"rotary_emb\.inv_freq|rope_freqs|vision_tower\.|multi_modal_projector\.")


def name_table(names: str, post_norms: bool) -> dict[str, str]:
    """Tensor names of public checkpoints -> ours, both without .weight and with # for the number of a block,
    from 0. Tensors that our model fuses are listed under the names of their parts: q, k, v; gate, up."""
    if names == "hf":
        prefix, outer = "model.layers", ("model.embed_tokens", "model.norm", "lm_head")
        block = HF | HF_SANDWICH if post_norms else HF
    else:
        prefix, outer, block = "blk", ("token_embd", "output_norm", "output"), GGUF
    found = dict(zip(outer, ("embedding", "norm", "unembedding")))
    return found | {f"{prefix}.#.{theirs}": f"blocks.#.{ours}" for theirs, ours in block.items()}


def pattern(name: str) -> str:
    """A tensor's name as `name_table` has it, without the prefix of the text part of a model for images."""
    for prefix in ("language_model.model.", "model.language_model."):
        name = name.replace(prefix, "model.")
    name = name.replace("language_model.", "")
    return re.sub(r"\.\d+\.", ".#.", name.removesuffix(".weight"), count=1)
