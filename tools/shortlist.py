"""Counts the token ids of a corpus for --shortlist (decoding/shortlist.py), and writes them in order of
frequency. Only completions are counted, because the ids of a prompt are always in the shortlist of its text.

    python -m tools.shortlist --checkpoint model.pt --data train.jsonl --out model.ids.npy

decode.py and eval.py find the ids in model.ids.npy next to model.pt, unless the checkpoint contains ids. Name
any other file with --frequent-ids.
"""

import common.threads  # noqa: F401  sets variables that torch reads

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError, run
from common.files import check_outputs, whole_file
from common.flags import Parser
from decode import load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT
from formats.data import Corpus
from formats.tokenizers.tokenizer import encode_prompt

SIZES = (1024, 2048, 4096, 8192, 16384)  # sizes of the shortlists whose coverage is printed
HELD_OUT = 10  # one pair in this many is left out, to measure coverage on it
Encoded = tuple[list[int], list[int]]  # the token ids of a prompt and of its completion


def by_count(counts: Counter) -> list[int]:
    """Returns the ids by falling count, the lower id first where counts are equal."""
    return sorted(counts, key=lambda token: (-counts[token], token))


def count(documents: Iterator[Encoded]) -> tuple[Counter, list[Encoded]]:
    """Counts how often every id occurs in completions. Returns the counts over all documents except every
    tenth, and a list of every tenth document."""
    counts, held = Counter(), []
    for number, (prompt, completion) in enumerate(documents, 1):
        if number % HELD_OUT == 0:
            held.append((prompt, completion))
        else:
            counts.update(completion)
    return counts, held


def encoded(corpus: Corpus, tokenizer, ends: list[int]) -> Iterator[Encoded]:
    """Yields the documents as in training: [bos] prompt [sep], and completion [eos]."""
    for prompt, completion in tqdm(corpus, desc="counting", unit="pair", disable=None, leave=False):
        yield encode_prompt(tokenizer, prompt) if prompt else [], [*tokenizer.encode(completion), *ends]


def coverage(ids: list[int], documents: list[Encoded]) -> tuple[float, float]:
    """Returns the share of the tokens of completions that a shortlist of these ids holds: by itself, and with
    the ids of the text before each token, as in decoding."""
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
    """Prints the coverage by size of the shortlist."""
    ids = by_count(counts)
    print(f"coverage of every {HELD_OUT}th pair ({len(held):,}, not counted here) by shortlist size:")
    print(f"  {'ids':>8}  {'tokens covered':>14}  {'with the ids of the text so far':>32}")
    for size in [size for size in SIZES if size < len(ids)] + [len(ids)]:
        alone, with_text = coverage(ids[:size], held)
        print(f"  {size:>8,}  {alone:>14.1%}  {with_text:>32.1%}")


def make_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.shortlist")
    add = parser.add_argument
    add("--checkpoint", default=str(DEFAULT_CHECKPOINT), metavar="FILE", help="default: %(default)s")
    add("--data", nargs="+", required=True, metavar="FILE", help="data files, as for train.py")
    add("--out", type=Path, required=True, metavar="FILE", help=".npy file to write")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    check_outputs([args.out], args.data)
    if args.out.suffix != ".npy":
        raise UserError(f"{args.out}: ids are written to a file that ends in .npy")
    model, tokenizer = load_checkpoint(args.checkpoint, form="plain")
    if tokenizer is None:
        raise UserError(f"{args.checkpoint}: has no tokenizer, which is needed to count the tokens of text")
    counts, held = count(encoded(Corpus(args.data), tokenizer, sorted(model.config.ends)))
    everything = counts + Counter(token for _, completion in held for token in completion)
    ids, size = by_count(everything), model.config.vocab_size
    print(f"{everything.total():,} tokens of completions, {len(ids):,} of {size:,} ids")
    if held:
        print_coverage(counts, held)
    with whole_file(args.out) as part, open(part, "wb") as file:
        np.save(file, np.array(ids, np.int32))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
