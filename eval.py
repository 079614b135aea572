"""Speed and quality side by side. Without arguments: the embedded model on 60 test inputs of each task, every row of its settings.

    python eval.py                                                  the table
    python eval.py --confidence softmax --threshold 0.6             the full model against one setting
    python eval.py --tune                                           chooses the settings anew, on dev, and writes them

All rows share code, cache, dtype and prompts; they take turns prompt by prompt, so that a drift of the machine meets all alike.
"""

import argparse
import json
import math
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

from cli import Parser, add_flags, add_model_flags, device_and_dtype, given, run, whole_file
from confidence import Trace
from data import TASKS, Example, encode_prompt, read_examples, task_file
from decode import DEFAULT_CHECKPOINT, Counters, DecodeConfig, Generation, generate
from metrics import bleu, bootstrap, rouge_l, rouge_l_f1, token_agreement
from model import Transformer, load_checkpoint

LOWERCASE_BLEU = ("e2e",)  # as its published results; translation keeps its capitals
MAX_NEW_TOKENS = 100
LOSS_ALLOWED = 0.01        # --tune: how much of the full model's BLEU and ROUGE-L a setting may lose


@dataclass
class Measured:
    """One row's outputs and times over all prompts."""

    config: DecodeConfig
    outputs: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each prompt, the median of its repeats


# ---------------------------------------------------------------- measuring


def measure(model: Transformer, prompts: list[list[int]], configs: dict[str, DecodeConfig], repeat: int, title: str) -> dict[str, Measured]:
    """Decodes every prompt under every config, in turn, `repeat` times, after a warm-up."""
    for config in configs.values():
        generate(model, prompts[0], config)
    rows = {name: Measured(config) for name, config in configs.items()}
    for prompt in tqdm(prompts, desc=title, unit="prompt", dynamic_ncols=True):
        times = defaultdict(list)
        for turn in range(repeat):
            for name, row in rows.items():
                synchronize(model)
                started = time.perf_counter()
                out = generate(model, prompt, row.config)
                synchronize(model)
                times[name].append(time.perf_counter() - started)
                if turn == 0:
                    row.outputs.append(out)
        for name, row in rows.items():
            row.seconds.append(median(times[name]))
    return rows


def synchronize(model: Transformer) -> None:
    if model.embedding.is_cuda:
        torch.cuda.synchronize()


def confidence_share(model: Transformer, prompts: list[list[int]], config: DecodeConfig) -> float:
    """Share of the decoding time spent on asking, in a run of its own: every question with the heads that it computes, less, where the
    answer was to exit, the time of one such head, since that gives the token."""
    asking = again = 0.0

    class Timed(Trace):
        def decided(self, threshold: float) -> bool:
            nonlocal asking, again
            synchronize(model)
            started = time.perf_counter()
            exits = super().decided(threshold)
            asking += time.perf_counter() - started
            if exits and self.flops.get(self.layer) == 2 * model.unembed.numel():  # a pruned head costs next to nothing
                started = time.perf_counter()
                model.head(self.hidden[-1][-1:], self.layer)
                synchronize(model)
                again += time.perf_counter() - started
            return exits

    started = time.perf_counter()
    for prompt in prompts:
        generate(model, prompt, config, Timed)
    return (asking - again) / (time.perf_counter() - started - again)


def summarize(model, tokenizer, task: str, examples: list[Example], name: str, row: Measured, full: Measured, share: float | None) -> dict:
    """One row of the table and of --json; the README says what each figure means. `share`: of the time, for asking; None: not asked."""
    total = Counters(*(sum(getattr(out.counters, f.name) for out in row.outputs) for f in fields(Counters)))
    lengths, full_lengths = ([len(out.tokens) for out in measured.outputs] for measured in (row, full))

    def speedup(tokens, seconds, full_tokens, full_seconds):
        return (sum(tokens) / sum(seconds)) / (sum(full_tokens) / sum(full_seconds))

    columns = (lengths, row.seconds, full_lengths, full.seconds)
    ideal = model.config.n_layers * total.tokens / total.block_runs
    texts, full_texts = ([tokenizer.decode(out.tokens) for out in measured.outputs] for measured in (row, full))
    references = [list(example.references) for example in examples]
    return {
        "task": task,
        "name": name,
        "config": asdict(row.config),
        "tokens_per_s": total.tokens / sum(row.seconds),
        "speedup": speedup(*columns),
        "speedup_ci": bootstrap(speedup, *columns),
        "ideal_speedup": ideal,
        "exit_efficiency": speedup(*columns) / ideal,
        "avg_exit_layer": mean(layer for out in row.outputs for layer in out.exit_layers),
        "block_rows_per_token": total.block_rows / total.tokens,
        "rows_per_deep_pass": total.deep_rows / total.deep_passes if total.deep_passes else None,
        "flops_per_token": (total.block_flops + total.head_flops) / total.tokens,
        "confidence_flops_per_token": total.confidence_flops / total.tokens,
        "confidence_time_share": share,
        "agreement": mean(token_agreement(out.tokens, base.tokens) for out, base in zip(row.outputs, full.outputs)),
        "rougeL_full": mean(map(rouge_l_f1, texts, full_texts)),
        "scores": {"bleu": bleu(texts, references, lowercase=task in LOWERCASE_BLEU), "rougeL": mean(map(rouge_l, texts, references))},
        "miss_rate": total.missed / total.pruned_deep if total.pruned_deep else None,
        "accepted": total.accepted / total.drafted if total.drafted else None,
        "rolled_back": (total.drafted - total.accepted) / total.drafted if total.drafted else None,
        "prompts": [
            {"prompt": example.prompt, "references": example.references, "text": text, "tokens": out.tokens, "exit_layers": out.exit_layers,
             "confidences": out.confidences, "seconds": seconds}
            for example, text, out, seconds in zip(examples, texts, row.outputs, row.seconds)
        ],
    }  # fmt: skip


def evaluate(model, tokenizer, task: str, examples: list[Example], configs: dict[str, DecodeConfig], repeat: int) -> list[dict]:
    """Rows of one task, first that of the full model under the same length and sampling."""
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]
    full = full_model(next(iter(configs.values())))
    rows = measure(model, prompts, {"full": full, **configs}, repeat, task)
    summaries = []
    for name, row in rows.items():
        asks = any(asked for out in row.outputs for asked in out.confidences)
        share = confidence_share(model, prompts, row.config) if asks else None
        summaries.append(summarize(model, tokenizer, task, examples, name, row, rows["full"], share))
    return summaries


def full_model(config: DecodeConfig) -> DecodeConfig:
    """The same without exits."""
    same = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return DecodeConfig(**{name: getattr(config, name) for name in same})


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


SHARES = ((1 / 3,), (1 / 2,), (1 / 4, 1 / 2), (1 / 3, 2 / 3), (1 / 2, 2 / 3), (1 / 3, 1 / 2, 2 / 3))  # exit sets, as shares of the depth
COARSE, FINE = (0.3, 0.6), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # thresholds
FIRST = 100  # inputs on which the layers are chosen


def candidates(n_layers: int, name: str, layers: tuple[int, ...] | None) -> list[DecodeConfig]:
    """What --tune tries: every `static` exit; to choose layers, exit sets under few thresholds; given `layers`, many thresholds. All but
    static exits are pruned to 64 candidates."""
    base = DecodeConfig(confidence="softmax", threshold=0.0, max_new_tokens=MAX_NEW_TOKENS)
    if name == "static":
        return [replace(base, exit_layers=(layer,)) for layer in range(1, n_layers)]
    sets = {tuple(sorted({min(n_layers - 1, max(1, round(n_layers * share))) for share in shares})) for shares in SHARES}
    grid = product([layers], FINE) if layers else product(sorted(sets), COARSE)
    return [replace(base, confidence=name, exit_layers=layers, threshold=threshold, prune="fixed") for layers, threshold in grid]


def choose(model, tokenizer, task: str, examples: list[Example], name: str, layers: tuple[int, ...] | None) -> DecodeConfig:
    """The fastest candidate that keeps the full model's BLEU and ROUGE-L on the examples to within LOSS_ALLOWED; if none does, the one
    that keeps most."""
    configs = candidates(model.config.n_layers, name, layers)
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]
    labelled = {"full": full_model(configs[0])} | {str(number): config for number, config in enumerate(configs)}
    measured = measure(model, prompts, labelled, 1, f"{task}: {name}")
    full, *rows = [summarize(model, tokenizer, task, examples, label, row, measured["full"], None) for label, row in measured.items()]
    kept = {row["name"]: min(row["scores"][key] / score if score else 1.0 for key, score in full["scores"].items()) for row in rows}
    good = [row for row in rows if kept[row["name"]] >= 1 - LOSS_ALLOWED]
    best = max(good, key=lambda row: row["speedup"]) if good else max(rows, key=lambda row: kept[row["name"]])
    config = configs[int(best["name"])]
    tqdm.write(f"{task}, {name}: exits {config.exit_layers}, threshold {config.threshold} keep {kept[best['name']]:.1%} "
               f"at {best['speedup']:.2f} times the full model's speed on {len(examples)} inputs")  # fmt: skip
    return config


def tune(model, tokenizer, task: str, examples: list[Example]) -> dict[str, dict]:
    """Settings of every row: a static exit and the exit layers that serve softmax, on some of the examples; then, for these layers, the
    threshold of each function, on all. Returns the fields that differ from DecodeConfig's defaults."""
    some = examples[:: math.ceil(len(examples) / FIRST)]
    chosen = {"static": choose(model, tokenizer, task, some, "static", None)}
    layers = choose(model, tokenizer, task, some, "softmax", None).exit_layers
    chosen |= {name: choose(model, tokenizer, task, examples, name, layers) for name in ("softmax", "weighted", "jsd")}
    default = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    return {
        name: {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
        for name, config in chosen.items()
    }


# ---------------------------------------------------------------- the command line


def environment(args: argparse.Namespace, model: Transformer) -> dict:
    """Where and how the figures were measured."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {
        "device": torch.cuda.get_device_name() if model.embedding.is_cuda else cpu, "threads": torch.get_num_threads(),
        "dtype": str(model.embedding.dtype).removeprefix("torch."), "weight_blocks": model.split, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit, "checkpoint": str(args.checkpoint), "split_of_data": args.split,
        "limit": args.limit, "repeat": args.repeat, "seed": args.seed,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Rows of one task as aligned text, which is Markdown too."""
    head = ["", "tokens/s", "speed-up (95 %)", "ideal", "efficiency", "exit layer", "MFLOPs/token (conf.)", "conf. time", "BLEU", "ROUGE-L",
            "agreement", "ROUGE-L to full"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        share = row["confidence_flops_per_token"] / row["flops_per_token"]
        low, high = row["speedup_ci"]
        lines.append([
            row["name"], f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})", f"{row['ideal_speedup']:.2f}",
            f"{row['exit_efficiency']:.2f}", f"{row['avg_exit_layer']:.1f}", f"{row['flops_per_token'] / 1e6:.1f} ({share:.0%})",
            "" if row["confidence_time_share"] is None else f"{row['confidence_time_share']:.0%}",
            *(f"{100 * row['scores'][score]:.1f}" for score in ("bleu", "rougeL")), f"{row['agreement']:.3f}", f"{row['rougeL_full']:.3f}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--split", choices=("dev", "test"), help="data to use (default: test; dev with --tune)")
    parser.add_argument("--limit", type=int, default=60, help="inputs of each task, drawn by --seed; 0 is all (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="times an input is decoded; the median counts (default: %(default)s)")
    parser.add_argument("--settings", type=Path, help="JSON file of the rows (default: the checkpoint's name with .json)")
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
    custom = given(args, DecodeConfig)
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
    result = {"environment": environment(args, model), "rows": []}
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
        rows = evaluate(model, tokenizer, task, examples, configs, args.repeat)
        result["rows"] += rows
        print(f"\n{task}, {len(examples)} {args.split} inputs\n\n{table(rows)}")
    if args.tune:
        old = json.loads(args.settings.read_text(encoding="utf-8")) if args.settings.is_file() else {}
        write_json(args.settings, {**old, **settings})
    if args.json:
        write_json(args.json, result)


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    with whole_file(path) as part:
        Path(part).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
