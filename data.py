"""Text in, batches out: the readers of every data format, documents as token ids, and packed training batches.

    python data.py data/e2e/train.csv.xz                            prints what a data file holds
    python data.py books.txt more.jsonl --out books.npy             also makes one memory-mapped file of it, and books.model, its tokenizer

A document is [bos] prompt [sep] completion [eos], learned on the completion only; plain text has no prompt and is learned whole.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm

from cli import Parser, run, whole_file, write_json
from model import load_tokenizer
from tokenizer import encode_prompt, train_tokenizer

HERE = Path(__file__).parent
FILES = {"translation": "data/translation/{}.tsv.xz", "e2e": "data/e2e/{}.csv.xz", "fairytaleqa": "data/fairytaleqa/{}.jsonl.xz",
         "stories": "data/stories/{}.jsonl.xz"}  # fmt: skip
SUMMARY = "{dialogue}\nSummary:\n"                              # the prompts of SAMSum,
QUESTION = "{context}\nQuestion: {question}\nAnswer:\n"        # SQuAD and FairytaleQA
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a letter, which UTF-8 cannot write
LEARN, START = 1, 2  # flags of a token: it is a training target; a document starts here


@dataclass(frozen=True)
class Example:
    """One input and every text that counts as a right answer to it."""

    prompt: str
    references: tuple[str, ...]


def task_file(task: str, split: str) -> str:
    """Path of an embedded task's `train`, `dev` or `test` file."""
    return locate(FILES[task].format(split))


def locate(path: str) -> str:
    """The path of a file of the project, from here if it lies below; any other path as it is."""
    if not (HERE / path).is_file() or Path(path).is_file():
        return path
    return str((HERE / path).relative_to(Path.cwd()) if (HERE / path).is_relative_to(Path.cwd()) else HERE / path)


# ---------------------------------------------------------------- readers


def open_text(path: str | Path) -> io.TextIOBase:
    """Opens a text file, compressed (.xz, .gz) or not, as UTF-8, with or without a byte-order mark."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_pairs(path: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (prompt, completion) from a file, its format told by its ending: .csv with the columns mr,ref (E2E NLG), .tsv with
    source and target (translation), .jsonl with a record a line, .json with a list of records or SQuAD's layout, and .txt as one text.
    Records: see `from_record`. Raises ValueError naming the file, and the line where there is one, for what is malformed, not UTF-8,
    or empty; given a list, malformed lines are noted there instead, and skipped."""
    kind = Path(path).with_suffix("").suffix if Path(path).suffix in (".xz", ".gz") else Path(path).suffix
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt}
    if kind not in readers:
        raise ValueError(f"{path}: unknown kind of data file; its name must end in {', '.join(readers)} (then .xz or .gz if compressed)")
    count = 0
    try:
        with open_text(path) as file:
            for found in readers[kind](file, path):
                if isinstance(found, ValueError):
                    if skipped is None:
                        raise found
                    skipped.append(str(found))
                else:
                    count += 1
                    yield found
    except (UnicodeDecodeError, csv.Error, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not readable after {count} records: {error}") from None
    if not count:
        raise ValueError(f"{path}: holds no data")


def _pair(where: str, prompt, completion) -> tuple[str, str] | ValueError:
    """What a reader yields: the pair, or what is wrong with it. Only a text has an empty prompt."""
    if is_text(prompt) and is_text(completion):
        return prompt, completion
    return ValueError(f"{where}: needs two non-empty texts, prompt and completion")


def is_text(value) -> bool:
    """Whether it is a text that is not empty and can be written as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def _read_csv(file, path):
    rows = csv.reader(file, strict=True)
    if next(rows, None) != ["mr", "ref"]:
        raise ValueError(f"{path}, line 1: the header must be mr,ref")
    for row in rows:
        yield _columns(row, f"{path}, line {rows.line_num}")


def _read_tsv(file, path):
    for number, line in enumerate(file, 1):
        yield _columns(line.rstrip("\r\n").split("\t"), f"{path}, line {number}")


def _columns(row: list[str], where: str) -> tuple[str, str] | ValueError:
    return _pair(where, *row) if len(row) == 2 else ValueError(f"{where}: has {len(row)} columns; 2 are needed")


def _read_jsonl(file, path):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield ValueError(f"{path}, line {number}: not JSON ({error.msg})")
            continue
        yield from from_record(row, f"{path}, line {number}")


def _read_json(file, path):
    try:
        content = json.load(file)
        rows = content if isinstance(content, list) else [
            {"context": paragraph["context"], **question}
            for article in content["data"] for paragraph in article["paragraphs"] for question in paragraph["qas"]
        ]  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: neither a list of records nor in SQuAD's layout ({type(error).__name__}: {error})") from None
    for number, row in enumerate(rows, 1):
        yield from from_record(row, f"{path}, record {number}")


def from_record(row, where: str) -> Iterator[tuple[str, str] | ValueError]:
    """(prompt, completion) for every completion of a JSON record: `text`, whose prompt is ""; `prompt` with `completion` or a list of
    `references`; `dialogue` and `summary` (SAMSum); `context`, `question` and `answers`, texts, [{"text": …}] or {"text": […]}
    (FairytaleQA, SQuAD)."""
    row = row if isinstance(row, dict) else {}
    row = {key: value.replace("\r\n", "\n") if isinstance(value, str) else value for key, value in row.items()}
    if "text" in row:
        yield ("", row["text"]) if is_text(row["text"]) else ValueError(f"{where}: needs a non-empty text")
        return
    if "dialogue" in row:
        form, parts, targets = SUMMARY, ["dialogue"], [row.get("summary")]
    elif "question" in row:
        form, parts, targets = QUESTION, ["context", "question"], row.get("answers")
    else:
        form, parts, targets = "{prompt}", ["prompt"], row.get("references") or [row.get("completion")]
    values = {part: row.get(part) for part in parts}
    prompt = form.format(**values) if all(map(is_text, values.values())) else None
    targets = targets.get("text") if isinstance(targets, dict) else targets
    for target in targets if targets and isinstance(targets, list) else [None]:
        yield _pair(where, prompt, target.get("text") if isinstance(target, dict) else target)


def _read_txt(file, path):
    text = file.read()
    if text.strip():
        yield "", text


@dataclass(frozen=True)
class Corpus:
    """The pairs of some files, as often as they are asked for."""

    files: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (pair for file in self.files for pair in read_pairs(file))


def read_examples(path: str | Path, skipped: list[str] | None = None) -> list[Example]:
    """The distinct prompts of a file in their order, each with all of its references. Raises and skips as `read_pairs` does."""
    groups: dict[str, list[str]] = {}
    for prompt, completion in read_pairs(path, skipped):
        groups.setdefault(prompt, []).append(completion)
    return [Example(prompt, tuple(references)) for prompt, references in groups.items()]


# ---------------------------------------------------------------- tokens, packed


def tokenize(pairs: Iterable[tuple[str, str]], tokenizer, path: str | Path, length: int) -> dict[str, int]:
    """Writes a memory-mappable array of (token, flags) records to `path` (.npy) and returns its statistics. A document of more than
    `length` + 1 tokens loses the left of its prompt (not the start token, nor the separator), then the end of its completion; a text is
    cut into documents, see `cut_text`. Raises ValueError for a tokenizer that has no end of text."""
    if tokenizer.eos_id() < 0:
        raise ValueError("the tokenizer has no piece for the end of a text, which documents need")
    tokens, flags, bos = array("I"), array("B"), [tokenizer.bos_id()] * (tokenizer.bos_id() >= 0)
    begin, stop = len(bos), len(encode_prompt(tokenizer, "")) - len(bos)  # tokens of a prompt that always stay
    stats = {"documents": 0, "tokens": 0, "learned": 0, "shortened": 0}
    for prompt, completion in pairs:
        if prompt:
            head, body = encode_prompt(tokenizer, prompt), [*tokenizer.encode(completion), tokenizer.eos_id()]
            excess = max(0, len(head) + len(body) - length - 1)
            stats["shortened"] += excess > 0
            end = len(head) - stop
            head = head[:begin] + head[min(begin + excess, end) : end] + head[end:]
            documents = [(head, body[: length + 1 - len(head)])]
        else:
            documents = ((bos, part) for part in cut_text(completion, tokenizer, length))
        for head, body in documents:
            tokens.extend(head + body)
            flags.extend([0] * len(head) + [LEARN] * len(body))
            flags[-len(head) - len(body)] |= START
            stats["documents"] += 1
            stats["learned"] += len(body)
    stats["tokens"] = len(tokens)
    record = np.dtype([("token", "<u2" if tokenizer.vocab_size() <= 65536 else "<u4"), ("flags", "u1")])
    records = np.empty(len(tokens), record)
    records["token"], records["flags"] = tokens, flags
    with whole_file(path) as part, open(part, "wb") as file:
        np.save(file, records)
    return stats


def cut_text(text: str, tokenizer, length: int) -> Iterator[list[int]]:
    """Token ids of a text in parts of at most `length`, each as many whole lines as fit; only a line that is longer is cut itself. So that
    what follows [bos] mostly is the beginning of a paragraph, as in a prompt. [eos] ends the last."""
    part, size, parts = [], 0, []
    for line in text.splitlines(keepends=True):
        more = len(tokenizer.encode(line)) + 1  # the end of the line is a token or part of the count's slack
        if part and size + more > length:
            parts.append("".join(part))
            part, size = [], 0
        part.append(line)
        size += more
    for number, lines in enumerate([*parts, "".join(part)]):
        ids = tokenizer.encode(lines) + [tokenizer.eos_id()] * (number == len(parts))
        yield from (ids[i : i + length] for i in range(0, len(ids), length))


@dataclass(frozen=True)
class Batch:
    """B rows of T positions, documents side by side and never seeing each other. Arrays are (B, T) int64."""

    inputs: np.ndarray
    targets: np.ndarray    # -1 where nothing is learned
    documents: np.ndarray  # number of the document within its row; 0 is padding


def batches(records: np.ndarray, rows: int, length: int, seed: int | None = 0, start: int = 0, every: int = 1) -> Iterator[Batch]:
    """Packs the documents of `records` (from `tokenize`) into batches, endlessly, in an order that depends on `seed` and the epoch alone;
    so skipping `start` batches resumes exactly. `every`: gives only each so many-th, a process's share. `seed=None`: one epoch, in the
    file's order. First fit over the rows of a batch; a document that fits nowhere waits for the next batch, and 16 of them waiting close
    the batch. Raises ValueError if a document is longer than a row."""
    begins = np.flatnonzero(records["flags"] & START)
    ends = np.append(begins[1:], len(records))
    if (ends - begins).max() > length + 1:
        raise ValueError(f"the data was prepared for a longer context than {length}; prepare it again")
    number = 0
    for epoch in itertools.count():
        order = range(len(begins)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(begins))
        for plan in _pack(order, ends - begins - 1, rows, length):
            if number >= start and (number - start) % every == 0:
                yield _fill(records, plan, begins, ends, rows, length)
            number += 1
        if seed is None:
            return


def _pack(order, sizes, rows: int, length: int) -> Iterator[list[list[int]]]:
    waiting: list[int] = []
    source = iter(order)
    while True:
        plan, room, late = [[] for _ in range(rows)], [length] * rows, []
        for document in itertools.chain(waiting, source):
            row = next((r for r in range(rows) if room[r] >= sizes[document]), None)
            if row is None:
                late.append(document)
                if len(late) == 16:
                    break
            else:
                plan[row].append(document)
                room[row] -= sizes[document]
        if not any(plan):
            return
        yield plan
        waiting = late


def _fill(records, plan, begins, ends, rows: int, length: int) -> Batch:
    inputs = np.zeros((rows, length), np.int64)
    targets = np.full((rows, length), -1, np.int64)
    documents = np.zeros((rows, length), np.int64)
    for row, members in enumerate(plan):
        at = 0
        for number, document in enumerate(members, 1):
            piece = records[begins[document] : ends[document]]
            span = slice(at, at + len(piece) - 1)
            inputs[row, span] = piece["token"][:-1]
            targets[row, span] = np.where(piece["flags"][1:] & LEARN, piece["token"][1:].astype(np.int64), -1)
            documents[row, span] = number
            at = span.stop
    return Batch(inputs, targets, documents)


# ---------------------------------------------------------------- prepared files


def digest(*parts) -> str:
    """A short name for these values; for the content of files given as Path, by their size and time of change."""
    state = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def prepare(files: tuple[str, ...], tokenizer: bytes, path: Path, length: int) -> dict:
    """Writes the files' documents to `path` (.npy), and beside it (.json) for which tokenizer and length, and its statistics, which it
    returns."""
    stats = tokenize(Corpus(files), spm.SentencePieceProcessor(model_proto=tokenizer), path, length)
    content = {"files": [str(file) for file in files], "tokenizer": digest(tokenizer), "length": length, **stats}
    write_json(path.with_suffix(".json"), content)
    return stats


def read_prepared(path: Path, tokenizer: bytes, length: int) -> np.ndarray:
    """The records of a prepared file, memory-mapped. Raises ValueError if it is damaged, or made for another tokenizer or a greater
    length."""
    try:
        made = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if made["tokenizer"] != digest(tokenizer) or made["length"] > length:
            raise ValueError(f"it was made for length {made['length']}, tokenizer {made['tokenizer']}, not {length}, {digest(tokenizer)}")
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: not usable as prepared data ({error}); make it anew with data.py") from None


def describe(stats: dict) -> str:
    """The statistics of `tokenize` in words."""
    return (f"{stats['documents']:,} documents, {stats['tokens']:,} tokens, {stats['learned']:,} of them learned; "
            f"{stats['shortened']:,} documents shortened to fit")  # fmt: skip


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
        raise ValueError(f"{args.out}: --out must be a .npy file in a folder that exists")
    made = [args.out.with_suffix(end) for end in (".npy", ".json", ".model")[: 2 if args.tokenizer else 3]] if args.out else []
    for path in made:
        if path.resolve() in {Path(file).resolve() for file in (*args.files, args.tokenizer or "")}:
            raise ValueError(f"{path}: is read, and would be overwritten; give another --out")
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path}: is there already; give another --out, or --overwrite")
    if args.length < 2:
        raise ValueError(f"length is {args.length}; it must be at least 2")
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
        print(f"{args.out}: {describe(prepare(args.files, tokenizer, args.out, args.length))}")


if __name__ == "__main__":
    run(main)
