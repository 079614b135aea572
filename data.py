"""Text in, tokens out: the tokenizer, the readers of every data format, and packed training batches.

    python data.py data/e2e/train.csv.xz          prints what a data file holds

A document is [bos] prompt [sep] completion [eos], learned on the completion only; plain text has no prompt and is learned whole.
"""

import csv
import gzip
import io
import itertools
import json
import lzma
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm

from cli import Parser, run, whole_file

SEP = "<sep>"  # the piece between prompt and completion; a tokenizer that lacks it continues prompts as they are
HERE = Path(__file__).parent
TASKS = {"translation": "data/translation/{}.tsv.xz", "e2e": "data/e2e/{}.csv.xz"}
LEARN, START = 1, 2  # flags of a token: it is a training target; a document starts here


@dataclass(frozen=True)
class Example:
    """One input and every text that counts as a right answer to it."""

    prompt: str
    references: tuple[str, ...]


def task_file(task: str, split: str) -> str:
    """Path of an embedded task's `train`, `dev` or `test` file, from here if it lies below."""
    path = HERE / TASKS[task].format(split)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# ---------------------------------------------------------------- readers


def open_text(path: str | Path) -> io.TextIOBase:
    """Opens a text file, compressed (.xz, .gz) or not, as UTF-8, with or without a byte-order mark."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_pairs(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields (prompt, completion) from a file, its format told by its ending: .csv with the columns mr,ref (E2E NLG), .tsv with
    source and target (translation), .jsonl with `prompt` and `completion` or `references`, or with `text`, and .txt as one text. A text has
    the prompt "".
    Raises ValueError naming the file, and the line where there is one, for what is malformed, not UTF-8, or empty."""
    kind = Path(path).with_suffix("").suffix if Path(path).suffix in (".xz", ".gz") else Path(path).suffix
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl, ".txt": _read_txt}
    if kind not in readers:
        raise ValueError(f"{path}: unknown kind of data file; its name must end in {', '.join(readers)} (then .xz or .gz if compressed)")
    count = 0
    try:
        with open_text(path) as file:
            for pair in readers[kind](file, path):
                count += 1
                yield pair
    except (UnicodeDecodeError, csv.Error, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not readable after {count} records: {error}") from None
    if not count:
        raise ValueError(f"{path}: holds no data")


def _fields(path, line: int, *fields) -> tuple[str, ...]:
    if not all(isinstance(field, str) and field.strip() for field in fields):
        needed = "two non-empty texts, prompt and completion" if len(fields) > 1 else "a non-empty text"
        raise ValueError(f"{path}, line {line}: needs {needed}")
    return fields


def _read_csv(file, path):
    rows = csv.reader(file, strict=True)
    if next(rows, None) != ["mr", "ref"]:
        raise ValueError(f"{path}, line 1: the header must be mr,ref")
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{path}, line {rows.line_num}: has {len(row)} columns; 2 are needed")
        yield _fields(path, rows.line_num, *row)


def _read_tsv(file, path):
    for number, line in enumerate(file, 1):
        row = line.rstrip("\r\n").split("\t")
        if len(row) != 2:
            raise ValueError(f"{path}, line {number}: has {len(row)} columns; 2 are needed")
        yield _fields(path, number, *row)


def _read_jsonl(file, path):
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if isinstance(row, dict) and "text" in row:
            yield "", *_fields(path, number, row["text"])
            continue
        targets = (row.get("references") or [row.get("completion")]) if isinstance(row, dict) else [None]
        for target in targets if isinstance(targets, list) else [None]:
            yield _fields(path, number, row.get("prompt") if isinstance(row, dict) else None, target)


def _read_txt(file, path):
    text = file.read()
    if text.strip():
        yield "", text


def read_examples(path: str | Path) -> list[Example]:
    """The distinct prompts of a file in their order, each with all of its references."""
    groups: dict[str, list[str]] = {}
    for prompt, completion in read_pairs(path):
        groups.setdefault(prompt, []).append(completion)
    return [Example(prompt, tuple(references)) for prompt, references in groups.items()]


# ---------------------------------------------------------------- tokens


def train_tokenizer(pairs: Iterable[tuple[str, str]], vocab_size: int) -> bytes:
    """A sentencepiece model, trained line by line: BPE, every byte representable, characters left as they are, runs of spaces made one;
    with a separator if there are prompts. Raises ValueError if there is too little text."""
    model, pairs = io.BytesIO(), iter(pairs)
    first = next(pairs, ("", ""))
    lines = (line for pair in itertools.chain([first], pairs) for text in pair for line in text.splitlines() if line.strip())
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
            character_coverage=0.9995, normalization_rule_name="identity", user_defined_symbols=[SEP] if first[0] else [],
            num_threads=os.cpu_count(), max_sentence_length=65536, minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from this text: {str(error).splitlines()[-1]}") from None
    return model.getvalue()


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces (sentencepiece_model.proto)


def build_tokenizer(tokens: list[str], scores: list[float], types: list[int], unk: int, bos: int | None, eos: int | None,
                    prefix: bool) -> bytes:
    """A sentencepiece BPE model of these pieces, as the bytes of a ModelProto (sentencepiece_model.proto). Text is taken as it is, spaces
    become ▁, with `prefix` one is put before the text, and what has no piece goes by bytes."""
    pieces, types = [token.replace(" ", "▁").encode() for token in tokens], list(types)
    types[unk] = UNKNOWN
    model = b"".join(_field(1, _field(1, p) + _field(2, float(s)) + _field(3, int(t))) for p, s, t in zip(pieces, scores, types))
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, BYTE in types)  # BPE, size, byte fallback
    for number, at in enumerate((unk, bos, eos, None)):  # unk, bos, eos, pad: by id, and by name; one that does not exist is not found
        trainer += _field(40 + number, -1 if at is None else at) + _field(45 + number, b"(none)" if at is None else pieces[at])
    normalizer = _field(1, b"identity") + _field(3, prefix) + _field(4, False) + _field(5, True)  # keeps runs of spaces, as ▁
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: bytes | float | int) -> bytes:
    """One field of a protobuf message: a string or message, a float, or an integer."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value, out = value % (1 << 64), bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def encode_prompt(tokenizer: spm.SentencePieceProcessor, prompt: str) -> list[int]:
    """[bos] prompt [sep], each only where the tokenizer has one."""
    bos, sep = tokenizer.bos_id(), tokenizer.piece_to_id(SEP)
    return [*([bos] if bos >= 0 else []), *tokenizer.encode(prompt), *([sep] if sep != tokenizer.unk_id() else [])]


def tokenize(pairs: Iterable[tuple[str, str]], tokenizer, path: str | Path, length: int) -> dict[str, int]:
    """Writes a memory-mappable array of (token, flags) records to `path` (.npy) and returns its statistics. A document of more than
    `length` + 1 tokens loses the left of its prompt, then the end of its completion; a text is cut into documents, see `cut_text`."""
    tokens, flags = array("I"), array("B")
    stats = {"documents": 0, "tokens": 0, "learned": 0, "shortened": 0}
    for prompt, completion in pairs:
        if prompt:
            head, body = encode_prompt(tokenizer, prompt), [*tokenizer.encode(completion), tokenizer.eos_id()]
            excess = max(0, len(head) + len(body) - length - 1)
            stats["shortened"] += excess > 0
            head = head[:1] + head[1 + excess :]
            documents = [(head, body[: length + 1 - len(head)])]
        else:
            documents = (([tokenizer.bos_id()], part) for part in cut_text(completion, tokenizer, length))
        for head, body in documents:
            tokens.extend(head + body)
            flags.extend([START] + [0] * (len(head) - 1) + [LEARN] * len(body))
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


def batches(records: np.ndarray, rows: int, length: int, seed: int | None = 0, start: int = 0) -> Iterator[Batch]:
    """Packs the documents of `records` (from `tokenize`) into batches, endlessly, in an order that depends on `seed` and the epoch alone;
    so skipping `start` batches resumes exactly. `seed=None`: one epoch, in the file's order. First fit over the rows of a batch; a
    document that fits nowhere waits for the next batch, and 16 of them waiting close the batch."""
    begins = np.flatnonzero(records["flags"] & START)
    ends = np.append(begins[1:], len(records))
    if (ends - begins).max() > length + 1:
        raise ValueError(f"the data was prepared for a longer context than {length}; prepare it again")
    number = 0
    for epoch in itertools.count():
        order = range(len(begins)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(begins))
        for plan in _pack(order, ends - begins - 1, rows, length):
            if number >= start:
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


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", help="data files: .csv, .tsv, .jsonl or .txt, plain or .xz or .gz")
    return parser


def main() -> None:
    for path in make_parser().parse_args().files:
        examples = read_examples(path)
        references = [reference for example in examples for reference in example.references]
        words = [len(text.split()) for text in references]
        print(f"{path}: {len(examples)} prompts, {len(references)} completions, {np.median(words):.0f} words each (at most {max(words)})")
        print(f"  {examples[0].prompt[:100]!r} -> {references[0][:100]!r}")


if __name__ == "__main__":
    run(main)
