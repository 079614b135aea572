"""Is one model that exits early better than a smaller one? Quality against the time of a token, measured in
turns:

    python -m tools.frontier --small runs/6/model.pt,runs/3/model.pt --plot frontier.png python -m
    tools.frontier --small runs/6/model.pt --small "trained longer=runs/6x2/model.pt" --plot frontier.png
    python -m tools.frontier --small runs/mine/model.pt --with docs/frontier.json --limit 200 --plot
    frontier.png

Rows are the smaller models at full depth, and of --checkpoint the full model, static exits, `softmax` and
`classifier` at falling thresholds, and drafts that are verified, with the exit layers of the settings beside
it. All models must share a tokenizer, so that a token means as much to each. A training takes longer than a
comparison, so figures may come from several runs: --with adds to this run's rows those of an earlier one's
--json that it has not, such as docs/frontier.json, with their times in proportion to the full model's, which
every run measures.
"""

import common.threads  # noqa: F401  before torch

import argparse
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

from common.config import check_range
from common.errors import UserError, run
from common.files import check_outputs, read_json, write_json
from common.flags import Parser, add_model_flags, loading
from decoding.choosing import DEFAULT_CHECKPOINT
from decoding.settings import DecodeConfig
from evaluation.figures import quality_figures
from evaluation.inputs import load_model
from evaluation.measure import encode_inputs, environment, run_in_turns
from evaluation.plots import pyplot
from evaluation.rows import exit_layers_of, read_settings
from evaluation.table import TITLES, aligned
from evaluation.tasks import Task, find_task, read_task, sample
from model import Transformer, load_checkpoint

THRESHOLDS = (0.95, 0.8, 0.6, 0.4, 0.2)
MARKS = {"full": "*", "static": "v", "softmax": "o", "classifier": "D", "verified": "P"}
MARKS_OF_SMALLER = "sX<>^"  # of the curves of smaller models, in the order of the flags


@dataclass
class Row:
    """One point: a model under a setting; `kind` is the curve that it lies on."""

    kind: str
    name: str
    model: Transformer
    config: DecodeConfig


def read_small(args: argparse.Namespace, model: Transformer, tokenizer) -> dict[tuple[str, str], Transformer]:
    """The smaller models by the curve that each lies on and its name there."""
    small = {}
    for words in args.small:
        kind, _, files = words.rpartition("=")
        if kind in MARKS:
            raise UserError(f"--small {words}: {kind} is a curve of {args.checkpoint}; give another name")
        for file in files.split(","):
            smaller, other = load_checkpoint(file, **loading(args) | {"heads": None, "frequent_ids": None})
            if other is None or other.to_blob() != tokenizer.to_blob():
                raise UserError(
                    f"{file}: has another tokenizer than {args.checkpoint}; compare models of one tokenizer"
                )
            shape, width = smaller.config, smaller.config.d_model
            name = f"{shape.n_layers} layers" + ("" if width == model.config.d_model else f" of {width}")
            key = (kind or "smaller", name)
            if key in small:
                raise UserError(
                    f"{file}: a second model of {name}; give it a curve of its own, --small NAME={file}"
                )
            small[key] = smaller
    return small


def rows_of(
    model: Transformer, small: dict[tuple[str, str], Transformer], task: Task, settings: Path
) -> list[Row]:
    """All rows of one task."""
    tuned = read_settings(settings, task, model, custom={})
    missing = [name for name in ("softmax", "verified") if name not in tuned]
    if missing:
        raise UserError(
            f"{settings}: has no row {missing[0]!r} for {task.name}; choose rows with eval.py tune"
        )
    softmax = replace(tuned["softmax"], layer_thresholds=None)
    full = softmax.full()
    rows = [Row(kind, name, each, full) for (kind, name), each in small.items()]
    rows.append(Row("full", f"{model.config.n_layers} layers", model, full))
    for layer in exit_layers_of(model):
        config = replace(full, confidence="softmax", threshold=0.0, exit_layers=(layer,))
        rows.append(Row("static", f"layer {layer}", model, config))
    for kind in ("softmax", "classifier"):
        if kind == "classifier" and not set(softmax.exits(model.config)) <= set(model.config.classifiers):
            continue
        for threshold in THRESHOLDS:
            config = replace(softmax, confidence=kind, threshold=threshold)
            rows.append(Row(kind, f"from {threshold}", model, config))
    rows.append(Row("verified", "same text", model, tuned["verified"]))
    return rows


def compare(args: argparse.Namespace, model, tokenizer, small: dict, task: Task) -> list[dict]:
    """The figures of every row on one task."""
    examples = sample(read_task(task, "test"), args.limit, 0)
    rows = rows_of(model, small, task, Path(args.heads or args.checkpoint).with_suffix(".json"))
    labelled = {f"{row.kind} {row.name}": row.config for row in rows}
    prompts, stopping = encode_inputs(model, tokenizer, task, examples, labelled)
    models = {f"{row.kind} {row.name}": row.model for row in rows}
    figures = []
    for row, measured in zip(
        rows, run_in_turns(model, prompts, stopping, args.repeat, task.name, models).values()
    ):
        texts = [tokenizer.decode(output.tokens) for output in measured.outputs]
        pace = sum(measured.seconds) / sum(len(output.tokens) for output in measured.outputs)
        scores = quality_figures(task, texts, [list(example.references) for example in examples])["scores"]
        figures.append(
            {
                "task": task.name,
                "kind": row.kind,
                "name": row.name,
                "ms_per_token": 1000 * pace,
                "scores": scores,
            }
        )
    return figures


def read_earlier(path: Path, limit: int) -> list[dict]:
    """The rows of an earlier run. Raises UserError for a file that holds none, or of other inputs."""
    content = read_json(path, "figures of an earlier run")
    try:
        inputs, rows = content["inputs"], content["rows"]
        for row in rows:
            row["scores"] = {name: float(score) for name, score in row["scores"].items()}
            row["ms_per_token"] = float(row["ms_per_token"])
            (row["task"], row["kind"], row["name"])
            if not row["ms_per_token"] > 0:
                raise ValueError(f"a token of {row['ms_per_token']} ms")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: holds no figures of a frontier ({error!r}); --json writes such a file"
        ) from None
    if inputs != limit:
        raise UserError(f"{path}: of {inputs} inputs a task, not {limit}; --limit {inputs} takes the same")
    return rows


def full_row(figures: list[dict]) -> dict:
    """The full model's row of one task."""
    return next(row for row in figures if row["kind"] == "full")


def joined(figures: list[dict], earlier: list[dict]) -> list[dict]:
    """The earlier rows of a task that are not among its figures, with these, smaller models first and by
    their times; times become what they were beside the full model's. Raises UserError where that was another
    model."""
    same_task = {(row["kind"], row["name"]): row for row in earlier if row["task"] == figures[0]["task"]}
    if not same_task:
        return figures
    full = full_row(figures)
    before = same_task.get(("full", full["name"]))
    if before is None:
        raise UserError(f"the figures of an earlier run have no row of a full model with {full['name']}")
    scale = full["ms_per_token"] / before["ms_per_token"]
    rows = {key: row | {"ms_per_token": scale * row["ms_per_token"]} for key, row in same_task.items()}
    rows |= {(row["kind"], row["name"]): row for row in figures}  # what both have, as it is now
    if any(set(row["scores"]) != set(full["scores"]) for row in rows.values()):
        raise UserError(f"the figures of an earlier run have other scores than {', '.join(full['scores'])}")
    small = [row for row in rows.values() if row["kind"] not in MARKS]
    return sorted(small, key=lambda row: row["ms_per_token"]) + [
        row for row in rows.values() if row["kind"] in MARKS
    ]


def table(figures: list[dict]) -> str:
    """The rows of one task as aligned text."""
    full = full_row(figures)["ms_per_token"]
    columns = {
        figures[0]["task"]: [f"{row['kind']}, {row['name']}" for row in figures],
        "ms a token": [f"{row['ms_per_token']:.2f}" for row in figures],
        "of full": [f"{row['ms_per_token'] / full:.2f}" for row in figures],
    }
    for name in figures[0]["scores"]:
        columns[TITLES[name]] = [f"{100 * row['scores'][name]:.1f}" for row in figures]
    return aligned(columns)


def draw(figures: list[dict], score: str, path: Path) -> None:
    """Quality against time, a panel a task, a curve a kind."""
    plt = pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in figures))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4.2), squeeze=False)
    for panel, task in zip(panels[0], tasks):
        kinds = dict.fromkeys(row["kind"] for row in figures)
        marks = dict(zip([kind for kind in kinds if kind not in MARKS], cycle(MARKS_OF_SMALLER))) | MARKS
        for kind, mark in marks.items():
            own = [row for row in figures if (row["task"], row["kind"]) == (task, kind)]
            if own:
                points = sorted((row["ms_per_token"], 100 * row["scores"][score]) for row in own)
                panel.plot(*zip(*points), marker=mark, linewidth=1, label=kind)
        panel.set(title=task, xlabel="ms a token, batch 1", ylabel=TITLES[score])
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.savefig(path)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--small",
        required=True,
        action="append",
        metavar="[NAME=]FILES",
        help="checkpoints of the smaller models, comma-separated; again with a NAME for a curve of its own",
    )
    add(
        "--with",
        type=Path,
        dest="earlier",
        metavar="FILE",
        help="add rows of an earlier run's --json, times in proportion",
    )
    add("--tasks", default="translation,e2e", help="default: %(default)s")
    add("--limit", type=int, default=60, help="test inputs of each task (default: %(default)s)")
    add(
        "--repeat",
        type=int,
        default=1,
        help="times an input is decoded; the median counts (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="draw the picture (needs matplotlib)")
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    return parser


def main() -> None:
    args = make_parser().parse_args()
    check_range("limit", args.limit, least=1)
    check_range("repeat", args.repeat, least=1)
    files = [file for words in args.small for file in words.rpartition("=")[2].split(",")]
    settings = Path(args.heads or args.checkpoint).with_suffix(".json")
    check_outputs([args.json, args.plot], [args.checkpoint, args.heads, args.frequent_ids, settings, *files])
    if args.plot and args.plot.suffix != ".png":
        raise UserError(f"{args.plot}: --plot writes a picture; give it a name that ends in .png")
    earlier = read_earlier(args.earlier, args.limit) if args.earlier else []
    tasks = [find_task(name) for name in args.tasks.split(",")]
    if args.plot:
        pyplot()  # says at once if it is not there
        for task in tasks:
            if "bleu" not in task.metrics:
                raise UserError(f"--plot draws BLEU, which {task.name} has not; leave it out")
    model, tokenizer = load_model(args)
    small = read_small(args, model, tokenizer)
    figures = []
    for task in tasks:
        rows = joined(compare(args, model, tokenizer, small, task), earlier)
        print(table(rows), end="\n\n", flush=True)
        figures += rows
    if args.json:
        write_json(args.json, {"environment": environment(model), "inputs": args.limit, "rows": figures})
    if args.plot:
        draw(figures, "bleu", args.plot)


if __name__ == "__main__":
    run(main)
