"""Files written whole or not at all; short names for what lies in files."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path) -> Iterator[str]:
    """Gives a temporary name to write to; renames it to `path` at the end, so that the file is written whole or not at all."""
    part = f"{os.fspath(path)}.part"
    try:
        yield part
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    with whole_file(path) as part:
        Path(part).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(*parts) -> str:
    """A short name for these values; for the content of files given as Path, by their size and time of change."""
    state = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
