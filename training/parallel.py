"""A training step in several processes under torchrun, each with the whole model on its own device. Every
process works on its own micro-batches, and DistributedDataParallel averages the gradients."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.flags import use_device
from training.device import DeviceBatch
from training.settings import TrainConfig

# ---------------------------------------------------------------- the processes


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Selects the device; under torchrun, also makes this process a member of its group. Raises UserError for
    a device that is not available."""
    rank = os.environ.get("LOCAL_RANK")
    use_device(f"cuda:{rank}" if device == "cuda" and rank is not None else device)
    if rank is None:
        yield
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the first may prepare much data meanwhile
    try:
        yield
        dist.barrier()  # no process leaves while another still saves or writes
    finally:
        dist.destroy_process_group()


def processes() -> tuple[int, int]:
    """The number of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return processes()[0] == 0


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block before the others do. If it fails, torchrun ends the others."""
    rank, world = processes()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and world > 1:
        dist.barrier()


def average(value: float, device: str) -> float:
    """The mean of a number over all processes."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box)
    return box.item() / processes()[1]


def tell(text: str) -> None:
    """Prints in the first process only, above its progress bar, and flushes the output at once."""
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()


# ---------------------------------------------------------------- around a step


def steps(stream: Iterator[DeviceBatch], config: TrainConfig, step: int) -> Iterator[list[DeviceBatch]]:
    """The micro-batches of this process for each step from number `step` on. Each gets the share that its
    loss has in the mean over the targets of all processes, times the number of processes, because their
    gradients are averaged; and a number, the seed of its layer dropout."""
    rank, world = processes()
    for now in itertools.count(step):
        parts = list(itertools.islice(stream, config.accumulate))
        targets = average(float(sum(len(part.targets) for part in parts)), config.device)
        for turn, part in enumerate(parts):
            number, share = (now * config.accumulate + turn) * world + rank, len(part.targets) / targets
            parts[turn] = part._replace(share=share, number=number, ends_step=turn == config.accumulate - 1)
        yield parts


class Replica(DistributedDataParallel):
    """One process's copy of the model; gradients are averaged only after the last micro-batch of a step."""

    def forward(self, batch: DeviceBatch, step: int):
        with contextlib.nullcontext() if batch.ends_step else self.no_sync():
            return super().forward(batch, step)


def distribute(objective: nn.Module, config: TrainConfig) -> nn.Module:
    """The objective as it is; with several processes, a `Replica` of it, whose gradients are averaged."""
    if processes()[1] == 1:
        return objective
    shape = objective.model.config
    unused = bool(config.layer_dropout or shape.exit_norms or shape.classifiers)  # in some steps
    return Replica(objective, find_unused_parameters=unused, gradient_as_bucket_view=True)
