"""GGUF files, by the optional package `gguf`, dequantized to float32 a few rows at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from formats.chat import checked
from formats.families import known_family
from formats.llama import BANDS
from formats.sources import Source, Stored
from formats.tokenizer_files import gguf_tokenizer

ARCHITECTURES = {  # -> model_type
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text",
}  # fmt: skip
INTERLEAVED = ("llama", "smollm3")  # whose rotary pairs llama.cpp wants side by side
LARGE = (
    ("gemma2", 46),
    ("gemma3", 62),
)  # 27B, with its own scale of queries; llama.cpp, too, knows it by its depth
CHUNK = 1 << 22  # elements of a tensor dequantized at a time
WORDS = {  # of config.json -> keys of the metadata
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base", "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window", "num_local_experts": "expert_count",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip


def open_gguf(path: Path) -> Source:
    """A GGUF file. Raises UserError."""
    fields, found = read_gguf(path)
    try:
        family = known_family(fields.get("general.architecture"), "architecture", ARCHITECTURES)
        config = gguf_config(fields, family)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors = {}
    for name, shape, data, kind in found:
        tensors[name] = Stored(
            shape, torch.float32, partial(dequantized, shape, data, kind, config["head_dim"])
        )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing")
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if "rope_freqs.weight" in tensors:  # Llama 3: what every frequency is divided by, at most the factor
        (divisors,) = tensors["rope_freqs.weight"].pieces()
        config["rope_scaling"] = {**BANDS, "factor": float(divisors.max())}
    template = fields.get("tokenizer.chat_template")
    find = partial(gguf_tokenizer, path, fields)
    return Source(
        "GGUF", config, "gguf", tensors, family in INTERLEAVED, find,
        chat_template=None if template is None else checked(template, path),
    )  # fmt: skip


def read_gguf(path: Path) -> tuple[dict, list[tuple]]:
    """The metadata, and name, shape, data and kind of quantization of every tensor. Raises UserError."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: GGUF needs the package gguf; pip install gguf") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        found = [(t.name, tuple(map(int, reversed(t.shape))), t.data, t.tensor_type) for t in reader.tensors]
        reader.fields.clear()  # one small array for every token of the vocabulary
    except Exception as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable GGUF file, or cut short ({reason})") from None
    return fields, found


def dequantized(shape: tuple[int, ...], data, kind, head_dim: int) -> Iterator[Tensor]:
    """A tensor in pieces of whole heads, so that convert.py can reorder the rows of each."""
    import gguf

    step = len(data)
    if len(shape) > 1:
        step = head_dim * max(1, CHUNK // (shape[-1] * head_dim))
    for first in range(0, len(data), step):
        try:
            rows = gguf.quants.dequantize(data[first : first + step], kind)
        except NotImplementedError:
            raise UserError(
                f"the package gguf cannot dequantize {kind.name}; take a file of another kind"
            ) from None
        rows = np.require(rows, requirements="W")  # torch wants it writable
        yield torch.from_numpy(rows).view(-1, *shape[1:])


def gguf_config(fields: dict, family: str) -> dict:
    """The metadata in the words of config.json. Raises UserError for sizes that are missing or impossible."""
    config = {word: fields[f"{family}.{key}"] for word, key in WORDS.items() if f"{family}.{key}" in fields}
    for word in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        if not isinstance(config.get(word), int) or config[word] < 1:
            raise UserError(f"the metadata lack {family}.{WORDS[word]}, or it is no whole number above 0")
    config["model_type"] = ARCHITECTURES[family]
    ends = [
        fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")
    ]  # of a text, of a turn in a chat
    config["eos_token_id"] = [token for token in ends if token is not None] or None
    share = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("head_dim", share)
    large = (family, config["num_hidden_layers"]) in LARGE
    config["query_pre_attn_scalar"] = share if large else config["head_dim"]
    scaling = fields.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": fields.get(f"{family}.rope.scaling.factor", 1.0),
        }
    return config
