"""Looks at data files, and prepares them for train.py.

python -m tools.prepare data/e2e/train.csv.xz                    prints what a data file holds
python -m tools.prepare books.txt more.jsonl --out books.npy     also makes one memory-mapped file, and books.model
"""

import argparse
from pathlib import Path

import numpy as np

from common.config import check_range
from common.errors import UserError, run
from common.files import check_replaceable, whole_file
from common.flags import Parser
from formats.data import Corpus, merged, read_examples
from formats.pieces import train_tokenizer
from formats.tokenizer_files import load_tokenizer
from training.batches import describe, prepare_file


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", help="data files: .csv, .tsv, .jsonl, .json or .txt, plain or .xz or .gz")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="prepare the files for train.py: their documents in one .npy file",
    )
    add(
        "--overwrite",
        action="store_true",
        help="even if --out, or one of the files beside it, is there already",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help="sentencepiece model, or a checkpoint (default: trained here, kept beside)",
    )
    add(
        "--vocab-size",
        type=int,
        default=4096,
        help="pieces of a tokenizer trained here (default: %(default)s)",
    )
    add("--length", type=int, default=128, help="positions of a training row (default: %(default)s)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what could not be written in the end, or would be lost."""
    check_range("length", args.length, least=2, most=2**20)
    check_range("vocab_size", args.vocab_size, least=1, most=2**20)
    if args.out is None:
        return
    if args.out.suffix != ".npy" or not args.out.parent.is_dir():
        raise UserError(f"{args.out}: --out must be a .npy file in a folder that exists")
    endings = (".npy", ".json") if args.tokenizer else (".npy", ".json", ".model")
    read = {Path(file).resolve() for file in (*args.files, args.tokenizer or "")}
    for path in (args.out.with_suffix(ending) for ending in endings):
        check_replaceable(path)
        if path.resolve() in read:
            raise UserError(f"{path}: is read, and would be overwritten; give another --out")
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: is there already; give another --out, or --overwrite")


def describe_file(path: str) -> str:
    """What a data file holds, in two lines."""
    examples = read_examples(path)
    references = [reference for example in examples for reference in example.references]
    words = [len(text.split()) for text in references]
    length = f"{np.median(words):.0f} words each (at most {max(words)})"
    first = f"  {examples[0].prompt[:100]!r} -> {references[0][:100]!r}"
    again = f"; {merged(examples)} for a prompt that came before" if merged(examples) else ""
    return f"{path}: {len(examples)} prompts, {len(references)} completions, {length}{again}\n{first}"


def main() -> None:
    args = make_parser().parse_args()
    check(args)
    for path in args.files:
        print(describe_file(path))
    if not args.out:
        return
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        tokenizer = train_tokenizer(Corpus(args.files), args.vocab_size)
        with whole_file(args.out.with_suffix(".model")) as part:
            Path(part).write_bytes(tokenizer)
    print(f"{args.out}: {describe(prepare_file(args.files, tokenizer, args.out, args.length))}")


if __name__ == "__main__":
    run(main)
