"""What keeps a long training run safe: a folder of its own, a checkpoint, a log, a clean stop on a signal."""

import contextlib
import fcntl
import json
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import check_outputs, parse_json, whole_file
from formats.checkpoint import STORED, fitting, load_weights, read_checkpoint, save_checkpoint
from formats.heads import FIELDS, fingerprint, read_heads, same_model, save_heads
from model import ModelConfig, Transformer
from training.parallel import is_first, processes, tell
from training.settings import MAY_CHANGE, TrainConfig
from training.start import Data

REMEDY = "give another --out, or --overwrite"


# ---------------------------------------------------------------- signals, lock, log


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Notes SIGTERM and SIGINT in a list; they no longer end the process, so that a run can end between two
    steps, with a checkpoint."""
    noted: list[int] = []
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, lambda number, frame: noted.append(number)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and locks it for this training run; the system unlocks it when the process ends,
    however it ends. A new folder in which nothing was written is removed. Raises UserError if another run
    holds the lock."""
    if not is_first():
        yield
        return
    if folder.is_file():
        raise UserError(f"{folder}: is a file; --out takes a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another training run is writing there; give another --out") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if is_new and list(folder.iterdir()) == [lock]:
                lock.unlink()
                folder.rmdir()


def read_log(path: Path) -> list[dict]:
    """The rows of a log. An invalid line is left out: the machine may have stopped while it was written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(UserError):
            rows.append(parse_json(line, str(path)))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


# ---------------------------------------------------------------- the run


class Run:
    """A training run in its folder: its step, its checkpoint.pt to resume from, its log.jsonl, and at the end
    model.pt; with --train heads, it writes heads.pt instead, and no file contains the model again. Only the
    first process writes."""

    def __init__(self, config: TrainConfig, shape: ModelConfig, folder: Path, overwrite: bool = False):
        """Looks for a checkpoint to resume from. Raises UserError for the checkpoint of another training run,
        and if files would be lost."""
        self.config, self.overwrite = config, overwrite
        self.checkpoint, self.log_file = folder / "checkpoint.pt", folder / "log.jsonl"
        self.result_file = folder / ("heads.pt" if config.heads_alone else "model.pt")
        self.outputs = self.checkpoint, self.result_file, self.log_file
        self.settings = {**asdict(config), "accumulate": config.accumulate * processes()[1]}
        self.step = 0
        # of the last validation: file -> layer -> [loss, agreement]
        self.results: dict[str, dict[int, list[float]]] = {}
        self.found = None  # content of the checkpoint
        if is_first():
            check_outputs(self.outputs, [config.init, config.tokenizer])
        if overwrite:
            return
        if self.checkpoint.exists():
            read = read_heads if config.heads_alone else read_checkpoint
            self.found = read(self.checkpoint)
            stored = FIELDS if config.heads_alone else asdict(shape)  # fields of the shape in the file
            settings = self.settings | {name: getattr(shape, name) for name in stored}
            check_resumable(self.checkpoint, self.found, settings)
            return
        for file in self.outputs:
            if file.exists() and file.stat().st_size:
                raise UserError(f"{file} already exists, but there is no checkpoint to resume from; {REMEDY}")

    def begin(self, model: Transformer, optimizer: torch.optim.Optimizer, data: Data) -> None:
        """Resumes from the checkpoint if there is one; otherwise starts from the beginning, after removing
        the files to overwrite. Raises UserError if the checkpoint was trained on other data."""
        self.model, self.optimizer, self.tokenizer = model, optimizer, data.tokenizer
        self.data = zlib.crc32(data.records.view(np.uint8))
        self.belongs_to = None
        if self.config.heads_alone:
            self.belongs_to = fingerprint(read_checkpoint(self.config.init))
        if self.found:
            self.restore()
            tell(f"resuming from {self.checkpoint} at step {self.step} of {self.config.max_steps}")
        if is_first():
            if self.overwrite:
                for path in self.outputs:
                    path.unlink(missing_ok=True)
            rows = read_log(self.log_file) if self.log_file.exists() else []
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.step]
            with whole_file(self.log_file) as part:  # drops what was written after the checkpoint
                Path(part).write_text("".join(kept), encoding="utf-8")

    def restore(self) -> None:
        """Loads weights, optimizer, step and results from the checkpoint."""
        training, path, heads_alone = self.found["training"], self.checkpoint, self.config.heads_alone
        if training["data"] != self.data:
            raise UserError(f"{path}: the training files have changed since; {REMEDY}")
        if heads_alone and not same_model(self.found["model"], self.belongs_to):
            raise UserError(f"{path}: {self.config.init} has changed since; {REMEDY}")
        with fitting(path):
            missing = load_weights(self.model, self.found["weights"])
            if missing and not heads_alone:
                raise KeyError(f"{missing[0]} is missing")
        self.optimizer.load_state_dict(training["optimizer"])
        self.step, self.results = training["step"], training["results"]
        self.found = None  # the file is about to be replaced

    def write(self, path: Path, dtype: torch.dtype | None = None, **extra) -> None:
        """Writes the model, or with --train heads its heads, and `extra`, whole or not at all."""
        if self.config.heads_alone:
            save_heads(path, self.model, self.belongs_to, dtype, **extra)
        else:
            save_checkpoint(path, self.model, self.tokenizer, dtype, **extra)

    def save(self) -> None:
        """Writes checkpoint.pt."""
        if not is_first():
            return
        training = {
            "step": self.step,
            "results": self.results,
            "config": self.settings,
            "data": self.data,
            "optimizer": self.optimizer.state_dict(),
        }
        self.write(self.checkpoint, training=training)

    def note(self, row: dict) -> None:
        """Adds a row to the log: step, loss and positions_per_s of a step, or step, dev file and [loss,
        agreement] by layer of a validation."""
        if is_first():
            with open(self.log_file, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")

    def write_result(self) -> None:
        """Writes model.pt, or heads.pt: matrices in float16, or in the dtype of --init."""
        if not is_first():
            return
        config, dtype, kept = self.config, torch.float16, {}
        if config.init:
            content = read_checkpoint(config.init)
            given = content["weights"]["embedding"].dtype
            dtype = given if given in STORED else dtype  # int8 was dequantized for training
            if not (config.tokenizer or config.heads_alone):
                kept["chat_template"] = content.get("chat_template")
                kept["frequent_ids"] = self.model.frequent_ids
        provenance = {
            "command": " ".join(sys.argv),
            "config": asdict(config),
            "steps": self.step,
            "loss and agreement by layer": self.results,
        }
        kept = {name: value for name, value in kept.items() if value is not None}
        self.write(self.result_file, dtype, provenance=provenance, **kept)
        usage = f", for --checkpoint {config.init} --heads {self.result_file}" if config.heads_alone else ""
        tell(f"wrote {self.result_file}{usage}")

    def end(self, signals: list[int]) -> None:
        """Writes the result. If a signal came before the last step, says how to resume instead, and ends the
        process with the exit status of that signal."""
        if self.step == self.config.max_steps:
            self.write_result()
            return
        at = f"{self.checkpoint} is at step {self.step} of {self.config.max_steps}"
        tell(f"stopped by a signal; {at}, and the same command resumes from there")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])


def check_resumable(checkpoint: Path, content: dict, settings: dict) -> None:
    """Raises UserError unless the content of the checkpoint is a training run with these settings, except for
    those that may change, and not beyond max_steps."""
    training = content.get("training")
    if not isinstance(training, dict):
        raise UserError(f"{checkpoint}: holds a model but no training run to resume; {REMEDY}")
    then = {**training["config"], **content["config"]}
    for name, value in settings.items():
        if value != then.get(name) and name not in MAY_CHANGE:
            found = f"{checkpoint} was trained with {name} {then.get(name)}, not {value}"
            raise UserError(f"{found}; {REMEDY}, or keep the old value")
    step, most = training["step"], settings["max_steps"]
    if step > most:
        raise UserError(f"{checkpoint} is at step {step}, beyond max_steps {most}; {REMEDY}")
