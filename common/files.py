"""Writing files whole or not at all, reading JSON that somebody else wrote, and short names for data."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """Yields a temporary name to write to, and renames that file to `path` at the end, so that the file is
    written whole or not at all.

    A symbolic link is kept: the file that it points to is replaced. Raises UserError for a path that exists
    but is not a regular file (a folder, a device, a FIFO), and for a full disk; OSError, which names the
    file, if nothing may be written there.
    """
    path = os.path.realpath(path)
    check_replaceable(path)
    part = f"{path}.part"
    try:
        open(part, "wb").close()  # fails at once, and with the name, if it may not be written
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"{path}: could not be written ({error.strerror}); any old file is kept") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


@contextlib.contextmanager
def reading(path: str | os.PathLike, problem: str = "cannot be read") -> Iterator[None]:
    """Turns whatever goes wrong inside into one line that names the file: a UserError gets the name in front
    unless it begins with it, and any other exception becomes "PATH: PROBLEM (reason)". Use this only around
    code that reads data that somebody else wrote, because a mistake of ours becomes a line, too."""
    try:
        yield
    except UserError as error:
        named = str(error).startswith(str(path))
        raise UserError(str(error) if named else f"{path}: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise UserError(f"{path}: {problem} ({in_short(error)})") from None


def in_short(error: Exception) -> str:
    """The kind of an exception and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def check_replaceable(path: str | os.PathLike) -> None:
    """Raises UserError unless `path` is a regular file, or a new name in a folder that exists."""
    target = os.path.realpath(path)
    if os.path.lexists(target) and not os.path.isfile(target):
        raise UserError(f"{path}: is not a regular file and is not replaced; give another name")
    if not os.path.isdir(os.path.dirname(target)):
        raise UserError(f"{path}: there is no folder {os.path.dirname(path) or target} to write to")


def check_input(path: str | os.PathLike, missing: str = "no such file") -> None:
    """Raises UserError unless `path` is a regular file; if it does not exist, the message says `missing`."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a file in it")
    if not os.path.exists(path):
        raise UserError(f"{path}: {missing}")
    if not os.path.isfile(path):
        raise UserError(f"{path}: is not a regular file; copy it into one")


def check_outputs(outputs: list, inputs: list) -> None:
    """Raises UserError or OSError for an output file that cannot be written, that is also one of the inputs,
    or that is named twice. A None in either list is skipped."""
    taken = {os.path.realpath(path): "is read here, and would be overwritten" for path in inputs if path}
    for path in filter(None, outputs):
        check_replaceable(path)
        place = os.path.realpath(path)
        if place in taken:
            raise UserError(f"{path}: {taken[place]}; give another name")
        taken[place] = "two files would be written there"
        with open(f"{place}.part", "wb"):  # an OSError here names a file that may not be written
            os.remove(f"{place}.part")


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    with whole_file(path) as part:
        Path(part).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike, what: str) -> dict:
    """The object in a JSON file; `what` says in messages what the file is used as. Raises UserError for
    anything else."""
    path = Path(path)
    check_input(path, f"no such file; expected {what}")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object, so it cannot be used as {what}")
    return content


def parse_json(text: str | bytes, where: str):
    """The value of a JSON text that comes from `where` (a file, perhaps a line of it). Raises UserError for
    anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def digest(*parts) -> str:
    """A short name for these values; for a file given as a Path, made from its path, size and modification
    time."""
    state = []
    for part in parts:
        if isinstance(part, Path):
            part = (str(part), part.stat().st_size, part.stat().st_mtime_ns)
        state.append(part)
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
