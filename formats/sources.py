"""What an opened public checkpoint is, whatever its layout: tensors that are read when they are asked for,
and a configuration in the words of a Hugging Face config.json, so that convert.py translates only once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """A tensor where it lies. `pieces` yields it in parts that follow each other along `dim`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]
    dim: int = 0


@dataclass
class Source:
    """An opened checkpoint."""

    layout: str  # what it was recognized as
    config: dict  # in the words of config.json
    names: str  # whose names the tensors have: hf, meta or gguf
    tensors: dict[str, Stored]
    interleaved: bool  # the rotary pairs of a head are (2i, 2i + 1), not (i, i + C/2)
    find_tokenizer: Callable[
        [], tuple[bytes | None, str]
    ]  # its bytes (formats/tokenizer.py), a note if there is none
    note: str = ""  # what the user should know
    tokenizer: bytes | None = None
    chat_template: str | None = None  # see formats/chat.py
