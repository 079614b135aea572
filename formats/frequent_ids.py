"""Frequent ids: the token ids of a corpus by falling count, which a shortlist begins with
(decoding/shortlist.py). tools/shortlist.py counts them; they lie in a checkpoint, or in a small .npy file of
their own, perhaps beside it."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import check_input


def find_frequent_ids(
    file: str | os.PathLike | None,
    checkpoint: str | os.PathLike,
    heads: str | os.PathLike | None,
    content: dict,
    vocab_size: int,
) -> Tensor | None:
    """The ids in `file`; without one those in the content of a checkpoint and its `heads`; without these
    those in a file beside one of the two (model.ids.npy beside model.pt), if there are any: (n,) int64.
    Raises UserError for what is no list of a model's ids."""
    if file is None and "frequent_ids" in content:
        return checked(content["frequent_ids"], vocab_size, f"{heads or checkpoint}, frequent_ids")
    beside = [ids_beside(each) for each in (heads, checkpoint) if each is not None]
    for found in [path for path in beside if path.is_file()] if file is None else [file]:
        return checked(read_ids(found), vocab_size, found)
    return None


def ids_beside(checkpoint: str | os.PathLike) -> Path:
    """The file of ids that may lie beside a checkpoint, or a file of heads."""
    return Path(checkpoint).with_suffix(".ids.npy")


def read_ids(file: str | os.PathLike) -> Tensor | None:
    """What a .npy file holds; None if that is no row of numbers. Raises UserError for another file."""
    check_input(file, "no such file; it was to hold frequent ids (python -m tools.shortlist makes one)")
    try:
        with open(file, "rb") as opened:
            return torch.from_numpy(np.lib.format.read_array(opened, allow_pickle=False))
    except (
        ValueError,
        TypeError,
        EOFError,
        MemoryError,
    ):  # no .npy, cut short, or of a kind that torch does not know
        return None


def checked(ids, vocab_size: int, where: str | os.PathLike) -> Tensor:
    """The ids as (n,) int64. Raises UserError unless they are a list of ids from 0 to vocab_size - 1, each
    once."""
    kinds = (torch.int32, torch.int64)
    if not isinstance(ids, Tensor) or ids.dtype not in kinds or ids.dim() != 1 or not len(ids):
        raise UserError(f"{where}: no list of token ids, as python -m tools.shortlist writes it")
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UserError(
            f"{where}: holds the id {wrong}, but the model's run from 0 to {vocab_size - 1}; count the ids "
            "with this model's tokenizer"
        )
    if len(ids.unique()) < len(ids):
        raise UserError(f"{where}: holds an id twice; each must be there once")
    return ids.to(torch.int64)
