"""Heads files: what training on top of a finished model adds to it, a few MB, and the fingerprint of the
model that it belongs to.

The file is a checkpoint (formats/checkpoint.py) without the model: the config has only FIELDS, the weights
only those whose names begin with one of HEAD_WEIGHTS; it may have `frequent_ids` (decoding/shortlist.py), and
`model` is the fingerprint. Loaded with the model, these heads replace those in the model's own file.
"""

import os
from dataclasses import asdict

import torch

from common.errors import UserError
from formats.checkpoint import HEADS, check_values, read_checkpoint, weights_of, write_content

HEAD_WEIGHTS = ("exit_norms", "adapters", "classifiers")
FIELDS = ("exit_norms", "adapter", "classifiers", "exit_layers")
SAMPLES = 16  # numbers of every weight in a fingerprint


# ---------------------------------------------------------------- whose heads


def fingerprint(content: dict) -> dict:
    """Values that identify a model, without its heads, from the content of its file: the `names` of the
    weights; `samples` (names, SAMPLES) float32, evenly spaced numbers of each weight; and `steps` (names,
    SAMPLES), by how much int8 may have moved each number.

    This reads some pages of the file, not all of it. The fingerprint is made from the file, not from the
    model in memory, whose weights may be packed or int8 there. It is not a hash, because the same model has
    different bits in a float32, a float16 and a bfloat16 file, even after rounding all of them to the
    coarsest (float16 to bfloat16 rounds twice); numbers can be compared within that rounding (`same_model`).
    A model trained further differs in some of thousands of samples."""
    weights, scales = content["weights"], content.get("scales", {})
    names = sorted(name for name in weights if not name.startswith(HEAD_WEIGHTS))
    samples, steps = torch.zeros(2, len(names), SAMPLES)
    for row, step, name in zip(samples, steps, names):
        numbers = weights[name].flatten()
        if len(numbers):
            places = torch.arange(SAMPLES) * (len(numbers) - 1) // (SAMPLES - 1)
            row.copy_(numbers[places])
            if name in scales:
                step.copy_(scales[name][places // weights[name].shape[1]])
                row.mul_(step)
    return {"names": names, "samples": samples, "steps": steps}


def same_model(one: dict, other: dict) -> bool:
    """Whether two fingerprints are of one model: their numbers differ by no more than rounding one of them to
    bfloat16 (by 2^-8 of a number) and the other to float16 (by 2^-11, or by 2^-25 where that is more)
    explains, or rounding to int8 (by half a step; the largest of a row by up to a whole one)."""
    if one["names"] != other["names"] or one["samples"].shape != other["samples"].shape:
        return False
    apart = (one["samples"] - other["samples"]).abs()
    return bool((apart <= 0.0045 * other["samples"].abs() + 1e-7 + one["steps"] + other["steps"]).all())


# ---------------------------------------------------------------- writing and reading


def save_heads(path, model, belongs_to: dict, dtype=None, **extra) -> None:
    """Writes the heads of a model, whose fingerprint is `belongs_to`, and `extra` to one file, whole or not
    at all; matrices as `dtype`. Raises UserError for a full disk."""
    config, weights = asdict(model.config), weights_of(model)
    content = {"format": HEADS, "config": {field: config[field] for field in FIELDS}, "model": belongs_to}
    content["weights"] = {name: w for name, w in weights.items() if name.startswith(HEAD_WEIGHTS)}
    if model.frequent_ids is not None:
        content["frequent_ids"] = model.frequent_ids.to("cpu", torch.int32)
    write_content(path, {**content, **extra}, dtype)


def read_heads(path: str | os.PathLike) -> dict:
    """The content of a heads file, which is small and therefore always compared with its checksums. Raises
    UserError for another kind of file, and for a damaged one."""
    content = read_checkpoint(path, check=True, kind=HEADS)
    if not {"names", "samples", "steps"} <= set(content.get("model", ())):
        raise UserError(f"{path}: does not say which model its heads belong to")
    for name, weight in content["weights"].items():
        check_values(weight, f"{path}: the weight {name}")
    return content


def read_model(path: str | os.PathLike, heads: str | os.PathLike | None = None, check: bool = False) -> dict:
    """The content of a model's file, as `read_checkpoint` returns it. The heads in the file `heads`, if it is
    given, replace the model's own. Raises UserError, also for heads of another model."""
    content = read_checkpoint(path, check)
    if heads is None:
        return content
    found = read_heads(heads)
    if not same_model(found["model"], fingerprint(content)):
        remedy = "name the model that they were trained on"
        raise UserError(f"{heads}: its heads belong to another model than {path}; {remedy}")
    base = {name: w for name, w in content["weights"].items() if not name.startswith(HEAD_WEIGHTS)}
    content["weights"] = base | found["weights"]
    content["config"] |= {field: found["config"][field] for field in FIELDS}
    if "frequent_ids" in found:
        content["frequent_ids"] = found["frequent_ids"]
    return content
