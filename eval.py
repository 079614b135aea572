"""Speed and quality side by side. Without arguments: the embedded model on 60 test inputs of each of its tasks, every row of its settings.

    python eval.py                                                  the table
    python eval.py --confidence softmax --threshold 0.6             the full model against one setting
    python eval.py --tasks samsum=val.jsonl,squad=dev-v1.1.json     other tasks; --show-prompt shows what the model gets
    python eval.py --sweep threshold 0.3 0.5 0.7 --sweep exit-layers 4 4,8    every combination; goes on where it stopped
    python eval.py --calibrate --tolerance 0.05 --error 0.05        a threshold with a guarantee, written to a file
    python eval.py --thresholds FILE                                the full model against settings from such a file
    python eval.py --tune                                           chooses the settings anew, on dev, and writes them
    torchrun --nproc-per-node 2 eval.py                             several GPUs, or processes, share the prompts

measure.py says what is measured, and how; tasks.py, on what.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from calibrate import calibrate
from cli import Parser, add_flags, add_model_flags, device_and_dtype, given, read_field, run, write_json
from data import Example, digest
from decode import DEFAULT_CHECKPOINT, DecodeConfig
from measure import Measured, environment, evaluate, means, measure, pareto, peak_memory, prepare, table
from metrics import rouge_l_f1
from model import load_checkpoint
from runs import process_group, processes, tell
from settings import with_thresholds
from tasks import TASKS, Task, find_task, read_task, sample
from tune import read_settings, tune

AT_A_TIME = 4  # settings of a sweep that are measured in turn with the full model, then kept


# ---------------------------------------------------------------- the table


def rows_of(args: argparse.Namespace, task: Task, n_layers: int, custom: dict) -> dict[str, DecodeConfig]:
    """The rows to measure beside the full model: with --confidence one of your own, else those of the settings, all or some."""
    if "confidence" in custom:
        config = DecodeConfig(**{"max_new_tokens": task.max_new_tokens, **custom})
        config.exits(n_layers)
        return {"yours": config}
    configs = read_settings(args.settings, task, n_layers, custom)
    names = args.rows.split(",") if args.rows else list(configs)
    unknown = [name for name in names if name not in configs]
    if unknown:
        raise ValueError(f"{args.settings}: has no row {unknown[0]!r} for {task.name}; choose from {', '.join(configs)}")
    return {name: configs[name] for name in names}


# ---------------------------------------------------------------- sweeps


def combinations(sweeps: list[list[str]], task: Task, n_layers: int, custom: dict) -> dict[str, DecodeConfig]:
    """Every combination of the values swept, named by them. Raises ValueError for one that cannot be."""
    choices = [[(field.replace("-", "_"), text) for text in texts] for field, *texts in sweeps]
    configs = {}
    for picks in product(*choices):
        values = {field: read_field(DecodeConfig, field, text) for field, text in picks}
        config = DecodeConfig(**{"max_new_tokens": task.max_new_tokens, "confidence": "softmax", **custom, **values})
        config.exits(n_layers)
        configs[" ".join(f"{field}={text}" for field, text in picks)] = config
    return configs


def sweep(model, tokenizer, task: Task, examples: list[Example], configs: dict[str, DecodeConfig], args, about: dict) -> list[dict]:
    """Rows of all configs, those that the results file has already taken from there; what is measured is added to it, a few settings at a
    time, each time beside the full model. A figure that depends on the machine is kept with where it was measured."""
    known, keys = {}, {name: digest(about, task.name, task.shots, asdict(config)) for name, config in configs.items()}
    if args.results.is_file():
        for number, line in enumerate(args.results.read_text(encoding="utf-8").splitlines(), 1):
            try:
                known |= {(entry := json.loads(line))["key"]: entry["rows"]}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{args.results}, line {number}: not a result of a sweep; name another file with --results") from None
    missing = [name for name in configs if keys[name] not in known]
    for start in range(0, len(missing), AT_A_TIME):
        part = {name: configs[name] for name in missing[start : start + AT_A_TIME]}
        full, *rows = evaluate(model, tokenizer, task, examples, part, args.repeat)
        for row in rows:
            pair = [{name: value for name, value in each.items() if name != "prompts"} for each in (full, row)]
            entry = {"key": keys[row["name"]], "environment": environment(model) | about, "rows": pair}
            known[entry["key"]] = pair
            if processes()[0] == 0:
                with open(args.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
    rows = [known[keys[name]][1] | {"name": name} for name in configs]
    return [known[keys[next(iter(configs))]][0], *rows]


# ---------------------------------------------------------------- calibration


def find_threshold(model, tokenizer, task: Task, sets: dict[str, list[Example]], config: DecodeConfig, args) -> tuple[float | None, dict]:
    """The threshold that Learn then Test finds on the calibration examples, None if none passes; and how, held-out risk included. sets:
    examples by split, the first to calibrate on, the second to check."""
    full: dict[str, Measured] = {}

    def losses(threshold: float, split: str) -> list[float]:
        examples = sets[split]
        configs = {} if split in full else {"full": config.full()}
        prompts, configs = prepare(model, tokenizer, task, examples, configs | {"early": replace(config, threshold=threshold)})
        rows = measure(model, prompts, configs, 1, f"{task.name}, {split}, threshold {threshold:g}")
        full.setdefault(split, rows.get("full"))
        early, exact = ([tokenizer.decode(out.tokens).strip() for out in row.outputs] for row in (rows["early"], full[split]))
        if args.risk == "consistency":
            return [1 - rouge_l_f1(*pair) for pair in zip(early, exact)]
        name = "rougeL" if "rougeL" in task.scores else next(iter(task.scores))
        scores = [[task.score([text], [list(each.references)])[name] for text, each in zip(texts, examples)] for texts in (early, exact)]
        return [max(0.0, whole - part) for part, whole in zip(*scores)]

    fit, check = sets
    threshold, tested = calibrate(lambda threshold: losses(threshold, fit), args.tolerance, args.error)
    for each in tested:
        tell(f"threshold {each.threshold:g}: risk {each.risk:.4f}, p {each.p_value:.4f}")
    provenance = {"tolerance": args.tolerance, "error": args.error, "risk": args.risk, "calibrated on": f"{len(sets[fit])} inputs of {fit}",
                  "tested": [asdict(each) for each in tested]}  # fmt: skip
    if threshold is None:
        return None, provenance
    held_out = losses(threshold, check)
    provenance["held out"] = {"split": check, "inputs": len(held_out), "risk": sum(held_out) / len(held_out)}
    return threshold, provenance


def calibrate_task(model, tokenizer, task: Task, sets: dict[str, list[Example]], custom: dict, args, about: dict) -> None:
    """Calibrates, says what was found, and writes it. Ends with status 1 if no threshold passes."""
    config = DecodeConfig(**{"max_new_tokens": task.max_new_tokens, "confidence": "softmax", **custom})
    config.exits(model.config.n_layers)
    threshold, provenance = find_threshold(model, tokenizer, task, sets, config, args)
    if threshold is None:
        tell(f"{task.name}: no threshold keeps the {args.risk} risk below {args.tolerance} at error level {args.error}; raise --tolerance, "
             "take more inputs (--limit), other exits, or --verify, which changes nothing")  # fmt: skip
        sys.exit(1)
    check = provenance["held out"]
    tell(f"{task.name}: threshold {threshold:g}; on {check['inputs']} inputs of {check['split']} its {args.risk} risk is "
         f"{check['risk']:.4f} (tolerance {args.tolerance})")  # fmt: skip
    settings = {name: value for name, value in asdict(config).items() if value != getattr(DecodeConfig(), name)}
    write_json(args.calibrated, {**settings, "threshold": threshold, "provenance": provenance | about | {"task": task.name}})
    tell(f"wrote {args.calibrated}")


# ---------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parser.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)}, or NAME=FILE (default: those of the settings)")
    parser.add_argument("--split", choices=("dev", "test"), help="data to use (default: test; dev with --tune and --calibrate)")
    parser.add_argument("--limit", type=int, default=60, help="inputs of each task, drawn by --seed; 0 is all (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="times an input is decoded; the median counts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of inputs, and of sampling (default: 0)")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before every prompt, from the training file (default: 0)")
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
    modes.add_argument("--results", type=Path, default=Path("sweep.jsonl"), metavar="FILE", help="of a sweep (default: %(default)s)")
    modes.add_argument("--calibrate", action="store_true", help="find a threshold whose risk is below the tolerance, by Learn then Test")
    modes.add_argument("--tolerance", type=float, default=0.05, help="largest expected loss, between 0 and 1 (default: %(default)s)")
    modes.add_argument("--error", type=float, default=0.05, help="chance allowed to be wrong about it (default: %(default)s)")
    modes.add_argument("--risk", choices=("consistency", "task"), default="consistency",
                       help="loss: 1 - ROUGE-L to the full model's text, or how much lower its score (default: %(default)s)")  # fmt: skip
    modes.add_argument("--calibrated", type=Path, default=Path("thresholds.json"), metavar="FILE", help="its file (default: %(default)s)")
    title = "decoding: with --confidence one row of your own, else changes to every row; what a sweep or calibration starts from"
    add_flags(parser, DecodeConfig(), title, skip=("seed",))
    return parser


def parse() -> tuple[argparse.Namespace, dict, list[Task]]:
    """The arguments, checked, the fields of DecodeConfig among them, and the tasks."""
    args = make_parser().parse_args()
    modes = [name for name in ("tune", "sweep", "calibrate", "show_prompt") if getattr(args, name)]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1].replace('_', '-')} are two commands; give one of them")
    args.split = args.split or ("dev" if args.tune or args.calibrate else "test")
    args.settings = args.settings or Path(args.checkpoint).with_suffix(".json")
    names = args.tasks.split(",") if args.tasks else default_tasks(args.settings)
    tasks = [find_task(name) for name in names]
    custom = with_thresholds(args.thresholds, given(args, DecodeConfig))
    DecodeConfig(**custom)
    if args.tune and (set(custom) - {"seed"} or args.json):
        raise ValueError("--tune tries its own settings and writes only these; leave out --json and the decoding flags")
    if args.calibrate and len(tasks) != 1:
        raise ValueError(f"--calibrate finds a threshold for one task; choose it with --tasks (here: {','.join(names)})")
    for field, *values in args.sweep or []:
        if not values:
            raise ValueError(f"--sweep {field}: give its values, too")
    writes = {args.json: True, args.settings: args.tune, args.results: args.sweep, args.calibrated: args.calibrate}
    for path, written in writes.items():
        if path and written and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent} to write to")
    if args.limit < 0 or args.repeat < 1 or args.shots < 0:
        raise ValueError(f"limit is {args.limit}, repeat {args.repeat}, shots {args.shots}; at least 0, 1 and 0")
    if not (0 < args.tolerance < 1 and 0 < args.error < 1):
        raise ValueError(f"tolerance is {args.tolerance}, error {args.error}; both must lie between 0 and 1")
    return args, custom, tasks


def default_tasks(settings: Path) -> list[str]:
    """The tasks that a checkpoint has settings for; else those of the embedded model."""
    try:
        return [name for name in json.loads(settings.read_text(encoding="utf-8")) if name in TASKS] or ["translation", "e2e"]
    except (OSError, ValueError):
        return ["translation", "e2e"]


def load_examples(args: argparse.Namespace, task: Task, split: str, tokenizer) -> tuple[Task, list[Example]]:
    """The task with its shots, and its inputs."""
    skipped: list[str] | None = [] if args.skip_bad else None
    examples = sample(read_task(task, split, skipped), args.limit, args.seed)
    for message in skipped or []:
        tell(f"skipped: {message}")
    if skipped:
        tell(f"{task.name}: {len(skipped)} malformed lines skipped")
    if args.shots:
        if not args.shot_file and "{}" not in task.file:
            raise ValueError(f"{task.name}: name the file that the shots come from with --shot-file")
        solved = read_task(replace(task, file=args.shot_file or task.file), "train", skipped)
        task = task.with_shots(sample(solved, args.shots, args.seed), tokenizer)
    return task, examples


def main() -> None:
    args, custom, tasks = parse()
    with process_group(args.device):
        evaluate_all(args, custom, tasks)


def evaluate_all(args: argparse.Namespace, custom: dict, tasks: list[Task]) -> None:
    model, tokenizer = load_checkpoint(args.checkpoint, *device_and_dtype(args))
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint}: has no tokenizer, which these tasks need, being text; decode.py takes token ids")
    L, settings = model.config.n_layers, {}
    how = {"checkpoint": str(args.checkpoint), "split_of_data": args.split, "limit": args.limit, "repeat": args.repeat, "seed": args.seed,
           "shots": args.shots}  # fmt: skip
    result = {"environment": environment(model) | how, "rows": []}
    if processes()[0] == 0:
        print(", ".join(f"{name} {value}" for name, value in result["environment"].items()), file=sys.stderr)
    for task in tasks:
        task, examples = load_examples(args, task, args.split, tokenizer)
        if args.show_prompt:
            first = examples[0]
            print(f"--- {task.name}, {args.split}\n{task.text(first.prompt, tokenizer)}\n--- references", *first.references, sep="\n")
        elif args.tune:
            settings[task.name] = tune(model, tokenizer, task, examples)
        elif args.calibrate:
            check = "test" if args.split == "dev" else "dev"
            sets = {args.split: examples, check: load_examples(args, task, check, tokenizer)[1]}
            calibrate_task(model, tokenizer, task, sets, custom, args, result["environment"])
        else:
            if args.sweep:
                rows = sweep(model, tokenizer, task, examples, combinations(args.sweep, task, L, custom), args, how)
            else:
                rows = evaluate(model, tokenizer, task, examples, rows_of(args, task, L, custom), args.repeat)
            result["rows"] += rows
            best = pareto(rows) if args.sweep else set()
            marked = [{**row, "name": row["name"] + " *" * (row["name"] in best)} for row in rows]
            swept = [field.replace("-", "_") for field, *values in args.sweep or [] if len(values) > 1]
            front = ", * on the Pareto front" if args.sweep else ""
            tell(f"\n{task.name}, {len(examples)} {args.split} inputs{front}\n\n{table(marked, task)}")
            if len(swept) > 1:
                tell("\nmean ± deviation over what else was swept\n" + "\n".join(means(rows[1:], field) for field in swept))
    if processes()[0]:
        return
    result["environment"]["peak_memory_mib"] = peak_memory(model)
    if args.tune:
        old = json.loads(args.settings.read_text(encoding="utf-8")) if args.settings.is_file() else {}
        write_json(args.settings, {**old, **settings})
    if args.json:
        write_json(args.json, result)
    if args.plot:
        from plots import draw_evaluation

        for path in draw_evaluation(args.plot, result["rows"], model, tokenizer):
            tqdm.write(f"wrote {path}")


if __name__ == "__main__":
    run(main)
