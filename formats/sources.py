"""The common form of an opened public checkpoint, whether it is a Hugging Face folder or a GGUF file: tensors
that are read when they are needed, and a configuration with the keys of a Hugging Face config.json."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """A tensor that has not been read yet; `pieces` yields its rows in one part or several."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    layout: str  # what the report calls it
    config: dict  # with the keys of config.json
    names: str  # how its tensors are named: hf or gguf
    tensors: dict[str, Stored]
    interleaved: bool  # whether the rotary pairs of a head are (2i, 2i + 1) instead of (i, i + C/2)
    find_tokenizer: Callable[[], bytes | None]  # what formats/tokenizers reads; None if there is no tokenizer
    chat_template: str | None  # see formats/chat.py
