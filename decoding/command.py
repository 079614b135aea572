"""Decodes a prompt with early exit, and shows which layer each token came from.

python decode.py "Ich habe heute keine Zeit, ins Kino zu gehen."
python decode.py "Guten Morgen!" --compare full,softmax,softmax+verify --html page.html
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from common.errors import UserError
from common.files import check_outputs, whole_file
from common.flags import Parser, add_flags, add_model_flags, given, loading, rare
from decoding.costs import costs_of
from decoding.display import Screen, difference, in_force, speed
from decoding.loading import load_checkpoint
from decoding.page import Page
from decoding.presets import DEFAULT_CHECKPOINT, defaults_in_help, settings_file, settings_in_force, variants
from decoding.record import Token
from decoding.replay import Recorder
from decoding.settings import DecodeConfig
from decoding.shortlist import ids_beside
from formats.chat import conversation, load_chat
from formats.tokenizers.tokenizer import encode_prompt

TURNS, SECONDS = 5, 20.0  # timings of each configuration, and the seconds after which no new turn begins

ABOUT_PROMPT = "text to continue (or token ids, separated by commas, if the checkpoint has no tokenizer)"
ABOUT_CHAT = "put the prompt into the checkpoint's chat template (needs jinja2)"
ABOUT_COMPARE = (
    "show several configurations, and compare them with the full model: full, static or confidence "
    "functions, each with changes, as in softmax,jsd+threshold=0.5,softmax+verify"
)
ABOUT_HTML = "write a page that compares the run with the full model, token by token and pass by pass"
ABOUT_STAIRCASE = "print the staircase after every token; 4×13 12×7: 13 positions in layers 1 to 4, 7 above"
ABOUT_THRESHOLDS = "settings that eval.py calibrate wrote; flags take precedence"
ABOUT_TRACE = "write one JSON line per token, with its id, text, exit layer, confidences and time"
ABOUT_SETTINGS = "settings file (default: the .json file next to the checkpoint or --heads)"
ABOUT_AMATEUR = "second, weaker model, for --predict cd"


def make_parser() -> Parser:
    parser = Parser(__doc__, usage="python decode.py PROMPT [--flag VALUE ...]")
    prompt = parser.add_mutually_exclusive_group(required=True)
    how = {"default": argparse.SUPPRESS, "metavar": "PROMPT"}
    prompt.add_argument("prompt", nargs="?", help=ABOUT_PROMPT, **how)
    rare(prompt.add_argument("--prompt", help="the prompt as a flag", **how))
    parser.add_argument("--chat", action="store_true", help=ABOUT_CHAT)
    parser.add_argument("--compare", metavar="NAMES", help=ABOUT_COMPARE)
    parser.add_argument("--html", metavar="FILE", help=ABOUT_HTML)
    parser.add_argument("--thresholds", metavar="FILE", help=ABOUT_THRESHOLDS)
    rare(parser.add_argument("--trace", metavar="FILE", help=ABOUT_TRACE))
    rare(parser.add_argument("--settings", metavar="FILE", help=ABOUT_SETTINGS))
    rare(parser.add_argument("--amateur", metavar="CHECKPOINT", help=ABOUT_AMATEUR))
    rare(parser.add_argument("--staircase", action="store_true", help=ABOUT_STAIRCASE))
    add_flags(parser, defaults_in_help(sys.argv), "decoding")
    add_model_flags(parser, DEFAULT_CHECKPOINT)
    return parser


# ---------------------------------------------------------------- one decoding


@dataclass
class ShownRun:
    """One decoding of the prompt: the caller decodes with `config` and `recorder`, and passes the tokens to
    `show`, which prints them on `screen`, if any. `full` is the full model's run, if the two are compared."""

    name: str
    config: DecodeConfig
    screen: Screen | None = None
    full: "ShownRun | None" = None
    recorder: Recorder = field(default_factory=Recorder)
    pace: list[float] = field(default_factory=list)  # seconds per token, each time that it is decoded again

    def show(self, tokens: Iterator[Token]) -> None:
        """Records the tokens, and prints them if there is a screen; if there is a full run, also prints where
        the text differs from it."""
        if self.screen is None:
            list(self.recorder.watch(tokens))
        elif self.full is None:
            self.screen.show(tokens, self.config, self.recorder)
        else:
            print(f"--- {self.name}")
            self.screen.show(tokens, self.config, self.recorder, self.name)
            texts = self.recorder.settled, self.full.recorder.settled
            print(f"{difference(*texts, self.screen.tokenizer)}\n")

    def time(self, tokens: Iterator[Token]) -> None:
        """Decodes once more, to measure how long it takes."""
        started = perf_counter()
        count = len(list(tokens))
        self.pace.append((perf_counter() - started) / count)


# ---------------------------------------------------------------- all of a command


class Session:
    """What the arguments of decode.py ask for. Files are written at the end, if all went well."""

    def __init__(self, args: argparse.Namespace):
        """Reads all that is needed. Raises UserError, or OSError for files that cannot be written."""
        if not args.prompt.strip():
            raise UserError("the prompt is empty; give some text")
        read = [args.checkpoint, args.heads, args.settings, args.thresholds, args.amateur, args.frequent_ids]
        for model in filter(None, [args.heads, args.checkpoint]):  # these files may lie next to a model
            read += [settings_file(model), ids_beside(model)]
        check_outputs([args.trace, args.html], read)
        self.args = args
        contrast = {"predict": "cd"} if args.amateur else {}
        flags = contrast | given(args, DecodeConfig)
        tuned = args.heads or args.checkpoint  # which a settings file may lie next to
        config, self.source = settings_in_force(flags, tuned, args.settings, args.thresholds)
        options = loading(args)
        self.model, self.tokenizer = load_checkpoint(args.checkpoint, **options)
        self.prompt = read_prompt(args.prompt, self.tokenizer)
        self.amateur = None
        if args.amateur:
            self.amateur, other = load_checkpoint(args.amateur, **options | {"heads": None})
            if self.tokenizer and (not other or other.to_blob() != self.tokenizer.to_blob()):
                raise UserError(f"{args.amateur}: an amateur must have the tokenizer of the model")
        if args.chat:
            chat = load_chat(args.checkpoint, self.tokenizer)
            self.prompt = chat.encode(conversation(args.prompt))
            config = replace(config, stop_tokens=(*config.stop_tokens, *chat.ends))
        self.full = ShownRun("full model", config.full())
        self.trace = io.StringIO() if args.trace else None
        screen = Screen(self.tokenizer, self.model.config, args.staircase, self.trace)
        several = self.full if args.compare else None
        self.printed = []
        for name, each in configurations(config, args.compare).items():
            each.exits(self.model.config)  # finds mistakes before anything is printed
            self.printed.append(ShownRun(name, each, screen, several))
        others = [run for run in self.printed if run.config != self.full.config]
        # The runs that are timed, and shown on the page:
        self.compared = [self.full, *others] if args.compare or args.html else []

    def runs(self) -> Iterator[tuple[DecodeConfig, Recorder | None, Callable[[Iterator[Token]], None]]]:
        """Yields the settings of each decoding that is needed, in order, with its counters and the function
        that takes its tokens. A decoding is finished when the next one is requested."""
        if self.compared:
            yield self.full.config, self.full.recorder, self.full.show
        print(self.args.prompt)
        for run in self.printed:
            if run.config.draft == "auto":
                costs_of(self.model, run.config)  # measured before a clock runs
            print(f"settings: {in_force(run.config, self.model.config)} ({self.source})", file=sys.stderr)
            yield run.config, run.recorder, run.show
        started = perf_counter()
        for _ in range(TURNS if self.compared else 0):  # in turns, so that a busy moment affects all alike
            yield from ((run.config, None, run.time) for run in self.compared)
            if perf_counter() - started > SECONDS:
                return

    def end(self) -> None:
        """Writes the file of --trace; prints how fast the configurations are, if several were timed, and
        writes the page of --html."""
        if self.trace:
            with whole_file(self.args.trace) as part:
                Path(part).write_text(self.trace.getvalue(), encoding="utf-8")
        if not self.compared:
            return
        speeds = [speed(run.pace, run.recorder.tokens, self.full.pace) for run in self.compared]
        width = max(len(run.name) for run in self.compared)
        print(f"median of {len(self.full.pace)} alternating runs:")
        for run, words in zip(self.compared, speeds):
            print(f"{run.name:{width}}  {words}")
        if self.args.html:
            page = Page(self.model, self.tokenizer, Path(self.args.checkpoint).name)
            runs = {run.name: (run.config, run.recorder) for run in self.compared}
            page.add(self.args.prompt, self.prompt, runs, speeds=speeds)
            page.write(self.args.html)
            print(f"wrote {self.args.html}", file=sys.stderr)


def configurations(config: DecodeConfig, words: str | None) -> dict[str, DecodeConfig]:
    """The configurations of --compare by name; without the flag, `config` alone. Raises UserError for one
    with a checkpoint of its own, which eval.py compares."""
    if words is None:
        return {config.confidence or "full": config}
    found = variants(words, config)
    for each in found:
        if each.checkpoint is not None:
            raise UserError(f"{each.name}: decode.py compares settings of one model; eval.py compares models")
    return {each.name: each.config for each in found}


def read_prompt(text: str, tokenizer) -> list[int]:
    """Token ids of a prompt. Without a tokenizer the prompt is ids, separated by commas. Raises UserError."""
    if tokenizer is not None:
        return encode_prompt(tokenizer, text)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("this checkpoint has no tokenizer: give token ids, separated by commas") from None
