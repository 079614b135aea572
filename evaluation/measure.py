"""How runs are measured: every configuration decodes every prompt, in turn; outputs and times are kept.

All configurations of a table share code, cache, dtype and prompts. They take turns prompt by prompt, so that
drift in the machine's speed affects all of them equally.
"""

import platform
import re
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from decode import generate, stream
from decoding.drafting import Drafting
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from model import Transformer


@dataclass(frozen=True)
class Configuration:
    """One line of a results table: how to decode, and with which model."""

    decode: DecodeConfig
    model: Transformer
    checkpoint: str | None = None  # of the model, if it is not the command's own


def baseline(config: DecodeConfig) -> DecodeConfig:
    """Returns the configuration of the full model that another is compared with. It has the same length,
    prediction and sampling. A configuration without exits whose tokens come from a contrast (DoLa, ACD) is
    compared with the model's own prediction."""
    return config.full() if config.confidence else replace(config, predict="own").full()


def by_baseline(configurations: dict[str, Configuration]) -> list[dict[str, Configuration]]:
    """Groups the configurations that are compared with the same full model."""
    groups = defaultdict(dict)
    for name, each in configurations.items():
        groups[baseline(each.decode)][name] = each
    return list(groups.values())


@dataclass
class Measured:
    """The outputs and times of one configuration over all prompts."""

    configuration: Configuration
    prompts: list[list[int]] = field(default_factory=list)
    outputs: list[Generation] = field(default_factory=list)
    times: list[tuple[float, ...]] = field(default_factory=list)  # seconds of every repeat, by prompt
    first: list[float] = field(default_factory=list)  # median seconds until the first token, by prompt

    @property
    def seconds(self) -> list[float]:
        """For each prompt, the median of its repeats."""
        return [median(repeats) for repeats in self.times]

    @property
    def total(self) -> Counters:
        """The work done for all prompts."""
        return Counters(*map(sum, zip(*(astuple(out.counters) for out in self.outputs))))


def run_in_turns(
    configurations: dict[str, Configuration], prompts: list[list[int]], repeat: int, title: str
) -> dict[str, Measured]:
    """Decodes every prompt under every configuration, in turn, `repeat` times, after a warm-up."""
    rows = {name: Measured(each) for name, each in configurations.items()}
    for each in configurations.values():
        timed(each, prompts[0], new_drafting(each))
    drafting = {name: new_drafting(each) for name, each in configurations.items()}
    for prompt in tqdm(prompts, desc=title, unit="prompt", dynamic_ncols=True):
        runs = {name: [] for name in rows}
        for _ in range(repeat):
            for name, each in configurations.items():
                runs[name].append(timed(each, prompt, drafting[name]))
        for name, row in rows.items():
            outputs, first, whole = zip(*runs[name])
            row.prompts.append(prompt)
            row.outputs.append(outputs[0])
            row.first.append(median(first))
            row.times.append(whole)
    return rows


def new_drafting(configuration: Configuration) -> Drafting | None:
    """Returns the state from which draft=auto starts to learn; None for other configurations."""
    model, config = configuration.model, configuration.decode
    return Drafting.of(model, config) if config.draft == "auto" else None


def timed(
    each: Configuration, prompt: list[int], drafting: Drafting | None
) -> tuple[Generation, float, float]:
    """Decodes a prompt, and returns the output and the seconds until its first and its last token."""
    counters, tokens, first = Counters(), [], 0.0
    synchronize(each.model)
    started = time.perf_counter()
    for token in stream(each.model, prompt, each.decode, counters, drafting=drafting):
        first = first or time.perf_counter() - started
        tokens.append(token)
    synchronize(each.model)
    return Generation.of(tokens, counters), first, time.perf_counter() - started


def synchronize(model: Transformer) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def confidence_share(configuration: Configuration, prompts: list[list[int]]) -> float:
    """Returns the share of the decoding time that confidence checks take, measured in a separate run. A check
    that lets its token exit is credited with the time of one head, since that head yields the token."""
    model, config = configuration.model, configuration.decode
    checks = credit = 0.0

    class Timed(Trace):
        def decided(self, threshold: float) -> bool:
            """Adds the time of the check, and credits the time of the head if the token exits."""
            nonlocal checks, credit
            weights = self._weights  # None for a few pruned candidates, whose head costs next to nothing
            synchronize(model)
            started = time.perf_counter()
            exits = super().decided(threshold)
            checks += time.perf_counter() - started
            if exits and weights and self.layer in self.flops:
                started = time.perf_counter()
                normed = model.exit_norm(self.state(self.layer)[None], self.layer)
                for weight in weights:
                    model.score(normed, weight)
                synchronize(model)
                credit += time.perf_counter() - started
            return exits

    class Timing(Counters):
        def new_trace(self, *args) -> Trace:
            return Timed(*args)

    drafting = new_drafting(configuration)
    started = time.perf_counter()
    for prompt in prompts:
        generate(model, prompt, config, Timing(), drafting=drafting)
    return max(0.0, checks - credit) / (time.perf_counter() - started - credit)


def place_of_run(model: Transformer) -> dict:
    """Returns the conditions under which figures are measured."""
    form = getattr(model, "form", "plain")
    return {
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": "int8" if form == "int8" else str(model.embedding.weight.dtype).removeprefix("torch."),
        "weights": form,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0].strip() if names else platform.processor()


def commit() -> str | None:
    """Returns the short commit of the project; None outside a repository, and where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def peak_memory(model: Transformer) -> int:
    """Returns the peak memory in MiB: that of the GPU that the model is on, or that of this process."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
