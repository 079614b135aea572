"""The table, which `python eval.py` prints: rows of figures as aligned text; and the files that go with
it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.files import check_outputs, write_json
from common.processes import processes, tell
from evaluation.figures import alike, evaluate
from evaluation.inputs import chosen_tasks, load_inputs, load_model, note, run_record
from evaluation.measure import peak_memory
from evaluation.pages import Pages, check_page
from evaluation.rows import choose_rows, custom_settings, origin_of_rows, sources
from evaluation.tasks import Task, sample

TITLES = {
    "bleu": "BLEU",
    "bleu_lower": "BLEU (lower case)",
    "rougeL_coco": "ROUGE-L (COCO)",
    "rougeL": "ROUGE-L",
    "rouge1_stem": "ROUGE-1 (stems)",
    "rouge2_stem": "ROUGE-2 (stems)",
    "rougeL_stem": "ROUGE-L (stems)",
    "rougeLsum_stem": "ROUGE-Lsum (stems)",
    "exact_match": "exact match",
    "f1": "F1",
}
LEGEND = """speed-up: over the full model, in brackets its 95 % interval over prompts and repeats; ideal: if
layers were all that takes time; exit layer: mean over tokens; agreement: tokens that are full's.
More: --wide (all figures), --all (all rows), --limit and --repeat (closer figures), --help."""
Cell = Callable[[dict], str]


# ---------------------------------------------------------------- cells


def percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def speedup_cell(row: dict) -> str:
    low, high = row["speedup_ci"]
    return f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})"


def flops_cell(row: dict) -> str:
    share = row["confidence_flops_per_token"] / row["flops_per_token"]
    return f"{row['flops_per_token'] / 1e6:.1f} ({share:.0%})"


def text_cell(row: dict, name: str, digits: int) -> str:
    """A figure of free text: only where there are no references, and so a perplexity."""
    return "" if row["perplexity"] is None else f"{row[name]:.{digits}f}"


SPEED: dict[str, Cell] = {  # a column that is empty in every row is left out
    "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
    "speed-up (95 %)": speedup_cell,
    "ideal": lambda row: f"{row['ideal_speedup']:.2f}",
    "efficiency": lambda row: f"{row['exit_efficiency']:.2f}",
    "first token, ms": lambda row: f"{1000 * row['first_token_s']:.0f}",
    "exit layer": lambda row: f"{row['avg_exit_layer']:.1f}",
    "MFLOPs/token (conf.)": flops_cell,
    "conf. time": lambda row: percent(row["confidence_time_share"], 0),
    "perplexity": lambda row: text_cell(row, "perplexity", 1),
    "distinct-2": lambda row: text_cell(row, "distinct_2", 2),
    "repetition": lambda row: text_cell(row, "repetition_4", 2),
}
LIKENESS: dict[str, Cell] = {
    "agreement": lambda row: f"{row['agreement']:.3f}",
    "ROUGE-L to full": lambda row: f"{row['rougeL_full']:.3f}",
    "missed": lambda row: percent(row["miss_rate"], 1),
    "drafts kept": lambda row: percent(row["accepted"], 1),
}
NARROW = ("tokens/s", "speed-up (95 %)", "ideal", "exit layer", "perplexity", "agreement")  # and two scores


def score_columns(task: Task) -> dict[str, Cell]:
    """A column for each score of a task, in points."""
    return {
        TITLES[metric]: lambda row, name=name: f"{100 * row['scores'][name]:.1f}"
        for name, metric in task.metrics.items()
    }


def columns_of(task: Task, wide: bool) -> dict[str, Cell]:
    """Columns by title: all, or those that fit a line of 100 characters, there with the short names of two
    scores."""
    scores = score_columns(task)
    if wide:
        return SPEED | scores | LIKENESS
    short = {title.split(" (")[0]: cell for title, cell in list(scores.items())[:2]}
    return {
        title: cell for title, cell in (SPEED | short | LIKENESS).items() if title in NARROW or title in short
    }


def table(rows: list[dict], task: Task, wide: bool) -> str:
    """Rows of one task as aligned text."""
    filled = {"": [row["name"] for row in rows]}
    for title, cell in columns_of(task, wide).items():
        cells = [cell(row) for row in rows]
        if any(cells):
            filled[title] = cells
    return aligned(filled)


def aligned(columns: dict[str, list[str]]) -> str:
    """Columns by title as aligned text, which is Markdown too."""
    widths = [max(map(len, [title, *cells])) for title, cells in columns.items()]
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values())]
    texts = []
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        texts.append("| " + " | ".join(padded) + " |")
    return "\n".join(texts)


def heading(args: argparse.Namespace, task: Task, used: int, available: int) -> str:
    """What the figures under it were measured on, and what the scores are."""
    count = f"{used} of {available}" if used < available else str(used)
    runs = "one run" if args.repeat == 1 else f"{args.repeat} runs, the median counts"
    scores = ", ".join(TITLES[metric] for metric in task.metrics.values())
    return f"{task.name}, {count} {args.split} inputs, {runs}{'; ' if scores else ''}{scores}"


# ---------------------------------------------------------------- the command


def main(args: argparse.Namespace) -> None:
    """`python eval.py`: the full model beside the rows of every task."""
    custom = custom_settings(args)
    if "confidence" in custom and (args.rows is not None or args.all):
        raise UserError(
            "--rows and --all choose among the settings, --confidence makes a row of its own, as does a file of "
            "thresholds; give one of them"
        )
    tasks = chosen_tasks(args)
    check_written(args, tasks)
    check_page(args)
    model, tokenizer = load_model(args)
    result, pages = {"environment": run_record(args, model), "rows": []}, Pages(args, model, tokenizer)
    note(sources(args, origin_of_rows(args, custom, model)))
    loaded = [
        load_inputs(args, task, args.split) for task in tasks
    ]  # all mistakes before anything is measured
    chosen = [choose_rows(args, task, model, custom) for task, _ in loaded]
    for (task, examples), rows_of_task in zip(loaded, chosen):
        drawn = sample(examples, args.limit, args.draw_seed)
        for configs in alike(rows_of_task):
            rows = evaluate(model, tokenizer, task, drawn, configs, args.repeat, bool(args.wide or args.json))
            tell(f"\n{heading(args, task, len(drawn), len(examples))}\n\n{table(rows, task, args.wide)}")
            result["rows"] += rows
            pages.add(task, drawn, configs)
    if not args.wide:
        tell(f"\n{LEGEND}")
    pages.write()
    finish(args, result, model, tokenizer)


def check_written(args: argparse.Namespace, tasks: list[Task]) -> None:
    """Raises UserError for what could not be written in the end."""
    outputs = args.json, getattr(args, "html", None), getattr(args, "results", None)
    check_files(args, tasks, *outputs, settings=args.settings)
    if args.plot:
        if not args.plot.parent.is_dir():
            raise UserError(f"{args.plot}: there is no folder {args.plot.parent} to write to")
        if args.plot.exists() and not args.plot.is_dir():
            raise UserError(f"{args.plot}: is a file; give the name of a folder")
        from evaluation.plots import pyplot

        pyplot()


def check_files(
    args: argparse.Namespace, tasks: list[Task], *paths: Path | None, settings: Path | None = None
) -> None:
    """Raises UserError for files that cannot be written, or that the command reads: `settings` and the data,
    too."""
    thresholds, data = getattr(args, "thresholds", None), [task.file for task in tasks]
    read = [args.checkpoint, args.heads, thresholds, args.shot_file, args.frequent_ids, settings, *data]
    check_outputs([*paths], read)


def finish(args: argparse.Namespace, result: dict, model, tokenizer) -> None:
    """Writes the files that the arguments name, from the first process."""
    if processes()[0]:
        return
    result["environment"]["peak_memory_mib"] = peak_memory(model)
    print(f"peak memory {peak_memory(model)} MiB", file=sys.stderr)
    if args.json:
        write_json(args.json, result)
    if args.plot:
        from evaluation.plots import draw_evaluation

        for path in draw_evaluation(args.plot, result["rows"], model, tokenizer):
            tell(f"wrote {path}")
