"""Moving batches to the device that trains."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.batches import Batch


class DeviceBatch(NamedTuple):
    """A micro-batch on the device: B rows of T positions, N of which have a target. The last three fields
    describe its place in a step (`steps` in training/parallel.py)."""

    inputs: Tensor  # (B, T)
    documents: Tensor  # (B, T)
    learned: Tensor  # positions whose next token is a target, as indices into the B T: (N,)
    targets: Tensor  # the tokens that follow them: (N,)
    share: float = 1.0  # the weight of its loss in the loss of the step
    number: int = 0  # the seed of its layer dropout
    ends_step: bool = True


def to_device(batch: Batch, device: str) -> DeviceBatch:
    """Copies a batch to the device. The positions with a target are found first, on the CPU; copies to a GPU
    start from pinned memory, so that the CPU does not wait for them."""
    learned = np.flatnonzero(batch.targets >= 0)
    arrays = batch.inputs, batch.documents, learned, batch.targets.flat[learned]
    parts = [torch.from_numpy(array) for array in arrays]
    if torch.device(device).type == "cuda":
        parts = [part.pin_memory() for part in parts]
    return DeviceBatch(*(part.to(device, non_blocking=True) for part in parts))


def on_device(stream: Iterator[Batch], device: str) -> Iterator[DeviceBatch]:
    """The batches on the training device. For a GPU, the next batch is packed and copied while the GPU works
    on the current one."""
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"  # another thread has its own current device
    moved = (to_device(batch, device) for batch in stream)
    return fetched_ahead(moved) if device.startswith("cuda") else moved


def fetched_ahead(items: Iterator) -> Iterator:
    """The same items in the same order; each is made in another thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
