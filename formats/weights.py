"""The two operations that decoding spends its time in, norm and matrix product, each in the form that is fastest here."""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE = 2**26  # bytes of weights that a trial multiplies with: more than caches hold


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of (N, d) (Zhang 2019). On the few rows of decoding, small kernels beat the library's."""
    if x.is_cpu and x.dtype == torch.float32 and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        scale, floor = _rms_constants(x.shape[-1], eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True) * scale, floor) * weight
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)  # the weight may be finer


@functools.cache
def _rms_constants(d: int, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt d and sqrt eps, as tensors: rms(x) = hypot(|x| / sqrt d, sqrt eps)."""
    return torch.tensor([d**-0.5, eps**0.5]).unbind()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, d_in) times a weight in one of the FORMS, logically (d_out, d_in): (N, d_out)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if weight.dim() == 3:  # (blocks, d_in, d_out / blocks)
        if len(x) > 16:
            return F.linear(x, weight.transpose(1, 2).flatten(0, 1))
        return torch.bmm(x.expand(len(weight), -1, -1), weight).transpose(0, 1).reshape(len(x), -1)
    return F.linear(x, weight)


def split(weight: Tensor) -> Tensor:
    """A view of the weight in as many blocks of its rows as there are threads, one for each; the weight itself if that does not fit, or in
    half precision, where the batched product makes a copy."""
    blocks = torch.get_num_threads()
    whole = blocks == 1 or len(weight) % blocks or weight.dtype != torch.float32
    return weight if whole else weight.view(blocks, -1, weight.shape[1]).transpose(1, 2)


def packed(weight: Tensor) -> Tensor:
    """A copy in oneDNN's own order, laid out for a few rows; the weight itself where oneDNN is missing or does not know the dtype."""
    known = torch.backends.mkldnn.is_available() and weight.dtype in (torch.float32, torch.bfloat16)
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4) if known else weight


# How a CPU model's weights are kept for `linear`, the form telling the kernel: `choose_form` takes the fastest.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda weight: weight, "split": split, "packed": packed}


def fastest_form(weights: list[Tensor], repeats: int = 5) -> str:
    """Times, on this machine, one row and four rows through weights in each of the FORMS, and names the clearly fastest. (The library's
    product of one row may run on one thread, at a fifth of what memory gives.)"""
    size, sample = 0, []
    for weight in weights:
        if size < SAMPLE:
            sample.append(weight)
            size += weight.nbytes
    forms = {name: [form(weight) for weight in sample] for name, form in FORMS.items()}
    inputs = [[weight.new_ones(rows, weight.shape[1]) for weight in sample] for rows in (1, 4)]

    def seconds(made: list[Tensor]) -> float:
        started = time.perf_counter()
        for rows in inputs:
            for x, weight in zip(rows, made):
                linear(x, weight)
        return time.perf_counter() - started

    times = {name: min(seconds(made) for _ in range(repeats)) * (0.9 if name == "plain" else 1) for name, made in forms.items()}
    return min(times, key=times.get)


COPY_LIMIT = 2**28  # bytes: a larger unembedding is not kept a second time, packed


@torch.no_grad()
def choose_form(model) -> None:
    """Keeps the blocks of a CPU model in the form that is fastest on this machine; `choose_head` then follows for the unembedding."""
    model.form = fastest_form([weight for block in model.blocks for weight in block.parameters() if weight.dim() > 1])
    for block in model.blocks:
        for name, weight in block._parameters.items():
            if weight.dim() > 1:
                block._parameters[name] = FORMS[model.form](weight)


def choose_head(model) -> None:
    """Keeps the unembedding of a model in its form, but a large one not a second time."""
    unembed = model.unembed.detach()
    model._head_weight = FORMS["split" if model.form == "packed" and unembed.nbytes > COPY_LIMIT else model.form](unembed)
