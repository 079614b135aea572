"""Loads a checkpoint for decoding: the model, with its heads, in a form that is fast on its device, and the
tokenizer."""

import os
import sys

import torch

from common.config import check_choice
from common.errors import UserError
from decoding.shortlist import find_frequent_ids
from decoding.weights import FORMS, Stored, default_form, prepare, slow_dtype
from formats.checkpoint import (
    check_finite,
    check_size,
    fitting,
    float_weights,
    load_weights,
    places,
    read_tokenizer,
)
from formats.heads import read_model
from model import ModelConfig, Transformer


def load_checkpoint(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    form: str | None = None,
    check: bool = False,
    frequent_ids: str | None = None,
    heads: str | None = None,
):
    """Returns (model, tokenizer), ready to decode; the tokenizer is None if the file holds none.

    dtype          of the matrices (vectors keep at least the file's precision); None: the file's own, but
                   float32 if a float16 file is loaded to a CPU, which is slow in half precision
    form           how a CPU stores the weights (decoding/weights.py); None: default_form's choice
    check          first compare the file with its checksums
    frequent_ids   a file of ids for shortlists (tools/shortlist.py), in place of those in the checkpoint
    heads          a heads file (formats/heads.py), in place of those in the checkpoint

    Raises UserError for a file, dtype or form that cannot be used."""
    content, device = read_model(path, heads, check), torch.device(device)
    check_finite(path)
    with fitting(path):
        dtype = dtype or default_dtype(content, device)
    check_form(form, dtype, device)
    in_int8 = dtype == torch.int8
    if device.type == "cpu" and slow_dtype(dtype):
        print("note: this CPU has no bfloat16 instructions; float32 is as fast, and exact", file=sys.stderr)
    weights, scales = (content["weights"], content["scales"]) if in_int8 else (float_weights(content), {})
    with fitting(heads or path):
        config = ModelConfig(**content["config"])
        check_size(weights, config)
        with torch.device("meta"):
            model = Transformer(config)
        missing = load_weights(model.requires_grad_(False), weights, assign=True)
        if missing:
            raise KeyError(f"{missing[0]} is missing")
    if device.type == "cpu":  # first, so that no float copy of the whole model is needed
        known = places(model)
        of_weight = {model.get_parameter(known[name]): scale for name, scale in scales.items()}
        prepare(model, "int8" if in_int8 else form or default_form(dtype), dtype, of_weight)
    cast(model, device, torch.float32 if in_int8 else dtype)
    model.make_rotary()
    model.frequent_ids = find_frequent_ids(frequent_ids, path, heads, content, config.vocab_size)
    tokenizer = content.get("tokenizer")
    if tokenizer is not None:
        tokenizer = read_tokenizer(path, tokenizer.numpy().tobytes(), config.vocab_size)
    return model.eval(), tokenizer


def cast(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Moves the weights that are in no form yet to a device and converts them: matrices and biases to
    `dtype`, but other vectors keep at least the file's precision."""
    for module in model.modules():
        if isinstance(module, Stored):
            continue
        for name, weight in module.named_parameters(recurse=False):
            exact = weight.dim() == 1 and name != "bias"
            weight.data = weight.data.to(device, torch.promote_types(weight.dtype, dtype) if exact else dtype)


def default_dtype(content: dict, device: torch.device) -> torch.dtype:
    """The file's own dtype, which may be int8, but float32 if a float16 file is loaded to a CPU."""
    if content["scales"]:
        return torch.int8
    stored = content["weights"]["embedding"].dtype
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def check_form(form: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError for a form that does not go with the dtype or the device."""
    check_choice("form of weights", form, FORMS)
    if form is not None and device.type != "cpu":
        raise UserError("--weights applies only to a CPU; leave it out on a GPU")
    if dtype == torch.int8 and (device.type != "cpu" or form is not None):
        raise UserError("int8 needs a CPU and its own form of weights; use bfloat16, or leave --weights out")
