"""A shortlist of the vocabulary: the ids that confidence checks score if a head over all ids would cost too
much.

It holds the most frequent ids of a corpus, which a model keeps as `frequent_ids` (tools/shortlist.py counts
them), and the ids of the prompt and of the text so far (after FR-Spec, Zhao 2025). The rows of the
unembedding that belong to the frequent ids are gathered once for a model; those of new ids are appended. The
LM head is then the topmost step of the staircase: a token that exits after all L blocks skips it (lossy), or
has it computed later (verified).

Dimensions: n ids, d model width.
"""

import os
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import check_input
from decoding.weights import head_part
from model import Transformer

_FREQUENT = weakref.WeakKeyDictionary()  # model -> size -> what all of its runs share


class Shortlist:
    """The shortlist of one text. `ids` (n,) int64; `weights` holds their rows of the unembedding, (n, d) in
    all: those of the frequent ids, in the form that heads multiply with, then the others."""

    def __init__(self, model: Transformer, size: int, length: int):
        """The `size` most frequent ids, and room for `length` more: those of the prompt and of tokens from
        the full model (drafts are already in it). Raises UserError if fewer are known."""
        self.model = model
        self.ids, weight, known = frequent(model, size)
        self.weights = [weight]
        self._known = set(known)
        rows = model.unembedding(self.ids[:1])
        self._more = rows.new_empty(length, model.config.d_model)  # rows of the other ids
        self._count = 0  # how many these are

    def add(self, tokens: list[int]) -> None:
        """Appends the tokens that are not in the shortlist yet."""
        new = [token for token in dict.fromkeys(tokens) if token not in self._known]
        if not new:
            return
        self._known.update(new)
        ids = torch.tensor(new, device=self.ids.device)
        self.ids = torch.cat([self.ids, ids])
        first, self._count = self._count, self._count + len(new)
        self._more[first : self._count] = self.model.unembedding(ids)
        self.weights = [self.weights[0], self._more[: self._count]]


def frequent(model: Transformer, size: int) -> tuple[Tensor, Tensor, frozenset[int]]:
    """The `size` most frequent ids (size,), their rows of the unembedding (size, d), and the ids as a set;
    made once for a model, whose weights must not change between its runs. Raises UserError if there are
    fewer."""
    made = _FREQUENT.setdefault(model, {})
    if size not in made or made[size][0] is not model.frequent_ids:
        if model.frequent_ids is None:
            remedy = "count them with python -m tools.shortlist"
            raise UserError(f"shortlist is {size}, but no frequent ids are known; {remedy}")
        if len(model.frequent_ids) < size:
            count = len(model.frequent_ids)
            raise UserError(f"shortlist is {size}, but only {count} ids occurred in the corpus counted")
        ids = model.frequent_ids[:size].to(model.device)
        made[size] = model.frequent_ids, ids, head_part(model, ids), frozenset(ids.tolist())
    return made[size][1:]


# ---------------------------------------------------------------- frequent ids on a disk


def find_frequent_ids(file, checkpoint, heads, content: dict, vocab_size: int) -> Tensor | None:
    """The frequent ids, (n,) int64: those in `file` if one is named, else those in the content of a
    checkpoint and its `heads`, else those in a file next to one of the two (model.ids.npy next to model.pt),
    else None. Raises UserError for anything but a list of the model's ids."""
    if file is None and "frequent_ids" in content:
        return checked_ids(content["frequent_ids"], vocab_size, f"{heads or checkpoint}, frequent_ids")
    if file is None:
        nearby = [ids_beside(each) for each in (heads, checkpoint) if each is not None]
        file = next((path for path in nearby if path.is_file()), None)
    return None if file is None else checked_ids(read_ids(file), vocab_size, file)


def ids_beside(checkpoint: str | os.PathLike) -> Path:
    """The file of ids that may lie next to a checkpoint or a heads file."""
    return Path(checkpoint).with_suffix(".ids.npy")


def read_ids(file: str | os.PathLike) -> Tensor | None:
    """The tensor in a .npy file; None if it holds none. Raises UserError if there is no such file."""
    check_input(file, "no such file; python -m tools.shortlist makes a file of frequent ids")
    try:
        with open(file, "rb") as opened:
            return torch.from_numpy(np.lib.format.read_array(opened, allow_pickle=False))
    except (ValueError, TypeError, EOFError):  # not a .npy file, cut short, or of a dtype that torch lacks
        return None


def checked_ids(ids, vocab_size: int, where: str | os.PathLike) -> Tensor:
    """The ids as (n,) int64. Raises UserError unless they are a list of ids from 0 to vocab_size - 1, each
    once."""
    kinds = (torch.int32, torch.int64)
    if not isinstance(ids, Tensor) or ids.dtype not in kinds or ids.dim() != 1 or not len(ids):
        raise UserError(f"{where}: is not a list of token ids, as python -m tools.shortlist writes")
    for wrong in ids[(ids < 0) | (ids >= vocab_size)].tolist():
        limits = f"the model's run from 0 to {vocab_size - 1}; count the ids with its tokenizer"
        raise UserError(f"{where}: holds the id {wrong}, but {limits}")
    if len(ids.unique()) < len(ids):
        raise UserError(f"{where}: holds an id twice; each may occur only once")
    return ids.to(torch.int64)
