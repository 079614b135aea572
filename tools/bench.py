"""Measures how long a pass takes for several rows, and what confidence checks cost.

python -m tools.bench
python -m tools.bench --plot FOLDER         also plots the time of a pass
python -m tools.bench --large-vocabulary    uses a random model with the shape of Gemma 3 270M
"""

import common.threads  # noqa: F401  sets variables that torch reads

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from common.config import check_range
from common.errors import run
from common.flags import Parser, add_model_flags, loading
from decode import load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT
from decoding.settings import DecodeConfig
from decoding.weights import default_form, prepare
from evaluation.measure import Configuration, peak_memory, place_of_run, run_in_turns
from evaluation.plots import CHECKS, make_folder, pyplot
from model import ModelConfig, Transformer

PROMPT, ANSWER = 32, 64  # tokens
ROWS = (1, 2, 4, 8, 16)
LARGE = ModelConfig(
    vocab_size=262_144, n_layers=18, d_model=640, n_heads=4, n_kv_heads=1, head_dim=256, d_ff=2048
)
SHORTLIST = 8192  # ids, of the large vocabulary


def random_model(args: argparse.Namespace) -> Transformer:
    """Makes a model with random weights and a large vocabulary, whose frequent ids are random, too."""
    options = loading(args)
    torch.manual_seed(0)
    model = Transformer(LARGE).requires_grad_(False)
    model.frequent_ids = torch.randperm(LARGE.vocab_size)
    dtype = options["dtype"] or torch.float32
    if options["device"] != "cpu":
        return model.to(options["device"], dtype)
    form = "int8" if dtype == torch.int8 else options["form"] or default_form(dtype)
    prepare(model if dtype == torch.int8 else model.to(dtype), form, dtype, {})
    return model


def print_rows(model: Transformer, repeat: int) -> dict[int, float]:
    """Prints and returns the time of a pass by its number of rows, which are the positions of a prompt; one
    token is decoded. The prompts take turns, so that drift in the machine's speed affects all of them
    equally; the first turn warms up."""
    one_token = {"": Configuration(DecodeConfig(max_new_tokens=1), model)}
    prompts = [[5] * rows for rows in ROWS] * (repeat + 1)
    spent = run_in_turns(one_token, prompts, 1, "rows")[""].seconds[len(ROWS) :]
    times = {rows: median(spent[place :: len(ROWS)]) for place, rows in enumerate(ROWS)}
    for rows, seconds in times.items():
        print(f"a pass of {rows:>2} rows: {1e6 * seconds:.0f} µs, {seconds / times[1]:.2f} times one row")
    return times


def draw_passes(times: dict[int, float], folder: Path) -> Path:
    """Draws the time of a pass by its number of rows, compared with separate passes for each row, and returns
    the file."""
    figure, axis = pyplot().subplots(figsize=(6, 3.2))
    axis.plot(ROWS, [1000 * times[1] * rows for rows in ROWS], "s--", label="a pass for each row")
    axis.plot(ROWS, [1000 * times[rows] for rows in ROWS], "o-", label="one pass for all rows")
    axis.set(xlabel="rows", ylabel="ms", xticks=ROWS)
    axis.legend()
    out = folder / "rows.png"
    figure.savefig(out)
    return out


def print_checks(model: Transformer, shortlist: int | None, tokens: int, repeat: int) -> None:
    """Prints the cost of confidence checks after layers at 1/3, 1/2 and 2/3 of the depth if no token exits:
    the time that they add to a token, also relative to a token at full depth."""
    L = model.config.n_layers
    layers = tuple(sorted({max(1, round(L * share)) for share in (1 / 3, 1 / 2, 2 / 3)} - {L}))
    full = DecodeConfig(max_new_tokens=tokens)
    runs = {"full": Configuration(full, model)}
    for name in CHECKS:
        never = replace(full, confidence=name, threshold=1.0, exit_layers=layers)
        for size in (None, shortlist) if shortlist else (None,):
            ids = f"a shortlist of {size:,}" if size else f"all {model.config.vocab_size:,} ids"
            check = replace(never, shortlist=size)
            runs[f"{name}, {ids}"] = Configuration(check, model)
            runs[f"{name}, {ids}, pruned"] = Configuration(replace(check, prune="fixed:64"), model)
    measured = run_in_turns(runs, [[5] * PROMPT], repeat, "checks")
    times = {name: row.seconds[0] for name, row in measured.items()}
    whole = times.pop("full")
    print(f"full depth: {tokens / whole:.0f} tokens/s, {1e6 * whole / tokens:.0f} µs per token")
    print(f"checks after layers {','.join(map(str, layers))}, none of which lets a token exit:")
    for name, seconds in times.items():
        added = 1e6 * (seconds - whole) / tokens
        print(f"  {name:42} {added:>7.0f} µs {seconds / whole - 1:>8.1%} of a token")


def make_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.bench")
    add_model_flags(parser, str(DEFAULT_CHECKPOINT))
    text = "use a random model with 262,144 tokens, with and without a shortlist"
    parser.add_argument("--large-vocabulary", action="store_true", help=text)
    text = "measure this many times and use the median (default: %(default)s)"
    parser.add_argument("--repeat", type=int, default=5, help=text)
    text = "plot the time of a pass against its number of rows in this folder (needs matplotlib)"
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help=text)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    check_range("repeat", args.repeat, least=1)
    if args.plot:
        make_folder(args.plot)
    if args.large_vocabulary:
        model, shortlist, tokens = random_model(args), SHORTLIST, 4
    else:
        model, shortlist, tokens = load_checkpoint(args.checkpoint, **loading(args))[0], None, ANSWER
    model.config = replace(model.config, eos_id=None)  # so that every run has the same length
    place = place_of_run(model)
    print(f"{place['threads']} threads, {place['dtype']}, weights {place['weights']}")
    times = print_rows(model, args.repeat)
    print_checks(model, shortlist, tokens, args.repeat)
    if args.plot:
        print(f"wrote {draw_passes(times, args.plot)}")
    print(f"peak memory {peak_memory(model)} MiB")


if __name__ == "__main__":
    run(main)
