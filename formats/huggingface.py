"""Hugging Face folders: config.json with *.safetensors or else pytorch_model*.bin, one or several, with an
index or without. The tensors are memory-mapped, not read."""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import check_input, read_json, reading
from formats.chat import find_template
from formats.sources import Source, Stored
from formats.tokenizers.files import find_tokenizer

DTYPES = {  # of safetensors; convert.py names those that it cannot convert
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


def open_hf(folder: Path) -> Source:
    """Opens a folder; its safetensors files are used if there are any. Raises UserError."""
    check_links(folder)
    config = read_json(folder / "config.json", "a configuration")
    config["eos_token_id"] = end_tokens(folder, config.get("eos_token_id"))
    kind, read, files = "safetensors", read_safetensors, weight_files(folder, "*.safetensors")
    if not files:
        kind, read, files = "torch", read_torch, weight_files(folder, "pytorch_model*.bin")
    if not files:
        raise UserError(f"{folder}: has a config.json, but neither *.safetensors nor pytorch_model*.bin")
    tensors: dict[str, Stored] = {}
    for file in files:
        with reading(file, f"not a readable {kind} file of weights; download it again"):
            tensors |= read(file)
    layout = f"Hugging Face folder, {len(files)} {kind} file(s)"
    find = partial(find_tokenizer, folder)
    return Source(layout, config, "hf", tensors, False, find, find_template(folder))


def check_links(folder: Path) -> None:
    """Raises UserError for a symbolic link that leads outside of the folder: a file of somebody else's could
    become part of what is converted. In the cache of Hugging Face, the files of snapshots/NAME are links to
    blobs/, next to snapshots/."""
    inside = folder.resolve()
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    for path in folder.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(f"{path}: is a link that leads outside of {inside}; put the file itself there")


def weight_files(folder: Path, pattern: str) -> list[Path]:
    """The files that an index names, else all files with such a name."""
    for index in folder.glob(f"{pattern}.index.json"):
        places = read_json(index, "an index of weights")
        with reading(index, "not an index of weights"):
            files = sorted({folder / Path(name).name for name in places["weight_map"].values()})
        for file in files:
            check_input(file, f"named in {index.name}, but missing; download it")
        return files
    return sorted(folder.glob(pattern))


def end_tokens(folder: Path, stated: list | int | None) -> list | int | None:
    """The ids that end a text: those that config.json states, and those that generation_config.json adds,
    such as the end of a turn in a chat. If config.json states none, there are none."""
    path = folder / "generation_config.json"
    if stated is None or not path.is_file():
        return stated
    more = read_json(path, "settings of generation").get("eos_token_id") or []
    lists = [ids if isinstance(ids, list) else [ids] for ids in (stated, more)]
    return lists[0] + lists[1]


# ---------------------------------------------------------------- files of tensors


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, the data. Raises UserError
    for a file that is cut short, other exceptions for a damaged header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        shape, dtype, (begin, stop) = tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["data_offsets"]
        if stop > len(data):
            raise UserError(f"{path}: cut short; download it again")
        tensors[name] = Stored(shape, dtype, partial(view, data[begin:stop], dtype, shape))
    return tensors


def view(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    """The tensor in these bytes, as a list of one piece."""
    if raw.storage_offset() % dtype.itemsize:  # safetensors does not promise alignment, but torch needs it
        raw = raw.clone()
    return [raw.view(dtype).view(shape)]


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a torch file; nothing in it is executed."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = {}
    for name, tensor in content.items():
        tensors[name] = Stored(tuple(tensor.shape), tensor.dtype, partial(list, [tensor.detach()]))
    return tensors
