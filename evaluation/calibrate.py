"""Finds a threshold with a guarantee for one task by CALM's method (Schuster 2022, section 4), which is based
on Learn then Test."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from common.errors import UserError
from common.files import write_json
from decoding.presets import override
from decoding.settings import DecodeConfig
from evaluation.configurations import command_config, differing_fields, own_config
from evaluation.figures import written
from evaluation.inputs import Setup, encode_inputs, say
from evaluation.measure import Configuration, run_in_turns
from evaluation.metrics import METRICS, rouge_l_f1
from evaluation.tasks import TUNING_SHARE, Task, between, source
from evaluation.walk import fewest_inputs, risk_p_value, walk
from formats.data import Example

THRESHOLDS = tuple(step / 20 for step in range(20, -1, -1))  # from cautious to bold
CHECK_SHARE = (1 + TUNING_SHARE) / 2  # splits a single file into inputs to calibrate on and to check on
# Printed if no threshold passes. These inputs have been used, so a new choice must be tested on others.
ADVICE = """Settings chosen after seeing these inputs have no guarantee on them: make your changes, then
calibrate once on inputs that were not used here (TASK=FILE). Or use --verify, which changes no text."""


def one_task(setup: Setup) -> Task:
    """Returns the task to calibrate. Raises UserError for a task or settings that cannot be calibrated."""
    task = setup.tasks[0]
    if len(setup.tasks) != 1:
        raise UserError("calibrate finds a threshold for one task; choose it with --tasks")
    decode = own_config(setup, task)
    if decode.confidence is None or decode.verify:
        raise UserError("calibrate needs a confidence function, and no --verify, since that keeps the text")
    if setup.config.risk == "task" and not task.metrics:
        raise UserError(f"task {task.name} has no score; calibrate with --risk consistency")
    return task


def two_sets(setup: Setup, task: Task) -> tuple[Task, dict[str, list[Example]]]:
    """Returns the task and two sets of inputs, to calibrate on and to check on, each under a name that states
    its source. `tune` uses none of the first set, because it draws from the other part of dev. One question
    is drawn for each text, because the guarantee requires independent inputs, and no text is in both sets. If
    the data of a task is a single file, both sets come from the part that tune does not use."""
    config = setup.config
    task, dev = setup.inputs(task, "dev")
    if "{}" in task.file:
        fit, names = setup.part(dev, TUNING_SHARE, 1), ("dev (what tune leaves of it)", "test")
        seen = {source(example) for example in between(dev, TUNING_SHARE, 1)}
        test = [example for example in setup.inputs(task, "test")[1] if source(example) not in seen]
        check = setup.part(test, 0, 1)
    else:
        names = f"{task.file} (one part)", f"{task.file} (another part)"
        fit, check = setup.part(dev, TUNING_SHARE, CHECK_SHARE), setup.part(dev, CHECK_SHARE, 1)
    needed = fewest_inputs(config.tolerance, config.error)
    if len(fit) < needed:  # found before any input was used, so another try is allowed
        proof = f"a risk below {config.tolerance} at error level {config.error}"
        remedy = "(--limit, or another file), or a higher --tolerance or --error"
        raise UserError(f"{len(fit)} inputs cannot prove {proof}; use at least {needed} {remedy}")
    return task, dict(zip(names, (fit, check)))


class Calibration:
    """The search for the threshold of one configuration. The thresholds file is written after every threshold
    that passes, so that an interrupted run leaves the last of them: each is covered by the same guarantee."""

    def __init__(self, setup: Setup, task: Task, sets: dict[str, list[Example]]):
        """`sets`: examples by source; the first set is used to calibrate, the second to check."""
        self.setup, self.task, self.sets = setup, task, sets
        decode = replace(own_config(setup, task), layer_thresholds=None)  # one threshold for all exit layers
        decode.exits(setup.model.config)
        early = {"early": Configuration(decode, setup.model)}
        self.encoded = {which: encode_inputs(setup, task, each, early) for which, each in sets.items()}
        self.full_texts: dict[str, list[str]] = {}  # by set; the full model decodes each once
        config = setup.config
        self.loss = next(iter(task.metrics)) if config.risk == "task" else "consistency"
        settings = {"confidence": decode.confidence} | differing_fields(decode, DecodeConfig())
        self.settings = settings | differing_fields(decode, command_config(setup))  # what readers start with
        self.provenance = {"task": task.name, "risk": config.risk, "loss": self.loss, **setup.record}
        self.provenance |= {"tolerance": config.tolerance, "error": config.error, "tested": []}

    def find(self) -> float | None:
        """Finds the boldest threshold whose risk is significantly below the tolerance, and writes it with its
        provenance and the risk on other inputs. Returns None if no threshold passes."""
        config, name, (fit, check) = self.setup.config, self.task.name, self.sets
        self.provenance["calibrated on"] = f"{len(self.sets[fit])} inputs of {fit}"
        passed = walk(THRESHOLDS, self.p_value, config.error)
        if not passed:
            goal = f"the {config.risk} risk below {config.tolerance} at error level {config.error}"
            say(f"{name}: no threshold keeps {goal}.\n{ADVICE}")
            return None
        threshold, losses = passed[-1], self.losses(passed[-1], check)
        where, risk = f"{len(losses)} inputs of {check}", fmean(losses)
        self.provenance["held out"] = {"on": where, "risk": risk}
        self.write(threshold)
        found = f"its {config.risk} risk is {risk:.4f} (tolerance {config.tolerance})"
        say(f"{name}: threshold {threshold:g}; on {where}, not used to find it, {found}.")
        if risk > config.tolerance:
            say("This exceeds the tolerance: the guarantee covers only the mean over many inputs.")
        say(f"wrote {config.out}, for decode.py and eval.py with --thresholds {config.out}")
        return threshold

    def p_value(self, threshold: float) -> float:
        """Tests one threshold, prints the result, and writes the threshold to the file if it passes."""
        config, fit = self.setup.config, next(iter(self.sets))
        losses = self.losses(threshold, fit)
        risk, p_value = fmean(losses), risk_p_value(losses, config.tolerance)
        self.provenance["tested"].append({"threshold": threshold, "risk": risk, "p_value": p_value})
        say(f"threshold {threshold:g}: risk {risk:.4f}, p {p_value:.4f}")
        if p_value <= config.error:
            self.write(threshold)
        return p_value

    def losses(self, threshold: float, which: str) -> list[float]:
        """Returns the loss of every example of a set."""
        prompts, configurations = self.encoded[which]
        early = configurations["early"]
        runs = {"early": replace(early, decode=override(early.decode, {"threshold": threshold}))}
        if which not in self.full_texts:
            runs["full"] = configurations["full"]
        rows = run_in_turns(runs, prompts, 1, f"{self.task.name}, {which}, threshold {threshold:g}")
        if "full" in rows:
            self.full_texts[which] = written(self.setup.tokenizer, rows["full"])
        texts, full_texts = written(self.setup.tokenizer, rows["early"]), self.full_texts[which]
        if self.loss == "consistency":
            return [1 - rouge_l_f1(*pair) for pair in zip(texts, full_texts)]
        metric, losses = METRICS[self.task.metrics[self.loss]], []
        for text, full_text, example in zip(texts, full_texts, self.sets[which]):
            references = [example.references]
            losses.append(max(0.0, metric([full_text], references) - metric([text], references)))
        return losses

    def write(self, threshold: float) -> None:
        settings = {**self.settings, "threshold": threshold, "provenance": self.provenance}
        write_json(Path(self.setup.config.out), settings)
