"""`eval.py sweep`: every combination of some settings, measured beside the full model; kept in a file, so
that a sweep goes on where it stopped."""

import argparse
import inspect
import json
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import mean, pstdev

from common.config import read_field
from common.errors import UserError
from common.files import digest, whole_file
from common.processes import processes, tell
from confidence import FUNCTIONS, resolve
from decoding.settings import DecodeConfig
from evaluation.figures import alike, evaluate, pareto
from evaluation.inputs import chosen_tasks, load_inputs, load_model, note, run_record
from evaluation.measure import environment
from evaluation.rows import custom_settings, own_origin, own_setting, sources
from evaluation.table import check_written, finish, heading, table
from evaluation.tasks import Task, sample
from formats.data import Example

AT_A_TIME = 4  # settings that are measured in turn with the full model, then kept
ENTRY = '{"key": '  # how a result begins
KIND = "rows with intervals"  # what a result holds; one of another kind is measured anew


def main(args: argparse.Namespace) -> None:
    """A table of every combination for each task, with its Pareto front."""
    custom = custom_settings(args)
    swept = swept_values(args.over)
    tasks = chosen_tasks(args)
    check_written(args, tasks)
    if "threshold" in swept and own_setting(args, tasks[0], custom).layer_thresholds:
        raise UserError("layer_thresholds outranks the threshold that is swept; leave it out")
    model, tokenizer = load_model(args)
    record = run_record(args, model)
    about = {name: record[name] for name in ABOUT}
    result = {"environment": record, "rows": []}
    note(sources(args, own_origin(args, custom, model)))
    for task in tasks:
        task, examples = load_inputs(args, task, args.split)
        drawn = sample(examples, args.limit, args.draw_seed)
        for configs in alike(combinations(swept, model, own_setting(args, task, custom))):
            rows = measured_or_known(model, tokenizer, task, drawn, configs, args.repeat, args.results, about)
            tell(
                f"\n{heading(args, task, len(drawn), len(examples))}, * on the Pareto front\n\n"
                f"{shown(rows, task, swept)}"
            )
            result["rows"] += rows
    finish(args, result, model, tokenizer)


def swept_values(over: list[list[str]]) -> dict[str, list[str]]:
    """The values of every field swept, as text. over: field, values. Raises UserError for one without values,
    or twice."""
    swept = {}
    for field, *values in over:
        name = field.replace("-", "_")
        if not values or name in swept:
            raise UserError(f"--over {field}: give it once, with all of its values")
        swept[name] = values
    return swept


def combinations(swept: dict[str, list[str]], model, base: DecodeConfig) -> dict[str, DecodeConfig]:
    """Every combination of the values swept, named by them. Raises UserError for one that cannot be."""
    configs = {}
    for texts in product(*swept.values()):
        picks = dict(zip(swept, texts))
        fields = {field: read_field(DecodeConfig, field, text) for field, text in picks.items()}
        config = replace(base, **fields)
        config.exits(model.config)
        configs[" ".join(f"{field}={text}" for field, text in picks.items())] = config
    return configs


def shown(rows: list[dict], task: Task, swept: dict[str, list[str]]) -> str:
    """The table with its Pareto front marked, and means over each of the fields that have several values."""
    points = {row["name"]: (row["speedup"], row["kept"]) for row in rows}
    best = pareto(points)
    marked = [{**row, "name": row["name"] + " *" * (row["name"] in best)} for row in rows]
    text = table(marked, task, wide=True)
    several = [field for field, values in swept.items() if len(values) > 1]
    if len(several) > 1:
        text += "\n\nmean ± deviation over what else was swept\n" + "\n".join(
            means(rows[1:], field) for field in several
        )
    return text


def means(rows: list[dict], field: str) -> str:
    """Of a sweep's rows, for every value of one field, mean ± standard deviation over all others."""
    groups = defaultdict(list)
    for row in rows:
        value = row["config"][field]
        if isinstance(value, (list, tuple)):  # a list, where the row has been in a file
            value = ",".join(map(str, value))
        groups[str(value)].append(row)
    figures = {
        "speed-up": lambda row: row["speedup"],
        "exit layer": lambda row: row["avg_exit_layer"],
        "confidence MFLOPs": lambda row: row["confidence_flops_per_token"] / 1e6,
        "agreement": lambda row: row["agreement"],
    }
    for name in rows[0]["scores"]:
        figures[name] = lambda row, name=name: 100 * row["scores"][name]
    lines = []
    for value, members in groups.items():
        cells = []
        for title, get in figures.items():
            values = [get(row) for row in members]
            cells.append(f"{title} {mean(values):.3g} ± {pstdev(values):.2g}")
        lines.append(f"{field} {value} ({len(members)} rows): {', '.join(cells)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the file of results

ABOUT = (
    "checkpoint",
    "checkpoint_id",
    "split_of_data",
    "limit",
    "repeat",
    "seed",
    "shots",
    "chat",
)  # of rows
PLACE = ("device", "threads", "dtype", "weights", "processes")  # what makes two runs comparable


def read_results(path: Path) -> dict[str, list[dict]]:
    """By key, the full model's row and that of a setting, from a file of results; a last one that was cut
    short is taken away. Raises UserError for a file that is something else."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n") and lines[-1].startswith(ENTRY.encode()[: len(lines[-1])]):
        lines.pop()
        if processes()[0] == 0:
            with whole_file(path) as part:
                Path(part).write_bytes(b"".join(lines))
    known = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line.decode("utf-8"))
            full, row = entry["rows"]
            known[entry["key"]] = [{**full}, {**row}]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{path}, line {number}: not a result of a sweep; name another file with --results"
            ) from None
    return known


def measured_or_known(
    model,
    tokenizer,
    task: Task,
    examples: list[Example],
    configs: dict[str, DecodeConfig],
    repeat: int,
    path: Path,
    about: dict,
) -> list[dict]:
    """Rows of all configs (which one full model serves), those that the results file has already taken from
    there; what is measured is added to it, a few settings at a time, each time beside the full model. A row
    counts as the same if the setting, the examples, the place and `about` are; `about`, {name: value}, says
    where model and examples come from."""
    here = environment(model)
    place = {name: here[name] for name in PLACE}
    keys = {
        name: digest(KIND, place, about, task, examples, asdict(config), source_of(config))
        for name, config in configs.items()
    }
    known = read_results(path)
    missing = [name for name in configs if keys[name] not in known]
    for start in range(0, len(missing), AT_A_TIME):
        part = {name: configs[name] for name in missing[start : start + AT_A_TIME]}
        full, *rows = evaluate(model, tokenizer, task, examples, part, repeat)
        for row in rows:
            known[keys[row["name"]]] = [without_prompts(full), without_prompts(row)]
        if processes()[0] == 0:
            with open(path, "a", encoding="utf-8") as file:
                for name in part:
                    entry = {"key": keys[name], "environment": here | about, "rows": known[keys[name]]}
                    file.write(json.dumps(entry) + "\n")
    first = keys[next(iter(configs))]
    rows = [known[key][1] | {"name": name} for name, key in keys.items()]
    return [known[first][0], *rows]


def source_of(config: DecodeConfig) -> str:
    """The file's text of a confidence function of one's own: edited, it is another one."""
    if config.confidence is None or config.confidence in FUNCTIONS:
        return ""
    return Path(inspect.getsourcefile(resolve(config.confidence))).read_text(encoding="utf-8")


def without_prompts(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "prompts"}
