"""Compares speed and quality. Without arguments, it evaluates the included model on test inputs of its tasks.

    python eval.py                                 --wide shows all columns, --all all configurations
    python eval.py --confidence softmax --threshold 0.6    the full model compared with one configuration
    python eval.py --compare softmax,my_file:stable+exit-layers=4,8,full+checkpoint=small.pt    several
    python eval.py --compare calm,free,layerskip   the papers' settings; also del, acd, dola
    python eval.py --html page.html                shows three inputs of each task, pass by pass
    python eval.py --tasks samsum=val.jsonl        your own data
    python eval.py --thresholds FILE               settings that calibrate wrote

    python eval.py sweep --over threshold 0.3 0.5 --over exit-layers 4 4,8    all combinations, on dev data
    python eval.py calibrate --tasks e2e --tolerance 0.05                     a threshold with a guarantee
    python eval.py tune --out tuned.json                                      chooses settings on dev data
    python eval.py prompt --tasks e2e --shots 2                               shows the prompt

Every command has its own --help. evaluation/measure.py explains how configurations are measured, and
evaluation/tasks.py defines the inputs.
"""

import datetime
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, run
from common.files import check_input, write_json
from common.flags import Parser, add_flags, add_model_flags, given, loading
from decode import stream
from decoding.page import Page
from decoding.presets import DEFAULT_CHECKPOINT, defaults_in_help, read_settings_file, settings_file
from decoding.replay import Recorder
from decoding.settings import DecodeConfig
from evaluation.calibrate import Calibration, one_task, two_sets
from evaluation.configurations import choose, sources
from evaluation.figures import evaluate
from evaluation.inputs import Setup, Table, encode_inputs, note, say
from evaluation.measure import peak_memory
from evaluation.settings import EvalConfig
from evaluation.sweep import combinations, measured_or_known, sweep_text
from evaluation.table import LEGEND, heading, table_text
from evaluation.tasks import TUNING_SHARE
from evaluation.tune import Tuning

# ---------------------------------------------------------------- the commands


def compare(config: EvalConfig) -> None:
    """Compares the full model with other configurations, and prints a table for each task."""
    setup = Setup(config, config.json, config.html)
    page = Page(setup.model, setup.tokenizer, Path(config.checkpoint).name)
    note(sources(setup))
    measured, tables = [], setup.tables(lambda task: choose(setup, task))
    for table in tables:
        measured.append(evaluate(setup, table, time_checks=bool(config.wide or config.json or config.plot)))
        say(f"\n{heading(config, table)}\n\n{table_text(measured[-1], table.task, config.wide)}")
        if config.html:
            add_to_page(page, setup, table)
    if not config.wide:
        say(f"\n{LEGEND}")
    if config.html:
        page.write(config.html)
        say(f"wrote {config.html}")
    finish(setup, measured)


def add_to_page(page: Page, setup: Setup, table: Table) -> None:
    """Adds the first three inputs, decoded in separate runs by the full model and by the configurations,
    except those with another model, since a page shows the layers of only one."""
    examples = table.examples[:3]
    prompts, configurations = encode_inputs(setup, table.task, examples, table.configurations)
    for example, prompt in zip(examples, prompts):
        runs = {}
        for name, each in configurations.items():
            if each.model is setup.model:
                recorder = Recorder()
                list(recorder.watch(stream(setup.model, prompt, each.decode, recorder)))
                runs[name] = each.decode, recorder
        page.add(table.task.text(example.prompt, page.tokenizer), prompt, runs, example.references)


def sweep(config: EvalConfig) -> None:
    """Measures every combination of some settings on every task, and stores the results in a file."""
    setup = Setup(config, config.json, config.results)
    note(sources(setup))
    measured = []
    for table in setup.tables(lambda task: combinations(setup, task)):
        measured.append(measured_or_known(setup, table))
        stars = "* every other row is clearly slower or worse"
        say(f"\n{heading(config, table)}; {stars}\n\n{sweep_text(measured[-1], table.task, config.over)}")
    finish(setup, measured)


def finish(setup: Setup, tables: list[list[dict]]) -> None:
    """Writes the rows of all tables and draws the pictures."""
    config, memory = setup.config, peak_memory(setup.model)
    note(f"peak memory {memory} MiB")
    if config.json:
        made = {"command": shlex.join(sys.argv), "date": str(datetime.date.today())}
        environment = made | setup.record | {"peak_memory_mib": memory}
        write_json(Path(config.json), {"environment": environment, "rows": list(chain(*tables))})
    if config.plot:
        from evaluation.plots import draw_evaluation

        for path in draw_evaluation(Path(config.plot), tables, setup.model, setup.tokenizer):
            say(f"wrote {path}")


def calibrate(config: EvalConfig) -> None:
    """Finds a threshold with a guarantee for one task. The exit status is 1 if no threshold passes."""
    setup = Setup(config, config.out)
    task, sets = two_sets(setup, one_task(setup))
    note(sources(setup))
    if Calibration(setup, task, sets).find() is None:
        sys.exit(1)


def tune(config: EvalConfig) -> None:
    """Chooses settings for every task on dev data and writes them; other tasks in the file stay unchanged."""
    out = Path(config.out) if config.out else settings_file(config.heads or config.checkpoint)
    settings = read_settings_file(out)
    if settings and not config.overwrite:
        raise UserError(f"{out}: already exists; name another file with --out, or give --overwrite")
    setup = Setup(config, rows=out)
    for task in setup.tasks:
        task, dev = setup.inputs(task, "dev")
        tuning = Tuning(setup, task, setup.part(dev, 0, TUNING_SHARE))
        settings[task.name] = tuning.rows()
        settings.setdefault("provenance", {})[task.name] = tuning.provenance
        write_json(out, settings)
        say(f"wrote {out}")


def prompt(config: EvalConfig) -> None:
    """Prints the first prompt of each task, with its template and shots, and its references."""
    setup = Setup(config)
    for task in setup.tasks:
        task, examples = setup.inputs(task)
        first = setup.sample(examples)[0]
        text = task.text(first.prompt, setup.tokenizer)
        say("\n".join([f"--- {task.name}, {config.split}", text, "--- references", *first.references]))


# ---------------------------------------------------------------- from the flags to a command

INPUTS = ("tasks", "seed", "shots", "shot_file", "chat", "skip_bad")
MEASURED = (*INPUTS, "limit", "repeat", "json", "plot", "settings", "split")
COMPARED = (*MEASURED, "compare", "all", "wide", "html")
CALIBRATED = (*INPUTS, "limit", "tolerance", "error", "risk", "out", "settings")


class Command(NamedTuple):
    """A command, its flags, which are fields of EvalConfig, and its own defaults."""

    run: Callable[[EvalConfig], None]
    flags: tuple[str, ...]
    defaults: EvalConfig
    decoding: str = ""  # describes its decoding flags in --help; empty: it has no such flags


CHANGED = "with --confidence, one configuration; without it, changes to every one"
ON_DEV = EvalConfig(split="dev")
TO_CALIBRATE = replace(ON_DEV, limit=200, out="thresholds.json")
COMMANDS = {
    "compare": Command(compare, COMPARED, EvalConfig(), CHANGED),
    "sweep": Command(sweep, ("results", *MEASURED), ON_DEV, "settings that are not swept"),
    "calibrate": Command(calibrate, CALIBRATED, TO_CALIBRATE, "settings to calibrate"),
    "tune": Command(tune, (*INPUTS, "limit", "out", "overwrite"), replace(ON_DEV, limit=400)),
    "prompt": Command(prompt, ("split", *INPUTS), EvalConfig(limit=0)),
}


def make_parser() -> Parser:
    parser = Parser(__doc__, usage="eval.py [FLAGS], or eval.py COMMAND [FLAGS]")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog="eval.py")
    for name, command in COMMANDS.items():
        about = {"help": command.run.__doc__, "description": command.run.__doc__}
        add_command_flags(commands.add_parser(name, usage=f"eval.py {name} [FLAGS]", **about), command)
    add_command_flags(parser, COMMANDS["compare"])
    return parser


def add_command_flags(parser: Parser, command: Command) -> None:
    """Adds the flags of a command, those of EvalConfig first. A flag that is not given leaves nothing in the
    parsed arguments, so that the defaults of the command apply."""
    if command.run is sweep:
        text = "a setting and its values; if repeated, every combination is measured"
        over = {"nargs": "+", "action": "append", "metavar": ("FIELD", "VALUE"), "required": True}
        parser.add_argument("--over", help=text, **over)
    others = {field.name for field in fields(EvalConfig)} - {*command.flags}
    add_flags(parser, command.defaults, skip=others)
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    if command.decoding:
        text = "settings that calibrate wrote; flags take precedence"
        parser.add_argument("--thresholds", metavar="FILE", help=text)
        add_flags(parser, defaults_in_help(sys.argv[1:]), f"decoding: {command.decoding}", skip=("seed",))


def main() -> None:
    args = make_parser().parse_args()
    command = COMMANDS[args.command or "compare"]
    if args.command not in (None, *sys.argv[1:2]):
        raise UserError(f"flags come after the command: eval.py {args.command} {sys.argv[1]} ..")
    check_input(args.checkpoint, "no such checkpoint; train one with train.py or name another")
    given_flags = given(args, EvalConfig) | {"loading": loading(args), "decoding": given(args, DecodeConfig)}
    command.run(replace(command.defaults, **given_flags))


if __name__ == "__main__":
    run(main)
