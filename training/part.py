"""A training over a part of the vocabulary: what the head over all V ids costs is most of a step where V is
large, and decoding asks its exits over a shortlist (decoding/shortlist.py) anyway.

Dimensions: N learned targets of a micro-batch, n ids of the part, d model width.
"""

import torch
from torch import Tensor

from model import Transformer
from training.device import DeviceBatch


def part_of_vocabulary(model: Transformer, size: int | None, batch: DeviceBatch) -> tuple[Tensor, Tensor]:
    """The unembedding of the `size` most frequent ids with those of the batch's texts, (n, d), and the
    targets as their places in it, (N,). size None: the whole unembedding, and the targets as they are."""
    if size is None:
        return model.unembed, batch.targets
    frequent = model.frequent_ids[:size].to(batch.targets.device)
    ids = torch.cat([frequent, batch.inputs.flatten(), batch.targets]).unique()  # (n,), rising
    return model.unembed[ids], torch.searchsorted(ids, batch.targets)
