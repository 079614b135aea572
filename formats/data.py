"""Text in, batches out: the readers of every data format, prompts and completions.

A document is [bos] prompt [sep] completion [eos], learned on the completion only; plain text has no prompt and is learned whole.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

HERE = Path(__file__).parent.parent
FILES = {"translation": "data/translation/{}.tsv.xz", "e2e": "data/e2e/{}.csv.xz", "fairytaleqa": "data/fairytaleqa/{}.jsonl.xz",
         "stories": "data/stories/{}.jsonl.xz"}  # fmt: skip
SUMMARY = "{dialogue}\nSummary:\n"                              # the prompts of SAMSum,
QUESTION = "{context}\nQuestion: {question}\nAnswer:\n"        # SQuAD and FairytaleQA
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a letter, which UTF-8 cannot write


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
        raise UserError(f"{path}: unknown kind of data file; its name must end in {', '.join(readers)} (then .xz or .gz if compressed)")
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
        raise UserError(f"{path}: not readable after {count} records: {error}") from None
    if not count:
        raise UserError(f"{path}: holds no data")


def _pair(where: str, prompt, completion) -> tuple[str, str] | ValueError:
    """What a reader yields: the pair, or what is wrong with it. Only a text has an empty prompt."""
    if is_text(prompt) and is_text(completion):
        return prompt, completion
    return UserError(f"{where}: needs two non-empty texts, prompt and completion")


def is_text(value) -> bool:
    """Whether it is a text that is not empty and can be written as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def _read_csv(file, path):
    rows = csv.reader(file, strict=True)
    if next(rows, None) != ["mr", "ref"]:
        raise UserError(f"{path}, line 1: the header must be mr,ref")
    for row in rows:
        yield _columns(row, f"{path}, line {rows.line_num}")


def _read_tsv(file, path):
    for number, line in enumerate(file, 1):
        yield _columns(line.rstrip("\r\n").split("\t"), f"{path}, line {number}")


def _columns(row: list[str], where: str) -> tuple[str, str] | ValueError:
    return _pair(where, *row) if len(row) == 2 else UserError(f"{where}: has {len(row)} columns; 2 are needed")


def _read_jsonl(file, path):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield UserError(f"{path}, line {number}: not JSON ({error.msg})")
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
        raise UserError(f"{path}: neither a list of records nor in SQuAD's layout ({type(error).__name__}: {error})") from None
    for number, row in enumerate(rows, 1):
        yield from from_record(row, f"{path}, record {number}")


def from_record(row, where: str) -> Iterator[tuple[str, str] | ValueError]:
    """(prompt, completion) for every completion of a JSON record: `text`, whose prompt is ""; `prompt` with `completion` or a list of
    `references`; `dialogue` and `summary` (SAMSum); `context`, `question` and `answers`, texts, [{"text": …}] or {"text": […]}
    (FairytaleQA, SQuAD)."""
    row = row if isinstance(row, dict) else {}
    row = {key: value.replace("\r\n", "\n") if isinstance(value, str) else value for key, value in row.items()}
    if "text" in row:
        yield ("", row["text"]) if is_text(row["text"]) else UserError(f"{where}: needs a non-empty text")
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
