"""A training step in several processes under torchrun, each on its own device.

Every process takes micro-batches of its own, and gradients are averaged: by DistributedDataParallel, where
each process keeps the whole model, or with --shard by `fully_shard` (FSDP2; Zhao 2023; the idea is the third
stage of ZeRO, Rajbhandari 2020), where each keeps its part of every weight, gradient and moment, and has a
block whole only while it computes there. A part is a DTensor, a tensor that knows what the others hold. Files
hold whole tensors, so that a training run may go on sharded or not.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.errors import UserError
from common.flags import use_device
from training.device import DeviceBatch
from training.settings import TrainConfig

# ---------------------------------------------------------------- the processes


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Makes this process one of its group under torchrun; does nothing elsewhere. Raises UserError for a
    device that is not there."""
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
    """Prints from the first process, above its progress bar, and at once if it prints into a file."""
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()


# ---------------------------------------------------------------- around a step


def steps(stream: Iterator[DeviceBatch], config: TrainConfig, step: int) -> Iterator[list[DeviceBatch]]:
    """The micro-batches of this process for each step from number `step` on. Each gets the share that its
    loss has in the mean over the targets of all processes, times the number of processes, because their
    gradients are averaged; and a number, the seed of its layer dropout. The processes of a sharded model have
    equal numbers: they gather each block together, so they leave out the same ones."""
    rank, world = processes()
    for now in itertools.count(step):
        parts = list(itertools.islice(stream, config.accumulate))
        targets = average(float(sum(len(part.targets) for part in parts)), config.device)
        for turn, part in enumerate(parts):
            number, share = now * config.accumulate + turn, len(part.targets) / targets
            if not config.shard:
                number = number * world + rank
            parts[turn] = part._replace(share=share, number=number, ends_step=turn == config.accumulate - 1)
        yield parts


class Replica(DistributedDataParallel):
    """One process's copy of the model; gradients are averaged after the last micro-batch of a step alone."""

    def forward(self, batch: DeviceBatch, step: int):
        with contextlib.nullcontext() if batch.ends_step else self.no_sync():
            return super().forward(batch, step)


def distribute(objective: nn.Module, config: TrainConfig) -> nn.Module:
    """The objective as it is; with several processes one whose gradients are averaged, or a sharded one."""
    if config.shard:
        return shard(objective, config)
    if processes()[1] == 1:
        return objective
    shape = objective.model.config
    unused = bool(config.layer_dropout or shape.exit_norms or shape.classifiers)  # in some steps
    return Replica(objective, find_unused_parameters=unused, gradient_as_bucket_view=True)


# ---------------------------------------------------------------- a sharded model


def check_sharding(config: TrainConfig) -> None:
    """Raises UserError for --shard with one process, and for a torch that averages gradients wrongly."""
    if not config.shard:
        return
    if processes()[1] == 1:
        raise UserError("--shard needs several processes; start torchrun --nproc-per-node N train.py")
    if not averages_gradients(config.device):
        raise UserError(f"torch {torch.__version__} cannot --shard on {config.device}; install a newer torch")


def averages_gradients(device: str) -> bool:
    """Whether a sharded layer gets the mean of the processes' gradients, tried on a small one. (On a CPU,
    torch 2.6 raises, and some later versions give the sum: pytorch issue 162338.)"""
    from torch.distributed.fsdp import fully_shard  # here: importing it takes a second

    rank, world = processes()
    mesh = init_device_mesh(torch.device(device).type, (world,))
    try:
        layer = fully_shard(nn.Linear(1, world, bias=False), mesh=mesh)
        layer(torch.full((1, 1), rank + 1.0, device=device)).sum().backward()  # gradients 1, 2, .. world
        gradient = whole(layer.weight.grad)
    except (AttributeError, RuntimeError):
        return False
    return bool((gradient - (world + 1) / 2).abs().max() < 1e-5)


def shard(objective: nn.Module, config: TrainConfig) -> nn.Module:
    """Spreads the weights of `objective.model`, which move from main memory to the device part by part. Every
    block is a unit, gathered together; the rest (embedding, heads, norms) is one that stays whole during a
    step. In bfloat16 blocks are gathered rounded, and their gradients summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if config.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(torch.device(config.device).type, (processes()[1],))
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(objective, mesh=mesh, reshard_after_forward=False)


@contextlib.contextmanager
def heads_whole(objective: nn.Module) -> Iterator[None]:
    """Inside, the weights outside the blocks are whole, so that all processes may use them for validation."""
    sharded = hasattr(objective, "unshard")
    if sharded:
        objective.unshard()
    yield
    if sharded:
        objective.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be a part; all processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """These tensors for a file: parts become whole, in main memory. All processes must call it; only the
    first one gets the wholes, the others get empty tensors."""
    tensors = dict(values)
    for name, value in values.items():
        if hasattr(value, "full_tensor"):
            full = value.full_tensor()
            tensors[name] = full.cpu() if is_first() else full.new_empty(0)
    return tensors


def parts_like(values: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of whole tensors, where the weight of the same name and shape is a part."""
    parts = dict(values)
    for name, value in values.items():
        weight = weights.get(name)
        if hasattr(weight, "full_tensor") and value.shape == weight.shape:
            from torch.distributed.tensor import distribute_tensor

            parts[name] = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return parts
