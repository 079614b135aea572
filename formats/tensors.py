"""Files of tensors, opened without reading the tensors: safetensors, and what torch.save has written."""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.files import parse_json
from formats.checkpoint import in_words, is_plain
from formats.sources import Stored

SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


def check_regular(path: Path) -> None:
    """Raises UserError for a folder, a FIFO or a device, which may have the name of a file of weights."""
    if not path.is_file():
        raise UserError(f"{path}: is no regular file; name the file that holds the data")


# ---------------------------------------------------------------- safetensors


class Entry(NamedTuple):
    """Where a tensor of a safetensors file lies: bytes from the beginning of the data, and what they are."""

    begin: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, memory-mapped: 8 bytes of header length, a JSON header, the data.
    Every length and offset is checked against the file; the tensors must fill the data without gap or
    overlap, as the format demands. Raises UserError."""
    check_regular(path)
    size = path.stat().st_size
    header, start = read_header(path, size)
    entries = {name: read_entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].stop)):
        if entry.begin != end:
            wrong = f"begins at byte {entry.begin}, where {end} was expected"
            raise UserError(f"{path}: {name} {wrong}: the tensors overlap or leave a gap")
        end = entry.stop
    if end != size - start:
        raise UserError(
            f"{path}: its tensors need {end} bytes of data, the file has {size - start}; download it again"
        )
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def piece(entry: Entry) -> list[Tensor]:
        raw = data[start + entry.begin : start + entry.stop]
        if (
            start + entry.begin
        ) % entry.dtype.itemsize:  # the format does not promise alignment, torch needs it
            raw = raw.clone()
        return [raw.view(entry.dtype).view(entry.shape)]

    return {name: Stored(entry.shape, entry.dtype, partial(piece, entry)) for name, entry in entries.items()}


def read_header(path: Path, size: int) -> tuple[dict, int]:
    """The header of a safetensors file, name -> entry, and the byte at which the data begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            wrong = f"a header of {length} bytes in a file of {size} (at most {MAX_HEADER})"
            raise UserError(f"{path}: {wrong}; cut short, or no safetensors")
        header = parse_json(file.read(length), f"{path}: its header", object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is no JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def unique(pairs: list[tuple[str, object]]) -> dict:
    """The pairs of a JSON object, whose names must differ."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def read_entry(path: Path, name: str, entry) -> Entry:
    """One entry of a safetensors header, checked."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        known = f"known are {', '.join(SAFETENSORS)}"
        raise UserError(
            f"{path}: {name} is of dtype {dtype!s:.40}; {known}: convert it to one of these first"
        )
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 2**63 for number in numbers
        ):
            wrong = f"has shape {shape!s:.40} and offsets {offsets!s:.40}"
            raise UserError(f"{path}: {name} {wrong}; both must be lists of integers, at least 0")
    needed = math.prod(shape) * SAFETENSORS[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        wrong = f"takes {needed} bytes, but has the offsets {offsets!s:.40}"
        raise UserError(f"{path}: {name}, {dtype} {shape!s:.40}, {wrong}")
    return Entry(*offsets, tuple(shape), SAFETENSORS[dtype])


# ---------------------------------------------------------------- torch


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a torch file, memory-mapped; nothing in it is executed. Raises UserError."""
    check_regular(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{path}: not a readable torch file of weights ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: holds no plain dictionary of tensors")
    tensors = {}
    for name, tensor in content.items():
        if not is_plain(tensor):
            raise UserError(
                f"{path}: {name} is {in_words(tensor)}; only plain tensors of numbers can be converted"
            )
        tensors[name] = Stored(tuple(tensor.shape), tensor.dtype, partial(list, [tensor.detach()]))
    return tensors
