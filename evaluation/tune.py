"""The rows of the table: read from the settings beside a checkpoint, or chosen anew on dev."""

import json
import math
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from decoding.choosing import from_json
from decoding.settings import DecodeConfig
from evaluation.measure import encode_inputs, measure, quality, summarize
from evaluation.tasks import Task
from formats.data import Example

LOSS_ALLOWED = 0.01  # --tune: how much of the full model's scores a setting may lose
SHARES = ((1 / 4,), (1 / 3,), (1 / 2,), (1 / 4, 1 / 2), (1 / 3, 2 / 3), (1 / 2, 2 / 3), (1 / 3, 1 / 2, 2 / 3))  # exit sets, of the depth
DRAFTS = ((1 / 6,), (1 / 4,), (1 / 3,), (1 / 4, 1 / 2))  # exit sets of verified mode, whose early tokens are drafts
COARSE, FINE = (0.3, 0.6), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # thresholds
LOOSE, OWED = (0.2, 0.4, 0.6), (8, 16)  # verified mode: thresholds, bounds of the owed rows
FIRST = 60  # inputs on which layers and drafts are chosen
PRUNING = {"none": {}, "fixed": {"prune": "fixed"}, "decaying": {"prune": "decaying"}, "adaptive": {"prune": "adaptive", "prune_k": 512}}


def read_settings(path: Path, task: Task, n_layers: int, changes: dict) -> dict[str, DecodeConfig]:
    """The named settings of a task in the JSON file that --tune writes, with the `changes` of the command line (a static exit stays
    static). Raises ValueError if there are none or they are unusable."""
    remedy = "choose some with --tune, or give one with --confidence and --threshold"
    if not path.is_file():
        raise UserError(f"{path}: no settings for this checkpoint; {remedy}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8")).get(task.name)
        if not settings:
            raise UserError(f"it has no rows for this task; {remedy}")
        configs = {}
        for name, setting in settings.items():
            config = DecodeConfig(**{"max_new_tokens": task.max_new_tokens, **from_json(setting)})
            threshold = changes.get("threshold", config.threshold) if config.threshold else 0.0
            configs[name] = replace(config, **{**changes, "threshold": threshold})
            configs[name].exits(n_layers)
        return configs
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not usable as settings of {task.name} ({error})") from None


def candidates(n_layers: int, length: int, name: str, layers: tuple[int, ...] | None, verify: bool) -> list[DecodeConfig]:
    """What --tune tries, answers of at most `length` tokens: every `static` exit; to choose layers, exit sets under few thresholds; given
    `layers`, many thresholds; for verified mode, exit sets of drafts, thresholds and bounds. All but static exits keep 64 candidates."""
    base = DecodeConfig(confidence="softmax", threshold=0.0, max_new_tokens=length)
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


def choose(model, tokenizer, task: Task, examples: list[Example], name: str, layers=None, verify: bool = False) -> DecodeConfig:
    """The fastest candidate that keeps the full model's scores on the examples to within LOSS_ALLOWED; if none does, the one that keeps
    most."""
    configs = candidates(model.config.n_layers, task.max_new_tokens, name, layers, verify)
    labelled = {"full": configs[0].full()} | {str(number): config for number, config in enumerate(configs)}
    prompts, stopping = encode_inputs(model, tokenizer, task, examples, labelled)
    measured = measure(model, prompts, stopping, 1, f"{task.name}: {name}")
    full, *rows = [summarize(model, tokenizer, task, examples, label, row, measured["full"], None) for label, row in measured.items()]
    kept = {row["name"]: quality(row, full) for row in rows}
    good = [row for row in rows if kept[row["name"]] >= 1 - LOSS_ALLOWED]
    best = max(good, key=lambda row: row["speedup"]) if good else max(rows, key=lambda row: kept[row["name"]])
    config = configs[int(best["name"])]
    bound = f", at most {config.max_owed} owed," if verify else ""
    tqdm.write(f"{task.name}, {name}{' verified' * verify}: exits {config.exit_layers}, threshold {config.threshold}{bound} keep "
               f"{kept[best['name']]:.1%} at {best['speedup']:.2f} times the full model's speed on {len(examples)} inputs")  # fmt: skip
    return config


def tune(model, tokenizer, task: Task, examples: list[Example]) -> dict[str, dict]:
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
    default = DecodeConfig(max_new_tokens=task.max_new_tokens)
    return {
        name: {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
        for name, config in chosen.items()
    }
