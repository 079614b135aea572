"""Loads a checkpoint for decoding: the model, with its heads, in a form that is fast on its device, and the
tokenizer."""

import os

import torch

from common.config import check_choice
from common.errors import UserError
from decoding.fast_weights import FORMS, FastTransformer, dequantized, kept_dtype
from decoding.shortlist import find_frequent_ids
from formats.checkpoint import check_finite, check_size, fitting, read_tokenizer
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
    form           how a CPU stores the weights (decoding/fast_weights.py); None: default_form's choice
    check          first compare the file with its checksums
    frequent_ids   a file of ids for shortlists (tools/shortlist.py), in place of those in the checkpoint
    heads          a heads file (formats/heads.py), in place of those in the checkpoint

    Raises UserError for a file, dtype or form that cannot be used."""
    content, device = read_model(path, heads, check), torch.device(device)
    check_finite(path)
    weights, scales = content["weights"], content["scales"]
    with fitting(path):
        dtype = dtype or default_dtype(content, device)
    check_form(form, dtype, device)
    if dtype != torch.int8:
        weights, scales = dequantized(weights, scales), {}
    with fitting(heads or path):
        config = ModelConfig(**content["config"])
        check_size(weights, config)
        with torch.device("meta"):
            model = Transformer(config)
        model.requires_grad_(False).load_state_dict(weights, assign=True)
    model.make_rope()
    model.frequent_ids = find_frequent_ids(frequent_ids, path, heads, content, config.vocab_size)
    if device.type == "cpu" and form != "plain":
        model = FastTransformer(model, "int8" if dtype == torch.int8 else form, dtype, scales)
    else:
        for weight in model.parameters():
            weight.data = weight.data.to(device, kept_dtype(weight, dtype))
        model.to(device)
    tokenizer = content.get("tokenizer")
    if tokenizer is not None:
        tokenizer = read_tokenizer(path, tokenizer.numpy().tobytes(), config.vocab_size)
    return model.eval(), tokenizer


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
