"""Public checkpoints as they lie on the disk, opened for convert.py: only headers are read here, tensors when they are asked for.

A source says what it is in the words of a Hugging Face config.json, whatever its layout, so that convert.py translates only once.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from formats.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, build_tokenizer

SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
GGUF_FAMILIES = {"llama": "llama", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}  # architecture -> model_type
LLAMA_3_BANDS = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CHUNK = 1 << 22  # elements of a GGUF tensor dequantized at a time


class Stored(NamedTuple):
    """A tensor where it lies. `pieces` yields it in parts that follow each other along `dim`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]
    dim: int = 0


@dataclass
class Source:
    """An opened checkpoint."""

    layout: str                  # what it was recognized as
    config: dict                 # in the words of config.json
    names: str                   # whose names the tensors have: hf, meta or gguf
    tensors: dict[str, Stored]
    interleaved: bool            # the rotary pairs of a head are (2i, 2i + 1), not (i, i + C/2)
    tokenizer: bytes | None      # a sentencepiece model
    note: str = ""               # what the user should know


def open_source(path: Path, tokenizer: Path | None) -> Source:
    """Recognizes a checkpoint by its content. `tokenizer` takes the place of the one in it or beside it. Raises ValueError for what is
    none of the known layouts, or damaged."""
    if path.is_dir():
        if (path / "config.json").is_file():
            source = open_hf(path)
        elif (path / "params.json").is_file():
            source = open_meta(path)
        else:
            raise UserError(f"{path}: no checkpoint folder; it needs config.json (Hugging Face) or params.json (Meta) beside the weights")
    elif path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        source = open_gguf(path) if magic == b"GGUF" else open_llama2c(path)
    else:
        raise UserError(f"{path}: no such file or folder")
    if tokenizer is not None:
        source.tokenizer = read_tokenizer_file(tokenizer)
    return source


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


# ---------------------------------------------------------------- Hugging Face folders


def open_hf(folder: Path) -> Source:
    """config.json with *.safetensors or else pytorch_model*.bin, one or several, with an index or without."""
    config = read_json(folder / "config.json")
    for kind, pattern, read in (("safetensors", "*.safetensors", read_safetensors), ("torch", "pytorch_model*.bin", read_torch)):
        indices, files = sorted(folder.glob(f"{pattern}.index.json")), sorted(folder.glob(pattern))
        if indices:
            places = read_json(indices[0]).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
                raise UserError(f"{indices[0]}: has no weight_map from tensors to files beside it")
            files = [folder / name for name in sorted(set(places.values()))]
        tensors: dict[str, Stored] = {}
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: named in {indices[0].name}, but missing; download it")
            for name, stored in read(file).items():
                if name in tensors:
                    raise UserError(f"{file}: {name} is in another file, too; keep one set of files")
                tensors[name] = stored
        if files:
            return Source(f"Hugging Face folder, {len(files)} {kind} file(s)", config, "hf", tensors, False, *find_tokenizer(folder))
    raise UserError(f"{folder}: has a config.json, but neither *.safetensors nor pytorch_model*.bin")


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, memory-mapped: 8 bytes of header length, a JSON header, the data. Every length and offset is
    checked against the file; the tensors must fill the data without gap or overlap, as the format demands. Raises ValueError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise UserError(f"{path}: a header of {length} bytes in a file of {size} (at most {MAX_HEADER}); cut short, or no safetensors")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except ValueError as error:
            raise UserError(f"{path}: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    spans = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (begin, stop, _, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise UserError(f"{path}: {name} begins at byte {begin}, where {end} was expected: the tensors overlap or leave a gap")
        end = stop
    if end != size - 8 - length:
        raise UserError(f"{path}: its tensors need {end} bytes of data, the file has {size - 8 - length}; download it again")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def piece(begin: int, stop: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        raw = data[8 + length + begin : 8 + length + stop]
        if (8 + length + begin) % dtype.itemsize:  # the format does not promise alignment, torch needs it
            raw = raw.clone()
        return [raw.view(dtype).view(shape)]

    return {name: Stored(shape, dtype, partial(piece, *spans[name])) for name, (_, _, shape, dtype) in spans.items()}


def _unique(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise UserError("a name occurs twice")
    return dict(pairs)


def _check_entry(path: Path, name: str, entry) -> tuple[int, int, tuple[int, ...], torch.dtype]:
    """(begin, stop, shape, dtype) of one entry of a safetensors header."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in SAFETENSORS:
        raise UserError(f"{path}: {name} is of dtype {dtype}; known are {', '.join(SAFETENSORS)}: convert it to one of these first")
    for what in (shape, offsets):
        if not isinstance(what, list) or not all(type(number) is int and number >= 0 for number in what):
            raise UserError(f"{path}: {name} has shape {shape} and offsets {offsets}; both must be lists of integers, at least 0")
    needed = math.prod(shape) * SAFETENSORS[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise UserError(f"{path}: {name}, {dtype} {shape}, takes {needed} bytes, but has the offsets {offsets}")
    return *offsets, tuple(shape), SAFETENSORS[dtype]


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a torch file, memory-mapped; nothing in it is executed. Raises ValueError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable torch file of weights ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path}: holds no plain dictionary of tensors")
    return {name: Stored(tuple(tensor.shape), tensor.dtype, partial(list, [tensor])) for name, tensor in content.items()}


def find_tokenizer(*folders: Path) -> tuple[bytes | None, str]:
    """The first tokenizer.model in the folders, and a note if there is none."""
    for path in (folder / "tokenizer.model" for folder in folders):
        if path.is_file():
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", path.read_bytes()[:200]):
                return None, "its tokenizer.model is byte-level BPE: no tokenizer"
            return path.read_bytes(), ""
    return None, "no tokenizer.model (sentencepiece): no tokenizer"


# ---------------------------------------------------------------- Meta and llama2.c


def open_meta(folder: Path) -> Source:
    """params.json with consolidated.*.pth, the shards of model parallelism: matrices are cut by rows, or, where they write into the
    residual stream, by columns (the embedding by columns in Llama 1 and 2, by rows in Llama 3)."""
    params, files = read_json(folder / "params.json"), sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder}: has a params.json, but no consolidated.*.pth")
    shards = [read_torch(file) for file in files]
    for file, shard in zip(files, shards):
        if shard.keys() != shards[0].keys():
            raise UserError(f"{file}: {min(shard.keys() ^ shards[0].keys())} is in only one of {files[0].name} and {file.name}")
    tensors, d = {}, params.get("dim")
    for name, (shape, dtype, pieces, _) in shards[0].items():
        if len(shape) == 2 and len(files) > 1:
            columns = name.endswith(("wo.weight", "w2.weight")) or (name == "tok_embeddings.weight" and shape[1] != d)
            parts = [shard[name] for shard in shards]
            whole = [sum(part.shape[i] for part in parts) if i == columns else shape[i] for i in (0, 1)]
            tensors[name] = Stored(tuple(whole), dtype, partial(_pieces, parts), int(columns))
        else:
            tensors[name] = Stored(shape, dtype, pieces)
    config = {"rms_norm_eps": params.get("norm_eps", 1e-5), "rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):  # 3.1 says no factor, and means 8
        config["rope_scaling"] = {**LLAMA_3_BANDS, "factor": params.get("rope_scaling_factor", 8.0)}
    config |= meta_config(tensors, params.get("n_layers"), params.get("n_heads"), params.get("n_kv_heads"))
    note = "params.json does not say how many positions: 2048 unless --max-len says otherwise"
    tokenizer, missing = find_tokenizer(folder, folder.parent)
    return Source(f"Meta folder, {len(files)} shard(s)", config, "meta", tensors, True, tokenizer, "; ".join(filter(None, (note, missing))))


def _pieces(parts: list[Stored]) -> Iterator[Tensor]:
    for part in parts:
        yield from part.pieces()


def meta_config(tensors: dict[str, Stored], n_layers: int, n_heads: int, n_kv_heads: int | None) -> dict:
    """What layouts with Meta's names have in common. Raises ValueError if the tensors that show the sizes are missing."""
    try:
        (V, d), (d_ff, _) = tensors["tok_embeddings.weight"].shape, tensors["layers.0.feed_forward.w1.weight"].shape
    except KeyError as error:
        raise UserError(f"tensor {error} is missing") from None
    return {
        "model_type": "llama", "vocab_size": V, "hidden_size": d, "intermediate_size": d_ff, "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads or n_heads,
        "tie_word_embeddings": "output.weight" not in tensors, "eos_token_id": None,
    }  # fmt: skip


def open_llama2c(path: Path) -> Source:
    """llama2.c's float32 .bin (export.py, versions 0 and 1): seven integers, then the weights, each kind for all layers together. The
    tokenizer is tokenizer.model or tokenizer.bin beside it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(256)
    if len(header) < 28:
        raise UserError(f"{path}: {size} bytes are no checkpoint")
    magic, version = struct.unpack_from("<Ii", header)
    new = magic == 0x616B3432
    if new and version != 1:
        raise UserError(f"{path}: llama2.c version {version} (int8); export it as version 0 or 1, which are float32")
    d, d_ff, L, H, K, V, T = struct.unpack_from("<7i", header, 8 if new else 0)
    start, tied = (256, bool(header[36])) if new and len(header) == 256 else (28, V > 0)
    if min(d, d_ff, L, H, K, abs(V), T) < 1 or d % H:
        raise UserError(f"{path}: neither GGUF nor, by its first numbers, llama2.c; of weights of another kind give the folder")
    C, V = d // H, abs(V)
    layer = {"attention_norm": (d,), "attention.wq": (d, d), "attention.wk": (K * C, d), "attention.wv": (K * C, d), "attention.wo": (d, d),
             "ffn_norm": (d,), "feed_forward.w1": (d_ff, d), "feed_forward.w2": (d, d_ff), "feed_forward.w3": (d_ff, d)}  # fmt: skip
    norms, whole = ["attention_norm", "ffn_norm"], {"tok_embeddings": (V, d), "norm": (d,), "rope.freqs": (T * C,), "output": (V, d)}
    if new:  # vectors first
        order = [*norms, "norm", "tok_embeddings", *(name for name in layer if name not in norms)]
    else:
        order = ["tok_embeddings", *layer, "norm", "rope.freqs"]
    order += [] if tied else ["output"]
    floats = sum(math.prod(layer[name]) * L if name in layer else math.prod(whole[name]) for name in order)
    if (needed := start + 4 * floats) != size:
        raise UserError(f"{path}: neither GGUF nor a whole file of llama2.c (by its first numbers {needed} bytes, not {size}); cut short?")
    spans, at = {}, start // 4
    for name in order:
        for full, shape in [(f"layers.{i}.{name}", layer[name]) for i in range(L)] if name in layer else [(name, whole[name])]:
            spans[f"{full}.weight"] = (at, shape)
            at += math.prod(shape)
    data = torch.from_file(str(path), shared=False, size=at)
    tensors = {
        name: Stored(shape, torch.float32, partial(lambda first, shape: [data[first : first + math.prod(shape)].view(shape)], first, shape))
        for name, (first, shape) in spans.items()
    }
    beside = next((file for file in (path.with_name("tokenizer.model"), path.with_name("tokenizer.bin")) if file.is_file()), None)
    config = {**meta_config(tensors, L, H, K), "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": T,
              "eos_token_id": 1}  # texts are divided by bos, as run.c knows  # fmt: skip
    note = "" if beside else "no tokenizer.model or tokenizer.bin beside it: no tokenizer, unless --tokenizer gives one"
    return Source("llama2.c", config, "meta", tensors, True, read_tokenizer_file(beside) if beside else None, note)


# ---------------------------------------------------------------- GGUF


def open_gguf(path: Path) -> Source:
    """A GGUF file, by the optional package `gguf`, dequantized to float32 a few rows at a time. Raises ValueError."""
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
        raise UserError(f"{path}: not a readable GGUF file, or cut short ({str(error).splitlines()[0][:100]})") from None
    family = fields.get("general.architecture")
    if family not in GGUF_FAMILIES:
        raise UserError(f"{path}: unknown architecture {family!r}; known are {', '.join(GGUF_FAMILIES)}")
    config = gguf_config(fields, family)

    def pieces(shape: tuple[int, ...], data, kind) -> Iterator[Tensor]:
        C = config["head_dim"]  # whole heads
        step = C * max(1, CHUNK // (shape[-1] * C)) if len(shape) > 1 else len(data)
        for first in range(0, len(data), step):
            rows = np.require(gguf.quants.dequantize(data[first : first + step], kind), requirements="W")  # torch wants it writable
            yield torch.from_numpy(rows).view(-1, *shape[1:])

    tensors = {name: Stored(shape, torch.float32, partial(pieces, shape, data, kind)) for name, shape, data, kind in found}
    if "rope_freqs.weight" in tensors:  # Llama 3: what every frequency is divided by, at most the factor
        config["rope_scaling"] = {**LLAMA_3_BANDS, "factor": float(next(iter(tensors["rope_freqs.weight"].pieces())).max())}
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing")
    config |= {"vocab_size": tensors["token_embd.weight"].shape[0], "tie_word_embeddings": "output.weight" not in tensors}
    tokenizer, note = gguf_tokenizer(path, fields)
    return Source("GGUF", config, "gguf", tensors, family == "llama", tokenizer, note)


def gguf_config(fields: dict, family: str) -> dict:
    """The metadata in the words of config.json."""
    words = {
        "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "max_position_embeddings": "context_length",
        "sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }  # fmt: skip
    config = {word: fields[f"{family}.{key}"] for word, key in words.items() if f"{family}.{key}" in fields}
    config |= {"model_type": GGUF_FAMILIES[family], "eos_token_id": fields.get("tokenizer.ggml.eos_token_id")}
    missing = [word for word in ("hidden_size", "num_attention_heads", "num_hidden_layers") if word not in config]
    if missing:
        raise UserError(f"the metadata lack {family}.{words[missing[0]]}")
    share = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("head_dim", share)
    large = (family, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62))  # 27B; llama.cpp, too, knows them by their depth
    config["query_pre_attn_scalar"] = share if large else config["head_dim"]
    if (kind := fields.get(f"{family}.rope.scaling.type", "none")) != "none":
        config["rope_scaling"] = {"rope_type": kind, "factor": fields.get(f"{family}.rope.scaling.factor", 1.0)}
    return config


# ---------------------------------------------------------------- tokenizers that are no sentencepiece models yet


def gguf_tokenizer(path: Path, fields: dict) -> tuple[bytes | None, str]:
    """The sentencepiece model that a GGUF file was made from, as far as encoding and decoding go, and a note if it was made from none."""
    get = lambda key, default=None: fields.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    if get("model") != "llama":  # what llama.cpp calls sentencepiece's BPE
        return None, f"its tokenizer is {get('model')} (byte-level BPE is gpt2), not sentencepiece: no tokenizer"
    tokens, scores, types = get("tokens", []), get("scores", []), list(get("token_type", []))
    if not len(tokens) == len(scores) == len(types) > 0:
        raise UserError(f"{path}: its tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    bos = get("bos_token_id") if get("add_bos_token", True) else None
    return build_tokenizer(tokens, scores, types, get("unknown_token_id", 0), bos, get("eos_token_id"), get("add_space_prefix", True)), ""


def read_tokenizer_file(path: Path) -> bytes:
    """A sentencepiece model, or one rebuilt from llama2.c's tokenizer.bin: the longest length, then score, length and bytes of each token.
    Raises ValueError."""
    raw = path.read_bytes()
    longest, at, tokens, scores = int.from_bytes(raw[:4], "little"), 4, [], []
    while longest < 1024 and at + 8 <= len(raw):  # a sentencepiece model begins with a tag that makes it larger
        score, length = struct.unpack_from("<fi", raw, at)
        if not 0 <= length <= longest:
            break
        tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        scores.append(score)
        at += 8 + length
    if at != len(raw) or len(tokens) < 3:
        return raw  # whether it is a sentencepiece model shows when it is loaded
    types = [BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    tokens[:3], types[:3] = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]  # run.c takes these for granted
    return build_tokenizer(tokens, scores, types, 0, 1, 2, True)
