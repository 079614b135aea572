"""Sweeps: every combination of some settings, measured beside the full model; kept in a file, so that a sweep goes on where it stopped."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

from common.config import read_field
from common.errors import UserError
from common.files import digest, whole_file
from common.processes import processes
from decoding.settings import DecodeConfig
from evaluation.measure import environment, evaluate
from evaluation.tasks import Task
from formats.data import Example

AT_A_TIME = 4  # settings that are measured in turn with the full model, then kept
ENTRY = '{"key": '  # how a result begins


def combinations(sweeps: list[list[str]], n_layers: int, base: dict) -> dict[str, DecodeConfig]:
    """Every combination of the values swept, named by them; sweeps: field, values. Raises ValueError for one that cannot be."""
    choices = [[(field.replace("-", "_"), text) for text in texts] for field, *texts in sweeps]
    configs = {}
    for picks in product(*choices):
        config = DecodeConfig(**{**base, **{field: read_field(DecodeConfig, field, text) for field, text in picks}})
        config.exits(n_layers)
        configs[" ".join(f"{field}={text}" for field, text in picks)] = config
    return configs


def read_results(path: Path) -> dict[str, list[dict]]:
    """By key, the full model's row and that of a setting, from a file of results; a last one that was cut short is taken away. Raises
    ValueError for a file that is something else."""
    known, number = {}, 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        cut = bool(lines) and not lines[-1].endswith("\n") and lines[-1].startswith(ENTRY[: len(lines[-1])])
        whole = lines[: len(lines) - cut]
        for number, line in enumerate(whole, 1):  # noqa: B007
            entry = json.loads(line)
            known[entry["key"]] = entry["rows"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}, line {number}: not a result of a sweep; name another file with --results") from None
    if cut and processes()[0] == 0:
        with whole_file(path) as part:
            Path(part).write_text("".join(whole), encoding="utf-8")
    return known


def sweep(model, tokenizer, task: Task, examples: list[Example], configs: dict[str, DecodeConfig], repeat: int, path: Path,
          about: dict) -> list[dict]:  # fmt: skip
    """Rows of all configs (which one full model serves), those that the results file has already taken from there; what is measured is
    added to it, a few settings at a time, each time beside the full model. A row counts as the same if the setting, the examples, the
    place that `environment` tells (but for versions) and `about` are; `about`, {name: value}, says where model and examples come from."""
    here = environment(model)
    place = {name: here[name] for name in ("device", "threads", "dtype", "processes")}
    keys = {name: digest(place, about, task, examples, asdict(config)) for name, config in configs.items()}
    known = read_results(path)
    missing = [name for name in configs if keys[name] not in known]
    for start in range(0, len(missing), AT_A_TIME):
        part = {name: configs[name] for name in missing[start : start + AT_A_TIME]}
        full, *rows = evaluate(model, tokenizer, task, examples, part, repeat)
        for row in rows:
            known[keys[row["name"]]] = [{name: value for name, value in each.items() if name != "prompts"} for each in (full, row)]
        if processes()[0] == 0:
            with open(path, "a", encoding="utf-8") as file:
                for name in part:
                    file.write(json.dumps({"key": keys[name], "environment": here | about, "rows": known[keys[name]]}) + "\n")
    return [known[keys[next(iter(configs))]][0], *(known[keys[name]][1] | {"name": name} for name in configs)]
