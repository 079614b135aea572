"""What passes cost on this machine: measured once for a model and its questions, kept in a file, and read
from there ever after. So what a run does depends on no stopwatch, and can be repeated.

The files lie in the user's cache folder, XDG_CACHE_HOME or ~/.cache; one that is deleted is measured anew.
"""

import functools
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from common.errors import UserError
from common.files import digest, read_json, write_json
from decoding.asking import ask_alone
from decoding.prediction import pick
from decoding.record import Counters
from decoding.settings import DecodeConfig
from model import Transformer

ROWS = (1, 2, 4, 8, 16)  # of the passes that are measured
PROMPT = 32  # tokens before them
TURNS, AT_LEAST = 9, 3.0  # turns of every measurement, or more to fill so many seconds; the median counts
MEASURED = 4  # the manner of measuring: files of another one are not read


@dataclass(frozen=True)
class Costs:
    """Seconds, by rows of a pass or by exit layer. What a pass costs beside these is counted with its
    blocks."""

    layers: int  # of the model
    block: dict[int, float]  # rows -> one block
    top: dict[int, float]  # rows -> the head over the vocabulary, and a token from each row
    ask: dict[int, float]  # exit layer -> its question, and a draft

    def __post_init__(self):
        """Raises UserError for what is no such table."""
        for name in ("block", "top", "ask"):
            table = {
                int(key): float(value) for key, value in getattr(self, name).items()
            }  # JSON has no other keys
            object.__setattr__(self, name, table)
            if not table or not all(0 < value < 3600 for value in table.values()):
                raise UserError(f"costs: {name} must hold times, each above 0 seconds and below an hour")
        if not 1 <= min(self.ask) <= max(self.ask) <= self.layers:
            raise UserError(f"costs: ask has an exit layer outside 1 to {self.layers}")


def costs_of(model: Transformer, config: DecodeConfig, run_type: Callable) -> Costs:
    """The table of a model under these settings: from its file, else measured now with `run_type`, which is
    decode.Run, and kept there, which is said on stderr. Raises UserError for a file that is no such table."""
    key = key_of(model, config)
    path = cache_folder() / f"costs-{digest(key)}.json"
    if not path.is_file():
        started = perf_counter()
        costs = measure(model, config, run_type)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": key, **asdict(costs)})
        spent = perf_counter() - started
        print(f"measured what passes cost here, in {spent:.0f} s, and kept it in {path}", file=sys.stderr)
    content = read_json(path, "costs of passes")
    content.pop("of", None)
    try:
        return Costs(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not usable as costs of passes ({error}); delete it, to measure anew"
        ) from None


def cache_folder() -> Path:
    """Where the files lie."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "early-exit-decoding"


def key_of(model: Transformer, config: DecodeConfig) -> dict:
    """What costs depend on: the machine, the shape of the model, how its weights are stored, and what is
    asked."""
    weight = model.embedding
    key = {"measured": MEASURED, "device": torch.cuda.get_device_name() if weight.is_cuda else processor()}
    key |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    key |= {"dtype": str(weight.dtype), "weights": model.form, "model": repr(model.config)}
    for name in ("shortlist", "prune", "prune_k", "prune_min", "premature_layers"):
        key[name] = getattr(config, name)
    key["confidence"] = getattr(config.confidence, "__qualname__", config.confidence)
    key |= {"exits": list(config.exits(model.config)), "sampled": config.temperature > 0}
    key |= {"cut": (config.top_k is not None, config.top_p < 1)}
    return key | {"penalty": config.repetition_penalty > 1}


@functools.cache
def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


@torch.inference_mode()
def measure(model: Transformer, config: DecodeConfig, run_type: Callable) -> Costs:
    """Times passes to the top of 1 to 16 rows, their heads alone, and the questions of every exit, in turns,
    so that a drift of the machine meets all alike."""
    room, L = model.config.max_len - 1, model.config.n_layers
    rows, layers = [count for count in ROWS if count < room], list(config.exits(model.config))
    prompt = [model.config.vocab_size // 2] * min(PROMPT, room - rows[-1])
    run = run_type(model, prompt, replace(config, draft="fixed", max_new_tokens=rows[-1]), Counters())
    newest, _ = run.advance(prompt, {})
    states = newest.hidden[-1][-1:].repeat(rows[-1], 1)  # (R, d)

    def deep(count: int) -> float:
        """A pass of so many rows to the top, and a token from each, which also waits for a GPU."""
        started = perf_counter()
        trace, _ = run.advance(prompt[:1] * count, {})
        for row in trace.final:
            pick(row, config.sampling, run.predictor.generator)
        spent = perf_counter() - started
        run.cache.rollback(len(prompt))
        return spent

    def top(count: int) -> float:
        started = perf_counter()
        for row in model.head(states[:count]):
            pick(row, config.sampling, run.predictor.generator)
        return perf_counter() - started

    def question(layer: int) -> float:
        """One question and its draft, after the blocks below, which leave little of the head in the CPU's
        cache."""
        trace, _ = run.advance(prompt[:1], {layer: 0.0})
        if model.embedding.is_cuda:
            torch.cuda.synchronize()  # the blocks are no part of the question
        started = perf_counter()
        alone = ask_alone(run, [state[-1:] for state in trace.hidden])
        run.emit(alone, layer)
        spent = perf_counter() - started
        run.text.pop()
        run.cache.rollback(len(prompt))
        return spent

    actions = [(deep, count) for count in rows] + [(top, count) for count in rows]
    spent = medians(actions + [(question, layer) for layer in layers])
    tops = {count: spent[top, count] for count in rows}
    blocks = {count: max(1e-9, spent[deep, count] - tops[count]) / L for count in rows}
    return Costs(L, blocks, tops, {layer: spent[question, layer] for layer in layers})


def medians(actions: list[tuple[Callable[[int], float], int]]) -> dict[tuple, float]:
    """The median of the seconds that each action says it took, a function and its argument, over all turns
    but the first, which warms up."""
    times, begun, turns = {action: [] for action in actions}, perf_counter(), 0
    while turns <= TURNS or perf_counter() - begun < AT_LEAST:
        turns += 1
        for function, argument in actions:
            times[function, argument].append(function(argument))
    return {action: median(values[1:]) for action, values in times.items()}
