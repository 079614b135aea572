"""A public checkpoint -> one file of this project.

    python convert.py SOURCE out.pt --dtype bf16

SOURCE is a Hugging Face folder (config.json with *.safetensors or pytorch_model*.bin), a folder of Meta's
(params.json with consolidated.*.pth), a .bin of llama2.c, or a GGUF file (with the package gguf): the Llama
family (Llama 1 to 3.3, TinyLlama, OpenLLaMA, CodeLlama, LayerSkip, SmolLM, SmolLM3), Mistral, Qwen 2, 2.5 and
3, and Gemma 1, 2 and 3 (docs/checkpoints.md). Tensors stream one by one from file to file. With --dtype int8
a weight is one byte, for decoding on a CPU.
"""

import common.threads  # noqa: F401  before torch

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
from common.files import check_outputs, whole_file
from common.flags import DTYPES, Parser, add_thread_flag, read_dtype, use_threads
from formats.checkpoint import FORMAT, STORED, read_tokenizer, seal
from formats.families import MAX_LEN, SKIPPED, config_fields, name_table, pattern
from formats.gguf import open_gguf
from formats.huggingface import open_hf
from formats.int8 import Int8Matrix
from formats.llama import open_llama2c, open_meta
from formats.sources import Source, Stored
from formats.tokenizer_files import read_tokenizer_file
from model import ModelConfig, Transformer

# ---------------------------------------------------------------- what is there


def open_source(path: Path, tokenizer: Path | None = None) -> Source:
    """Recognizes a checkpoint by its content. `tokenizer` takes the place of the one in it or beside it; of
    the name none, there is none. Raises UserError for what is none of the known layouts, or damaged."""
    if (path / "config.json").is_file():
        source = open_hf(path)
    elif (path / "params.json").is_file():
        source = open_meta(path)
    elif path.is_dir():
        needed = "config.json (Hugging Face) or params.json (Meta) beside the weights"
        raise UserError(f"{path}: no checkpoint folder; it needs {needed}")
    elif path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        source = open_gguf(path) if magic == b"GGUF" else open_llama2c(path)
    else:
        raise UserError(f"{path}: no such file or folder")
    if tokenizer is None:
        source.tokenizer, missing = source.find_tokenizer()
        source.note = "; ".join(note for note in (source.note, missing) if note)
    elif str(tokenizer) != "none":
        source.tokenizer = read_tokenizer_file(tokenizer)
    return source


def model_config(words: dict, max_len: int | None) -> ModelConfig:
    """The ModelConfig of a config.json. Raises UserError for a family that is not known, and for what is
    missing or not supported."""
    return ModelConfig(**config_fields(words, max_len))


def shapes_of(config: ModelConfig, tensors: dict) -> dict[str, Tensor]:
    """Our weights, by name, without data. Raises UserError for sizes that no model has, or that cannot be
    those of these tensors."""
    if config.n_layers > len(tensors):  # before they are made
        raise UserError(f"num_hidden_layers is {config.n_layers}, but there are only {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            return Transformer(config).state_dict()
    except RuntimeError as error:  # more numbers than 64 bits count
        raise UserError(
            f"the configuration has impossible sizes ({str(error).splitlines()[0][:100]})"
        ) from None


# ---------------------------------------------------------------- which tensor goes where

PARTS = {  # of what lies fused in ours
    "qkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias"), "gate_up": ("gate", "up"),
}  # fmt: skip
ROTATED = ("q", "k", "q_bias", "k_bias")


def parts_of(name: str) -> list[str]:
    """The names of a weight's parts: itself, unless it is a fused one."""
    block, _, kind = name.rpartition(".")
    return [f"{block}.{part}" for part in PARTS[kind]] if kind in PARTS else [name]


def place(name: str, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """Where the tensor or part of our `name` goes: a weight, or some rows of a fused one."""
    block, _, part = name.rpartition(".")
    q, kv, ff = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff
    sizes = {"qkv": (q, kv, kv), "qkv_bias": (q, kv, kv), "gate_up": (ff, ff)}
    for fused, parts in PARTS.items():
        if part in parts:
            rows = weights[f"{block}.{fused}"].split(sizes[fused])
            return rows[parts.index(part)]
    return weights[name]


def match(source: Source, config: ModelConfig, shapes: dict[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """(our name -> theirs, theirs that are skipped). Raises UserError for a tensor that is unknown, missing,
    of another shape than the configuration says, or not of real numbers. `shapes`: our weights, without
    data."""
    table = name_table(source.names, config.post_norms)
    needed = {part for name in shapes for part in parts_of(name)}
    found, skipped = {}, []
    for theirs, stored in source.tensors.items():
        ours = our_name(theirs, table)
        if SKIPPED.search(theirs) or (ours == "unembedding" and config.tie_embeddings):
            skipped.append(theirs)
            continue
        if ours not in needed or ours in found:
            what = f"unknown tensor {theirs} {list(stored.shape)}"
            raise UserError(f"{what}: the model of this configuration has no place for it")
        found[ours] = theirs
        here = list(place(ours, shapes, config).shape)
        if list(stored.shape) != here:
            raise UserError(f"{theirs} has the shape {list(stored.shape)}, but by the configuration {here}")
        if stored.dtype not in (*STORED, torch.float64):
            known = "floating-point weights of 16 bits or more"
            raise UserError(f"{theirs} is of {stored.dtype}; only {known} can be converted")
    missing = needed - set(found)
    if missing:
        name = their_name(min(missing), table)
        raise UserError(f"tensor {name if name.endswith('.bias') else name + '.weight'} is missing")
    return found, skipped


def our_name(theirs: str, table: dict[str, str]) -> str:
    """Our name of one of their tensors, "" for an unknown one."""
    number = re.search(r"\.(\d+)\.", theirs)
    ours = table.get(pattern(theirs), "")
    return ours.replace("#", number[1].lstrip("0") or "0") if number else ours


def their_name(ours: str, table: dict[str, str]) -> str:
    """Their name of one of our tensors, without .weight."""
    number = re.search(r"\.(\d+)\.", ours)
    back = {ours: theirs for theirs, ours in table.items()}
    theirs = back[re.sub(r"\.\d+\.", ".#.", ours)]
    return theirs.replace("#", number[1]) if number else theirs


# ---------------------------------------------------------------- writing


def fill(target: Tensor, stored: Stored, half: int | None, plus_one: bool) -> None:
    """Copies a tensor to its place, piece by piece. `half`: its rows are the interleaved rotary pairs (2i, 2i
    + 1) of heads of width 2 half, and become (i, i + half)."""
    at = 0
    for piece in stored.pieces():
        size = piece.shape[stored.dim]
        part = target.narrow(stored.dim, at, size)
        if plus_one:
            part.copy_(piece.float() + 1)
        elif half:
            width = math.prod(part.shape[1:])  # 1 for a bias
            part.view(-1, 2, half, width).copy_(piece.view(-1, half, 2, width).transpose(1, 2))
        else:
            part.copy_(piece)
        at += size


def copy_weights(
    source: Source, config: ModelConfig, found: dict[str, str], content: dict, title: str
) -> None:
    """Copies every tensor of the source to its place in the weights of our file's content. Raises UserError
    for one that is not finite there."""
    weights, scales = content["weights"], content.get("scales", {})
    gemma = source.config["model_type"].startswith("gemma")
    size = sum(weight.nbytes for weight in weights.values())
    with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, desc=title) as bar:
        for ours, theirs in found.items():
            target, kind = place(ours, weights, config), ours.rpartition(".")[2]
            stored = target
            if stored.dtype == torch.int8:
                target = torch.empty(stored.shape)  # float32, one at a time
            half = config.head_dim // 2 if source.interleaved and kind in ROTATED else None
            plus_one = gemma and source.names == "hf" and "norm" in kind
            fill(target, source.tensors[theirs], half, plus_one)
            if not torch.stack(torch.aminmax(target)).isfinite().all():
                name = str(target.dtype).removeprefix("torch.")
                remedy = "try --dtype fp32, or download it again"
                raise UserError(f"{theirs} has values that are not finite in {name}; {remedy}")
            if stored.dtype == torch.int8:
                matrix = Int8Matrix.of(target)
                stored.copy_(matrix.rows)
                place(ours, scales, config).copy_(matrix.scale)
            bar.update(stored.nbytes)


def convert(
    path: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    max_len: int | None = None,
    tokenizer: Path | None = None,
) -> str:
    """Writes the checkpoint at `path` to `out`, whole or not at all, and returns a report. dtype None: the
    source's own, for GGUF float32; vectors are always float32, so that Gemma's norms, stored here as w + 1,
    lose nothing. Raises UserError."""
    inside = [file for file in path.iterdir() if file.suffix != ".pt"] if path.is_dir() else []
    check_outputs([out], [path, tokenizer, *inside])
    source = open_source(path, tokenizer)
    try:
        config = model_config(source.config, max_len)
        shapes = shapes_of(config, source.tensors)
        found, skipped = match(source, config, shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if source.tokenizer is not None:
        tokens = read_tokenizer(path, source.tokenizer, config.vocab_size)
        if config.eos_id is None:
            config = replace(config, eos_id=tokens.ends)
    if dtype is None:
        own = source.tensors[found["embedding"]].dtype
        dtype = own if own in STORED else torch.float32

    with whole_file(out) as part:
        content = reserve(part, config, shapes, dtype, source)
        copy_weights(source, config, found, content, out.name)
        seal(part)
    tensors = [*content["weights"].values(), *content.get("scales", {}).values()]
    size = sum(tensor.nbytes for tensor in tensors)
    return report(path, out, source, config, found, skipped, size, dtype)


def reserve(
    part: str, config: ModelConfig, shapes: dict[str, Tensor], dtype: torch.dtype, source: Source
) -> dict:
    """Writes a checkpoint whose weights are still to come, its room on the disk taken, and returns its
    content, mapped: what is written to these tensors is written to the file. Raises UserError if the disk has
    too little room."""
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.empty(shape.shape, dtype=dtype if shape.dim() > 1 else torch.float32)
    blob = (
        None if source.tokenizer is None else torch.frombuffer(bytearray(source.tokenizer), dtype=torch.uint8)
    )
    content = {"format": FORMAT, "config": asdict(config), "weights": weights, "tokenizer": blob}
    if dtype == torch.int8:
        matrices = {name: weight for name, weight in weights.items() if weight.dtype == torch.int8}
        content["scales"] = {
            name: torch.empty(len(rows), dtype=torch.bfloat16) for name, rows in matrices.items()
        }
    if source.chat_template is not None:
        content["chat_template"] = source.chat_template
    with (
        torch.serialization.skip_data()
    ):  # holes for data, so that the untouched memory of `weights` never fills
        torch.save(content, part)
    size, free = os.path.getsize(part), shutil.disk_usage(os.path.dirname(part)).free
    if free < size:
        need = f"needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f}"
        raise UserError(f"{part.removesuffix('.part')}: {need}; make room, or convert to a smaller --dtype")
    if hasattr(os, "posix_fallocate"):  # else writing to memory whose disk is full meanwhile ends in a signal
        with open(part, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        content = torch.load(part, weights_only=True, mmap=True)
    if blob is not None:
        content["tokenizer"].copy_(blob)
    return content


def report(
    path: Path,
    out: Path,
    source: Source,
    config: ModelConfig,
    found: dict,
    skipped: list,
    size: int,
    dtype: torch.dtype,
) -> str:
    """What was read, renamed and skipped, blocks taken together."""
    default, settings = ModelConfig(), []
    for name, value in asdict(config).items():
        if value != getattr(default, name):
            settings.append(f"{name} {value}")
    renamed = [
        f"{pattern(theirs)} -> {re.sub(r'[.][0-9]+[.]', '.#.', ours)}" for ours, theirs in found.items()
    ]
    without = "without a tokenizer: decode.py takes and prints token ids"
    tokenizer = "with its tokenizer" if source.tokenizer else without
    if source.tokenizer and source.chat_template:
        tokenizer += " and chat template"
    lines = [
        f"read {path}: {source.layout}, {len(source.tensors)} tensors, {source.config['model_type']}",
        source.note,
        f"config: {', '.join(settings)}",
        f"renamed: {grouped(renamed)}",
        f"skipped: {grouped(map(pattern, skipped))}",
        f"wrote {out}: {size / 1e9:.2f} GB, {str(dtype).removeprefix('torch.')}, {tokenizer}",
    ]
    return "\n".join(line for line in lines if line)


def grouped(names: Iterable[str]) -> str:
    """The names, each once, with how often it occurred."""
    counts = Counter(names)
    return (
        ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in counts.items())
        or "nothing"
    )


# ---------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: the source's own; float32 for GGUF)")
    parser.add_argument("--max-len", type=int, help=f"positions (default: the model's, at most {MAX_LEN})")
    kinds = "sentencepiece model, tokenizer.json, file of ranks, llama2.c tokenizer.bin, or none"
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help=f"{kinds} (default: SOURCE's)")
    add_thread_flag(parser)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    use_threads(args.threads)
    print(convert(args.source, args.out, read_dtype(args.dtype), args.max_len, args.tokenizer))


if __name__ == "__main__":
    run(main)
