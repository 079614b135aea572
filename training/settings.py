"""How a training goes: its settings, each also a flag of train.py."""

from dataclasses import dataclass

import torch

from common.config import check_limits, option
from common.errors import UserError
from formats.data import task_file
from training.losses import LossConfig

EMBEDDED = (
    "translation",
    "translation",
    "e2e",
)  # tasks of the default training; translation is seen twice as often
MOST_STEPS = 10**9
# What may change when a run goes on from its checkpoint.
MAY_CHANGE = {
    "dev", "max_steps", "device", "tf32", "prefetch", "compile", "recompute", "shard", "peak_tflops", "validate_every",
    "save_every",
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(LossConfig):
    """How to train. One step is one update of the weights."""

    data: tuple[str, ...] = option(
        tuple(task_file(task, "train") for task in EMBEDDED),
        "training files; one named twice is seen twice as often",
    )
    dev: tuple[str, ...] = option(
        tuple(task_file(task, "dev") for task in ("translation", "e2e")),
        "validation files, each measured by itself",
    )
    init: str | None = option(
        None, "checkpoint to start from, shape and tokenizer included; none: random weights"
    )
    train: str = option(
        "all",
        "all: every weight, into model.pt; heads: norm, adapter and classifier of each exit, the model's own "
        "output unchanged, into heads.pt, a few MB",
    )
    max_steps: int = option(7500, "steps in all", least=1, most=MOST_STEPS)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: str | None = option(
        None, "float32 or bfloat16 (autocast); none: bfloat16 on a GPU, float32 on a CPU"
    )

    heads: str | None = option(
        None,
        "file of heads to start from, in place of those in --init",
        group="a model with heads, or a shortlist",
    )
    frequent_ids: str | None = option(
        None,
        "ids for --shortlist, kept in what is written; none: those in or beside --init",
        group="a model with heads, or a shortlist",
    )

    tokenizer: str | None = option(
        None,
        "sentencepiece model, or checkpoint that holds one; none: that of --init, or a new one",
        group="batches",
    )
    rows: int = option(16, "rows of a micro-batch", group="batches", least=1, most=2**16)
    length: int = option(
        128, "positions of a row; documents are packed into rows", group="batches", least=2, most=2**20
    )
    learn_prompts: bool = option(
        False, "learn from prompts, too, not from completions alone", group="batches"
    )
    accumulate: int = option(
        1, "micro-batches of a step, in each process", group="batches", least=1, most=2**16
    )
    lr: float = option(1.5e-3, "peak learning rate", group="optimization", above=0, most=1000)
    min_lr: float = option(
        0.02,
        "learning rate at the end, as a share of the peak, 0 to 1",
        group="optimization",
        least=0,
        most=1,
    )
    warmup: int = option(
        300, "steps of linear warm-up, before the cosine", group="optimization", least=0, most=MOST_STEPS
    )
    weight_decay: float = option(
        0.1, "weight decay of matrices; norms have none", group="optimization", least=0, most=1000
    )
    clip: float = option(1.0, "largest norm of the gradient; inf: any", group="optimization", above=0)
    layer_dropout: float = option(
        0.0,
        "chance to leave out the last layer, less for lower ones, 0 to 1",
        group="optimization",
        least=0,
        most=1,
    )
    seed: int = option(
        0,
        "seed of the weights, of the data's order and of the layers left out",
        group="optimization",
        least=0,
        most=2**63 - 1,
    )
    tf32: bool = option(
        True, "on a GPU, TF32 in what is left of float32 matrix products", group="speed and memory"
    )
    prefetch: bool = option(
        torch.cuda.is_available(),
        "pack and copy the next batch while this one is worked on",
        group="speed and memory",
    )
    compile: bool = option(False, "torch.compile every block", group="speed and memory")
    recompute: bool = option(
        False,
        "make the insides of blocks anew for the gradient: less memory, a third more work",
        group="speed and memory",
    )
    shard: bool = option(
        False,
        "under torchrun, each process keeps its part of the model alone: for one that does not fit a device",
        group="speed and memory",
    )
    peak_tflops: float | None = option(
        None,
        "TFLOP/s that a device can do, to tell the share of it used; none: known cards",
        group="speed and memory",
        above=0,
        most=10**9,
    )
    validate_every: int = option(
        750, "steps between validations", group="long runs", least=1, most=MOST_STEPS
    )
    save_every: int = option(250, "steps between checkpoints", group="long runs", least=1, most=MOST_STEPS)

    def __post_init__(self):
        super().__post_init__()
        for name in ("data", "dev"):
            object.__setattr__(self, name, tuple(map(str, getattr(self, name))))
        if self.dtype is None:
            object.__setattr__(self, "dtype", "bfloat16" if self.device.startswith("cuda") else "float32")
        for name, known in {"dtype": ("float32", "bfloat16"), "train": ("all", "heads")}.items():
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(known)}")
        check_limits(self)
        if not self.data:
            raise UserError("there is nothing to train on; name a file with --data")
        if self.train == "heads":
            self.check_heads()
        if self.init is None and (self.heads or self.frequent_ids):
            raise UserError("--heads and --frequent-ids belong to a model to start from; name it with --init")
        if self.shortlist is not None and self.train != "heads":
            raise UserError(
                f"shortlist is {self.shortlist}, but train is {self.train}: only heads learn over a part "
                "of the vocabulary, a model needs all of it"
            )

    def check_heads(self) -> None:
        """Raises UserError for what does not go with training the heads alone."""
        if self.init is None or self.loss in ("none", "hidden") or self.layer_dropout:
            raise UserError(
                "train is heads, which needs --init, a loss of the exits (weighted, rotate or distill) and no "
                "layer_dropout"
            )
        if not self.exits:
            raise UserError("train is heads, but there must be exits to train; give --exits")
