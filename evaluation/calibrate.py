"""`eval.py calibrate`: a threshold with a guarantee for one task, found as CALM finds it (Schuster 2022,
section 4)."""

import argparse
import sys
from dataclasses import asdict, replace
from statistics import fmean

from common.errors import UserError
from common.files import write_json
from common.processes import processes, tell
from decoding.settings import DecodeConfig
from evaluation.figures import written
from evaluation.inputs import chosen_tasks, load_inputs, load_model, note, run_record
from evaluation.learn_then_test import fewest, walk
from evaluation.measure import encode_inputs, run_in_turns
from evaluation.metrics import METRICS, rouge_l_f1
from evaluation.rows import (
    command_setting,
    custom_settings,
    fields_that_differ,
    own_origin,
    own_setting,
    sources,
)
from evaluation.table import check_files
from evaluation.tasks import TUNING_SHARE, Task, between, one_of_each_source, sample, source
from formats.data import Example

CHECK_SHARE = (
    1 + TUNING_SHARE
) / 2  # of a single file: from here on inputs to check on; below, those to calibrate on


def main(args: argparse.Namespace) -> None:
    """Finds a threshold, says what was found, and writes it. Ends with status 1 if no threshold passes."""
    custom = custom_settings(args)
    tasks = chosen_tasks(args)
    check_files(args, tasks, args.out, settings=args.settings)
    check_flags(args, own_setting(args, tasks[0], custom), tasks)
    model, tokenizer = load_model(args)
    record = run_record(args, model)
    task, sets = two_sets(args, tasks[0])
    config = own_setting(args, task, custom)
    config.exits(model.config)
    note(sources(args, own_origin(args, custom, model)))
    threshold, provenance = find_threshold(
        model, tokenizer, task, sets, config, args.risk, args.tolerance, args.error
    )
    tell(report(task, threshold, provenance))
    if threshold is None:
        sys.exit(1)
    if processes()[0] == 0:
        settings = {"confidence": config.confidence} | fields_that_differ(config, DecodeConfig())
        settings |= fields_that_differ(config, command_setting(args))  # what a reader of the file begins with
        settings |= {"threshold": threshold, "provenance": provenance | record | {"task": task.name}}
        write_json(args.out, settings)
    tell(f"wrote {args.out}")


def check_flags(args: argparse.Namespace, config: DecodeConfig, tasks: list[Task]) -> None:
    """Raises UserError for what cannot be calibrated."""
    if config.layer_thresholds:
        raise UserError("layer_thresholds outranks the threshold that is to be found; leave it out")
    if config.confidence is None:
        raise UserError("calibrate needs a confidence function; confidence is none")
    if config.verify:
        raise UserError("verify changes no text, so every threshold is safe; leave it out")
    if hasattr(args, "threshold"):
        raise UserError(f"threshold is {args.threshold}, but it is what calibrate finds; leave it out")
    for name in ("tolerance", "error"):
        if not 0 < getattr(args, name) < 1:
            raise UserError(f"{name} is {getattr(args, name)}; it must lie between 0 and 1")
    if len(tasks) != 1:
        names = ",".join(task.name for task in tasks)
        raise UserError(f"calibrate finds a threshold for one task; choose it with --tasks (here: {names})")
    if args.risk == "task" and not tasks[0].metrics:
        raise UserError(f"task {tasks[0].name} has no score; calibrate with --risk consistency")


def two_sets(args: argparse.Namespace, task: Task) -> tuple[Task, dict[str, list[Example]]]:
    """The examples to calibrate on, and others to check on. None of the first has been used by `tune`, which
    draws from the rest of dev; each text is asked one question, since the guarantee is for independent
    inputs; and no text is in both sets. Of a task of your own, which is a single file, both come from the
    part that tune leaves."""
    task, dev = load_inputs(args, task, "dev")
    if "{}" in task.file:
        fit = between(dev, TUNING_SHARE, 1)
        seen = {source(example) for example in fit}
        check = [example for example in load_inputs(args, task, "test")[1] if source(example) not in seen]
        names = "dev (what tune leaves of it)", "test"
    else:
        fit, check = between(dev, TUNING_SHARE, CHECK_SHARE), between(dev, CHECK_SHARE, 1)
        names = f"{task.file} (one part)", f"{task.file} (another part)"
    if not fit or not check:
        raise UserError(f"{task.file}: holds too little to calibrate on one part and check on another")
    drawn = [
        sample(one_of_each_source(part, args.draw_seed), args.limit, args.draw_seed) for part in (fit, check)
    ]
    needed = fewest(args.tolerance, args.error)
    if len(drawn[0]) < needed:  # known before any is looked at, so another try is allowed
        raise UserError(
            f"{len(drawn[0])} inputs cannot prove a risk below {args.tolerance} at error level {args.error}, whatever "
            f"their losses; take at least {needed} (--limit, or another file), or a higher --tolerance or --error"
        )
    return task, dict(zip(names, drawn))


def find_threshold(
    model,
    tokenizer,
    task: Task,
    sets: dict[str, list[Example]],
    config: DecodeConfig,
    risk: str,
    tolerance: float,
    error: float,
) -> tuple[float | None, dict]:
    """The threshold that Learn then Test finds on the calibration examples, None if none passes; and how,
    held-out risk included. sets: examples by what they are, the first to calibrate on, the second to check
    on. risk: consistency, 1 - ROUGE-L to the full model's text; or task, how much lower the task's first
    score is."""
    fit, check = sets
    name = next(iter(task.metrics)) if risk == "task" else "consistency"
    both = {"early": config, "full": config.full()}
    encoded = {
        which: encode_inputs(model, tokenizer, task, examples, both) for which, examples in sets.items()
    }
    full: dict[str, list[str]] = {}  # the full model's texts of a set, which it decodes once

    def losses(threshold: float, which: str) -> list[float]:
        """The loss of every example of a set."""
        prompts, ending = encoded[which]
        configs = {"early": replace(ending["early"], threshold=threshold)}
        if which not in full:
            configs["full"] = ending["full"]
        rows = run_in_turns(model, prompts, configs, 1, f"{task.name}, {which}, threshold {threshold:g}")
        if which not in full:
            full[which] = written(tokenizer, rows["full"])
        early = written(tokenizer, rows["early"])
        if risk == "consistency":
            return [1 - rouge_l_f1(*pair) for pair in zip(early, full[which])]
        metric = METRICS[task.metrics[name]]
        lost = []
        for text, whole, example in zip(early, full[which], sets[which]):
            references = [list(example.references)]
            lost.append(max(0.0, metric([whole], references) - metric([text], references)))
        return lost

    threshold, tested = walk(lambda threshold: losses(threshold, fit), tolerance, error)
    for each in tested:
        tell(f"threshold {each.threshold:g}: risk {each.risk:.4f}, p {each.p_value:.4f}")
    provenance = {"tolerance": tolerance, "error": error, "risk": risk, "loss": name}
    provenance["calibrated on"] = f"{len(sets[fit])} inputs of {fit}"
    provenance["tested"] = [asdict(each) for each in tested]
    if threshold is not None:
        held_out = losses(threshold, check)
        provenance["held out"] = {"on": f"{len(held_out)} inputs of {check}", "risk": fmean(held_out)}
    return threshold, provenance


def report(task: Task, threshold: float | None, provenance: dict) -> str:
    """What calibration found, in words. After a failure it advises only what leaves a guarantee a guarantee:
    the inputs have been looked at, so whatever is chosen in view of them must be tested on others."""
    risk, tolerance = f"{provenance['risk']} risk", provenance["tolerance"]
    if threshold is None:
        return (
            f"{task.name}: no threshold keeps the {risk} below {tolerance} at error level {provenance['error']}. "
            "These inputs have now been looked at: another tolerance, other exits or more inputs chosen in view of "
            "them would have no guarantee on them. Settle these first, then calibrate once on inputs that were not "
            f"used here ({task.name}=FILE or file=FILE). Or use --verify, which changes no text and needs no guarantee."
        )
    held_out = provenance["held out"]
    text = (
        f"{task.name}: threshold {threshold:g}; on {held_out['on']}, not used to find it, its {risk} is "
        f"{held_out['risk']:.4f} (tolerance {tolerance})."
    )
    if held_out["risk"] > tolerance:
        text += " Above it: the guarantee is for the mean over many inputs, of the same source as those calibrated on."
    return text
