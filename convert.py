"""Converts a public checkpoint into one file of this project.

    python convert.py SOURCE out.pt --dtype bf16

SOURCE is a Hugging Face folder (config.json with *.safetensors or pytorch_model*.bin) or a GGUF file (which
needs the package gguf) of the Llama family (Llama 1 to 3.3, TinyLlama, OpenLLaMA, CodeLlama, LayerSkip,
SmolLM, SmolLM3), Mistral, Qwen 2, 2.5 and 3, or Gemma 1, 2 and 3 (docs/checkpoints.md). Tensors stream one by
one from file to file. With --dtype int8, a weight takes one byte; such a file is meant for decoding on a CPU.
"""

import common.threads  # noqa: F401  sets variables that torch reads

import math
import mmap
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, run
from common.files import check_outputs, reading, whole_file
from common.flags import DTYPES, Parser, add_thread_flag, use_threads
from decoding.weights import quantized
from formats.checkpoint import (
    FORMAT,
    STORED,
    as_blob,
    check_values,
    is_gguf,
    read_tokenizer,
    save_part,
    seal,
    weights_of,
)
from formats.families import MAX_LEN, SKIPPED, model_config, name_table, pattern
from formats.gguf import open_gguf
from formats.huggingface import open_hf
from formats.sources import Source, Stored
from formats.tokenizers.files import read_tokenizer_file
from model import ModelConfig, Transformer

# ---------------------------------------------------------------- which tensor goes where

PARTS = {  # weights that are fused here, but not in the sources
    "qkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias"), "gate_up": ("gate", "up"),
}  # fmt: skip
ROTATED = ("q", "k", "q_bias", "k_bias")


def in_parts(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Splits fused weights into their parts, which are views of their rows. `weights` holds our weights, or
    tensors with as many rows (their scales), by name."""
    q, kv, ff = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff
    sizes = {"qkv": (q, kv, kv), "qkv_bias": (q, kv, kv), "gate_up": (ff, ff)}
    parts = {}
    for name, weight in weights.items():
        block, _, kind = name.rpartition(".")
        if kind in PARTS:
            for part, rows in zip(PARTS[kind], weight.split(sizes[kind])):
                parts[f"{block}.{part}"] = rows
        else:
            parts[name] = weight
    return parts


def match(source: Source, config: ModelConfig, shapes: dict[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Returns (our name -> theirs, theirs that are skipped). `shapes`: our weights in parts, without data.
    Raises UserError for a tensor that is unknown, missing, of another shape than the configuration says, or
    of a dtype that cannot be converted."""
    table = name_table(source.names, config.post_norms)
    found, skipped = {}, []
    for theirs, stored in source.tensors.items():
        number = re.search(r"\.(\d+)\.", theirs)
        ours = table.get(pattern(theirs), "").replace("#", number[1] if number else "")
        if SKIPPED.search(theirs) or (ours == "unembedding" and config.tie_embeddings):
            skipped.append(theirs)
            continue
        if ours not in shapes:
            raise UserError(f"unknown tensor {theirs}: this configuration has no such weight")
        has, needed = list(stored.shape), list(shapes[ours].shape)
        if has != needed:
            raise UserError(f"{theirs} has shape {has}, but the configuration says {needed}")
        if stored.dtype not in (*STORED, torch.float64):
            known = "floating-point weights of 16 bits or more"
            raise UserError(f"{theirs} is of {stored.dtype}; only {known} can be converted")
        found[ours] = theirs
    missing = [name for name in shapes if name not in found]
    if missing:
        raise UserError(f"there is no tensor for {missing[0]} ({len(missing)} missing); download it again")
    return found, skipped


# ---------------------------------------------------------------- writing


def fill(target: Tensor, stored: Stored, half: int | None, plus_one: bool) -> None:
    """Copies a tensor to its place, piece by piece. With `half`, its rows are the interleaved rotary pairs
    (2i, 2i + 1) of heads of width 2 half, and become (i, i + half). `plus_one` adds 1."""
    at = 0
    for piece in stored.pieces():
        part = target[at : at + len(piece)]
        at += len(piece)
        if plus_one:
            part.copy_(piece.float() + 1)
        elif half:
            width = math.prod(part.shape[1:])  # 1 for a bias
            part.view(-1, 2, half, width).copy_(piece.view(-1, half, 2, width).transpose(1, 2))
        else:
            part.copy_(piece)


def copy_weights(source: Source, config: ModelConfig, found: dict[str, str], content: dict) -> None:
    """Copies every tensor of the source to its place in the weights of our file's content. Raises UserError
    for values that are not finite after the copy."""
    weights = in_parts(content["weights"], config)
    scales = in_parts(content.get("scales", {}), config)
    gemma = source.config["model_type"].startswith("gemma")
    size = sum(weight.nbytes for weight in weights.values())
    with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for ours, theirs in found.items():
            kind, target = ours.rpartition(".")[2], weights[ours]
            if ours in scales:
                target = torch.empty(target.shape)  # float32, one matrix at a time
            half = config.head_dim // 2 if source.interleaved and kind in ROTATED else None
            plus_one = gemma and source.names == "hf" and "norm" in kind
            fill(target, source.tensors[theirs], half, plus_one)
            check_values(target, theirs)
            if ours in scales:
                rows, scale = quantized(target)
                weights[ours].copy_(rows)
                scales[ours].copy_(scale)
            bar.update(weights[ours].nbytes)


def convert(path: Path, out: Path, dtype=None, max_len=None, tokenizer: Path | None = None) -> str:
    """Writes the checkpoint at `path` to `out`, whole or not at all, and returns a report. dtype None: the
    source's own, but float32 for GGUF; vectors are always float32, so Gemma's norms, stored here as w + 1,
    lose nothing. `tokenizer` replaces the source's; with the name none, the file has no tokenizer. Raises
    UserError."""
    inside = [file for file in path.iterdir() if file.suffix != ".pt"] if path.is_dir() else []
    check_outputs([out], [path, tokenizer, *inside])
    if is_gguf(path):
        source = open_gguf(path)
    elif (path / "config.json").is_file():
        source = open_hf(path)
    else:
        raise UserError(f"{path}: is neither a GGUF file nor a folder with config.json; download one first")
    blob = None
    try:
        if str(tokenizer) != "none":
            blob = read_tokenizer_file(tokenizer) if tokenizer else source.find_tokenizer()
    except UserError as error:
        raise UserError(f"{error}; --tokenizer none converts the model without one") from None
    with reading(path, "the configuration is not that of a model"):
        config = model_config(source.config, max_len)
        with torch.device("meta"):
            shapes = weights_of(Transformer(config))
        found, skipped = match(source, config, in_parts(shapes, config))
    if blob is not None:
        tokens = read_tokenizer(path, blob, config.vocab_size)
        if not config.ends:
            config = replace(config, eos_id=tokens.ends)
    if dtype is None:
        own = source.tensors[found["embedding"]].dtype
        dtype = own if own in STORED else torch.float32

    entries = {"config": asdict(config), "tokenizer": as_blob(blob), "chat_template": source.chat_template}
    with whole_file(out) as part:
        content = reserve(part, entries, shapes, dtype)
        with reading(path):
            copy_weights(source, config, found, content)
        seal(part)
    return summary(path, out, source, content, found, skipped)


def reserve(part: str, entries: dict, shapes: dict[str, Tensor], dtype: torch.dtype) -> dict:
    """Writes a checkpoint in which space is reserved for the weights, and returns its content, memory-mapped:
    whatever is written to these tensors is written to the file. Raises UserError if the disk has too little
    space."""
    weights, scales = {}, {}
    for name, shape in shapes.items():
        weights[name] = torch.empty(shape.shape, dtype=dtype if shape.dim() > 1 else torch.float32)
        if weights[name].dtype == torch.int8:
            scales[name] = torch.empty(len(shape), dtype=torch.bfloat16)
    content = {"format": FORMAT, **entries, "weights": weights, **({"scales": scales} if scales else {})}
    with torch.serialization.skip_data():  # leaves holes for the data; the memory of `weights` is never used
        save_part(part, content)
    size, free = os.path.getsize(part), shutil.disk_usage(os.path.dirname(part)).free
    if free < size:
        need = f"needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f}"
        raise UserError(f"{part.removesuffix('.part')}: {need}; make room, or convert to a smaller --dtype")
    if hasattr(os, "posix_fallocate"):  # otherwise a disk that fills up later would end the process
        with open(part, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(part, weights_only=True, mmap=True)
    if content["tokenizer"] is not None:
        mapped["tokenizer"].copy_(content["tokenizer"])
    return mapped


def summary(path: Path, out: Path, source: Source, content: dict, found: dict, skipped: list) -> str:
    """Reports what was read, renamed, skipped and written; equal blocks are counted together."""
    default = asdict(ModelConfig())
    settings = [f"{name} {value}" for name, value in content["config"].items() if value != default[name]]
    renamed = [f"{pattern(theirs)} -> {pattern(ours)}" for ours, theirs in found.items()]
    tokenizer = "with its tokenizer"
    if content["tokenizer"] is None:
        tokenizer = "without a tokenizer: decode.py takes and prints token ids"
    elif source.chat_template:
        tokenizer += " and chat template"
    kind = str(content["weights"]["embedding"].dtype).removeprefix("torch.")
    return f"""\
read {path}: {source.layout}, {len(source.tensors)} tensors, {source.config["model_type"]}
config: {", ".join(settings)}
renamed: {counted(renamed)}
skipped: {counted(map(pattern, skipped))}
wrote {out}: {out.stat().st_size / 1e9:.2f} GB, {kind}, {tokenizer}"""


def counted(names: Iterable[str]) -> str:
    """Each name once, with the number of times that it occurred."""
    counts = Counter(names).items()
    return ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in counts) or "nothing"


# ---------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file to convert")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the source's own, but float32 for GGUF")
    parser.add_argument("--max-len", type=int, help=f"positions (default: the model's, at most {MAX_LEN})")
    kinds = "sentencepiece model, tokenizer.json, or none"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=f"{kinds} (default: SOURCE's)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    add_thread_flag(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    use_threads(args.threads)
    if args.out.is_file() and not args.overwrite:
        raise UserError(f"{args.out}: already exists; give another name, or --overwrite")
    print(convert(args.source, args.out, DTYPES.get(args.dtype), args.max_len, args.tokenizer))


if __name__ == "__main__":
    run(main)
