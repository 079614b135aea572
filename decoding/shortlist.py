"""A shortlist of the vocabulary: what exits are asked over where a head over all ids would cost more than the
blocks.

Its ids are the most frequent ones of a corpus, which a model keeps as `frequent_ids` (tools/shortlist.py
counts them), with those of the prompt and of the text so far (after FR-Spec, Zhao 2025). Their rows of the
unembedding are laid side by side once; new ids are appended. The head over the whole vocabulary then is the
topmost step of the staircase, which an exit after all L blocks leaves out (lossy) or owes (verified).

Dimensions: n ids, d model width.
"""

import weakref

import torch
from torch import Tensor

from common.errors import UserError
from formats.weights import as_form
from model import Transformer

_FREQUENT = weakref.WeakKeyDictionary()  # model -> size -> what all of its runs share


class Shortlist:
    """The shortlist of one text. `ids` (n,) int64; `weights` their rows of the unembedding, (n, d) in all:
    those of the frequent ids, in the form that heads multiply with, then the others."""

    def __init__(self, model: Transformer, size: int, length: int):
        """The `size` most frequent ids, and room for `length` more: those of the prompt and of tokens from
        the full model (a draft is in it already). Raises UserError if the model knows not so many."""
        self.unembed = model.unembed
        self._frequent_ids, self._frequent_weight, known = frequent(model, size)
        self._known = set(known)
        self._more_ids = self._frequent_ids.new_empty(length)
        self._more_weight = self.unembed.new_empty(length, self.unembed.shape[1])
        self._count = 0
        self.ids, self.weights = self._frequent_ids, [self._frequent_weight]

    def add(self, tokens: list[int]) -> None:
        """Appends those of the tokens that are not there yet."""
        new = [token for token in dict.fromkeys(tokens) if token not in self._known]
        if not new:
            return
        self._known.update(new)
        rows = slice(self._count, self._count + len(new))
        self._count += len(new)
        self._more_ids[rows] = torch.tensor(new, device=self._more_ids.device)
        self._more_weight[rows] = self.unembed[self._more_ids[rows]]
        self.ids = torch.cat(
            [self._frequent_ids, self._more_ids[: self._count]]
        )  # ids are few bytes, rows are not
        self.weights = [self._frequent_weight, self._more_weight[: self._count]]


def frequent(model: Transformer, size: int) -> tuple[Tensor, Tensor, frozenset[int]]:
    """The `size` most frequent ids (size,), their rows of the unembedding (size, d), and the ids as a set;
    made once for a model, whose weights must not change between its runs. Raises UserError if there are not
    so many."""
    made = _FREQUENT.setdefault(model, {})
    if size not in made or made[size][0] is not model.frequent_ids:
        if model.frequent_ids is None:
            raise UserError(
                f"shortlist is {size}, but no frequent ids are known; count them with "
                "python -m tools.shortlist"
            )
        if len(model.frequent_ids) < size:
            raise UserError(
                f"shortlist is {size}, but only {len(model.frequent_ids)} ids occurred in the corpus counted"
            )
        ids = model.frequent_ids[:size].to(model.embedding.device)
        made[size] = model.frequent_ids, ids, as_form(model.unembed[ids], model.form), frozenset(ids.tolist())
    return made[size][1:]
