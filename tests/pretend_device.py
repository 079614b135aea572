"""A pretended GPU: tensors that say they lie on another device, and are computed on the CPU. What a GPU would
refuse, tensors of two devices in one operation, raises here too; what would make the CPU wait for a GPU,
reading a value back, is counted.

    with pretended() as waits:
        model = make().to(NAME)
        ...
        assert waits.count <= 3

Only plain eager code in one process runs on it: no autocast that is enabled, no torch.compile, no torch.inference_mode
(torch.no_grad in its place). It shows that code is free of mistakes between devices, and nothing of speed.
Needs torch 2.9 (`available`)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "pretend"
COPIES = ("_to_copy", "copy_", "_local_scalar_dense")  # operations that may see both devices


def available() -> bool:
    """Whether this torch can pretend a device."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


if available():  # at import: the device must be known before the first backward pass of the process
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.pretend.get_amp_supported_dtype = lambda: []  # asked by torch.utils.checkpoint


@dataclass
class Waits:
    """How many values were read back so far."""

    count: int = 0


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `raw`, on the CPU, holds its numbers."""

    waits = Waits()

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "layout": raw.layout}
        device = torch.device(NAME, 0)
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, device=device, **layout)

    def __init__(self, raw: torch.Tensor):
        self.raw = raw

    def __repr__(self):
        return f"Elsewhere({self.raw})"

    def tolist(self):
        Elsewhere.waits.count += 1
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def dispatch(function, args, kwargs):
    """The operation on the CPU, its result on the device where it belongs. Raises RuntimeError if it mixes
    devices."""
    name = function.overloadpacket.__name__
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() > 0]
    by_index = name.startswith("index") and isinstance(args[0], Elsewhere)  # a GPU takes indices from the CPU
    if there and here and name not in COPIES and not by_index:
        shapes = [tuple(tensor.shape) for tensor in here]
        raise RuntimeError(f"{function}: tensors on {NAME} and on the CPU in one operation: {shapes}")

    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        stays = torch.device(asked).type == NAME
    else:
        stays = bool(there) and name != "_local_scalar_dense"
    if there and not stays:
        Elsewhere.waits.count += 1
    out = function(*tree_map(raw, args), **tree_map(raw, kwargs))
    known = {id(tensor.raw): tensor for tensor in there}  # an operation in place hands back its argument

    def placed(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in known:
            return known[id(leaf)]
        return Elsewhere(leaf) if stays else leaf

    return tree_map(placed, out)


def raw(leaf):
    """The numbers of a tensor on the device; anything else as it is."""
    return leaf.raw if isinstance(leaf, Elsewhere) else leaf


class Mode(TorchDispatchMode):
    """Also sees operations that have no tensor yet, such as torch.zeros(3, device=NAME)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Generator(torch._C.Generator):
    """A generator for the device, which draws on the CPU."""

    def __new__(cls, device=None):
        return torch._C.Generator.__new__(torch._C.Generator, "cpu")


def tensor_there(make):
    """torch.tensor, made on the CPU and then moved."""

    def tensor(data, dtype=None, device=None, **more):
        made = make(data, dtype=dtype, **more)
        return made if device is None else made.to(device)

    return tensor


@contextlib.contextmanager
def pretended() -> Iterator[Waits]:
    """Inside, the device `NAME` is there. Yields the counter of values read back, at 0."""
    tensor, generator = torch.tensor, torch.Generator
    torch.tensor, torch.Generator = tensor_there(tensor), Generator
    Elsewhere.waits = Waits()
    try:
        with Mode():
            yield Elsewhere.waits
    finally:
        torch.tensor, torch.Generator = tensor, generator
