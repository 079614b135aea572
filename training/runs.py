"""What keeps a long training safe: its log, its end by a signal, going on where it stopped."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.files import whole_file


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT, noted in a list instead of ending the process, so that a run ends between two steps, with a checkpoint."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_log(path: Path) -> list[dict]:
    """The rows of a log; what is none, as where the machine stopped while it wrote, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Log:
    """JSON lines: step, loss and tokens_per_s of each step; step, dev file and [loss, agreement] by layer of each validation."""

    def __init__(self, path: Path, step: int):
        """Goes on after `step`; what an interrupted run has written beyond it goes."""
        rows = read_log(path) if path.exists() else []
        with whole_file(path) as part:
            Path(part).write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step), encoding="utf-8")
        self.path = path

    def write(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


def check_resumable(checkpoint: Path, content: dict, settings: dict, free: set[str]) -> None:
    """Raises ValueError unless the run that wrote the checkpoint's content had the same settings, but for the `free`, and has not gone
    beyond max_steps."""
    remedy = "give another --out, or --overwrite"
    if "training" not in content:
        raise UserError(f"{checkpoint}: holds a model but no training to go on with; {remedy}")
    then = {**content["training"]["config"], **content["config"]}
    other = [name for name in settings if settings[name] != then.get(name) and name not in free]
    if other:
        raise UserError(f"{checkpoint} was trained with {other[0]} {then.get(other[0])}, not {settings[other[0]]}; {remedy}")
    if content["training"]["step"] > settings["max_steps"]:
        raise UserError(f"{checkpoint} is at step {content['training']['step']}, beyond max_steps {settings['max_steps']}; {remedy}")
