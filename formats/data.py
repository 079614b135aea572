"""Text in, batches out: the readers of every data format, prompts and completions.

A document is [bos] prompt [sep] completion [eos], learned on the completion only; plain text has no prompt
and is learned whole.
"""

import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import check_input, parse_json

HERE = Path(__file__).parent.parent
FILES = {
    "translation": "data/translation/{}.tsv.xz",
    "e2e": "data/e2e/{}.csv.xz",
    "fairytaleqa": "data/fairytaleqa/{}.jsonl.xz",
    "stories": "data/stories/{}.jsonl.xz",
}
SUMMARY = "{dialogue}\nSummary:\n"  # the prompts of SAMSum,
QUESTION = "{context}\nQuestion: {question}\nAnswer:\n"  # SQuAD and FairytaleQA
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a letter, or what stands for a byte that is not UTF-8
NOT_UTF8 = "bytes that are not UTF-8, or half a letter"


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
    return str(
        (HERE / path).relative_to(Path.cwd()) if (HERE / path).is_relative_to(Path.cwd()) else HERE / path
    )


# ---------------------------------------------------------------- readers

Found = tuple[str, str] | UserError  # a pair, or what is wrong with it


def open_text(path: str | Path) -> io.TextIOBase:
    """Opens a text file, compressed (.xz, .gz) or not, as UTF-8, with or without a byte-order mark. Bytes
    that are not UTF-8 come as surrogates, so that they spoil no more than their line."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_pairs(path: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (prompt, completion) from a file, its format told by its ending: .csv with the columns mr and
    ref (E2E NLG), .tsv with source and target (translation), .jsonl with a record a line, .json with a list
    of records or SQuAD's layout, and .txt as one text. Records: see `from_record`. Raises UserError naming
    the file, and the line where there is one, for what is malformed, not UTF-8, or empty; given a list,
    malformed lines are noted there instead, and skipped."""
    inner = Path(path)
    if inner.suffix in (".xz", ".gz"):
        inner = inner.with_suffix("")
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".txt": _read_txt,
    }
    if inner.suffix not in readers:
        endings = f"{', '.join(readers)} (then .xz or .gz if compressed)"
        raise UserError(f"{path}: unknown kind of data file; its name must end in {endings}")
    check_input(path, "no such data file")
    count = 0
    try:
        with open_text(path) as file:
            for found in readers[inner.suffix](file, path):
                if not isinstance(found, UserError):
                    count += 1
                    yield found
                elif skipped is None:
                    raise found
                else:
                    skipped.append(str(found))
    except (csv.Error, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not readable after {count} records: {error}") from None
    if not count:
        raise UserError(f"{path}: holds no data")


def _pair(where: str, prompt, completion) -> Found:
    """A prompt and its completion, or what is wrong with them. Only a text has an empty prompt."""
    if not is_text(prompt) or not is_text(completion):
        return UserError(f"{where}: needs two non-empty texts, prompt and completion")
    if SURROGATE.search(prompt) or SURROGATE.search(completion):
        return UserError(f"{where}: holds {NOT_UTF8}")
    return prompt, completion


def _text(where: str, text) -> Found:
    """A text without a prompt, or what is wrong with it."""
    if not is_text(text):
        return UserError(f"{where}: needs a non-empty text")
    if SURROGATE.search(text):
        return UserError(f"{where}: holds {NOT_UTF8}")
    return "", text


def is_text(value) -> bool:
    """Whether it is a text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def _read_csv(file, path) -> Iterator[Found]:
    rows = csv.reader(file, strict=True)
    header = next(rows, [])
    if "mr" not in header or "ref" not in header:
        raise UserError(f"{path}, line 1: the header must name the columns mr and ref (E2E NLG)")
    prompt, completion = header.index("mr"), header.index("ref")
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield UserError(f"{path}, line {rows.line_num}: not CSV ({error})")
            continue
        where = f"{path}, line {rows.line_num}"
        if len(row) != len(header):
            yield UserError(f"{where}: has {len(row)} columns; {len(header)} are needed")
        else:
            yield _pair(where, row[prompt], row[completion])


def _read_tsv(file, path) -> Iterator[Found]:
    for number, line in enumerate(file, 1):
        row, where = line.rstrip("\r\n").split("\t"), f"{path}, line {number}"
        if len(row) != 2:
            yield UserError(f"{where}: has {len(row)} columns; 2 are needed")
        else:
            yield _pair(where, *row)


def _read_jsonl(file, path) -> Iterator[Found]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, where)
        except UserError as error:
            yield error
            continue
        yield from from_record(row, where)


def _read_json(file, path) -> Iterator[Found]:
    content = parse_json(file.read(), str(path))
    try:
        rows = content if isinstance(content, list) else squad_records(content)
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: neither a list of records nor in SQuAD's layout ({reason})") from None
    for number, row in enumerate(rows, 1):
        yield from from_record(row, f"{path}, record {number}")


def squad_records(content: dict) -> list[dict]:
    """The questions of a file in SQuAD's layout, each with its context."""
    records = []
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                records.append({"context": paragraph["context"], **question})
    return records


def _read_txt(file, path) -> Iterator[Found]:
    text = file.read()
    found = SURROGATE.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise UserError(f"{path}, line {line}: holds {NOT_UTF8}")
    if text.strip():
        yield "", text


# ---------------------------------------------------------------- records


def from_record(row, where: str) -> Iterator[Found]:
    """(prompt, completion) for every completion of a JSON record: `text`, whose prompt is ""; `prompt` with
    `completion` or a list of `references`; `dialogue` and `summary` (SAMSum); `context`, `question` and
    `answers`, texts, [{"text": …}] or {"text": […]} (FairytaleQA, SQuAD). A question that is marked as having
    no answer (SQuAD 2.0) gives none."""
    row = {name: _unix(value) for name, value in row.items()} if isinstance(row, dict) else {}
    if "text" in row:
        yield _text(where, row["text"])
        return
    if is_unanswerable(row):
        return
    if "dialogue" in row:
        form, parts, targets = SUMMARY, ["dialogue"], [row.get("summary")]
    elif "question" in row:
        form, parts, targets = QUESTION, ["context", "question"], row.get("answers")
    else:
        form, parts, targets = "{prompt}", ["prompt"], row.get("references") or [row.get("completion")]
    values = {part: row.get(part) for part in parts}
    prompt = form.format(**values) if all(map(is_text, values.values())) else None
    if isinstance(targets, dict):
        targets = targets.get("text")
    if not targets or not isinstance(targets, list):
        targets = [None]
    for target in targets:
        if isinstance(target, dict):
            target = target.get("text")
        yield _pair(where, prompt, target)


def _unix(value):
    """A text with the line ends of Unix; anything else as it is."""
    return value.replace("\r\n", "\n") if isinstance(value, str) else value


def is_unanswerable(row: dict) -> bool:
    """Whether a question is marked as having no answer: by SQuAD 2.0's own file, or by an empty list beside
    its starts."""
    answers = row.get("answers")
    empty = isinstance(answers, dict) and answers.get("text") == []
    return "question" in row and (row.get("is_impossible") is True or empty)


# ---------------------------------------------------------------- whole files


@dataclass(frozen=True)
class Corpus:
    """The pairs of some files, as often as they are asked for."""

    files: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for file in self.files:
            yield from read_pairs(file)


def read_examples(path: str | Path, skipped: list[str] | None = None) -> list[Example]:
    """The distinct prompts of a file in their order, each with all of its references. Raises and skips as
    `read_pairs` does."""
    groups: dict[str, list[str]] = {}
    for prompt, completion in read_pairs(path, skipped):
        groups.setdefault(prompt, []).append(completion)
    return [Example(prompt, tuple(references)) for prompt, references in groups.items()]


def merged(examples: list[Example]) -> int:
    """How many completions of a file were for a prompt that came before, and so became one more reference to
    it."""
    return sum(len(example.references) - 1 for example in examples)
