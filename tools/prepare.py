"""Looks at data files, and prepares them for train.py.

    python -m tools.prepare data/e2e/train.csv.xz                         prints what a data file holds
    python -m tools.prepare books.txt more.jsonl --out books.npy          also makes one memory-mapped file, and books.model
"""

from pathlib import Path

import numpy as np

from common.errors import UserError, run
from common.files import whole_file
from common.flags import Parser
from formats.checkpoint import load_tokenizer
from formats.data import Corpus, read_examples
from formats.tokenizer import train_tokenizer
from training.batches import describe, prepare_file


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help="data files: .csv, .tsv, .jsonl, .json or .txt, plain or .xz or .gz")
    parser.add_argument("--out", type=Path, metavar="FILE", help="prepare the files for train.py: their documents in one .npy file")
    parser.add_argument("--overwrite", action="store_true", help="even if --out, or one of the files beside it, is there already")
    parser.add_argument("--tokenizer", metavar="FILE", help="sentencepiece model, or a checkpoint (default: trained here, kept beside)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of a tokenizer trained here (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="positions of a training row (default: %(default)s)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.out and (args.out.suffix != ".npy" or not args.out.parent.is_dir()):
        raise UserError(f"{args.out}: --out must be a .npy file in a folder that exists")
    made = [args.out.with_suffix(end) for end in (".npy", ".json", ".model")[: 2 if args.tokenizer else 3]] if args.out else []
    for path in made:
        if path.resolve() in {Path(file).resolve() for file in (*args.files, args.tokenizer or "")}:
            raise UserError(f"{path}: is read, and would be overwritten; give another --out")
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: is there already; give another --out, or --overwrite")
    if args.length < 2:
        raise UserError(f"length is {args.length}; it must be at least 2")
    for path in args.files:
        examples = read_examples(path)
        references = [reference for example in examples for reference in example.references]
        words = [len(text.split()) for text in references]
        print(f"{path}: {len(examples)} prompts, {len(references)} completions, {np.median(words):.0f} words each (at most {max(words)})")
        print(f"  {examples[0].prompt[:100]!r} -> {references[0][:100]!r}")
    if args.out:
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
        else:
            tokenizer = train_tokenizer(Corpus(args.files), args.vocab_size)
            with whole_file(args.out.with_suffix(".model")) as part:
                Path(part).write_bytes(tokenizer)
        print(f"{args.out}: {describe(prepare_file(args.files, tokenizer, args.out, args.length))}")


if __name__ == "__main__":
    run(main)
