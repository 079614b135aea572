"""Formats rows of figures as aligned text, which is also Markdown."""

from collections.abc import Callable

from evaluation.inputs import Table
from evaluation.settings import EvalConfig
from evaluation.tasks import Task

TITLES = {
    "bleu": "BLEU",
    "bleu_lower": "BLEU (lower case)",
    "rougeL_coco": "ROUGE-L (COCO)",
    "rougeL": "ROUGE-L",
    "rouge1_stem": "ROUGE-1 (stems)",
    "rouge2_stem": "ROUGE-2 (stems)",
    "rougeL_stem": "ROUGE-L (stems)",
    "exact_match": "exact match",
    "f1": "F1",
}
LEGEND = """speed-up: compared with the full model (95 % interval over prompts and repeats); ideal: speed-up
if only layers (with a shortlist, also LM heads) took time; exit layer: mean over tokens; agreement:
share of tokens equal to the full model's. More: --wide (all columns), --all (all configurations),
--limit and --repeat (narrower intervals), --help."""
Cell = Callable[[dict], str]


# ---------------------------------------------------------------- cells


def figure(name: str, form: str) -> Cell:
    """Makes a cell that shows a number in this format, or nothing where it does not apply."""
    return lambda row: "" if row[name] is None else format(row[name], form)


def of_free_text(name: str) -> Cell:
    """Makes a cell that shows a figure only for texts without references (only these have a perplexity)."""
    return lambda row: "" if row["perplexity"] is None else f"{row[name]:.2f}"


def speedup_cell(row: dict) -> str:
    low, high = row["speedup_ci"]
    return f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})"


def flops_cell(row: dict) -> str:
    share = row["confidence_flops_per_token"] / row["flops_per_token"]
    return f"{row['flops_per_token'] / 1e6:.1f} ({share:.0%})"


SPEED: dict[str, Cell] = {  # a column that is empty in every row is left out
    "tokens/s": figure("tokens_per_s", ".0f"),
    "speed-up (95 %)": speedup_cell,
    "ideal": figure("ideal_speedup", ".2f"),
    "efficiency": figure("exit_efficiency", ".2f"),
    "first token, ms": lambda row: f"{1000 * row['first_token_s']:.0f}",
    "exit layer": figure("avg_exit_layer", ".1f"),
    "MFLOPs/token (conf.)": flops_cell,
    "conf. time": figure("confidence_time_share", ".0%"),
    "perplexity": figure("perplexity", ".1f"),
    "distinct-2": of_free_text("distinct_2"),
    "repetition": of_free_text("repetition_4"),
}
LIKENESS: dict[str, Cell] = {
    "agreement": figure("agreement", ".3f"),
    "ROUGE-L to full": figure("rougeL_full", ".3f"),
    "missed": figure("miss_rate", ".1%"),
    "drafts kept": figure("accepted", ".1%"),
}
NARROW = ("tokens/s", "speed-up (95 %)", "ideal", "exit layer", "perplexity", "agreement")  # and two scores


def columns_of(task: Task, wide: bool) -> dict[str, Cell]:
    """Returns the columns by title: all, or those that fit into a line of 100 characters, including at most
    two scores, with shortened titles. Scores are in points."""
    scores = {}
    for name, metric in task.metrics.items():
        scores[TITLES[metric]] = lambda row, name=name: f"{100 * row['scores'][name]:.1f}"
    if wide:
        return SPEED | scores | LIKENESS
    short = {title.split(" (")[0]: cell for title, cell in list(scores.items())[:2]}
    columns = SPEED | short | LIKENESS
    return {title: columns[title] for title in columns if title in (*NARROW, *short)}


def table_text(rows: list[dict], task: Task, wide: bool) -> str:
    """Formats the rows of one task as aligned text."""
    columns = {"": [row["name"] for row in rows]}
    columns |= {title: [cell(row) for row in rows] for title, cell in columns_of(task, wide).items()}
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    widths = [max(map(len, [title, *cells])) for title, cells in columns.items()]
    lines = []
    for line in [list(columns), ["---"] * len(columns), *zip(*columns.values())]:
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
    return "\n".join(lines)


def heading(config: EvalConfig, table: Table) -> str:
    """Says what the figures below it were measured on, and what the scores are."""
    used = len(table.examples)
    count = f"{used} of {table.available}" if used < table.available else str(used)
    runs = "one run" if config.repeat == 1 else f"{config.repeat} runs, the median counts"
    scores = ", ".join(TITLES[metric] for metric in table.task.metrics.values())
    return f"{table.task.name}, {count} {config.split} inputs, {runs}{'; ' if scores else ''}{scores}"
