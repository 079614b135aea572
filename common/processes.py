"""Several processes as one, under torchrun."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.flags import check_device


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Under torchrun, this process as one of its group; by itself otherwise. Raises ValueError for a device that is not there."""
    check_device(device)
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))  # the first may prepare much data meanwhile
    try:
        yield
        dist.barrier()  # no process leaves while another still saves or writes
    finally:
        dist.destroy_process_group()


def processes() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(value: float, device: str) -> float:
    """The sum over all processes."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box)
    return box.item()


def gathered(value) -> list:
    """The value of every process, in each of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def tell(text: str) -> None:
    """Prints from the first process, above its progress bar, at once, into a file, too."""
    if processes()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()
