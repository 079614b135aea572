"""The settings of a command: its defaults, changed by files beside the checkpoint or named by flags, and by
the flags."""

import re
from dataclasses import replace
from pathlib import Path

from common.config import read_field
from common.errors import UserError
from common.files import read_json
from confidence import FUNCTIONS
from decoding.settings import DecodeConfig

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "default.pt"
COMMAND = DecodeConfig(confidence="softmax", prune="fixed", max_new_tokens=100)  # what a command starts from


def settings_of(checkpoint: str, thresholds: str | None, flags: dict) -> tuple[DecodeConfig, str]:
    """The settings of a command, and where they come from: COMMAND, changed by `decode` in the JSON file
    beside the checkpoint, by a file of thresholds, and by the flags. Raises UserError."""
    beside = beside_checkpoint(checkpoint)
    config = replace(replace(COMMAND, **beside), **outranking(with_thresholds(thresholds, flags)))
    sources = ["defaults"]
    if beside:
        sources.append(Path(checkpoint).with_suffix(".json").name)
    if thresholds:
        sources.append(str(thresholds))
    if flags:
        sources.append("flags")
    return config, ", then ".join(sources)


def beside_checkpoint(checkpoint: str) -> dict:
    """Fields of DecodeConfig that the settings beside a checkpoint name under `decode`. Raises UserError for
    unusable ones."""
    path = Path(checkpoint).with_suffix(".json")
    if not path.is_file():
        return {}
    content = read_json(path, "settings")
    try:
        return from_json(content.get("decode", {}))
    except UserError as error:
        raise UserError(f"{path}: not usable as settings of decode ({error})") from None


def with_thresholds(path: str | Path | None, flags: dict) -> dict:
    """The fields of DecodeConfig in a file of thresholds, if there is one, and the flags, which outrank
    it."""
    settings = {} if path is None else read_thresholds(path, flags.get("confidence"))
    return {**settings, **outranking(flags)}


def outranking(fields: dict) -> dict:
    """Fields of DecodeConfig as they replace those of a source below: a threshold those of single layers,
    too, and so do other exit layers, since these thresholds belonged to others."""
    return {"layer_thresholds": None, **fields} if {"threshold", "exit_layers"} & set(fields) else fields


def read_thresholds(path: str | Path, named: str | None = None) -> dict:
    """Settings from a JSON file, as calibration writes it: fields of DecodeConfig, and their `provenance`,
    which is not read. named: the function that the flag --confidence names, which the file may name, too.
    Raises UserError for what is not that."""
    content = read_json(path, "thresholds")
    content.pop("provenance", None)
    if named is not None and content.get("confidence") == named:
        del content["confidence"]
    try:
        return from_json(content)
    except UserError as error:
        raise UserError(f"{path}: not usable as thresholds ({error})") from None


def from_json(content: dict) -> dict:
    """Fields of DecodeConfig, each as its flag would read it. Raises UserError for what no flag would take,
    and for a function of one's own: code comes from flags only, never from a file beside a model."""
    if not isinstance(content, dict):
        raise UserError(f"settings must be fields and values, not {content!r:.40}")
    settings = {}
    for name, value in content.items():
        text = ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        settings[name.replace("-", "_")] = read_field(DecodeConfig, name, text)
    confidence = settings.get("confidence")
    if confidence is not None and confidence not in FUNCTIONS:
        raise UserError(
            f"confidence {confidence!r} is none of {', '.join(FUNCTIONS)}; a function of your own is named "
            "by the flag --confidence alone"
        )
    DecodeConfig(**settings)
    return settings


def variants(config: DecodeConfig, names: str) -> dict[str, DecodeConfig]:
    """`config` changed as --compare says, by name: confidence functions or full, each with +field or
    +field=value changes, as in softmax+verify,jsd+exit-layers=4,8: a part that is a number goes on with the
    list before it. Raises UserError."""
    configs = {}
    for name in re.split(r",(?!\s*\d)", names):
        first, *changes = name.strip().split("+")
        values = {"confidence": None if first == "full" else first}
        for change in changes:
            field, _, text = change.partition("=")
            values[field.replace("-", "_")] = read_field(DecodeConfig, field, text)
        configs[name] = replace(config, **outranking(values))
    return configs
