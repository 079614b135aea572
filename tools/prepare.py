"""Looks at data files, and prepares them for train.py.

python -m tools.prepare data/e2e/train.csv.xz                   prints what a data file holds
python -m tools.prepare books.txt more.jsonl --out books.npy    also makes a memory-mapped file, books.model
"""

import argparse
from pathlib import Path
from statistics import median

from common.errors import UserError, run
from common.files import check_outputs, whole_file
from common.flags import Parser
from formats.data import Corpus, read_examples
from formats.tokenizers.files import load_tokenizer
from formats.tokenizers.pieces import train_tokenizer
from training.batches import prepare_file


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", help="data files: .csv, .tsv, .jsonl, .json or .txt, plain or .xz or .gz")
    add("--out", type=Path, metavar="FILE", help="write the documents of the files here, a .npy for train.py")
    add("--overwrite", action="store_true", help="replace --out and the files next to it")
    text = "sentencepiece model, or a checkpoint (default: trained here, and kept next to --out)"
    add("--tokenizer", metavar="FILE", help=text)
    text = "pieces of a tokenizer trained here (default: %(default)s)"
    add("--vocab-size", type=int, default=4096, help=text)
    add("--length", type=int, default=128, help="positions of a training row (default: %(default)s)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for files that could not be written in the end, or would be lost."""
    if args.out is None:
        return
    if args.out.suffix != ".npy":
        raise UserError(f"{args.out}: --out must be a .npy file")
    endings = (".npy", ".json") if args.tokenizer else (".npy", ".json", ".model")
    outputs = [args.out.with_suffix(ending) for ending in endings]
    check_outputs(outputs, [*args.files, args.tokenizer])
    for path in outputs:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path}: is there already; give another --out, or --overwrite")


def describe_file(path: str) -> str:
    """Describes a data file in two lines."""
    examples = read_examples(path)
    references = [reference for example in examples for reference in example.references]
    words = [len(text.split()) for text in references]
    length = f"{median(words):.0f} words each (at most {max(words)})"
    first = f"  {examples[0].prompt[:100]!r} -> {references[0][:100]!r}"
    return f"{path}: {len(examples)} prompts, {len(references)} completions, {length}\n{first}"


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
    print(f"{args.out}: {prepare_file(args.files, tokenizer, args.out, args.length)}")


if __name__ == "__main__":
    run(main)
