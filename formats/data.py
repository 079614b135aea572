"""The readers of every data format, which turn files into prompts and completions.

A document is [bos] prompt [sep] completion [eos], of which only the completion is learned; plain text has no
prompt and is learned whole.
"""

import csv
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import check_input, parse_json, reading

ROOT = Path(__file__).parent.parent
FILES = {
    "translation": "data/translation/{}.tsv.xz", "e2e": "data/e2e/{}.csv.xz",
    "fairytaleqa": "data/fairytaleqa/{}.jsonl.xz", "stories": "data/stories/{}.jsonl.xz",
}  # fmt: skip
# Without a separator, a prompt's template shows where the answer begins. For each kind of file:
TEMPLATES = {".csv": "Facts: {}\nSentence:\n", ".tsv": "German: {}\nEnglish:\n"}  # E2E, translation
LINE = "{}\n"  # for all other kinds
SUMMARY = "{dialogue}\nSummary:\n"  # the prompts of SAMSum
QUESTION = "{context}\nQuestion: {question}\nAnswer:\n"  # and of SQuAD and FairytaleQA
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, or in place of a byte that is not UTF-8


@dataclass(frozen=True)
class Example:
    """One input and every text that counts as a right answer to it."""

    prompt: str
    references: tuple[str, ...]


def task_file(task: str, split: str) -> str:
    """Path of an included task's `train`, `dev` or `test` file."""
    return locate(FILES[task].format(split))


def locate(path: str) -> str:
    """The path of a file of the project, relative to the current folder if that contains it; any other path
    as it is."""
    own = ROOT / path
    if not own.is_file() or Path(path).is_file():
        return path
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


# ---------------------------------------------------------------- readers

Found = tuple[str, str] | UserError  # a pair, or what is wrong with it


def open_text(path: str | Path) -> io.TextIOBase:
    """Opens a text file, compressed (.xz, .gz) or not, as UTF-8, with or without a byte-order mark. Bytes
    that are not UTF-8 become surrogates, so that they make only their own line unusable."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def read_pairs(path: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (prompt, completion) from a file of the kind that its ending names: .csv with the columns mr and
    ref (E2E NLG), .tsv with source and target (translation), .jsonl with one record per line, .json with a
    list of records or SQuAD's layout, and .txt as one text. Records: see `from_record`. Empty lines are
    skipped. Raises UserError, which names the file, and the line if there is one, for malformed, non-UTF-8 or
    empty data; if `skipped` is a list, notes malformed lines there and skips them."""
    check_input(path, "no such data file")
    kind = ending(path)
    if kind not in READERS:
        endings = f"{', '.join(READERS)} (then .xz or .gz if compressed)"
        raise UserError(f"{path}: unknown kind of data file; its name must end in {endings}")
    count = 0
    with open_text(path) as file, reading(path, f"damaged, or not in a known layout of {kind} files"):
        for found in READERS[kind](file, path):
            if not isinstance(found, UserError):
                count += 1
                yield found
            elif skipped is None:
                raise found
            else:
                skipped.append(str(found))
    if not count:
        raise UserError(f"{path}: holds no data")


def ending(path: str | Path) -> str:
    """The ending that names the kind of a data file, such as ".csv" of "train.csv.xz"."""
    path = Path(path)
    return path.with_suffix("").suffix if path.suffix in (".xz", ".gz") else path.suffix


def template_of(file: str | Path) -> str:
    """The template of a file's prompts for models without a separator, in training and in evaluation."""
    return TEMPLATES.get(ending(file), LINE)


def in_template(prompt: str, template: str) -> str:
    """The prompt as a model without a separator gets it."""
    return template.format(prompt.removesuffix("\n"))


def _pair(where: str, prompt, completion, plain: bool = False) -> Found:
    """A prompt and its completion, or what is wrong with them; the prompt of a plain text is empty."""
    if not is_text(completion) or not (plain or is_text(prompt)):
        needed = "a non-empty text" if plain else "two non-empty texts, prompt and completion"
        return UserError(f"{where}: needs {needed}")
    if SURROGATE.search(prompt + completion):
        return UserError(f"{where}: is not valid UTF-8, or holds half a character")
    return prompt, completion


def is_text(value) -> bool:
    """Whether the value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def _read_csv(file, path) -> Iterator[Found]:
    rows = csv.DictReader(file, strict=True)
    if not {"mr", "ref"} <= set(rows.fieldnames or ()):
        raise UserError(f"{path}, line 1: the header must name the columns mr and ref (E2E NLG)")
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield UserError(f"{path}, line {rows.reader.line_num}: not CSV ({error})")
            continue
        if row is None:
            return
        if None in row:  # where DictReader puts surplus columns
            yield UserError(f"{path}, line {rows.line_num}: has more columns than the header")
        else:
            yield _pair(f"{path}, line {rows.line_num}", row["mr"], row["ref"])


def _read_tsv(file, path) -> Iterator[Found]:
    for number, line in enumerate(file, 1):
        row, where = line.rstrip("\r\n").split("\t"), f"{path}, line {number}"
        if len(row) == 2:
            yield _pair(where, *row)
        elif row != [""]:
            yield UserError(f"{where}: has {len(row)} columns; 2 are needed")


def _read_jsonl(file, path) -> Iterator[Found]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield from from_record(parse_json(line, where), where)
        except UserError as error:
            yield error


def _read_json(file, path) -> Iterator[Found]:
    content = parse_json(file.read(), str(path))
    for number, row in enumerate(content if isinstance(content, list) else squad_records(content), 1):
        yield from from_record(row, f"{path}, record {number}")


def squad_records(content: dict) -> Iterator[dict]:
    """Yields the questions of a file in SQuAD's layout, each with its context."""
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {"context": paragraph["context"], **question}


def _read_txt(file, path) -> Iterator[Found]:
    text = file.read()
    if text.strip():
        yield _pair(str(path), "", text, plain=True)


READERS = {
    ".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt,
}  # fmt: skip

# ---------------------------------------------------------------- records


def from_record(row, where: str) -> Iterator[Found]:
    """Yields (prompt, completion) for every completion of a JSON record with these fields: `text`, whose
    prompt is ""; `prompt` with `completion` or a list of `references`; `dialogue` and `summary` (SAMSum); or
    `context`, `question` and `answers`: a list of texts, [{"text": …}] or {"text": […]} (FairytaleQA, SQuAD).
    A question that is marked as having no answer (SQuAD 2.0) yields nothing."""
    row = row if isinstance(row, dict) else {}
    for name, value in row.items():
        if isinstance(value, str):
            row[name] = value.replace("\r\n", "\n")
    if "text" in row:
        yield _pair(where, "", row["text"], plain=True)
        return
    if is_unanswerable(row):
        return
    if "dialogue" in row:
        form, parts, targets = SUMMARY, ["dialogue"], [row.get("summary")]
    elif "question" in row:
        form, parts, targets = QUESTION, ["context", "question"], row.get("answers")
    else:
        form, parts, targets = "{prompt}", ["prompt"], row.get("references") or [row.get("completion")]
    prompt = form.format(**row) if all(is_text(row.get(part)) for part in parts) else None
    if isinstance(targets, dict):
        targets = targets.get("text")
    for target in targets if targets and isinstance(targets, list) else [None]:
        yield _pair(where, prompt, target.get("text") if isinstance(target, dict) else target)


def is_unanswerable(row: dict) -> bool:
    """Whether a question is marked as having no answer: by is_impossible, as in SQuAD 2.0's own file, or by
    answers of the form {"text": []}."""
    answers = row.get("answers")
    empty = isinstance(answers, dict) and answers.get("text") == []
    return "question" in row and (row.get("is_impossible") is True or empty)


# ---------------------------------------------------------------- whole files


@dataclass(frozen=True)
class Corpus:
    """The pairs of some files, which can be read any number of times. With `templates`, every prompt is put
    into the template of its kind of file."""

    files: tuple[str, ...]
    templates: bool = False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for file in self.files:
            template = template_of(file)
            for prompt, completion in read_pairs(file):
                if prompt and self.templates:  # a plain text has no prompt
                    prompt = in_template(prompt, template)
                yield prompt, completion


def read_examples(path: str | Path, skipped: list[str] | None = None) -> list[Example]:
    """The distinct prompts of a file in their order, each with all of its references. Raises and skips as
    `read_pairs` does."""
    groups: dict[str, list[str]] = {}
    for prompt, completion in read_pairs(path, skipped):
        groups.setdefault(prompt, []).append(completion)
    return [Example(prompt, tuple(references)) for prompt, references in groups.items()]
