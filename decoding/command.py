"""Stops early, pays the debt later: shows each token by its exit layer.

python decode.py --prompt "Ich habe heute keine Zeit, ins Kino zu gehen."
python decode.py --prompt "Guten Morgen!" --compare full,softmax,softmax+verify --html page.html
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from common.files import check_outputs, whole_file
from common.flags import Parser, add_flags, add_model_flags, given, loading
from decoding.checks import check_prompt
from decoding.choosing import COMMAND, DEFAULT_CHECKPOINT, settings_of, variants
from decoding.display import difference, read_amateur, read_prompt, show
from decoding.page import Page
from decoding.record import Token
from decoding.replay import Recorder, recorded
from decoding.settings import DecodeConfig
from formats.chat import conversation, load_chat
from formats.frequent_ids import ids_beside
from model import load_checkpoint


def make_parser() -> Parser:
    parser = Parser(__doc__, usage="python decode.py --prompt TEXT [--flag VALUE ...]")
    parser.add_argument(
        "--prompt",
        required=True,
        help="text; token ids, separated by commas, where the checkpoint has no tokenizer",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a turn in a chat, by the template of the checkpoint; needs jinja2",
    )
    parser.add_argument(
        "--compare",
        metavar="NAMES",
        help="show several settings, and where each first differs from the full model: confidence "
        "functions or full, with changes, as in softmax,jsd+threshold=0.5,softmax+verify",
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write one JSON line per token: id, text, exit layer, confidences, time, ..",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write a page that shows the run beside the full model's: every token by its exit layer, "
        "what each layer would have said, the staircase pass by pass",
    )
    parser.add_argument(
        "--staircase",
        action="store_true",
        help="after every token print filled: 4×13 12×7 is 13 positions in layers 1 to 4, 7 in 5 to 12",
    )
    parser.add_argument(
        "--thresholds",
        metavar="FILE",
        help="JSON file of settings, as calibration writes it; flags outrank it",
    )
    parser.add_argument(
        "--amateur",
        metavar="CHECKPOINT",
        help="a second, weaker model to contrast with (Contrastive Decoding)",
    )
    add_model_flags(parser, DEFAULT_CHECKPOINT)
    add_flags(parser, COMMAND, "decoding")
    return parser


@contextmanager
def trace_file(path: str | None) -> Iterator[TextIO | None]:
    """The file for --trace, if it is asked for; one that was there is replaced at the end of the runs."""
    if path is None:
        yield None
        return
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        yield file


def show_runs(args: argparse.Namespace, stream: Callable[..., Iterator[Token]]) -> None:
    """Decodes as the arguments say, by decode.stream, and shows it. Raises UserError."""
    options = loading(args)
    model, tokenizer = load_checkpoint(args.checkpoint, **options)
    contrast = {"predict": "contrast"} if args.amateur else {}
    tuned = args.heads or args.checkpoint  # whose settings may lie beside it
    config, source = settings_of(tuned, args.thresholds, contrast | given(args, DecodeConfig))
    prompt = read_prompt(args.prompt, tokenizer)
    amateur = read_amateur(args.amateur, tokenizer, options | {"heads": None})
    if amateur is None and config.amateur_temperature != 1:
        raise UserError("amateur_temperature is a second model's; name that model with --amateur")
    if args.chat:
        chat = load_chat(args.checkpoint, tokenizer)
        (prompt,) = chat.encode([conversation(args.prompt)])
        config = replace(config, stop_tokens=(*config.stop_tokens, *chat.ends))
    configs = variants(config, args.compare) if args.compare else {"": config}
    check_prompt(prompt, model)
    for each in configs.values():
        each.exits(model.config)  # a mistake there leaves an old trace file alone
    read = [args.checkpoint, args.heads, Path(tuned).with_suffix(".json"), args.thresholds, args.amateur]
    read += [args.frequent_ids, *(ids_beside(file) for file in (args.checkpoint, args.heads) if file)]
    check_outputs([args.trace, args.html], read)
    full, runs = Recorder(), {}
    if args.compare or args.html:
        list(stream(model, prompt, replace(config.full(), max_new_tokens=4), amateur=amateur))  # warms up
        full = recorded(stream, model, prompt, config.full(), amateur)
        runs["full model"] = config.full(), full
    print(args.prompt)
    for each in configs.values():
        if each.draft == "auto":  # measures what passes cost, if nobody has, before a clock runs
            list(stream(model, prompt, replace(each, max_new_tokens=1), amateur=amateur))
    with trace_file(args.trace) as trace:
        for name, each in configs.items():
            print(f"settings: {each.describe(model.config)} ({source})", file=sys.stderr)
            if name:
                print(f"--- {name}")
            recorder = Recorder()
            tokens = recorder.watch(
                stream(model, prompt, each, recorder, recorder.trace, amateur), len(prompt)
            )
            ids = show(tokens, tokenizer, model.config, each, recorder, trace, args.staircase, name)
            if name:
                print(f"{difference(ids, [token.id for token in full.settled], tokenizer)}\n")
            if each.confidence or each.full() != config.full():
                runs[name or each.confidence] = each, recorder
    if args.html:
        page = Page(model, tokenizer, Path(args.checkpoint).name)
        page.add(args.prompt, prompt, runs)
        page.write(args.html)
        print(f"wrote {args.html}", file=sys.stderr)
