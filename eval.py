"""Speed and quality side by side. Without arguments: the embedded model on 60 test inputs of each task, every row of its settings.

    python eval.py                                                  the table
    python eval.py --confidence softmax --threshold 0.6             the full model against one setting
    python eval.py --thresholds FILE                                the full model against settings from a file, as calibration writes it
    python eval.py --tune                                           chooses the settings anew, on dev, and writes them

measure.py says what is measured, and how.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path

from tqdm import tqdm

from cli import Parser, add_flags, add_model_flags, device_and_dtype, given, run, write_json
from data import TASKS, Example, read_examples, task_file
from decode import DEFAULT_CHECKPOINT, DecodeConfig
from measure import environment, evaluate, measure, summarize, table
from model import load_checkpoint
from settings import with_thresholds
from tokenizer import encode_prompt

MAX_NEW_TOKENS = 100
LOSS_ALLOWED = 0.01        # --tune: how much of the full model's BLEU and ROUGE-L a setting may lose


# ---------------------------------------------------------------- settings, chosen on dev


def read_settings(path: Path, task: str, n_layers: int, changes: dict) -> dict[str, DecodeConfig]:
    """The named settings of a task in the JSON file that --tune writes, with the `changes` of the command line (a static exit stays
    static). Raises ValueError if there are none or they are unusable."""
    if not path.is_file():
        raise ValueError(f"{path}: no settings for this checkpoint; choose some with --tune, or give one with --confidence and --threshold")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))[task]
        configs = {}
        for name, setting in settings.items():
            config = DecodeConfig(**{"max_new_tokens": MAX_NEW_TOKENS, **setting})
            threshold = changes.get("threshold", config.threshold) if config.threshold else 0.0
            configs[name] = replace(config, **{**changes, "threshold": threshold})
            configs[name].exits(n_layers)
        return configs
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not usable as settings of {task} ({error})") from None


SHARES = ((1 / 4,), (1 / 3,), (1 / 2,), (1 / 4, 1 / 2), (1 / 3, 2 / 3), (1 / 2, 2 / 3), (1 / 3, 1 / 2, 2 / 3))  # exit sets, of the depth
DRAFTS = ((1 / 6,), (1 / 4,), (1 / 3,), (1 / 4, 1 / 2))  # exit sets of verified mode, whose early tokens are drafts
COARSE, FINE = (0.3, 0.6), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # thresholds
LOOSE, OWED = (0.2, 0.4, 0.6), (8, 16)  # verified mode: thresholds, bounds of the owed rows
FIRST = 60  # inputs on which layers and drafts are chosen
PRUNING = {"none": {}, "fixed": {"prune": "fixed"}, "decaying": {"prune": "decaying"}, "adaptive": {"prune": "adaptive", "prune_k": 512}}


def candidates(n_layers: int, name: str, layers: tuple[int, ...] | None, verify: bool) -> list[DecodeConfig]:
    """What --tune tries: every `static` exit; to choose layers, exit sets under few thresholds; given `layers`, many thresholds; for
    verified mode, exit sets of drafts, thresholds and bounds. All but static exits are pruned to 64 candidates."""
    base = DecodeConfig(confidence="softmax", threshold=0.0, max_new_tokens=MAX_NEW_TOKENS)
    if name == "static":
        return [replace(base, exit_layers=(layer,)) for layer in range(1, n_layers)]

    def exit_sets(shares) -> list[tuple[int, ...]]:
        return sorted({tuple(sorted({min(n_layers - 1, max(1, round(n_layers * share))) for share in each})) for each in shares})

    base = replace(base, confidence=name, prune="fixed")
    if verify:
        grid = product(exit_sets(DRAFTS), LOOSE, OWED)
        return [replace(base, exit_layers=exits, threshold=bar, max_owed=owed, verify=True) for exits, bar, owed in grid]
    grid = product([layers], FINE) if layers else product(exit_sets(SHARES), COARSE)
    return [replace(base, exit_layers=exits, threshold=bar) for exits, bar in grid]


def choose(model, tokenizer, task: str, examples: list[Example], name: str, layers=None, verify: bool = False) -> DecodeConfig:
    """The fastest candidate that keeps the full model's BLEU and ROUGE-L on the examples to within LOSS_ALLOWED; if none does, the one
    that keeps most."""
    configs = candidates(model.config.n_layers, name, layers, verify)
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]
    labelled = {"full": configs[0].full()} | {str(number): config for number, config in enumerate(configs)}
    measured = measure(model, prompts, labelled, 1, f"{task}: {name}")
    full, *rows = [summarize(model, tokenizer, task, examples, label, row, measured["full"], None) for label, row in measured.items()]
    kept = {row["name"]: min(row["scores"][key] / score if score else 1.0 for key, score in full["scores"].items()) for row in rows}
    good = [row for row in rows if kept[row["name"]] >= 1 - LOSS_ALLOWED]
    best = max(good, key=lambda row: row["speedup"]) if good else max(rows, key=lambda row: kept[row["name"]])
    config = configs[int(best["name"])]
    bound = f", at most {config.max_owed} owed," if verify else ""
    tqdm.write(f"{task}, {name}{' verified' * verify}: exits {config.exit_layers}, threshold {config.threshold}{bound} keep "
               f"{kept[best['name']]:.1%} at {best['speedup']:.2f} times the full model's speed on {len(examples)} inputs")  # fmt: skip
    return config


def tune(model, tokenizer, task: str, examples: list[Example]) -> dict[str, dict]:
    """Settings of every row. On some of the examples: a static exit, the exit layers that serve softmax, and the drafts of verified mode;
    then, for these layers, the threshold of each function, on all. Every pruning schedule and the copy fill share these. Returns the fields
    that differ from DecodeConfig's defaults."""
    some = examples[:: math.ceil(len(examples) / FIRST)]
    pick = partial(choose, model, tokenizer, task)
    layers = pick(some, "softmax").exit_layers
    softmax, weighted, jsd = (pick(examples, name, layers) for name in ("softmax", "weighted", "jsd"))
    chosen = {"static": pick(some, "static")}
    chosen |= {f"softmax {name}": replace(softmax, **{"prune": "none", **changes}) for name, changes in PRUNING.items()}
    chosen |= {"weighted fixed": weighted}
    chosen |= {f"jsd {name}": replace(jsd, **{"prune": "none", **changes}) for name, changes in PRUNING.items()}
    chosen |= {"softmax copy": replace(softmax, fill="copy")}
    chosen |= {f"{name} verified": pick(some, name, verify=True) for name in ("softmax", "jsd")}
    default = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    return {
        name: {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
        for name, config in chosen.items()
    }


# ---------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--split", choices=("dev", "test"), help="data to use (default: test; dev with --tune)")
    parser.add_argument("--limit", type=int, default=60, help="inputs of each task, drawn by --seed; 0 is all (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="times an input is decoded; the median counts (default: %(default)s)")
    parser.add_argument("--settings", type=Path, help="JSON file of the rows (default: the checkpoint's name with .json)")
    parser.add_argument("--rows", metavar="NAMES", help="of the settings only these rows, comma-separated (default: all)")
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help="JSON file of settings, as calibration writes it; flags outrank it")
    parser.add_argument("--tune", action="store_true", help="choose the settings on dev and write them to --settings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, per prompt too")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of inputs, and of sampling (default: 0)")
    title = "decoding: with --confidence one row of your own, else changes to every row"
    add_flags(parser, DecodeConfig(max_new_tokens=MAX_NEW_TOKENS), title, skip=("seed",))
    return parser


def parse() -> tuple[argparse.Namespace, dict]:
    """The arguments, checked, and the fields of DecodeConfig among them."""
    args = make_parser().parse_args()
    args.split = args.split or ("dev" if args.tune else "test")
    args.settings = args.settings or Path(args.checkpoint).with_suffix(".json")
    unknown = [task for task in args.tasks.split(",") if task not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    custom = with_thresholds(args.thresholds, given(args, DecodeConfig))
    DecodeConfig(**custom)
    if args.tune and (set(custom) - {"seed"} or args.json):
        raise ValueError("--tune tries its own settings and writes only these; leave out --json and the decoding flags")
    for path in (args.json, args.settings if args.tune else None):
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent} to write to")
    if args.limit < 0 or args.repeat < 1:
        raise ValueError(f"limit is {args.limit}, repeat {args.repeat}; limit must be at least 0, repeat at least 1")
    return args, custom


def main() -> None:
    args, custom = parse()
    model, tokenizer = load_checkpoint(args.checkpoint, *device_and_dtype(args))
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint}: has no tokenizer, which these tasks need, being text; decode.py takes token ids")
    how = {"checkpoint": str(args.checkpoint), "split_of_data": args.split, "limit": args.limit, "repeat": args.repeat, "seed": args.seed}
    result = {"environment": environment(model) | how, "rows": []}
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()), file=sys.stderr)
    settings = {}
    for task in args.tasks.split(","):
        examples = read_examples(task_file(task, args.split))
        if 0 < args.limit < len(examples):
            examples = [examples[i] for i in sorted(random.Random(args.seed).sample(range(len(examples)), args.limit))]
        if args.tune:
            settings[task] = tune(model, tokenizer, task, examples)
            continue
        if "confidence" in custom:
            configs = {"yours": DecodeConfig(**{"max_new_tokens": MAX_NEW_TOKENS, **custom})}
            configs["yours"].exits(model.config.n_layers)
        else:
            configs = read_settings(args.settings, task, model.config.n_layers, custom)
            names = args.rows.split(",") if args.rows else list(configs)
            unknown = [name for name in names if name not in configs]
            if unknown:
                raise ValueError(f"{args.settings}: has no row {unknown[0]!r} for {task}; choose from {', '.join(configs)}")
            configs = {name: configs[name] for name in names}
        rows = evaluate(model, tokenizer, task, examples, configs, args.repeat)
        result["rows"] += rows
        print(f"\n{task}, {len(examples)} {args.split} inputs\n\n{table(rows)}")
    if args.tune:
        old = json.loads(args.settings.read_text(encoding="utf-8")) if args.settings.is_file() else {}
        write_json(args.settings, {**old, **settings})
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run(main)
