"""Which settings are measured: those beside a checkpoint, the papers' recipes, or one of your own; and where
each came from."""

import argparse
from dataclasses import replace
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from common.flags import given
from decoding.choosing import (
    COMMAND,
    beside_checkpoint,
    from_json,
    outranking,
    read_thresholds,
    with_thresholds,
)
from decoding.settings import AUTO_CHOOSES, DecodeConfig
from evaluation.recipes import RECIPES
from evaluation.tasks import TASKS, Task

MAIN = ("static", "softmax", "weighted", "jsd", "verified")  # the rows that the table shows by itself
REMEDY = "choose some with `eval.py tune`, name recipes (--rows calm,free,layerskip), or give one with --confidence"


def custom_settings(args: argparse.Namespace) -> dict:
    """The fields of DecodeConfig given by flags and by --thresholds, the flags first. Raises UserError for
    unusable ones."""
    custom = with_thresholds(args.thresholds, given(args, DecodeConfig))
    DecodeConfig(**custom)
    return custom


def own_setting(args: argparse.Namespace, task: Task, custom: dict) -> DecodeConfig:
    """One setting of your own: what decode.py does by itself with this checkpoint, changed by `custom`."""
    return replace(command_setting(args), **{"max_new_tokens": task.max_new_tokens, **outranking(custom)})


def command_setting(args: argparse.Namespace) -> DecodeConfig:
    """What decode.py does by itself with this checkpoint."""
    return replace(COMMAND, **beside_checkpoint(args.heads or args.checkpoint))


def exit_layers_of(model) -> list[int]:
    """The layers at which a model exits where nobody names others. Raises UserError if it has none."""
    if model.config.n_layers == 1:
        raise UserError("this model has one layer, and so no exit")
    return list(DecodeConfig(confidence="softmax").exits(model.config))


def choose_rows(args: argparse.Namespace, task: Task, model, custom: dict) -> dict[str, DecodeConfig]:
    """What the table shows beside the full model: with --confidence one row of your own; with --rows those
    named, of the settings or of the recipes; else the settings' main rows, or with --all all of them."""
    if "confidence" in custom:
        config = own_setting(args, task, custom)
        config.exits(model.config)
        return {"yours": config}
    names = None if args.rows is None else args.rows.split(",")
    recipes = {name: recipe_row(name, task, model, custom) for name in names or [] if name in RECIPES}
    if names and len(recipes) == len(names):
        return recipes
    configs = read_settings(args.settings, task, model, custom)
    if names is None:
        main = {name: configs[name] for name in MAIN if name in configs}
        return configs if args.all or not main else main
    unknown = [name for name in names if name not in configs and name not in recipes]
    if unknown:
        raise UserError(
            f"{args.settings}: has no row {unknown[0]!r} for {task.name}; choose from "
            f"{', '.join(configs)}, or of the recipes from {', '.join(RECIPES)}"
        )
    return {name: configs.get(name) or recipes[name] for name in names}


def recipe_row(name: str, task: Task, model, custom: dict) -> DecodeConfig:
    """A recipe on a model, with the changes of the command line."""
    fields = RECIPES[name].fields(model.config.n_layers, exit_layers_of(model))
    return changed(DecodeConfig(max_new_tokens=task.max_new_tokens, **fields), custom)


def changed(config: DecodeConfig, custom: dict) -> DecodeConfig:
    """The setting with changes. What a row is about stays: a static exit, whose threshold is 0, is static,
    drafting by measurement makes its own choice, copies owe nothing."""
    fixed = ()
    if config.draft == "auto":
        fixed = (*AUTO_CHOOSES, "threshold_schedule")
    elif config.fill == "copy":
        fixed = ("max_owed",)
    custom = {name: value for name, value in custom.items() if name not in fixed}
    if config.threshold == 0:
        custom = {name: value for name, value in custom.items() if name != "layer_thresholds"} | {
            "threshold": 0.0
        }
    return replace(config, **outranking(custom))


# ---------------------------------------------------------------- settings in a file


def read_settings_file(path: Path) -> dict:
    """The content of a settings file: by task, rows by name; {} if there is no file. Raises UserError for
    another file."""
    return read_json(path, "settings by task") if path.is_file() else {}


def default_tasks(settings: Path) -> list[str]:
    """The tasks that a checkpoint has settings for; else those of the embedded model."""
    embedded = [name for name, task in TASKS.items() if task.file]  # the others need a file to be named
    return [name for name in read_settings_file(settings) if name in embedded] or ["translation", "e2e"]


def read_settings(path: Path, task: Task, model, custom: dict) -> dict[str, DecodeConfig]:
    """The named settings of a task in the JSON file that `tune` writes, with the changes of the command line.
    Raises ValueError if there are none or they are unusable."""
    if not path.is_file():
        raise UserError(f"{path}: no settings for this checkpoint; {REMEDY}")
    try:
        rows = read_settings_file(path).get(task.name)
        if not rows:
            raise UserError(f"it has no rows for this task; {REMEDY}")
        configs = {}
        for name, fields in rows.items():
            config = DecodeConfig(**{"max_new_tokens": task.max_new_tokens, **from_json(fields)})
            configs[name] = changed(config, custom)
            configs[name].exits(model.config)
        return configs
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not usable as settings of {task.name} ({error})") from None


# ---------------------------------------------------------------- where they came from


def sources(args: argparse.Namespace, origin: str) -> str:
    """One line that says which settings are in force and from where; a source outranks those that follow it.
    origin: where the rows themselves come from."""
    parts = []
    flags = given(args, DecodeConfig)
    if flags:
        parts.append(f"flags ({listed(flags)})")
    if args.thresholds:
        parts.append(
            f"{args.thresholds} ({listed(read_thresholds(args.thresholds, flags.get('confidence')))})"
        )
    return f"settings: {', over '.join([*parts, origin])}"


def listed(fields: dict) -> str:
    """Fields and values in words."""
    words = []
    for name, value in fields.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"{name} {text}")
    return ", ".join(words)


def origin_of_rows(args: argparse.Namespace, custom: dict, model) -> str:
    """Where the rows of the table come from, in words."""
    if "confidence" in custom:
        return own_origin(args, custom, model)
    recipes = "the recipes in evaluation/recipes.py"
    names = set(args.rows.split(",")) if args.rows else set()
    if names and names <= set(RECIPES):
        return recipes
    rows = f"{args.settings}, beside the checkpoint" if args.beside else str(args.settings)
    return f"{rows}, and {recipes}" if names & set(RECIPES) else rows


def own_origin(args: argparse.Namespace, custom: dict, model) -> str:
    """Where a setting of your own begins, in words, the model's exit layers among it unless others are
    named."""
    fields = fields_that_differ(command_setting(args), DecodeConfig())
    fields.pop("max_new_tokens", None)  # the task's
    words = f"decode.py's defaults ({listed(fields)})"
    if custom.get("exit_layers", fields.get("exit_layers")) is None:
        words += f" and the model's exit layers {','.join(map(str, exit_layers_of(model)))}"
    return words


def fields_that_differ(config: DecodeConfig, base: DecodeConfig) -> dict:
    """The fields of a setting that are not as in another."""
    return {name: value for name, value in vars(config).items() if value != getattr(base, name)}
