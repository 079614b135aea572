"""The settings of a training run; each is also a flag of train.py."""

from dataclasses import dataclass

import torch

from common.config import check_limits, option
from common.errors import UserError
from formats.data import task_file
from training.losses import LossConfig

INCLUDED = ("translation", "translation", "e2e")  # the default data; translation is seen twice as often
DATA = tuple(task_file(task, "train") for task in INCLUDED)
# Settings that may change when a training run resumes from its checkpoint.
MAY_CHANGE = {"dev", "max_steps", "device", "compile", "recompute", "validate_every"}
BATCHES, OPTIMIZATION, SPEED = "batches", "optimization", "speed and memory"  # groups in --help


@dataclass(frozen=True)
class TrainConfig(LossConfig):
    """How to train. One step is one update of the weights."""

    data: tuple[str, ...] = option(DATA, "training files; a file that is named twice is used twice as often")
    dev: tuple[str, ...] = option(
        (),
        "validation files, measured one by one (none: those of the included tasks or, with your own --data, "
        "its last documents, which are then not trained on)",
    )
    init: str | None = option(None, "start from this checkpoint, with its shape and tokenizer")
    max_steps: int = option(7500, "total number of steps", least=1)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: str | None = option(
        None,
        "float32 or bfloat16 (none: bfloat16 on a GPU, float32 on a CPU)",
        choices=("float32", "bfloat16"),
    )

    tokenizer: str | None = option(
        None,
        "tokenizer file, or a checkpoint with one (none: that of --init, or a new one)",
        BATCHES,
        rare=True,
    )
    rows: int = option(16, "batch rows (sequences) in a micro-batch", BATCHES, least=1)
    length: int = option(128, "positions in a batch row, which holds several documents", BATCHES, least=2)
    learn_prompts: bool = option(False, "train on prompts as well as completions", BATCHES, rare=True)
    accumulate: int = option(1, "micro-batches per step, in each process", BATCHES, least=1, rare=True)
    lr: float = option(1.5e-3, "peak learning rate", OPTIMIZATION, above=0)
    warmup: int = option(300, "steps of linear warm-up before the cosine decay", OPTIMIZATION, least=0)
    layer_dropout: float = option(
        0.0, "skip layers at random, the last one with this probability", OPTIMIZATION, least=0, most=1
    )
    seed: int = option(
        0, "seed for the weights, the order of the data and layer dropout", OPTIMIZATION, least=0, rare=True
    )
    compile: bool = option(False, "compile every block with torch.compile", SPEED, rare=True)
    recompute: bool = option(
        False, "compute blocks again in the backward pass: less memory, more time", SPEED, rare=True
    )
    validate_every: int = option(750, "steps between validations", "long runs", least=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise UserError("there is nothing to train on; name a file with --data")
        if not self.dev and self.data == DATA:
            dev = tuple(task_file(task, "dev") for task in dict.fromkeys(INCLUDED))
            object.__setattr__(self, "dev", dev)
        if self.dtype is None:
            object.__setattr__(self, "dtype", "bfloat16" if self.device.startswith("cuda") else "float32")
        check_limits(self)
        if self.init is None and (self.heads_alone or self.shortlist):
            raise UserError(f"train is {self.train}, which needs a model to start from; give --init")
        if self.heads_alone and (self.loss in ("none", "layerskip", "hidden") or self.layer_dropout):
            raise UserError("train is heads, which needs a loss on exits only and no --layer-dropout")
