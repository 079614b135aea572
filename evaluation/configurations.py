"""Chooses the configurations to compare: entries of the settings file, the papers' recipes, or those that
--compare and the flags describe."""

from collections.abc import Iterable
from dataclasses import replace

from common.errors import UserError
from decoding import presets
from decoding.settings import DecodeConfig
from evaluation.inputs import Setup
from evaluation.measure import Configuration
from evaluation.recipes import RECIPES, recipe_fields
from evaluation.tasks import Task
from model import Transformer

MAIN = ("static", "softmax", "weighted", "jsd", "verified")  # the entries that the table shows by default
REMEDY = "choose some with `eval.py tune`, or name configurations (--compare calm,free,softmax+threshold=0.6)"


def choose(setup: Setup, task: Task) -> dict[str, Configuration]:
    """Chooses the configurations of a table: those of --compare; with --confidence or --thresholds, the one
    that the flags describe; otherwise the main entries of the settings file, or all of them with --all."""
    config = setup.config
    if "confidence" in changes(setup) and (config.compare or config.all):
        flag = "--confidence" if "confidence" in config.decoding else "--thresholds"
        raise UserError(f"{flag} defines a configuration; leave out either it or --compare and --all")
    if config.compare:
        mentioned = {part.split("+")[0].strip() for part in config.compare.split(",")}
        named = named_configs(setup, task, mentioned)
        found = presets.variants(config.compare, own_config(setup, task), named)
        chosen = {each.name: (each.config, each.checkpoint) for each in found if each.name != "full"}
    elif "confidence" in changes(setup):
        own = own_config(setup, task)
        fields = differing_fields(own, replace(command_config(setup), max_new_tokens=own.max_new_tokens))
        chosen = {presets.name_of({"confidence": own.confidence, **fields}): (own, None)}
    else:
        rows = presets.read_configurations(setup.settings_file, task.name)
        if not rows:
            raise UserError(f"{setup.settings_file}: has no rows for {task.name}; {REMEDY}")
        main = [*rows] if config.all else [name for name in MAIN if name in rows] or [*rows]
        named = named_configs(setup, task, main)
        chosen = {name: (named[name], None) for name in main}
    configurations = {}
    for name, (decode, checkpoint) in chosen.items():
        model = setup.model_of(checkpoint)
        decode.exits(model.config)  # raises UserError for layers that the model does not have
        configurations[name] = Configuration(decode, model, checkpoint)
    return configurations or {"full": Configuration(own_config(setup, task).full(), setup.model)}


def changes(setup: Setup) -> dict:
    """Returns the fields of DecodeConfig that the thresholds file and the flags set. Flags override the
    file."""
    flags, file = setup.config.decoding, setup.config.thresholds
    in_file = presets.read_thresholds(file, flags.get("confidence")) if file else {}
    return {**in_file, **presets.above(flags)}


def own_config(setup: Setup, task: Task) -> DecodeConfig:
    """Returns decode.py's configuration for this checkpoint and these flags, with the length of the task."""
    return presets.override(command_config(setup), {"max_new_tokens": task.max_new_tokens, **changes(setup)})


def command_config(setup: Setup) -> DecodeConfig:
    """Returns decode.py's configuration for this checkpoint without flags."""
    config = setup.config
    return presets.settings_in_force({}, config.heads or config.checkpoint, config.settings)[0]


def named_configs(setup: Setup, task: Task, wanted: Iterable[str]) -> dict[str, DecodeConfig]:
    """Returns the recipes and the entries of the settings file, changed by the flags. If a change cannot be
    made, raises UserError for a configuration that is wanted, and leaves out any other."""
    exits = exit_layers_of(setup.model)
    rows = {name: recipe_fields(name, setup.model.config.n_layers, exits) for name in RECIPES}
    rows |= presets.read_configurations(setup.settings_file, task.name)
    configs = {}
    for name, fields in rows.items():
        config = DecodeConfig(**{"max_new_tokens": task.max_new_tokens, **fields})
        try:
            configs[name] = presets.changed(config, changes(setup))
        except UserError as error:
            if name in wanted:
                raise UserError(f"{name}: {error}") from None
    return configs


def exit_layers_of(model: Transformer) -> list[int]:
    """Returns the default exit layers of a model. Raises UserError if it has none."""
    if model.config.n_layers == 1:
        raise UserError("this model has only one layer and therefore no exits")
    return list(DecodeConfig(confidence="softmax").exits(model.config))


def sources(setup: Setup) -> str:
    """Says in one line where the settings come from. Each source overrides those before it."""
    file = setup.settings_file if setup.settings_file.is_file() else None
    flags = "flags" if setup.config.decoding else None
    named = [each for each in ("defaults", file, setup.config.thresholds, flags) if each]
    return f"settings: {', then '.join(map(str, named))}"


def differing_fields(config: DecodeConfig, base: DecodeConfig) -> dict:
    """Returns the fields of a configuration that differ from those of another."""
    return {name: value for name, value in vars(config).items() if value != getattr(base, name)}
