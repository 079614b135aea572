"""Counts the token ids of a corpus, which --shortlist asks over (decoding/shortlist.py), the most frequent
first. Of prompts with completions only these are counted, for the ids of a prompt are in the shortlist of its
text anyway.

    python -m tools.shortlist --checkpoint model.pt --data train.jsonl --out model.ids.npy    ids alone
    python -m tools.shortlist --checkpoint model.pt --data train.jsonl --out counted.pt       a copy of it

In model.ids.npy beside model.pt the ids are found, unless others are inside; elsewhere decode.py and eval.py
are told, --frequent-ids ids.npy. The copy has them inside.
"""

import common.threads  # noqa: F401  before torch

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError, run
from common.files import check_replaceable, whole_file
from common.flags import Parser
from decoding.choosing import DEFAULT_CHECKPOINT
from formats.checkpoint import fitting, read_checkpoint, read_tokenizer, write_content
from formats.data import Corpus
from formats.tokenizer import encode_prompt
from model import ModelConfig

SIZES = (1024, 2048, 4096, 8192, 16384)  # of shortlists whose coverage is printed
HELD_OUT = 10  # every so many-th pair is left out to measure it
Encoded = tuple[list[int], list[int]]  # the token ids of a prompt and of its completion


def encoded(pairs: Iterator[tuple[str, str]], tokenizer, ends: list[int]) -> Iterator[Encoded]:
    """Token ids of prompts and completions, as training has them: [bos] prompt [sep], and completion [eos],
    all of the model's `ends`. A text has no prompt."""
    for prompt, completion in pairs:
        head = encode_prompt(tokenizer, prompt) if prompt else []
        yield head, [*tokenizer.encode(completion), *ends]


def by_count(counts: Counter) -> list[int]:
    """The ids by falling count; of equal counts the lower id first."""
    return sorted(counts, key=lambda token: (-counts[token], token))


def count(documents: Iterator[Encoded]) -> tuple[Counter, Counter, list[Encoded]]:
    """How often every id occurred in completions: of all documents but every tenth, of these; and these
    themselves."""
    counts, held_counts, held = Counter(), Counter(), []
    for number, (prompt, completion) in enumerate(documents, 1):
        if number % HELD_OUT == 0:
            held_counts.update(completion)
            held.append((prompt, completion))
        else:
            counts.update(completion)
    return counts, held_counts, held


def coverage(ids: list[int], documents: list[Encoded]) -> tuple[float, float]:
    """What share of the tokens of completions a shortlist of these ids holds: by itself; and with the ids of
    the text before each, as in decoding."""
    listed, tokens, held, held_with_text = set(ids), 0, 0, 0
    for prompt, completion in documents:
        tokens += len(completion)
        known = set(prompt)
        for token in completion:
            held += token in listed
            held_with_text += token in listed or token in known
            known.add(token)
    return held / tokens, held_with_text / tokens


def print_coverage(counts: Counter, held: list[Encoded]) -> None:
    """A table over sizes of the shortlist."""
    ids = by_count(counts)
    print(
        f"on every {HELD_OUT}th pair ({len(held):,}), whose tokens the others did not count, a shortlist holds"
    )
    print(f"  {'ids':>8}  {'of the tokens':>14}  {'with the ids of the text before':>32}")
    for size in [size for size in SIZES if size < len(ids)] + [len(ids)]:
        alone, with_text = coverage(ids[:size], held)
        print(f"  {size:>8,}  {alone:>14.1%}  {with_text:>32.1%}")


def write(out: Path, ids: list[int], checkpoint: str) -> None:
    """The ids alone (int32, .npy), or a copy of the checkpoint with them inside; whole or not at all."""
    if out.suffix == ".npy":
        with whole_file(out) as part, open(part, "wb") as file:
            np.save(file, np.array(ids, np.int32))
    else:
        content = read_checkpoint(checkpoint)
        content["frequent_ids"] = torch.tensor(ids, dtype=torch.int32)
        write_content(out, content)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default=str(DEFAULT_CHECKPOINT), metavar="FILE", help="default: %(default)s")
    add("--data", nargs="+", required=True, metavar="FILE", help="data files, as for train.py")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file to write: the ids alone if it ends in .npy",
    )
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what could not be written in the end, or would be lost."""
    check_replaceable(args.out)
    for file in args.data:
        if os.path.exists(file) and os.path.realpath(file) == os.path.realpath(args.out):
            raise UserError(f"{args.out}: is read, and would be overwritten; give another --out")


def main() -> None:
    args = make_parser().parse_args()
    check(args)
    content = read_checkpoint(args.checkpoint)
    with fitting(args.checkpoint):
        config = ModelConfig(**content["config"])
    if content["tokenizer"] is None:
        raise UserError(f"{args.checkpoint}: has no tokenizer, which is needed to count the tokens of text")
    tokenizer = read_tokenizer(args.checkpoint, content["tokenizer"].numpy().tobytes(), config.vocab_size)
    pairs = tqdm(Corpus(args.data), desc="counting", unit="pair", disable=None, leave=False)
    counts, held_counts, held = count(encoded(pairs, tokenizer, sorted(config.ends)))
    everything = counts + held_counts
    print(f"{everything.total():,} tokens of completions, {len(everything):,} of {config.vocab_size:,} ids")
    if held:
        print_coverage(counts, held)
    ids = by_count(everything)
    write(args.out, ids, args.checkpoint)
    print(f"{args.out}: {len(ids):,} ids")


if __name__ == "__main__":
    run(main)
