"""What keeps a long training safe: one run in a folder at a time, its checkpoint, its log, its end by a
signal."""

import contextlib
import fcntl
import json
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import parse_json, whole_file
from common.processes import by_first, processes, tell
from formats.checkpoint import STORED, as_blob, fitting, read_checkpoint, save_checkpoint
from formats.heads import FIELDS, HEAD_WEIGHTS, fingerprint, read_heads, same_model, save_heads
from model import ModelConfig, Transformer
from training.settings import MAY_CHANGE, TrainConfig
from training.sharding import gathered, gathered_moments, load_moments, load_weights

REMEDY = "give another --out, or --overwrite"
Results = dict[str, dict[int, list[float]]]  # validation file -> layer -> [loss, agreement]


# ---------------------------------------------------------------- signals, lock, log


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT, noted in a list instead of ending the process, so that a run ends between two
    steps, with a checkpoint."""
    noted: list[int] = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is this run's alone; the system lets go of it when the process ends, however it ends. Raises
    UserError where another run is in it."""
    file = by_first(lock, folder)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def lock(folder: Path) -> IO:
    """A file that holds the lock as long as it is open; one that holds none where there are no locks, which
    is said."""
    file = open(folder / ".lock", "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{folder}: another training is writing there; wait for its end, or give another --out"
        ) from None
    except OSError as error:
        tell(f"{folder} cannot be locked ({error.strerror}): make sure that no other training writes there")
    return file


def read_log(path: Path) -> list[dict]:
    """The rows of a log; what is none, as where the machine stopped while it wrote, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(UserError):
            rows.append(parse_json(line, str(path)))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Log:
    """JSON lines: step, loss, positions_per_s and perhaps share_of_peak of each step; step, dev file and
    [loss, agreement] by layer of each validation."""

    def __init__(self, path: Path, step: int):
        """Goes on after `step`; what an interrupted run has written beyond it goes."""
        rows = read_log(path) if path.exists() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        with whole_file(path) as part:
            Path(part).write_text("".join(kept), encoding="utf-8")
        self.path = path

    def write(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


# ---------------------------------------------------------------- the run


class Run:
    """A training in its folder: where it stands, its checkpoint.pt to go on from, its log.jsonl, at its end
    model.pt; with --train heads heads.pt, and no file holds the model again. Only the first process
    writes."""

    def __init__(self, config: TrainConfig, shape: ModelConfig, folder: Path, overwrite: bool = False):
        """Looks for a checkpoint to go on from. Raises UserError for one of another run, and for what would
        be lost."""
        self.config, self.folder, self.overwrite = config, folder, overwrite
        self.checkpoint, self.result_file, self.log_file = output_files(config, folder)
        self.heads_alone = config.train == "heads"
        self.settings = {**asdict(config), "accumulate": config.accumulate * processes()[1]}
        self.step = 0
        self.results: Results = {}  # of the last validation
        self.found = None  # content of the checkpoint
        if overwrite:
            return
        if self.checkpoint.exists():
            read = read_heads if self.heads_alone else read_checkpoint
            self.found = read(self.checkpoint)
            told = FIELDS if self.heads_alone else asdict(shape)  # of the shape, by the file
            settings = self.settings | {name: getattr(shape, name) for name in told}
            check_resumable(self.checkpoint, self.found, settings)
        elif self.result_file.exists():
            raise UserError(f"{self.result_file} is there already; {REMEDY}")
        elif self.log_file.exists() and self.log_file.stat().st_size:
            raise UserError(
                f"{self.log_file} is there already, of a training that left no checkpoint to go on from; {REMEDY}"
            )

    def begin(
        self, model: Transformer, optimizer: torch.optim.Optimizer, tokenizer: bytes, data: np.ndarray
    ) -> None:
        """From the checkpoint if there is one, else from the start, in which case files to overwrite go.
        Raises UserError if the checkpoint was trained on other data."""
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        self.data = zlib.crc32(data.view(np.uint8))
        self.belongs_to = fingerprint(read_checkpoint(self.config.init)) if self.heads_alone else None
        first = processes()[0] == 0
        if self.found:
            self.restore()
            tell(f"going on from {self.checkpoint} at step {self.step} of {self.config.max_steps}")
        elif first and self.overwrite:
            for path in (self.checkpoint, self.result_file, self.log_file):
                path.unlink(missing_ok=True)
        self.log = Log(self.log_file, self.step) if first else None

    def restore(self) -> None:
        """Weights, optimizer and step of the checkpoint."""
        content, training, path = self.found, self.found["training"], self.checkpoint
        tokenizer = content["tokenizer"]
        same = isinstance(tokenizer, Tensor) and tokenizer.numpy().tobytes() == self.tokenizer
        if not same or training["data"] != self.data:
            raise UserError(f"{path}: the training files have changed since; {REMEDY}")
        weights = content["weights"]
        if self.heads_alone:
            if not same_model(content["model"], self.belongs_to):
                raise UserError(f"{path}: {self.config.init} has changed since; {REMEDY}")
            if set(weights) != set(self.weights()):
                raise UserError(f"{path}: its weights are not those of the heads; {REMEDY}")
        with fitting(path):
            load_weights(self.model, weights, strict=not self.heads_alone)
        try:
            load_moments(self.optimizer, training["optimizer"])
            check_moments(self.optimizer, training["step"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: its optimizer does not fit the model ({error}); {REMEDY}") from None
        self.step, results = training["step"], training.get("results", {})
        self.results = {file: figures for file, figures in results.items() if file in self.config.dev}
        self.found = None  # the file is about to be replaced

    def weights(self) -> dict[str, Tensor]:
        """What the files of this training hold of the model."""
        held = HEAD_WEIGHTS if self.heads_alone else ""
        return {name: weight for name, weight in self.model.state_dict().items() if name.startswith(held)}

    def save(self) -> None:
        """Writes checkpoint.pt, whole or not at all; every process gives its part."""
        weights, moments = gathered(self.weights()), gathered_moments(self.optimizer)
        if processes()[0] == 0:
            training = {
                "step": self.step,
                "results": self.results,
                "config": self.settings,
                "data": self.data,
                "optimizer": moments,
            }
            if self.heads_alone:
                extra = {"tokenizer": as_blob(self.tokenizer), "training": training}
                save_heads(self.checkpoint, self.model, self.belongs_to, None, weights, **extra)
            else:
                save_checkpoint(
                    self.checkpoint, self.model, self.tokenizer, weights=weights, training=training
                )

    def note(self, row: dict) -> None:
        """Adds a row to the log; the first process alone has one."""
        if self.log:
            self.log.write(row)

    def write_result(self) -> None:
        """Writes model.pt, or heads.pt: matrices in float16, or as --init has them. Every process gives its
        part."""
        model, config, dtype, kept = self.model, self.config, torch.float16, {}
        weights = gathered(self.weights())
        if processes()[0] > 0:
            return
        if config.init:
            content = read_checkpoint(config.init)
            if "chat_template" in content and not config.tokenizer:
                kept["chat_template"] = content["chat_template"]
            if model.frequent_ids is not None and (config.frequent_ids or not config.tokenizer):
                kept["frequent_ids"] = model.frequent_ids
            given = content["weights"]["embedding"].dtype
            dtype = given if given in STORED else dtype  # int8 was dequantized for training
        provenance = {
            "command": " ".join(sys.argv),
            "config": asdict(config),
            "steps": self.step,
            "loss and agreement by layer": self.results,
        }
        if self.heads_alone:
            save_heads(self.result_file, model, self.belongs_to, dtype, weights, provenance=provenance)
            tell(f"wrote {self.result_file}, for --checkpoint {config.init} --heads {self.result_file}")
        else:
            save_checkpoint(
                self.result_file, model, self.tokenizer, dtype, weights, provenance=provenance, **kept
            )
            tell(f"wrote {self.result_file}")

    def end(self, signals: list[int]) -> None:
        """The model's file; or where a signal came before the last step, what to do, and the exit status of
        that signal."""
        if self.step == self.config.max_steps:
            self.write_result()
            return
        at = f"{self.checkpoint} is at step {self.step} of {self.config.max_steps}"
        tell(f"stopped by a signal; {at}, and the same command goes on from there")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])


def output_files(config: TrainConfig, folder: Path) -> tuple[Path, Path, Path]:
    """What a training writes: its checkpoint, its result, its log."""
    result = "heads.pt" if config.train == "heads" else "model.pt"
    return folder / "checkpoint.pt", folder / result, folder / "log.jsonl"


def check_outputs(config: TrainConfig, folder: Path) -> None:
    """Raises UserError if the training would overwrite what it starts from."""
    outputs = [path.resolve() for path in output_files(config, folder)]
    for source in filter(None, (config.init, config.tokenizer, config.heads, config.frequent_ids)):
        if Path(source).resolve() in outputs:
            raise UserError(f"{source}: is in --out, where it would be overwritten; give another --out")


def check_resumable(checkpoint: Path, content: dict, settings: dict) -> None:
    """Raises UserError unless the content of the checkpoint is a training with these settings, but for those
    that may change, and not beyond max_steps."""
    if "training" not in content:
        raise UserError(f"{checkpoint}: holds a model but no training to go on with; {REMEDY}")
    training = content["training"]
    for name, kind in {"step": int, "config": dict, "data": int, "optimizer": dict}.items():
        if not isinstance(training, dict) or not isinstance(training.get(name), kind):
            raise UserError(f"{checkpoint}: its training lacks its {name}, so it cannot go on; {REMEDY}")
    if training["step"] < 0:
        raise UserError(
            f"{checkpoint}: its training is at step {training['step']}, which must be at least 0; {REMEDY}"
        )
    then = {**training["config"], **content["config"]}
    for name, value in settings.items():
        if value != then.get(name) and name not in MAY_CHANGE:
            found = f"{checkpoint} was trained with {name} {then.get(name)}, not {value}"
            raise UserError(f"{found}; {REMEDY}, or go on with the same")
    if training["step"] > settings["max_steps"]:
        raise UserError(
            f"{checkpoint} is at step {training['step']}, beyond max_steps {settings['max_steps']}; {REMEDY}"
        )


def check_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raises ValueError unless the moments are those of the weights."""
    if step and not optimizer.state:
        raise ValueError("it holds no moments")
    for weight, state in optimizer.state.items():
        if any(state[name].shape != weight.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("its moments have other shapes")
