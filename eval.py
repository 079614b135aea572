"""Speed and quality side by side. Without arguments: the embedded model on test inputs of each of its tasks.

    python eval.py                                        the table; --wide for all figures, --all for all rows
    python eval.py --confidence softmax --threshold 0.6   the full model against one setting
    python eval.py --rows calm,free,layerskip             against the papers' settings; also del, acd, dola
    python eval.py --html page.html                       a page that shows three inputs of each task, pass by pass
    python eval.py --tasks samsum=val.jsonl               another task
    python eval.py --thresholds FILE                      the full model against settings that calibrate wrote

    python eval.py sweep --over threshold 0.3 0.5 --over exit-layers 4 4,8    every combination
    python eval.py calibrate --tasks e2e --tolerance 0.05                     a threshold with a guarantee
    python eval.py tune                                                       chooses the rows of the table anew
    python eval.py prompt --tasks e2e --shots 2                               shows what the model gets
    torchrun --nproc-per-node 2 eval.py                                       processes share the prompts

Every command has its own --help. evaluation/measure.py says how is measured, evaluation/tasks.py on what.
"""

import argparse
import sys
from pathlib import Path

from common.config import check_range, reader
from common.errors import UserError, run
from common.files import check_input
from common.flags import Parser, add_flags, add_model_flags
from common.processes import process_group
from decoding.choosing import COMMAND, DEFAULT_CHECKPOINT
from evaluation import calibrate, inputs, sweep, table, tune
from evaluation.recipes import RECIPES
from evaluation.tasks import TASKS


def path(text: str) -> Path:
    """A file's name on the command line. Raises ValueError for an empty one, which Path would take for this
    folder."""
    if not text:
        raise ValueError
    return Path(text)


# ---------------------------------------------------------------- the flags of each command, those needed first on top


def make_parser() -> Parser:
    parser = Parser(__doc__, usage="eval.py [FLAGS], or eval.py COMMAND [FLAGS]")
    commands = parser.add_subparsers(
        title="commands, in place of the table", dest="command", metavar="COMMAND", prog="eval.py"
    )
    for name, (text, add_command_flags) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, usage=f"eval.py {name} [FLAGS]")
        add_command_flags(command)
    add_table_flags(parser)
    return parser


def add_table_flags(parser: Parser) -> None:
    add_task_flags(parser, limit=60)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--rows", metavar="NAMES", help=f"rows of the settings, comma-separated, or {', '.join(RECIPES)}"
    )
    rows.add_argument("--all", action="store_true", help="all rows of the settings")
    parser.add_argument("--wide", action="store_true", help="all figures, and the time of asking")
    add_measuring_flags(parser)
    add_page_flags(parser)
    add_settings_flag(parser, "the rows")
    add_model_and_input_flags(parser)
    add_decoding_flags(parser, "with --confidence one row of your own, else changes to every row")
    parser.set_defaults(work=table.main)


def add_sweep_flags(parser: Parser) -> None:
    add = parser.add_argument
    text = "a setting and its values; given several times, every combination"
    add("--over", nargs="+", action="append", metavar=("FIELD", "VALUE"), required=True, help=text)
    add_task_flags(parser, limit=60)
    text = "where it goes on if it was cut off (default: %(default)s)"
    add("--results", type=path, metavar="FILE", default="sweep.jsonl", help=text)
    add_measuring_flags(parser)
    add_model_and_input_flags(parser)
    add_decoding_flags(parser, "what every row starts from")
    parser.set_defaults(work=sweep.main)


def add_calibrate_flags(parser: Parser) -> None:
    add_task_flags(parser, limit=200)
    add = parser.add_argument
    add("--tolerance", type=float, default=0.05, help="largest expected loss (default: %(default)s)")
    add(
        "--error", type=float, default=0.05, help="chance allowed to be wrong about it (default: %(default)s)"
    )
    text = "loss: 1 - ROUGE-L to the full model's text, or how much lower its score (default: %(default)s)"
    add("--risk", choices=("consistency", "task"), default="consistency", help=text)
    add(
        "--out",
        type=path,
        metavar="FILE",
        default="thresholds.json",
        help="the file written (default: %(default)s)",
    )
    add_model_and_input_flags(parser, split=False)
    add_decoding_flags(parser, "what is calibrated")
    parser.set_defaults(work=calibrate.main, split="dev", repeat=1)


def add_tune_flags(parser: Parser) -> None:
    add_task_flags(parser, limit=400)
    add_settings_flag(parser, "the file written")
    add_model_and_input_flags(parser, split=False)
    parser.set_defaults(work=tune.main, split="dev", repeat=1)


def add_prompt_flags(parser: Parser) -> None:
    add_task_flags(parser, limit=0)
    add_model_and_input_flags(parser)
    parser.set_defaults(work=inputs.show_prompts, repeat=1)


def add_task_flags(parser: Parser, limit: int) -> None:
    text = f"comma-separated, of {', '.join(TASKS)}, or NAME=FILE (default: those of the settings)"
    parser.add_argument("--tasks", help=text)
    text = "inputs of each task, drawn by --seed; 0: all (default: %(default)s)"
    parser.add_argument("--limit", type=int, default=limit, help=text)


def add_measuring_flags(parser: Parser) -> None:
    text = "times an input is decoded; the median counts (default: %(default)s)"
    parser.add_argument("--repeat", type=int, default=1, help=text)
    parser.add_argument("--json", type=path, metavar="FILE", help="write all figures, per prompt too")
    parser.add_argument("--plot", type=path, metavar="FOLDER", help="draw pictures there (needs matplotlib)")


def add_page_flags(parser: Parser) -> None:
    text = "write a page that shows some inputs under every row: tokens by exit layer, the staircase pass by pass"
    parser.add_argument("--html", type=path, metavar="FILE", help=text)
    text = "which of the inputs drawn, counted from 1 (default: 1,2,3)"
    parser.add_argument("--html-inputs", type=reader(tuple[int, ...]), metavar="NUMBERS", help=text)


def add_settings_flag(parser: Parser, what: str) -> None:
    text = f"{what} (default: the name of the checkpoint, or of --heads, with .json)"
    parser.add_argument("--settings", type=path, metavar="FILE", help=text)


def add_model_and_input_flags(parser: Parser, split: bool = True) -> None:
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    add = parser.add_argument_group("inputs").add_argument
    if split:
        add("--split", choices=("dev", "test"), default="test", help="default: %(default)s")
    add("--seed", type=int, default=argparse.SUPPRESS, help="draws the inputs, and samples (default: 0)")
    add("--shots", type=int, default=0, help="solved examples before every prompt (default: %(default)s)")
    add("--shot-file", metavar="FILE", help="where they come from (default: the task's training file)")
    add(
        "--chat",
        action="store_true",
        help="inputs and shots are turns in a chat, by the checkpoint's template",
    )
    add("--skip-bad", action="store_true", help="count and skip malformed lines of a data file")


def add_decoding_flags(parser: Parser, what: str) -> None:
    text = "settings as calibrate writes them; flags outrank them"
    parser.add_argument("--thresholds", type=path, metavar="FILE", help=text)
    add_flags(parser, COMMAND, f"decoding: {what}", skip=("seed",))


COMMANDS = {
    "sweep": ("a row for every combination of some settings", add_sweep_flags),
    "calibrate": ("find a threshold with a guarantee, by Learn then Test", add_calibrate_flags),
    "tune": ("choose the rows of the table on dev", add_tune_flags),
    "prompt": ("print the first prompt of each task, as the model gets it", add_prompt_flags),
}

# ---------------------------------------------------------------- from the flags to the work


def parse() -> argparse.Namespace:
    """The arguments, those checked that every command has."""
    args = make_parser().parse_args()
    if args.command and sys.argv[1] != args.command:
        raise UserError(f"flags come after the command: eval.py {args.command} {sys.argv[1]} ..")
    args.draw_seed = getattr(args, "seed", 0)
    args.beside = getattr(args, "settings", None) is None
    if args.beside:
        check_input(
            args.heads or args.checkpoint, "no such checkpoint; train one with train.py or name another"
        )
        args.settings = Path(args.heads or args.checkpoint).with_suffix(".json")
    elif args.command != "tune":
        check_input(args.settings, "no such file; it was to hold settings")
    for name, least in {"limit": 0, "repeat": 1, "shots": 0}.items():
        check_range(name, getattr(args, name), least=least, most=10**9)
    if args.shot_file and not args.shots:
        raise UserError("--shot-file gives solved examples; say how many with --shots")
    return args


def main() -> None:
    args = parse()
    with process_group(args.device):
        args.work(args)


if __name__ == "__main__":
    run(main)
