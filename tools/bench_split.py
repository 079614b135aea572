"""Where the missing efficiency goes: `python -m tools.bench --split`, on dev inputs of each task.

A setting's *ideal* speed-up is the one that its block runs allow; of it the measured speed-up is the share
that is called *efficiency*. What is missing up to 1 is a share of the setting's time, which is told apart
here:

- *questions*: the time inside Trace.decided, heads included; less, where the answer was to exit and the head was one
  over the vocabulary, the mean time of such a head at full depth, since it gave the token.
- *several rows*: the time of block runs of two rows and more, less that of as many runs of one row, whose mean is
  taken at full depth. (The first run of a layer in a text holds the prompt's rows, and is left to the next line.)
- *the prompt*: the same of the runs that hold the prompt's rows. The full model pays for these, too, but no exit saves
  them; missing is what the ideal expects to be saved.
- *the rest*: what remains. Heads of passes to the top, embedding, sampling and bookkeeping, of which early tokens need
  as much as others, and blocks that are slower after a question than after a block.

All four are measured: a clock cuts the time of every text into segments, each block run, head, question and
what lies between. The settings take turns, text by text. The work is the same in every turn, so of every
segment the median of its turns counts, and the segments of a text add up to its time. The clock costs about a
microsecond a block run.
"""

import common.threads  # noqa: F401  before torch

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from torch import Tensor

from common.errors import UserError
from confidence import Trace
from decode import generate
from decoding.record import Generation
from decoding.settings import DecodeConfig
from evaluation.figures import work_figures
from evaluation.inputs import load_model
from evaluation.measure import Measured, encode_inputs, synchronize
from evaluation.rows import default_tasks, read_settings
from evaluation.tasks import TASKS, read_task, sample
from model import ModelConfig, Transformer

SETTINGS, INPUTS = (
    ("softmax", "verified"),
    8,
)  # rows of the settings beside the checkpoint; inputs of each task
# Kinds of segments: block runs of one row, of several, and of the prompt's; heads of passes to the top; and
# questions.
ONE, SEVERAL, PROMPT, HEAD, QUESTIONS, REST = (
    "one row",
    "several rows",
    "the prompt",
    "head",
    "questions",
    "the rest",
)
PARTS = (QUESTIONS, SEVERAL, PROMPT, REST)  # of what is missing
COLUMNS = ("speed-up", "ideal", "efficiency", *PARTS)


# ---------------------------------------------------------------- measuring


class Clock:
    """Cuts the time of one text into segments, (kind, seconds) each, that follow each other without a gap."""

    def __init__(self, model: Transformer):
        self.model = model
        self.segments: list[tuple[str, float]] = []
        self.given = 0  # tokens that came from a question's head over the vocabulary
        self._begun = set()  # layers that have run
        self._last = self._now()

    def _now(self) -> float:
        """Seconds, once the device has done what it was asked to do."""
        synchronize(self.model)
        return time.perf_counter()

    def tick(self, kind: str) -> None:
        """Ends a segment of this kind."""
        now = self._now()
        self.segments.append((kind, now - self._last))
        self._last = now

    def block(self, layer: int, forward: Callable, x: Tensor, attend: Callable) -> Tensor:
        """A block run, in a segment of its own."""
        self.tick(REST)
        out = forward(x, attend)
        kind = ONE if len(x) == 1 else SEVERAL
        self.tick(kind if layer in self._begun else PROMPT)
        self._begun.add(layer)
        return out

    def head(self, head: Callable, hidden: Tensor) -> Tensor:
        """The head of a pass to the top, in a segment of its own."""
        self.tick(REST)
        out = head(hidden)
        self.tick(HEAD)
        return out

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model's blocks and its head go by this clock."""
        for layer, block in enumerate(self.model.blocks, 1):
            block.forward = partial(self.block, layer, block.forward)  # hides the method of the class
        self.model.head = partial(self.head, self.model.head)
        try:
            yield
        finally:
            for block in self.model.blocks:
                del block.forward
            del self.model.head


def timed(model: Transformer, prompt: list[int], config: DecodeConfig) -> tuple[Clock, Generation]:
    """Decodes a prompt by a clock."""
    whole_head = 2 * model.unembed.numel()  # FLOPs

    class Timed(Trace):
        def decided(self, threshold: float) -> bool:
            clock.tick(REST)
            exits = super().decided(threshold)
            clock.tick(QUESTIONS)
            clock.given += exits and self.flops.get(self.layer, 0) >= whole_head
            return exits

    clock = Clock(model)
    with clock.running():
        output = generate(model, prompt, config, Timed)
        clock.tick(REST)
    return clock, output


@dataclass
class Spent:
    """What the texts of one setting took: seconds by kind of segment, of each the median of its turns, and
    how many there were."""

    config: DecodeConfig
    outputs: list[Generation] = field(default_factory=list)
    seconds: Counter = field(default_factory=Counter)
    count: Counter = field(default_factory=Counter)
    given: int = 0  # tokens that came from a question's head over the vocabulary

    def add(self, turns: list[Clock], output: Generation) -> None:
        """One text, decoded several times."""
        self.outputs.append(output)
        self.given += turns[0].given
        for segments in zip(*(clock.segments for clock in turns), strict=True):
            kind = segments[0][0]
            self.seconds[kind] += median(seconds for _, seconds in segments)
            self.count[kind] += 1

    @property
    def tokens(self) -> int:
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def token(self) -> float:
        """Seconds of one token."""
        return self.seconds.total() / self.tokens

    def mean(self, kind: str) -> float:
        """Seconds of one segment of this kind."""
        return self.seconds[kind] / self.count[kind]

    def above(self, kind: str, one: float) -> float:
        """Seconds a token of block runs of this kind, above those of as many runs of `one` seconds."""
        return (self.seconds[kind] - self.count[kind] * one) / self.tokens


def measure(
    model: Transformer, prompts: list[list[int]], configs: dict[str, DecodeConfig], repeat: int
) -> dict[str, Spent]:
    """Every prompt under every config, in turn, `repeat` times, after a warm-up."""
    for config in configs.values():
        timed(model, prompts[0], config)
    spent = {name: Spent(config) for name, config in configs.items()}
    for prompt in prompts:
        clocks = {name: [] for name in configs}
        for _ in range(repeat):
            for name, config in configs.items():
                clock, output = timed(model, prompt, config)
                clocks[name].append((clock, output))
        for name, runs in clocks.items():
            spent[name].add([clock for clock, _ in runs], runs[0][1])
    return spent


# ---------------------------------------------------------------- telling apart


def split(full: Spent, spent: Spent, shape: ModelConfig) -> dict[str, float]:
    """Speed-up, ideal speed-up and efficiency of a setting, and the parts of what is missing up to 1: they
    and the efficiency add up to 1."""
    ideal = work_figures(Measured(spent.config, outputs=spent.outputs), shape)["ideal_speedup"]
    one = full.mean(ONE)
    missing = spent.token - full.token / ideal  # seconds
    parts = {
        QUESTIONS: (spent.seconds[QUESTIONS] - spent.given * full.mean(HEAD)) / spent.tokens,
        SEVERAL: spent.above(SEVERAL, one) - full.above(SEVERAL, one) / ideal,
        PROMPT: spent.above(PROMPT, one) - full.above(PROMPT, one) / ideal,
    }
    parts[REST] = missing - sum(parts.values())
    shares = {name: seconds / spent.token for name, seconds in parts.items()}
    speedup = full.token / spent.token
    return {"speed-up": speedup, "ideal": ideal, "efficiency": speedup / ideal, **shares}


def print_split(args: argparse.Namespace) -> None:
    """A table of the settings beside the checkpoint. Raises UserError where there are none, or no
    tokenizer."""
    settings = Path(args.heads or args.checkpoint).with_suffix(".json")
    model, tokenizer = load_model(args)
    print(
        f"where the missing efficiency goes, {INPUTS} dev inputs of each task, as shares of a setting's time:"
    )
    print(f"{'':20}" + "".join(f"  {column}" for column in COLUMNS))
    for task in (TASKS[name] for name in default_tasks(settings)):
        rows = read_settings(settings, task, model, {})
        configs = {name: rows[name] for name in SETTINGS if name in rows}
        if not configs:
            raise UserError(
                f"{settings}: has neither {' nor '.join(SETTINGS)} for {task.name}; run eval.py tune"
            )
        configs = {"full": next(iter(configs.values())).full(), **configs}
        examples = sample(read_task(task, "dev"), INPUTS, 0)
        prompts, configs = encode_inputs(model, tokenizer, task, examples, configs)
        spent = measure(model, prompts, configs, args.repeat)
        full = spent.pop("full")
        for name, each in spent.items():
            print_row(f"{task.name} {name}", split(full, each, model.config))


def print_row(name: str, figures: dict[str, float]) -> None:
    """The figures of a setting in one line; in another the parts as shares of what is missing."""
    cells, shares = [], []
    for column in COLUMNS:
        is_part = column in PARTS
        cells.append(f"{figures[column]:.1%}" if is_part else f"{figures[column]:.2f}")
        shares.append(f"{figures[column] / (1 - figures['efficiency']):.0%}" if is_part else "")
    for title, line in ((name, cells), ("  of what is missing", shares)):
        print(f"{title:20}" + "".join(f"  {cell:>{len(column)}}" for cell, column in zip(line, COLUMNS)))
