"""Measures every combination of some settings, and stores the results in a file, from which an interrupted
sweep resumes."""

import inspect
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import mean, pstdev

from common.errors import UserError
from common.files import digest, read_json, write_json
from common.flags import as_text
from confidence import FUNCTIONS, resolve
from decoding.presets import override, read_fields
from decoding.settings import DecodeConfig
from evaluation.configurations import own_config
from evaluation.figures import best_rows, evaluate
from evaluation.inputs import Setup, Table
from evaluation.measure import Configuration
from evaluation.table import table_text
from evaluation.tasks import Task

AT_A_TIME = 4  # configurations that are measured in turn with the full model, then kept
MAY_CHANGE = ("torch", "python", "commit")  # in the records of runs whose results are used together


def swept_values(over: list[list[str]]) -> dict[str, list[str]]:
    """Returns the values of every swept field, as text. Raises UserError for a field without values, or given
    twice."""
    swept = {field.replace("-", "_"): values for field, *values in over}
    if len(swept) < len(over) or not all(swept.values()):
        raise UserError("--over takes a setting and its values; give each setting once")
    return swept


def combinations(setup: Setup, task: Task) -> dict[str, Configuration]:
    """Returns every combination of the swept values, by a name that lists them. Raises UserError for an
    invalid combination."""
    swept, base = swept_values(setup.config.over), own_config(setup, task)
    configurations = {}
    for texts in product(*swept.values()):
        picks = dict(zip(swept, texts))
        decode = override(base, read_fields(picks))
        decode.exits(setup.model.config)
        name = " ".join(f"{field}={text}" for field, text in picks.items())
        configurations[name] = Configuration(decode, setup.model)
    return configurations


def sweep_text(rows: list[dict], task: Task, over: list[list[str]]) -> str:
    """Formats the table, with a star for rows that are clearly on the Pareto front, and, if several fields
    have several values, the means for each value of these fields."""
    best = best_rows(rows)
    starred = [{**row, "name": row["name"] + (" *" if row["name"] in best else "")} for row in rows]
    text = table_text(starred, task, wide=True)
    several = [field for field, values in swept_values(over).items() if len(values) > 1]
    if len(several) > 1:
        lines = [means(rows[1:], field) for field in several]
        text += "\n\nmean ± deviation over what else was swept\n" + "\n".join(lines)
    return text


def means(rows: list[dict], field: str) -> str:
    """Formats mean ± standard deviation over all other fields, for every value of one field."""
    groups = defaultdict(list)
    for row in rows:
        groups[as_text(row["config"][field])].append(row)
    lines = []
    for value, members in groups.items():
        figures = {
            "speed-up": [row["speedup"] for row in members],
            "exit layer": [row["avg_exit_layer"] for row in members],
            "confidence MFLOPs": [row["confidence_flops_per_token"] / 1e6 for row in members],
            "agreement": [row["agreement"] for row in members],
        }
        for name in rows[0]["scores"]:
            figures[name] = [100 * row["scores"][name] for row in members]
        cells = [f"{title} {mean(values):.3g} ± {pstdev(values):.2g}" for title, values in figures.items()]
        lines.append(f"{field} {value} ({len(members)} rows): {', '.join(cells)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the file of results


def measured_or_known(setup: Setup, table: Table) -> list[dict]:
    """Returns the rows of a table. Reads those that the results file contains, measures the others, and adds
    them to the file. A few configurations at a time are measured in turn with the full model. A row is reused
    if its configuration, task, examples, frequent ids and run record (except MAY_CHANGE) are the same."""
    path = Path(setup.config.results)
    where = {name: value for name, value in setup.record.items() if name not in MAY_CHANGE}
    ids = setup.model.frequent_ids
    where["frequent_ids"] = None if ids is None else digest(ids.tolist())
    keys = {
        name: digest(where, table.task, table.examples, asdict(each.decode), source_of(each.decode))
        for name, each in table.configurations.items()
    }
    known = read_json(path, "results of a sweep") if path.is_file() else {}
    if not all(isinstance(rows, list) and len(rows) == 2 for rows in known.values()):
        raise UserError(f"{path}: does not hold the results of a sweep; give --results another name")
    missing = [name for name in keys if keys[name] not in known]
    for start in range(0, len(missing), AT_A_TIME):
        part = {name: table.configurations[name] for name in missing[start : start + AT_A_TIME]}
        full, *rows = evaluate(setup, replace(table, configurations=part))
        for row in (full, *rows):
            del row["prompts"]
        known |= {keys[row["name"]]: [full, row] for row in rows}
        write_json(path, known)
    first = next(iter(keys.values()))
    return [known[first][0], *(known[key][1] | {"name": name} for name, key in keys.items())]


def source_of(config: DecodeConfig) -> str:
    """Returns the source of a user's confidence function, whose file may change under the same name."""
    if config.confidence is None or config.confidence in FUNCTIONS:
        return ""
    return Path(inspect.getsourcefile(resolve(config.confidence))).read_text(encoding="utf-8")
