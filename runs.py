"""What keeps a long training safe: its log, its end by a signal, going on where it stopped; and several processes as one (torchrun)."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import check_device, whole_file

# ---------------------------------------------------------------- processes


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


# ---------------------------------------------------------------- one run


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT, noted in a list instead of ending the process, so that a run ends between two steps, with a checkpoint."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_log(path: Path) -> list[dict]:
    """The rows of a log; what is none, as where the machine stopped while it wrote, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Log:
    """JSON lines: step, loss and tokens_per_s of each step; step, dev file and [loss, agreement] by layer of each validation."""

    def __init__(self, path: Path, step: int):
        """Goes on after `step`; what an interrupted run has written beyond it goes."""
        rows = read_log(path) if path.exists() else []
        with whole_file(path) as part:
            Path(part).write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step), encoding="utf-8")
        self.path = path

    def write(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


def check_resumable(checkpoint: Path, content: dict, settings: dict, free: set[str]) -> None:
    """Raises ValueError unless the run that wrote the checkpoint's content had the same settings, but for the `free`, and has not gone
    beyond max_steps."""
    remedy = "give another --out, or --overwrite"
    if "training" not in content:
        raise ValueError(f"{checkpoint}: holds a model but no training to go on with; {remedy}")
    then = {**content["training"]["config"], **content["config"]}
    other = [name for name in settings if settings[name] != then.get(name) and name not in free]
    if other:
        raise ValueError(f"{checkpoint} was trained with {other[0]} {then.get(other[0])}, not {settings[other[0]]}; {remedy}")
    if content["training"]["step"] > settings["max_steps"]:
        raise ValueError(f"{checkpoint} is at step {content['training']['step']}, beyond max_steps {settings['max_steps']}; {remedy}")
