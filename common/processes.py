"""Several processes as one, under torchrun."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.errors import UserError
from common.flags import use_device


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Under torchrun, this process as one of its group; by itself otherwise. Raises UserError for a device
    that is not there."""
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
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(value: float | list[float], device: str):
    """The sum over all processes, of a number or of each in a list."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box)
    return box.tolist()


def gathered(value) -> list:
    """The value of every process, in each of them."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def by_first(action: Callable, *args):
    """What `action` returns, done in the first process alone while the others wait; there None. A mistake of
    the user's that it meets is raised in all of them."""
    made, mistake = None, None
    if processes()[0] == 0:
        try:
            made = action(*args)
        except (UserError, OSError) as error:
            mistake = str(error)
    mistake = gathered(mistake)[0]
    if mistake is not None:
        raise UserError(mistake)
    return made


def tell(text: str) -> None:
    """Prints from the first process, above its progress bar, at once, into a file, too."""
    if processes()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()
