"""One run: every setting on every prompt, in turn, with its outputs and times; and where it was made.

All rows share code, cache, dtype and prompts; they take turns prompt by prompt, so that a drift of the
machine meets all alike.
"""

import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from common.errors import UserError
from common.processes import by_first, gathered, processes
from confidence import Trace
from decode import Run, generate, stream
from decoding.costs import costs_of, processor
from decoding.drafting import Drafting
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from evaluation.tasks import Task
from formats.data import Example
from model import Transformer


@dataclass
class Measured:
    """One row's outputs and times over all prompts."""

    config: DecodeConfig
    prompts: list[list[int]] = field(default_factory=list)
    outputs: list[Generation] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)  # of each prompt, the seconds of every repeat
    first: list[float] = field(default_factory=list)  # until its first token, the median of its repeats
    drafting: Drafting | None = None  # what its texts teach, one after the other, where draft is auto

    @property
    def seconds(self) -> list[float]:
        """Of each prompt, the median of its repeats."""
        return [median(repeats) for repeats in self.times]


def run_in_turns(
    model: Transformer,
    prompts: list[list[int]],
    configs: dict[str, DecodeConfig],
    repeat: int,
    title: str,
    others: dict[str, Transformer] | None = None,
) -> dict[str, Measured]:
    """Decodes every prompt under every config, in turn, `repeat` times, after a warm-up; rows named in
    `others` by a model of their own. Several processes (torchrun) share the prompts."""
    rank, world = processes()
    rows = {name: Measured(config) for name, config in configs.items()}
    models = dict.fromkeys(rows, model) | (others or {})
    for name, row in rows.items():
        generate(models[name], prompts[0], row.config, drafting=drafting_of(models[name], row.config))
        row.drafting = drafting_of(models[name], row.config)
    own = prompts[rank::world]
    for prompt in tqdm(own, desc=title, unit="prompt", dynamic_ncols=True, disable=rank > 0):
        runs = {name: [] for name in rows}
        for _ in range(repeat):
            for name, row in rows.items():
                runs[name].append(timed(models[name], prompt, row.config, row.drafting))
        for name, row in rows.items():
            outputs, first, whole = zip(*runs[name])
            row.prompts.append(prompt)
            row.outputs.append(outputs[0])
            row.first.append(median(first))
            row.times.append(list(whole))
    return {name: merged([part[name] for part in gathered(rows)]) for name in rows}


def drafting_of(model: Transformer, config: DecodeConfig) -> Drafting | None:
    """For a run over several texts: where draft is auto, a beginner that knows the costs, which the first
    process measures if nobody has."""
    if config.draft == "fixed":
        return None
    by_first(costs_of, model, config, Run)
    return Drafting(costs_of(model, config, Run))


def timed(
    model: Transformer, prompt: list[int], config: DecodeConfig, drafting: Drafting | None
) -> tuple[Generation, float, float]:
    """The output, the seconds until its first token, and those until its last."""
    counters, tokens, first = Counters(), [], 0.0
    synchronize(model)
    started = time.perf_counter()
    for token in stream(model, prompt, config, counters, drafting=drafting):
        first = first or time.perf_counter() - started
        tokens.append(token)
    synchronize(model)
    return Generation.of(tokens, counters), first, time.perf_counter() - started


def merged(parts: list[Measured]) -> Measured:
    """What the processes measured, in the order of the prompts, which they took by turns."""
    whole = Measured(parts[0].config)
    for i in range(len(parts[0].outputs)):
        for part in parts:
            if i < len(part.outputs):
                whole.prompts.append(part.prompts[i])
                whole.outputs.append(part.outputs[i])
                whole.times.append(part.times[i])
                whole.first.append(part.first[i])
    return whole


def synchronize(model: Transformer) -> None:
    if model.embedding.is_cuda:
        torch.cuda.synchronize()


def confidence_share(model: Transformer, prompts: list[list[int]], config: DecodeConfig) -> float:
    """Share of the decoding time spent on asking, in a run of its own: every question with the heads that it
    computes, less, where the answer was to exit, the time of one such head, since that gives the token."""
    asking = again = 0.0

    class Timed(Trace):
        def decided(self, threshold: float) -> bool:
            nonlocal asking, again
            weights = (
                self._weights
            )  # a head here multiplies with them; None: a few pruned candidates, next to nothing
            synchronize(model)
            started = time.perf_counter()
            exits = super().decided(threshold)
            asking += time.perf_counter() - started
            if exits and weights and self.layer in self.flops:
                started = time.perf_counter()
                normed = model.exit_norm(self.hidden[self.layer][-1:], self.layer)
                for weight in weights:
                    model.score(normed, weight)
                synchronize(model)
                again += time.perf_counter() - started
            return exits

    drafting = drafting_of(model, config)
    started = time.perf_counter()
    for prompt in prompts:
        generate(model, prompt, config, Timed, drafting=drafting)
    return max(0.0, asking - again) / (time.perf_counter() - started - again)


def encode_inputs(
    model, tokenizer, task: Task, examples: list[Example], configs: dict[str, DecodeConfig]
) -> tuple[list[list[int]], dict[str, DecodeConfig]]:
    """Token ids of the prompts, cut on the left where they leave no room for an answer, and the configs with
    what ends an answer."""
    longest, stops = max(config.max_new_tokens for config in configs.values()), task.stop_tokens(tokenizer)
    if longest > model.config.max_len - 2:
        raise UserError(
            f"max_new_tokens is {longest}, of {model.config.max_len} positions; leave some to the prompt"
        )
    room = model.config.max_len - longest
    prompts, cut = zip(*task.encode([example.prompt for example in examples], tokenizer, room))
    if any(cut):
        tqdm.write(
            f"{task.name}: {sum(cut)} of {len(cut)} prompts lost their left to leave {longest} positions to answer",
            file=sys.stderr,
        )
    ending = {
        name: replace(config, stop_tokens=(*config.stop_tokens, *stops)) for name, config in configs.items()
    }
    return list(prompts), ending


def environment(model: Transformer) -> dict:
    """Where the figures were measured."""
    return {
        "device": torch.cuda.get_device_name() if model.embedding.is_cuda else processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.embedding.dtype).removeprefix("torch."),
        "weights": model.form,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "processes": processes()[1],
    }


def commit() -> str | None:
    """The commit of the project, short; None outside a repository, and where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def peak_memory(model: Transformer) -> int:
    """The largest memory so far, in MiB: of the GPU that the model is on, or of this process."""
    return torch.cuda.max_memory_allocated() >> 20 if model.embedding.is_cuda else peak_resident()


def peak_resident() -> int:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
