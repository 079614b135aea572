"""Which settings are in force, and where they come from. Every command follows this order, in which each
source takes precedence over those before it:

    COMMAND < `decode` in the settings file < --thresholds FILE < flags < +changes in --compare

A source replaces the fields that it names. There is one more rule: if a source sets the threshold or the exit
layers, thresholds of single layers from earlier sources no longer apply, as they went with other settings.
"""

import re
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.files import check_input, read_json
from common.flags import as_text, did_you_mean, read_field
from confidence import FUNCTIONS
from decoding.settings import AUTO_CHOOSES, DecodeConfig

DEFAULT_CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "default.pt"
COMMAND = DecodeConfig(confidence="softmax", prune="fixed", max_new_tokens=100)  # the defaults of commands
WORDS = {"full": {"confidence": None}, "static": {"confidence": "softmax", "threshold": 0.0}}  # of --compare


def override(config: DecodeConfig, fields: dict) -> DecodeConfig:
    """The config, overridden by the fields of a source."""
    return replace(config, **above(fields))


def above(fields: dict) -> dict:
    """The fields of a source. If it sets the threshold or the exit layers, thresholds of single layers are
    reset, unless it sets these, too."""
    return {"layer_thresholds": None, **fields} if {"threshold", "exit_layers"} & set(fields) else fields


# ---------------------------------------------------------------- from the defaults to the flags


def settings_in_force(flags: dict, checkpoint, settings=None, thresholds=None) -> tuple[DecodeConfig, str]:
    """The settings of a command, and the sources that they come from, in words. `flags` are the fields given
    as flags; `settings` is a file to read in place of the one next to the checkpoint, `thresholds` a file
    that calibration wrote. Raises UserError."""
    path = settings_file(checkpoint, settings)
    in_file = fields_of(read_settings_file(path).get("decode", {}), path, "settings of decode")
    config = override(COMMAND, in_file)
    sources = ["defaults", path.name] if in_file else ["defaults"]
    if thresholds is not None:
        config = override(config, read_thresholds(thresholds, flags.get("confidence")))
        sources.append(str(thresholds))
    if flags:
        config = override(config, flags)
        sources.append("flags")
    return config, ", then ".join(sources)


def settings_file(checkpoint: str | Path, settings: str | Path | None = None) -> Path:
    """The settings file: the one that was named, which must exist, else the one next to the checkpoint (or
    next to its heads), which need not exist. Raises UserError."""
    if settings is None:
        return Path(checkpoint).with_suffix(".json")
    check_input(settings, "no such file; expected a settings file")
    return Path(settings)


def read_thresholds(path: str | Path, named: str | None = None) -> dict:
    """The fields of DecodeConfig in a file that calibration wrote, without their `provenance`. It may name a
    function of the user's own only if the flag --confidence has `named` the same one. Raises UserError."""
    content = read_json(path, "thresholds")
    content.pop("provenance", None)
    if named is not None and content.get("confidence") == named:
        del content["confidence"]
    return fields_of(content, path, "thresholds")


def defaults_in_help(words: list[str]) -> DecodeConfig:
    """The defaults that --help shows: the settings in force before flags, for the checkpoint and the settings
    file that the words of a command line name."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--checkpoint", "--heads", "--settings"):
        finder.add_argument(flag, nargs="?")
    named, _ = finder.parse_known_args(words)
    checkpoint = named.heads or named.checkpoint or DEFAULT_CHECKPOINT
    try:
        return settings_in_force({}, checkpoint, named.settings)[0]
    except UserError:  # the command itself will report the error
        return COMMAND


# ---------------------------------------------------------------- configurations by name


def read_settings_file(path: Path) -> dict:
    """The content of a settings file: configurations by name for each task; {} if there is no file. Raises
    UserError for any other file."""
    content = read_json(path, "settings by task") if path.is_file() else {}
    for name, value in content.items():
        if not isinstance(value, dict):
            raise UserError(f'{path}: {name} is not a task; the settings of decode.py go under "decode"')
    return content


def read_configurations(path: Path, task: str) -> dict[str, dict]:
    """The fields of each named configuration that a settings file has for a task; {} if it has none. Raises
    UserError."""
    named = read_settings_file(path).get(task, {})
    return {name: fields_of(fields, path, f"settings of {task}") for name, fields in named.items()}


def changed(config: DecodeConfig, fields: dict) -> DecodeConfig:
    """A named configuration changed by --thresholds and flags. It remains what its name says: a static exit,
    whose threshold is 0, remains static; adaptive drafting still makes its own choices; with fill copy,
    nothing is owed."""
    kept = ("max_owed",) if config.fill == "copy" else ()
    if config.draft == "auto":
        kept += (*AUTO_CHOOSES, "threshold_schedule")
    if config.threshold == 0:
        kept += ("threshold", "layer_thresholds")
    return override(config, {name: value for name, value in fields.items() if name not in kept})


class Variant(NamedTuple):
    """One configuration to compare; `checkpoint` is that of a model of its own, if it has one."""

    name: str
    config: DecodeConfig
    checkpoint: str | None = None


def variants(words: str, base: DecodeConfig, named: dict[str, DecodeConfig] | None = None) -> list[Variant]:
    """The configurations that --compare lists, as in full,softmax+verify,jsd+exit-layers=4,8: a part that is
    a number continues the list before it. Each begins with the name of a configuration in `named`, else with
    full, static or a confidence function, which change `base`. Then come changes, +field or +field=value;
    checkpoint=FILE names another model. Raises UserError."""
    found = {}
    for name in re.split(r",(?!\s*\d)", words):
        first, *changes = name.strip().split("+")
        texts = dict(change.partition("=")[::2] for change in changes)  # field -> its value, as text
        checkpoint = texts.pop("checkpoint", None)
        fields = read_fields(texts)
        start = first_configuration(first, base, named or {})
        found[name.strip()] = Variant(name.strip(), override(start, fields), checkpoint)
    return list(found.values())


def first_configuration(word: str, base: DecodeConfig, named: dict[str, DecodeConfig]) -> DecodeConfig:
    """The configuration that the first word of a part of --compare names. Raises UserError for an unknown
    word."""
    if word in named:
        return named[word]
    if word == "full":
        return base.full()
    known = list(dict.fromkeys([*named, *WORDS, *FUNCTIONS]))  # a settings file may name functions, too
    if word not in known and ":" not in word:
        hint = did_you_mean(word, known)
        raise UserError(f"unknown configuration {word!r}{hint}; choose from {', '.join(known)}")
    return override(base, WORDS.get(word, {"confidence": word}))


def name_of(fields: dict) -> str:
    """The name of a configuration given by flags, as --compare would write it: its confidence function
    (without one, full) and its changes."""
    name = str(fields.get("confidence", COMMAND.confidence) or "full")
    for field, value in fields.items():
        if field != "confidence":
            name += f"+{field.replace('_', '-')}" + ("" if value is True else f"={as_text(value)}")
    return name


# ---------------------------------------------------------------- from text and JSON


def read_fields(texts: dict[str, str]) -> dict:
    """Fields of DecodeConfig from text, each as its flag would read it. Raises UserError."""
    return {name.replace("-", "_"): read_field(DecodeConfig, name, text) for name, text in texts.items()}


def fields_of(content: dict, path: str | Path, what: str) -> dict:
    """Fields of DecodeConfig from a part of a JSON file, each as its flag would read it. Raises UserError for
    values that no flag would accept, and for a user's own function: only flags may name code, never a file
    that came with a model."""
    try:
        if not isinstance(content, dict):
            raise UserError(f"settings must be fields and values, not {content!r:.40}")
        fields = read_fields({name: as_text(value) for name, value in content.items()})
        confidence = fields.get("confidence")
        if confidence is not None and confidence not in FUNCTIONS:
            remedy = "name a function of your own with --confidence"
            raise UserError(f"confidence {confidence!r} is none of {', '.join(FUNCTIONS)}; {remedy}")
        DecodeConfig(**fields)
        return fields
    except UserError as error:
        raise UserError(f"{path}: not usable as {what} ({error})") from None
