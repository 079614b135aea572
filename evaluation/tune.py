"""`eval.py tune`: chooses the rows of the table on dev, with a margin, and writes them to the settings beside
the checkpoint.

What is promised: of a function's threshold and of the static exit, with the layers chosen before on other
inputs, candidates are walked from cautious to bold and the walk ends at the first that does not keep 99 % of
every score of the full model at the lower end of its bootstrap interval; then shortlists for these functions,
where frequent ids are known. So the chance that a chosen row keeps less on inputs of the same source is about
5 % a walk, given a few hundred inputs: a bootstrap does not know of losses that it has not met, and what is
not met in n inputs may still happen in 3 of n. The other pruning schedules and the copy fill share the chosen
layers and threshold without a promise of their own; verified rows keep everything anyway. Whether inputs of
test are of the same source as those of dev, no margin can promise.
"""

import argparse
import math
from dataclasses import dataclass, replace
from itertools import product

from tqdm import tqdm

from common.errors import UserError
from common.files import write_json
from common.processes import processes
from decoding.settings import DecodeConfig
from evaluation.figures import quality_interval, quality_kept, speed_figures, written
from evaluation.inputs import chosen_tasks, load_inputs, load_model, run_record
from evaluation.measure import encode_inputs, run_in_turns
from evaluation.rows import exit_layers_of, fields_that_differ, read_settings_file
from evaluation.table import check_files
from evaluation.tasks import TUNING_SHARE, Task, between, one_of_each_source, sample
from formats.data import Example

LOSS_ALLOWED = 0.01  # how much of the full model's scores a setting may lose
LEVEL = 0.9  # of the interval whose lower end must keep the rest: 5 % lie below it
FIRST = 60  # inputs on which layers and drafts are chosen; thresholds are chosen on the others
SHARES = (
    (1 / 4,),
    (1 / 3,),
    (1 / 2,),
    (1 / 4, 1 / 2),
    (1 / 3, 2 / 3),
    (1 / 2, 2 / 3),
    (1 / 3, 1 / 2, 2 / 3),
    (1 / 4, 1 / 3, 1 / 2),
    (1 / 4, 1 / 3, 1 / 2, 2 / 3),
)  # of the depth
DRAFTS = (
    (1 / 6,),
    (1 / 4,),
    (1 / 3,),
    (1 / 4, 1 / 2),
)  # exit sets of verified mode, whose early tokens are drafts
COARSE, FINE = (0.6, 0.3), (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # thresholds, from cautious to bold
LOOSE, OWED = (0.6, 0.4, 0.2), (8, 16)  # verified mode: thresholds, bounds of the owed rows
SHORTLISTS = (32768, 8192, 2048, 1024)  # from cautious to bold, those of at most half the vocabulary
PRUNING = {
    "none": {"prune": "none"},
    "decaying": {"prune": "decaying"},
    "adaptive": {"prune": "adaptive", "prune_k": 512},
}


def main(args: argparse.Namespace) -> None:
    """Tunes every task and writes its rows; those of other tasks in the file stay."""
    settings = read_settings_file(args.settings)
    tasks = chosen_tasks(args)
    check_files(args, tasks, args.settings)
    model, tokenizer = load_model(args)
    record = run_record(args, model)
    for task in tasks:
        task, examples = load_inputs(args, task, "dev")
        independent = one_of_each_source(between(examples, 0, TUNING_SHARE), args.draw_seed)
        drawn = sample(independent, args.limit, args.draw_seed)
        if not drawn:
            raise UserError(f"{task.file}: holds too little to tune on one part of it")
        settings[task.name] = tune(model, tokenizer, task, drawn)
        provenance = {
            "inputs": len(drawn),
            "of": "dev (the part that calibrate does not use)",
            "seed": args.draw_seed,
            "kept": 1 - LOSS_ALLOWED,
            "level": LEVEL,
            "checkpoint_id": record["checkpoint_id"],
            "commit": record["commit"],
        }
        settings.setdefault("provenance", {})[task.name] = provenance
    if processes()[0] == 0:
        write_json(args.settings, settings)


def tune(model, tokenizer, task: Task, examples: list[Example]) -> dict[str, dict]:
    """Settings of every row, as the fields that differ from DecodeConfig's defaults. On some of the examples,
    the exit layers that serve softmax and the drafts of verified mode; on the others, a static exit and, for
    these layers, the threshold of each function. Up to FIRST examples are too few to be parted: then all
    serve both."""
    step = math.ceil(len(examples) / FIRST)
    some = examples[::step]
    exits = exit_layers_of(model)
    others = [example for i, example in enumerate(examples) if i % step] or some

    def try_out(
        inputs: list[Example], name: str, layers: tuple[int, ...] | None = None, verify: bool = False
    ) -> list[Tried]:
        configs = candidates(model.config.n_layers, exits, task.max_new_tokens, name, layers, verify)
        return measure_candidates(
            model, tokenizer, task, inputs, configs, f"{task.name}, {name}{' verified' * verify}"
        )

    def try_shortlists(inputs: list[Example], row: DecodeConfig) -> list[Tried]:
        title = f"{task.name}, {row.confidence}{' verified' * row.verify}, shortlists"
        return measure_candidates(model, tokenizer, task, inputs, with_shortlists(model, row), title)

    layers = fastest(try_out(some, "softmax")).exit_layers
    verified, jsd_verified = (fastest(try_out(some, name, verify=True)) for name in ("softmax", "jsd"))
    static = boldest(try_out(others, "static"))
    softmax, weighted, jsd = (
        boldest(try_out(others, name, layers)) for name in ("softmax", "weighted", "jsd")
    )
    if len(with_shortlists(model, softmax)) > 1:
        softmax, weighted, jsd = (boldest(try_shortlists(others, row)) for row in (softmax, weighted, jsd))
        verified, jsd_verified = (fastest(try_shortlists(some, row)) for row in (verified, jsd_verified))
    chosen = {"static": static, "softmax": softmax, "weighted": weighted, "jsd": jsd, "verified": verified}
    return rows_of(task, chosen, jsd_verified)


def rows_of(task: Task, chosen: dict[str, DecodeConfig], jsd_verified: DecodeConfig) -> dict[str, dict]:
    """All rows of a task, those `chosen` and those that share their layers and thresholds, as the fields that
    differ from DecodeConfig's defaults."""
    chosen, softmax, jsd = dict(chosen), chosen["softmax"], chosen["jsd"]
    for schedule, changes in PRUNING.items():
        chosen[f"softmax {schedule}"] = replace(softmax, **changes)
    for schedule, changes in PRUNING.items():
        chosen[f"jsd {schedule}"] = replace(jsd, **changes)
    chosen["softmax copy"] = replace(softmax, fill="copy")
    chosen["jsd verified"] = jsd_verified
    default = DecodeConfig(max_new_tokens=task.max_new_tokens)
    auto = {"confidence": "softmax", "verify": True, "draft": "auto"}  # needs no tuning
    chosen["verified auto"] = replace(default, **auto, shortlist=chosen["verified"].shortlist)
    return {name: fields_that_differ(config, default) for name, config in chosen.items()}


def candidates(
    n_layers: int, exits: list[int], length: int, name: str, layers: tuple[int, ...] | None, verify: bool
) -> list[DecodeConfig]:
    """What is tried, answers of at most `length` tokens, from cautious to bold: every `static` exit; to
    choose layers, exit sets under few thresholds; given `layers`, many thresholds; for verified mode, exit
    sets of drafts, thresholds and bounds. All but static exits keep 64 candidates. exits: the layers that may
    be chosen."""
    base = DecodeConfig(confidence="softmax", threshold=0.0, max_new_tokens=length)
    if name == "static":
        return [replace(base, exit_layers=(layer,)) for layer in reversed(exits)]
    base = replace(base, confidence=name, prune="fixed")
    if verify:
        grid = product(exit_sets(DRAFTS, n_layers, exits), LOOSE, OWED)
        return [
            replace(base, exit_layers=each, threshold=bar, max_owed=owed, verify=True)
            for each, bar, owed in grid
        ]
    grid = product([layers], FINE) if layers else product(exit_sets(SHARES, n_layers, exits), COARSE)
    return [replace(base, exit_layers=each, threshold=bar) for each, bar in grid]


def with_shortlists(model, row: DecodeConfig) -> list[DecodeConfig]:
    """A setting asked over the vocabulary, and over shortlists, from cautious to bold; alone where no
    frequent ids are known, or too few."""
    known = 0 if model.frequent_ids is None else len(model.frequent_ids)
    sizes = [size for size in SHORTLISTS if size <= min(known, model.config.vocab_size // 2)]
    return [row, *(replace(row, shortlist=size) for size in sizes)]


def exit_sets(
    shares: tuple[tuple[float, ...], ...], n_layers: int, exits: list[int]
) -> list[tuple[int, ...]]:
    """The sets of exits nearest to these shares of the depth, each once."""
    sets = set()
    for wanted in shares:
        near = {min(exits, key=lambda layer, share=share: abs(layer - share * n_layers)) for share in wanted}
        sets.add(tuple(sorted(near)))
    return sorted(sets)


# ---------------------------------------------------------------- trying and choosing


@dataclass(frozen=True)
class Tried:
    """A candidate, its speed-up, and how much of the full model's scores it keeps: the estimate, and its
    lower end."""

    config: DecodeConfig
    speedup: float
    kept: float
    surely: float
    title: str
    inputs: int


def measure_candidates(
    model, tokenizer, task: Task, examples: list[Example], configs: list[DecodeConfig], title: str
) -> list[Tried]:
    """Every candidate on the examples, in turn with the full model."""
    labelled = {"full": configs[0].full()} | {str(number): config for number, config in enumerate(configs)}
    prompts, stopping = encode_inputs(model, tokenizer, task, examples, labelled)
    rows = run_in_turns(model, prompts, stopping, 1, title)
    full = rows.pop("full")
    full_texts, references = written(tokenizer, full), [list(example.references) for example in examples]
    tried = []
    for config, row in zip(configs, rows.values()):
        texts = written(tokenizer, row)
        kept = quality_kept(task, texts, full_texts, references)
        surely = quality_interval(task, texts, full_texts, references, LEVEL)[0]
        tried.append(Tried(config, speed_figures(row, full)["speedup"], kept, surely, title, len(examples)))
    return tried


def fastest(tried: list[Tried]) -> DecodeConfig:
    """Of those that keep the scores by their estimate the fastest; if none does, the one that keeps most. It
    promises nothing for other inputs, and serves to choose layers, and drafts, which change no text."""
    good = [each for each in tried if each.kept >= 1 - LOSS_ALLOWED]
    best = max(good, key=lambda each: each.speedup) if good else max(tried, key=lambda each: each.kept)
    return told(best)


def boldest(tried: list[Tried]) -> DecodeConfig:
    """Walks from cautious to bold until one does not surely keep the scores, and takes the fastest of those
    before it; if the first fails, the first, which then promises nothing."""
    passed = []
    for each in tried:
        if each.surely < 1 - LOSS_ALLOWED:
            break
        passed.append(each)
    if passed:
        return told(max(passed, key=lambda each: each.speedup))
    tqdm.write(
        f"{tried[0].title}: {tried[0].inputs} inputs are too few to be sure that even the most cautious candidate "
        f"keeps {1 - LOSS_ALLOWED:.0%}; taken all the same"
    )
    return told(tried[0])


def told(each: Tried) -> DecodeConfig:
    """The setting of a candidate, after saying why it was taken."""
    config = each.config
    bound = f", at most {config.max_owed} owed," if config.verify else ""
    bound = f"{bound or ','} shortlist {config.shortlist}," if config.shortlist else bound
    tqdm.write(
        f"{each.title}: exits {config.exit_layers}, threshold {config.threshold}{bound} keep {each.kept:.1%}, surely "
        f"{each.surely:.1%}, at {each.speedup:.2f} times the full model's speed on {each.inputs} inputs"
    )
    return config
