"""Weights with Meta's names: folders as Meta publishes them, and the .bin files of llama2.c."""

import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_json
from formats.sources import Source, Stored
from formats.tensors import read_torch
from formats.tokenizer_files import find_tokenizer, read_tokenizer_file

BANDS = {  # of Llama 3
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def llama_config(tensors: dict[str, Stored], n_layers: int, n_heads: int, n_kv_heads: int | None) -> dict:
    """What layouts with Meta's names have in common. Raises UserError if the tensors that show the sizes are
    missing."""
    sizes = []
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"tensor {name} is missing, or no matrix")
        sizes.append(tensors[name].shape)
    (vocab_size, d_model), (d_ff, _) = sizes
    return {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": d_model, "intermediate_size": d_ff,
        "num_hidden_layers": n_layers, "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads or n_heads,
        "tie_word_embeddings": "output.weight" not in tensors, "eos_token_id": None,
    }  # fmt: skip


# ---------------------------------------------------------------- Meta's folders


def open_meta(folder: Path) -> Source:
    """params.json with consolidated.*.pth, the shards of model parallelism. Raises UserError."""
    params, files = (
        read_json(folder / "params.json", "a configuration"),
        sorted(folder.glob("consolidated.*.pth")),
    )
    if not files:
        raise UserError(f"{folder}: has a params.json, but no consolidated.*.pth")
    shards = [read_torch(file) for file in files]
    for file, shard in zip(files, shards):
        if shard.keys() != shards[0].keys():
            one = min(shard.keys() ^ shards[0].keys())
            raise UserError(f"{file}: {one} is in only one of {files[0].name} and {file.name}")
    tensors = {name: join([shard[name] for shard in shards], name, params.get("dim")) for name in shards[0]}
    config = {"rms_norm_eps": params.get("norm_eps", 1e-5), "rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):  # 3.1 says no factor, and means 8
        config["rope_scaling"] = {**BANDS, "factor": params.get("rope_scaling_factor", 8.0)}
    config |= llama_config(tensors, params.get("n_layers"), params.get("n_heads"), params.get("n_kv_heads"))
    note = "params.json does not say how many positions: 2048 unless --max-len says otherwise"
    find = partial(find_tokenizer, folder, folder.parent)
    return Source(f"Meta folder, {len(files)} shard(s)", config, "meta", tensors, True, find, note)


def join(parts: list[Stored], name: str, d_model: int | None) -> Stored:
    """One tensor of the parts that the shards hold: vectors are the same in all; matrices are cut by rows,
    or, where they write into the residual stream, by columns; the embedding by columns in Llama 1 and 2, by
    rows in Llama 3."""
    first = parts[0]
    if len(first.shape) != 2 or len(parts) == 1:
        return first
    by_columns = name.endswith(("wo.weight", "w2.weight"))
    if name == "tok_embeddings.weight":
        by_columns = first.shape[1] != d_model
    dim = 1 if by_columns else 0
    if any(len(part.shape) != 2 for part in parts):
        raise UserError(f"{name} is no matrix in every shard")
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Stored(tuple(shape), first.dtype, partial(pieces_of, parts), dim)


def pieces_of(parts: list[Stored]) -> Iterator[Tensor]:
    """The pieces of one part after the other."""
    for part in parts:
        yield from part.pieces()


# ---------------------------------------------------------------- llama2.c


def open_llama2c(path: Path) -> Source:
    """llama2.c's float32 .bin (export.py, versions 0 and 1): seven integers, then the weights, each kind for
    all layers together. The tokenizer is tokenizer.model or tokenizer.bin beside it. Raises UserError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(256)
    if len(header) < 28:
        raise UserError(f"{path}: {size} bytes are no checkpoint")
    magic, version = struct.unpack_from("<Ii", header)
    new = magic == 0x616B3432
    if new and version != 1:
        raise UserError(
            f"{path}: llama2.c version {version} (int8); export it as version 0 or 1, which are float32"
        )
    numbers = struct.unpack_from("<7i", header, 8 if new else 0)
    d, d_ff, n_layers, n_heads, n_kv_heads, vocab_size, positions = numbers
    start, tied = (256, bool(header[36])) if new and len(header) == 256 else (28, vocab_size > 0)
    vocab_size = abs(vocab_size)
    if min(d, d_ff, n_layers, n_heads, n_kv_heads, vocab_size, positions) < 1 or d % n_heads:
        other = "of weights of another kind give the folder"
        raise UserError(f"{path}: neither GGUF nor, by its first numbers, llama2.c; {other}")

    per_layer, whole = llama2c_shapes(
        d, d_ff, n_kv_heads * (d // n_heads), vocab_size, positions * (d // n_heads)
    )
    if new:  # vectors first, and no table of frequencies
        matrices = [name for name in per_layer if not name.endswith("norm")]
        names = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *matrices]
    else:
        names = ["tok_embeddings", *per_layer, "norm", "rope.freqs"]
    if not tied:
        names.append("output")
    floats = sum(
        math.prod(whole[name]) if name in whole else n_layers * math.prod(per_layer[name]) for name in names
    )
    needed = start + 4 * floats
    if needed != size:
        wrong = f"by its first numbers {needed} bytes, not {size}"
        raise UserError(f"{path}: neither GGUF nor a whole file of llama2.c ({wrong}); cut short?")

    shapes = {}
    for name in names:
        if name in whole:
            shapes[f"{name}.weight"] = whole[name]
        else:
            shapes |= {f"layers.{layer}.{name}.weight": per_layer[name] for layer in range(n_layers)}
    data, at, tensors = torch.from_file(str(path), shared=False, size=size // 4), start // 4, {}
    for name, shape in shapes.items():
        stop = at + math.prod(shape)
        tensors[name] = Stored(shape, torch.float32, partial(list, [data[at:stop].view(shape)]))
        at = stop

    config = llama_config(tensors, n_layers, n_heads, n_kv_heads)
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": positions}
    config["eos_token_id"] = 1  # texts are divided by bos, as run.c knows
    return Source("llama2.c", config, "meta", tensors, True, partial(find_beside, path))


def find_beside(path: Path) -> tuple[bytes | None, str]:
    """The tokenizer beside a file of llama2.c, and a note if there is none."""
    for name in ("tokenizer.model", "tokenizer.bin"):
        if path.with_name(name).is_file():
            return read_tokenizer_file(path.with_name(name)), ""
    return None, "no tokenizer.model or tokenizer.bin beside it: no tokenizer, unless --tokenizer gives one"


def llama2c_shapes(d: int, d_ff: int, d_kv: int, vocab_size: int, frequencies: int) -> tuple[dict, dict]:
    """The shapes of a layer's tensors, in the order of version 0, and of those that there are once."""
    per_layer = {
        "attention_norm": (d,), "attention.wq": (d, d), "attention.wk": (d_kv, d), "attention.wv": (d_kv, d),
        "attention.wo": (d, d),
        "ffn_norm": (d,), "feed_forward.w1": (d_ff, d), "feed_forward.w2": (d, d_ff), "feed_forward.w3": (d_ff, d),
    }  # fmt: skip
    whole = {
        "tok_embeddings": (vocab_size, d),
        "norm": (d,),
        "rope.freqs": (frequencies,),
        "output": (vocab_size, d),
    }
    return per_layer, whole
