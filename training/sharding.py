"""A model that does not fit one device, spread over the processes of torchrun: each keeps its part of every
weight, gradient and moment, and has a block whole only while it computes there. By torch's own `fully_shard`
(FSDP2; Zhao 2023; the idea is ZeRO's third stage, Rajbhandari 2020). A part is a DTensor, a tensor that knows
what the others hold; files hold whole tensors, so that a run may go on sharded or not.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.errors import UserError
from common.processes import processes
from training.settings import TrainConfig


def check_sharding(config: TrainConfig) -> None:
    """Raises UserError for --shard where there is nobody to share with, or where this torch does not do it
    right."""
    if not config.shard:
        return
    if processes()[1] == 1:
        raise UserError(
            "shard is True, but there is one process; start several: torchrun --nproc-per-node N train.py"
        )
    if not averages_gradients(config.device):
        kind = torch.device(config.device).type
        raise UserError(
            f"shard is True, but torch {torch.__version__} cannot do it on {kind}; take a newer torch"
        )


def averages_gradients(device: str) -> bool:
    """Whether a sharded layer gets the mean of the processes' gradients, tried on a small one. (On a CPU,
    torch 2.6 raises, and some later ones give the sum: pytorch issue 162338.)"""
    rank, world = processes()
    try:
        from torch.distributed.fsdp import fully_shard  # here: importing it takes a second

        layer = fully_shard(nn.Linear(1, world, bias=False), mesh=mesh_of_all(device))
        layer(torch.full((1, 1), rank + 1.0, device=device)).sum().backward()  # gradients 1, 2, .. world
        gradient = whole(layer.weight.grad)
    except (ImportError, AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool((gradient - (world + 1) / 2).abs().max() < 1e-5)


def mesh_of_all(device: str) -> DeviceMesh:
    """All processes in a row, each with its device."""
    return init_device_mesh(torch.device(device).type, (processes()[1],))


def shard(objective: nn.Module, config: TrainConfig) -> nn.Module:
    """Spreads the weights of `objective.model`, which move from main memory to the device part by part. Every
    block is a unit, gathered together; the rest (embedding, heads, norms) is one that stays whole during a
    step. In bfloat16 blocks are gathered rounded, and their gradients summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if config.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    mesh = mesh_of_all(config.device)
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(objective, mesh=mesh, reshard_after_forward=False)


@contextlib.contextmanager
def heads_whole(objective: nn.Module) -> Iterator[None]:
    """Inside, what lies outside the blocks is whole: its functions may be called one by one, by all processes
    alike."""
    sharded = hasattr(objective, "unshard")
    if sharded:
        objective.unshard()
    try:
        yield
    finally:
        if sharded:
            objective.reshard()


# ---------------------------------------------------------------- parts and whole tensors


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be a part; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """These tensors for a file: whole, what was a part in main memory, and of the first process alone
    (elsewhere empty). All processes must ask."""
    tensors = {}
    for name, value in values.items():
        full = whole(value)
        if full is not value:
            full = full.cpu() if processes()[0] == 0 else full.new_empty(0)
        tensors[name] = full
    return tensors


def part_like(value: Tensor, weight: Tensor | None) -> Tensor:
    """This process's part of a whole tensor, where `weight`, of the same shape, is a part; else the tensor
    itself."""
    if not hasattr(weight, "full_tensor") or value.shape != weight.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


def gathered_moments(optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state dictionary, its tensors as `gathered` gives them."""
    content = optimizer.state_dict()
    return {**content, "state": {number: gathered(moments) for number, moments in content["state"].items()}}


def load_weights(model: nn.Module, weights: dict[str, Tensor], strict: bool = True) -> None:
    """Gives a model, sharded or not, these whole weights. Raises RuntimeError if they are not its own
    (`strict`: all of them)."""
    own = model.state_dict()
    model.load_state_dict(
        {name: part_like(weight, own.get(name)) for name, weight in weights.items()}, strict
    )


def load_moments(optimizer: torch.optim.Optimizer, content: dict) -> None:
    """Gives the optimizer of a model, sharded or not, a state dictionary of whole tensors. Raises what torch
    does for one that does not fit."""
    weights = dict(enumerate(weight for group in optimizer.param_groups for weight in group["params"]))
    state = {}
    for number, moments in content["state"].items():
        state[number] = {name: part_like(value, weights.get(number)) for name, value in moments.items()}
    optimizer.load_state_dict({**content, "state": state})
