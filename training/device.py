"""Where a training computes, and in which precision: batches on their way to the device, bfloat16 and TF32 on
a GPU."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.batches import Batch
from training.settings import TrainConfig


class DeviceBatch(NamedTuple):
    """A batch on the device: B rows of T positions, N of which learn."""

    inputs: Tensor  # (B, T)
    documents: Tensor  # (B, T)
    learned: Tensor  # which positions learn, of B T: (N,)
    targets: Tensor  # what comes next there: (N,)


def to_device(batch: Batch, device: str) -> DeviceBatch:
    """The batch on the device. What learns is looked up before, where nobody waits for the answer; to a GPU
    the copies start from pinned memory, so that they go on beside its work."""
    learned = np.flatnonzero(batch.targets >= 0)
    arrays = batch.inputs, batch.documents, learned, batch.targets.flat[learned]
    parts = [torch.from_numpy(array) for array in arrays]
    if torch.device(device).type == "cuda":
        parts = [part.pin_memory() for part in parts]
    return DeviceBatch(*(part.to(device, non_blocking=True) for part in parts))


def on_device(stream: Iterator[Batch], config: TrainConfig) -> Iterator[DeviceBatch]:
    """The batches on the device of training; with `prefetch` the next is packed and copied while this one is
    worked on."""
    device = config.device
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"  # which another thread would not know
    if not config.prefetch:
        for batch in stream:
            yield to_device(batch, device)
        return

    def fetch() -> DeviceBatch | None:
        batch = next(stream, None)
        return None if batch is None else to_device(batch, device)

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(fetch)
        while True:
            batch = coming.result()
            if batch is None:
                return
            coming = thread.submit(fetch)
            yield batch


def autocast(config: TrainConfig):
    """Matrix products in the dtype of training, what is summed in float32."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, torch.bfloat16)


def set_precision(config: TrainConfig) -> None:
    """On a GPU, float32 matrix products by TF32 (10 bits of mantissa), or exact."""
    if torch.device(config.device).type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
