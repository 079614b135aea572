"""GGUF files, read with the optional package `gguf` and dequantized to float32 a few rows at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import reading
from formats.chat import check_template
from formats.families import check_family
from formats.sources import Source, Stored
from formats.tokenizers.files import gguf_tokenizer

ARCHITECTURES = {  # -> model_type
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text",
}  # fmt: skip
INTERLEAVED = ("llama", "smollm3")  # architectures whose rotary pairs llama.cpp stores side by side
LARGE = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, which have a different query scale
CHUNK = 1 << 22  # elements of a tensor dequantized at a time
WORDS = {  # of config.json -> keys of the metadata
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length", "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
LLAMA_3_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file. Raises UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: GGUF needs the package gguf; pip install gguf") from None
    with reading(path, "not a readable GGUF file, or cut short"):
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        reader.fields.clear()  # these hold one small array for every token of the vocabulary
        family = check_family(fields.get("general.architecture"), "architecture", ARCHITECTURES)
        config = gguf_config(fields, family)
        tensors = {}
        for each in reader.tensors:
            shape = tuple(map(int, reversed(each.shape)))
            pieces = partial(dequantize_rows, shape, each.data, each.tensor_type, config["head_dim"])
            tensors[each.name] = Stored(shape, torch.float32, pieces)
        config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if "rope_freqs.weight" in tensors:  # Llama 3: frequency divisors, the largest is the factor
        (divisors,) = tensors["rope_freqs.weight"].pieces()
        config["rope_scaling"] = {**LLAMA_3_ROPE, "factor": float(divisors.max())}
    find = partial(gguf_tokenizer, path, fields)
    template = check_template(fields.get("tokenizer.chat_template"), path)
    return Source("GGUF", config, "gguf", tensors, family in INTERLEAVED, find, template)


def dequantize_rows(shape: tuple[int, ...], data, kind, head_dim: int) -> Iterator[Tensor]:
    """A tensor in pieces of whole heads, so that convert.py can reorder the rows of each."""
    import gguf

    step = len(data)
    if len(shape) > 1:
        step = head_dim * max(1, CHUNK // (shape[-1] * head_dim))
    for first in range(0, len(data), step):
        rows = gguf.quants.dequantize(data[first : first + step], kind)
        rows = np.require(rows, requirements="W")  # torch wants it writable
        yield torch.from_numpy(rows).view(-1, *shape[1:])


def gguf_config(fields: dict, family: str) -> dict:
    """The metadata under the keys of config.json. Raises KeyError for sizes that are missing."""
    config = {word: fields[f"{family}.{key}"] for word, key in WORDS.items() if f"{family}.{key}" in fields}
    config["model_type"] = ARCHITECTURES[family]
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]  # of a text, of a turn
    config["eos_token_id"] = [token for token in ends if token is not None] or None
    share = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("head_dim", share)
    large = config["num_hidden_layers"] == LARGE.get(family)
    config["query_pre_attn_scalar"] = share if large else config["head_dim"]
    kind, factor = (fields.get(f"{family}.rope.scaling.{name}") for name in ("type", "factor"))
    if kind not in (None, "none"):
        config["rope_scaling"] = {"rope_type": kind, "factor": factor or 1.0}
    return config
