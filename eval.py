"""Speed and quality side by side. Without arguments: the embedded model on 60 test inputs of each of its tasks, every row of its settings.

    python eval.py                                                  the table
    python eval.py --confidence softmax --threshold 0.6             the full model against one setting
    python eval.py --tasks samsum=val.jsonl --confidence jsd        another task; --show-prompt shows what the model gets
    python eval.py --sweep threshold 0.3 0.5 0.7 --sweep exit-layers 4 4,8    every combination; goes on where it stopped
    python eval.py --calibrate --tasks e2e --tolerance 0.05         a threshold with a guarantee, written to a file
    python eval.py --thresholds FILE                                the full model against settings from such a file
    python eval.py --tune                                           chooses the settings anew, on dev, and writes them
    torchrun --nproc-per-node 2 eval.py                             several GPUs, or processes, share the prompts

measure.py says what is measured, and how; tasks.py, on what.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from common.errors import UserError, run
from common.files import digest, write_json
from common.flags import Parser, add_flags, add_model_flags, device_and_dtype, given
from common.processes import process_group, processes, tell
from decode import DEFAULT_CHECKPOINT
from decoding.choosing import with_thresholds
from decoding.settings import DecodeConfig
from evaluation.calibrate import find_threshold, report
from evaluation.measure import alike, environment, evaluate, means, pareto, peak_memory, quality, table
from evaluation.sweep import combinations, sweep
from evaluation.tasks import TASKS, Task, find_task, read_task, sample
from evaluation.tune import read_settings, tune
from formats.data import Example
from model import load_checkpoint

DEFAULTS = {"limit": 60, "repeat": 2, "seed": 0, "shots": 0, "results": Path("sweep.jsonl"), "calibrated": Path("thresholds.json"),
            "risk": "consistency", "tolerance": 0.05, "error": 0.05}  # fmt: skip
USELESS = {  # flags that say nothing to a command
    "the table": ("results", "calibrated", "risk", "tolerance", "error"),
    "show_prompt": ("results", "calibrated", "risk", "tolerance", "error", "json", "plot", "rows", "repeat"),
    "tune": ("results", "calibrated", "risk", "tolerance", "error", "json", "plot", "rows", "repeat", "thresholds"),
    "sweep": ("calibrated", "risk", "tolerance", "error", "rows", "settings"),
    "calibrate": ("results", "json", "plot", "rows", "repeat", "settings"),
}

# ---------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parser.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}, or NAME=FILE (default: those of the settings)")
    parser.add_argument("--split", choices=("dev", "test"), help="data to use (default: test; dev with --tune and --calibrate)")
    parser.add_argument("--limit", type=int, help="inputs of each task, drawn by --seed; 0 is all (default: 60)")
    parser.add_argument("--repeat", type=int, help="times an input is decoded; the median counts (default: 2)")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="seed of the draw of inputs, and of sampling (default: 0)")
    parser.add_argument("--shots", type=int, help="solved examples before every prompt, from the training file (default: 0)")
    parser.add_argument("--shot-file", metavar="FILE", help="take them from this file")
    parser.add_argument("--show-prompt", action="store_true", help="print the first prompt of each task, as the model gets it, and end")
    parser.add_argument("--skip-bad", action="store_true", help="count and skip malformed lines of a data file")
    parser.add_argument("--settings", type=Path, help="JSON file of the rows (default: the checkpoint's name with .json)")
    parser.add_argument("--rows", metavar="NAMES", help="of the settings only these rows, comma-separated (default: all)")
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help="JSON file of settings, as calibration writes it; flags outrank it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, per prompt too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw pictures there (needs matplotlib)")
    modes = parser.add_argument_group("other than the table of the settings")
    modes.add_argument("--tune", action="store_true", help="choose the settings on dev and write them to --settings")
    modes.add_argument("--sweep", nargs="+", action="append", metavar=("FIELD", "VALUE"), help="a row for each value, or combination")
    modes.add_argument("--results", type=Path, metavar="FILE", help="of a sweep, which goes on from it (default: sweep.jsonl)")
    modes.add_argument("--calibrate", action="store_true", help="find a threshold whose risk is below the tolerance, by Learn then Test")
    modes.add_argument("--tolerance", type=float, help="largest expected loss, between 0 and 1 (default: 0.05)")
    modes.add_argument("--error", type=float, help="chance allowed to be wrong about it (default: 0.05)")
    modes.add_argument("--risk", choices=("consistency", "task"),
                       help="loss: 1 - ROUGE-L to the full model's text, or how much lower its score (default: consistency)")  # fmt: skip
    modes.add_argument("--calibrated", type=Path, metavar="FILE", help="the file written (default: thresholds.json)")
    title = "decoding: with --confidence one row of your own, else changes to every row; what a sweep or calibration starts from"
    add_flags(parser, DecodeConfig(), title, skip=("seed",))
    return parser


def parse() -> tuple[argparse.Namespace, dict, list[Task]]:
    """The arguments, checked, the fields of DecodeConfig among them, and the tasks."""
    args = make_parser().parse_args()
    modes = [name for name in USELESS if getattr(args, name, False)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} are two commands; give one of them".replace("_", "-"))
    mode = modes[0] if modes else "the table"
    for name in USELESS[mode]:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} says nothing to {'--' * bool(modes)}{mode.replace('_', '-')}; leave it out")
    custom = with_thresholds(args.thresholds, given(args, DecodeConfig))
    for name, value in DEFAULTS.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.split = args.split or ("dev" if args.tune or args.calibrate else "test")
    args.settings = args.settings or Path(args.checkpoint).with_suffix(".json")
    tasks = [find_task(name) for name in (args.tasks.split(",") if args.tasks else default_tasks(args.settings))]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"two tasks would be called {max(names, key=names.count)}; evaluate them one by one")
    check_combination(args, custom, names)
    check_outputs(args)
    if args.limit < 0 or args.repeat < 1 or args.shots < 0:
        raise UserError(f"limit is {args.limit}, repeat {args.repeat}, shots {args.shots}; at least 0, 1 and 0")
    if not (0 < args.tolerance < 1 and 0 < args.error < 1):
        raise UserError(f"tolerance is {args.tolerance}, error {args.error}; both must lie between 0 and 1")
    return args, custom, tasks


def check_combination(args: argparse.Namespace, custom: dict, tasks: list[str]) -> None:
    """Raises ValueError for flags of which one would be ignored."""
    DecodeConfig(**custom)
    if args.tune and set(custom) - {"seed"}:
        raise UserError("--tune tries its own settings; leave out the decoding flags")
    if args.rows and "confidence" in custom:
        raise UserError("--rows chooses among the settings, --confidence makes a row of its own; give one of them")
    if args.shot_file and not args.shots:
        raise UserError("--shot-file gives solved examples; say how many with --shots")
    swept = [field.replace("-", "_") for field, *_ in args.sweep or []]
    for field, *values in args.sweep or []:
        if not values or swept.count(field.replace("-", "_")) > 1:
            raise UserError(f"--sweep {field}: give it once, with all of its values")
    if (args.calibrate or "threshold" in swept) and custom.get("layer_thresholds"):
        raise UserError("layer_thresholds outranks the threshold that is to be found; leave it out")
    if args.calibrate and custom.get("confidence", "softmax") is None:
        raise UserError("--calibrate needs a confidence function; confidence is none")
    if args.calibrate and len(tasks) != 1:
        raise UserError(f"--calibrate finds a threshold for one task; choose it with --tasks (here: {','.join(tasks)})")
    if args.calibrate and args.risk == "task" and not find_task(args.tasks).scores:
        raise UserError(f"task {tasks[0]} has no score; calibrate with --risk consistency")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises ValueError for what could not be written in the end."""
    written = [args.json, args.tune and args.settings, args.sweep and args.results, args.calibrate and args.calibrated]
    for path in filter(None, [*written, args.plot]):
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent} to write to")
        if path.is_dir() if path in written else path.is_file():
            raise UserError(f"{path}: is a {'folder' if path in written else 'file'}; give another name")
    if args.plot:
        from evaluation.plots import pyplot

        pyplot()
    if args.tune:
        args.before = read_object(args.settings)


def read_object(path: Path) -> dict:
    """The object in a JSON file, {} if there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not settings by task")
    return content


def default_tasks(settings: Path) -> list[str]:
    """The tasks that a checkpoint has settings for; else those of the embedded model."""
    return [name for name in read_object(settings) if name in TASKS] or ["translation", "e2e"]


# ---------------------------------------------------------------- what each command does


def rows_of(args: argparse.Namespace, task: Task, n_layers: int, custom: dict) -> dict[str, DecodeConfig]:
    """What to measure beside the full model: a sweep's combinations; with --confidence a row of your own; else those of the settings, all
    or some."""
    if args.sweep:
        return combinations(args.sweep, n_layers, start(task, custom))
    if "confidence" in custom:
        config = DecodeConfig(**start(task, custom))
        config.exits(n_layers)
        return {"yours": config}
    configs = read_settings(args.settings, task, n_layers, custom)
    names = args.rows.split(",") if args.rows else list(configs)
    unknown = [name for name in names if name not in configs]
    if unknown:
        raise UserError(f"{args.settings}: has no row {unknown[0]!r} for {task.name}; choose from {', '.join(configs)}")
    return {name: configs[name] for name in names}


def start(task: Task, custom: dict) -> dict:
    """Fields of DecodeConfig that a setting begins with."""
    return {"max_new_tokens": task.max_new_tokens, "confidence": "softmax", **custom}


def load_examples(args: argparse.Namespace, task: Task, split: str, limit: int) -> tuple[Task, list[Example]]:
    """The task with its shots, and its inputs, no shot among them."""
    skipped: list[str] | None = [] if args.skip_bad else None
    examples, shots = read_task(task, split, skipped), []
    if args.shots:
        if task.openings:
            raise UserError(f"{task.name}: goes on from a text, so it takes no --shots")
        if not args.shot_file and "{}" not in task.file:
            raise UserError(f"{task.name}: name the file that the shots come from with --shot-file")
        shots = sample(read_task(replace(task, file=args.shot_file or task.file), "train", skipped), args.shots, args.seed)
    for message in skipped or []:
        tell(f"skipped: {message}")
    if skipped:
        tell(f"{task.name}: {len(skipped)} malformed lines skipped")
    return task.with_shots(shots), sample([each for each in examples if each not in shots], limit, args.seed)


def two_sets(args: argparse.Namespace, task: Task, examples: list[Example]) -> dict[str, list[Example]]:
    """The examples to calibrate on, and others to check on, from the other split; of a single file two parts of the examples."""
    if "{}" in task.file:
        other = "test" if args.split == "dev" else "dev"
        return {args.split: examples, other: load_examples(args, task, other, args.limit)[1]}
    if len(examples) < 2:
        raise UserError(f"{task.file}: holds too little to calibrate on one half and check on the other")
    return {f"{task.file} (one part)": examples[::2], f"{task.file} (another part)": examples[1::2]}


def calibrate(args: argparse.Namespace, task: Task, examples: list[Example], model, tokenizer, custom: dict, about: dict) -> None:
    """Finds a threshold, says what was found, and writes it. Ends with status 1 if no threshold passes."""
    config = DecodeConfig(**start(task, custom))
    config.exits(model.config.n_layers)
    sets = two_sets(args, task, examples)
    threshold, provenance = find_threshold(model, tokenizer, task, sets, config, args.risk, args.tolerance, args.error)
    tell(report(task, threshold, provenance))
    if threshold is None:
        sys.exit(1)
    if processes()[0] == 0:
        settings = {name: value for name, value in asdict(config).items() if value != getattr(DecodeConfig(), name)}
        write_json(args.calibrated, {**settings, "threshold": threshold, "provenance": provenance | about | {"task": task.name}})
    tell(f"wrote {args.calibrated}")


def main() -> None:
    args, custom, tasks = parse()
    with process_group(args.device):
        evaluate_all(args, custom, tasks)


def evaluate_all(args: argparse.Namespace, custom: dict, tasks: list[Task]) -> None:
    """Does with every task what the arguments ask for, prints it, and writes the files that they name."""
    model, tokenizer = load_checkpoint(args.checkpoint, *device_and_dtype(args), check=args.check)
    if tokenizer is None:
        raise UserError(f"{args.checkpoint}: has no tokenizer, which these tasks need, being text; decode.py takes token ids")
    how = {"checkpoint": str(args.checkpoint), "checkpoint_id": digest(Path(args.checkpoint)), "split_of_data": args.split,
           "limit": args.limit, "repeat": args.repeat, "seed": args.seed, "shots": args.shots}  # fmt: skip
    result, settings = {"environment": environment(model) | how, "rows": []}, {}
    if processes()[0] == 0:
        print(", ".join(f"{name} {value}" for name, value in result["environment"].items()), file=sys.stderr)
    for task in tasks:
        one_file = args.calibrate and "{}" not in task.file  # both sets come from it
        task, examples = load_examples(args, task, args.split, args.limit * (2 if one_file else 1))
        if args.show_prompt:
            first = examples[0]
            tell(f"--- {task.name}, {args.split}\n{task.text(first.prompt, tokenizer)}\n--- references\n" + "\n".join(first.references))
        elif args.tune:
            settings[task.name] = tune(model, tokenizer, task, examples)
        elif args.calibrate:
            calibrate(args, task, examples, model, tokenizer, custom, result["environment"])
        else:
            for configs in alike(rows_of(args, task, model.config.n_layers, custom)):
                if args.sweep:
                    rows = sweep(model, tokenizer, task, examples, configs, args.repeat, args.results, how)
                else:
                    rows = evaluate(model, tokenizer, task, examples, configs, args.repeat)
                tell(shown(args, task, rows, len(examples)))
                result["rows"] += rows
    if processes()[0] or args.show_prompt:
        return
    result["environment"]["peak_memory_mib"] = peak_memory(model)
    print(f"peak memory {peak_memory(model)} MiB", file=sys.stderr)
    if args.tune:
        write_json(args.settings, {**args.before, **settings})
    if args.json:
        write_json(args.json, result)
    if args.plot:
        from evaluation.plots import draw_evaluation

        for path in draw_evaluation(args.plot, result["rows"], model, tokenizer):
            tell(f"wrote {path}")


def shown(args: argparse.Namespace, task: Task, rows: list[dict], count: int) -> str:
    """The table of some rows; after a sweep with its Pareto front, and with means over each of the fields that have several values."""
    if not args.sweep:
        return f"\n{task.name}, {count} {args.split} inputs\n\n{table(rows, task)}"
    best = pareto({row["name"]: (row["speedup"], quality(row, rows[0])) for row in rows})
    marked = [{**row, "name": row["name"] + " *" * (row["name"] in best)} for row in rows]
    text = f"\n{task.name}, {count} {args.split} inputs, * on the Pareto front\n\n{table(marked, task)}"
    swept = [field.replace("-", "_") for field, *values in args.sweep if len(values) > 1]
    if len(swept) > 1:
        text += "\n\nmean ± deviation over what else was swept\n" + "\n".join(means(rows[1:], field) for field in swept)
    return text


if __name__ == "__main__":
    run(main)
