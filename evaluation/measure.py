"""One run measured: every setting on every prompt, in turn; its speed, quality and work; and the table of it.

All rows share code, cache, dtype and prompts; they take turns prompt by prompt, so that a drift of the machine meets all alike.
"""

import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, median, pstdev

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.errors import UserError
from common.processes import gathered, processes
from confidence import Trace
from decode import generate, stream
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from evaluation.metrics import bootstrap, distinct, first_difference, repetition, rouge_l_f1, token_agreement
from evaluation.tasks import TITLES, Task
from formats.data import Example
from model import Transformer


@dataclass
class Measured:
    """One row's outputs and times over all prompts."""

    config: DecodeConfig
    prompts: list[list[int]] = field(default_factory=list)
    outputs: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each prompt, the median of its repeats
    first: list[float] = field(default_factory=list)    # likewise, until its first token


def measure(model: Transformer, prompts: list[list[int]], configs: dict[str, DecodeConfig], repeat: int, title: str) -> dict[str, Measured]:
    """Decodes every prompt under every config, in turn, `repeat` times, after a warm-up. Several processes (torchrun) share the prompts."""
    rank, world = processes()
    for config in configs.values():
        generate(model, prompts[0], config)
    rows = {name: Measured(config) for name, config in configs.items()}
    for prompt in tqdm(prompts[rank::world], desc=title, unit="prompt", dynamic_ncols=True, disable=rank > 0):
        times = defaultdict(list)
        for turn in range(repeat):
            for name, row in rows.items():
                out, *spent = timed(model, prompt, row.config)
                times[name].append(spent)
                if turn == 0:
                    row.outputs.append(out)
        for name, row in rows.items():
            row.prompts.append(prompt)
            first, whole = map(median, zip(*times[name]))
            row.first.append(first)
            row.seconds.append(whole)
    return {name: merged([part[name] for part in gathered(rows)]) for name in rows}


def timed(model: Transformer, prompt: list[int], config: DecodeConfig) -> tuple[Generation, float, float]:
    """The output, the seconds until its first token, and those until its last."""
    counters, tokens, first = Counters(), [], 0.0
    synchronize(model)
    started = time.perf_counter()
    for token in stream(model, prompt, config, counters):
        first = first or time.perf_counter() - started
        tokens.append(token)
    synchronize(model)
    return Generation.of(tokens, counters), first, time.perf_counter() - started


def merged(parts: list[Measured]) -> Measured:
    """What the processes measured, in the order of the prompts, which they took by turns."""
    order = [(part, i) for i in range(len(parts[0].outputs)) for part in parts if i < len(part.outputs)]
    columns = {name: [getattr(part, name)[i] for part, i in order] for name in ("prompts", "outputs", "seconds", "first")}
    return Measured(parts[0].config, **columns)


def synchronize(model: Transformer) -> None:
    if model.embedding.is_cuda:
        torch.cuda.synchronize()


def confidence_share(model: Transformer, prompts: list[list[int]], config: DecodeConfig) -> float:
    """Share of the decoding time spent on asking, in a run of its own: every question with the heads that it computes, less, where the
    answer was to exit, the time of one such head, since that gives the token."""
    asking = again = 0.0

    class Timed(Trace):
        def decided(self, threshold: float) -> bool:
            nonlocal asking, again
            synchronize(model)
            started = time.perf_counter()
            exits = super().decided(threshold)
            asking += time.perf_counter() - started
            if exits and self.flops.get(self.layer, 0) >= 2 * model.unembed.numel():  # a pruned head costs next to nothing
                started = time.perf_counter()
                model.head(self.hidden[-1][-1:], self.layer)
                synchronize(model)
                again += time.perf_counter() - started
            return exits

    started = time.perf_counter()
    for prompt in prompts:
        generate(model, prompt, config, Timed)
    return max(0.0, asking - again) / (time.perf_counter() - started - again)


def summarize(
    model: Transformer, tokenizer, task: Task, examples: list[Example], name: str, row: Measured, full: Measured, asking: float | None
) -> dict:
    """One row of the table and of --json; the README says what each figure means. `asking`: share of the time for it; None: not asked."""
    total = Counters(*(sum(getattr(out.counters, f.name) for out in row.outputs) for f in fields(Counters)))
    lengths, full_lengths = ([len(out.tokens) for out in measured.outputs] for measured in (row, full))

    def speedup(tokens, seconds, full_tokens, full_seconds):
        return (sum(tokens) / sum(seconds)) / (sum(full_tokens) / sum(full_seconds))

    columns = (lengths, row.seconds, full_lengths, full.seconds)
    ideal = model.config.n_layers * total.tokens / total.block_runs
    texts, full_texts = ([tokenizer.decode(out.tokens).strip() for out in measured.outputs] for measured in (row, full))
    differences = [first_difference(out.tokens, base.tokens) for out, base in zip(row.outputs, full.outputs)]
    changed = [at for at in differences if at is not None]
    later = [(seconds - first) / (length - 1) for seconds, first, length in zip(row.seconds, row.first, lengths) if length > 1]
    return {
        "task": task.name,
        "name": name,
        "config": asdict(row.config),
        "tokens_per_s": total.tokens / sum(row.seconds),
        "speedup": speedup(*columns),
        "speedup_ci": bootstrap(speedup, *columns),
        "first_token_s": median(row.first),
        "later_token_s": median(later) if later else None,
        "ideal_speedup": ideal,
        "exit_efficiency": speedup(*columns) / ideal,
        "avg_exit_layer": mean(layer for out in row.outputs for layer in out.exit_layers),
        "block_rows_per_token": total.block_rows / total.tokens,
        "rows_per_deep_pass": total.deep_rows / total.deep_passes if total.deep_passes else None,
        "flops_per_token": (total.block_flops + total.head_flops) / total.tokens,
        "confidence_flops_per_token": total.confidence_flops / total.tokens,
        "confidence_time_share": asking,
        "agreement": mean(token_agreement(out.tokens, base.tokens) for out, base in zip(row.outputs, full.outputs)),
        "same_texts": mean(difference is None for difference in differences),
        "first_difference": median(changed) if changed else None,
        "rougeL_full": mean(map(rouge_l_f1, texts, full_texts)),
        "scores": task.score(texts, [list(example.references) for example in examples]),
        "perplexity": perplexity(model, row) if not task.scores else None,
        "distinct_2": distinct(texts, 2),
        "repetition_4": mean(repetition(out.tokens) for out in row.outputs),
        "miss_rate": total.missed / total.pruned_deep if total.pruned_deep else None,
        "accepted": total.accepted / total.drafted if total.drafted else None,
        "rolled_back": (total.drafted - total.accepted) / total.drafted if total.drafted else None,
        "prompts": [
            {"prompt": example.prompt, "references": example.references, "prompt_tokens": prompt, "text": text, "tokens": out.tokens,
             "exit_layers": out.exit_layers, "confidences": out.confidences, "seconds": seconds, "first_token_s": first,
             "first_difference": at}
            for example, prompt, text, out, seconds, first, at in zip(
                examples, row.prompts, texts, row.outputs, row.seconds, row.first, differences)
        ],
    }  # fmt: skip


@torch.inference_mode()
def perplexity(model: Transformer, row: Measured) -> float:
    """exp of the mean loss in nats, under the full model, of the tokens of the row's outputs, each after its prompt."""
    losses = []
    for prompt, out in zip(row.prompts, row.outputs):
        text = torch.tensor([*prompt, *out.tokens], device=model.embedding.device)
        states = model.hidden_states(text[None, :-1])[-1][len(prompt) - 1 :]
        losses.append(F.cross_entropy(model.head(states), text[len(prompt) :], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def alike(configs: dict[str, DecodeConfig]) -> list[dict[str, DecodeConfig]]:
    """The configs in groups that one full model serves: those of the same length, prediction and sampling."""
    groups = defaultdict(dict)
    for name, config in configs.items():
        groups[config.full()][name] = config
    return list(groups.values())


def evaluate(model, tokenizer, task: Task, examples: list[Example], configs: dict[str, DecodeConfig], repeat: int) -> list[dict]:
    """Rows of one task, first that of the full model, which is one for all of these configs (see `alike`)."""
    prompts, configs = encode_inputs(model, tokenizer, task, examples, configs)
    full = next(iter(configs.values())).full()
    rows = measure(model, prompts, {"full": full, **configs}, repeat, task.name)
    summaries = []
    for name, row in rows.items():
        asks = any(asked for out in row.outputs for asked in out.confidences)
        share = confidence_share(model, prompts[::3], row.config) if asks else None
        summaries.append(summarize(model, tokenizer, task, examples, name, row, rows["full"], share))
    return summaries


def encode_inputs(model, tokenizer, task: Task, examples: list[Example], configs: dict[str, DecodeConfig]) -> tuple[list[list[int]], dict]:
    """Token ids of the prompts, cut on the left where they leave no room for an answer, and the configs with what ends an answer."""
    longest, stops = max(config.max_new_tokens for config in configs.values()), task.stop_tokens(tokenizer)
    if longest > model.config.max_len - 2:
        raise UserError(f"max_new_tokens is {longest}, of {model.config.max_len} positions; leave some to the prompt")
    prompts, cut = zip(*(task.encode(example.prompt, tokenizer, model.config.max_len - longest) for example in examples))
    if any(cut):
        tqdm.write(f"{task.name}: {sum(cut)} of {len(cut)} prompts lost their left to leave {longest} positions to answer", file=sys.stderr)
    return list(prompts), {name: replace(config, stop_tokens=config.stop_tokens or stops) for name, config in configs.items()}


def environment(model: Transformer) -> dict:
    """Where the figures were measured."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    try:
        git = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {
        "device": torch.cuda.get_device_name() if model.embedding.is_cuda else cpu, "threads": torch.get_num_threads(),
        "dtype": str(model.embedding.dtype).removeprefix("torch."), "weights": model.form, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit, "processes": processes()[1],
    }  # fmt: skip


COLUMNS = {  # of the table, each with the text of its cell; a column that is empty in every row is left out
    "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
    "speed-up (95 %)": lambda row: f"{row['speedup']:.2f} ({row['speedup_ci'][0]:.2f}-{row['speedup_ci'][1]:.2f})",
    "ideal": lambda row: f"{row['ideal_speedup']:.2f}",
    "efficiency": lambda row: f"{row['exit_efficiency']:.2f}",
    "first token, ms": lambda row: f"{1000 * row['first_token_s']:.0f}",
    "exit layer": lambda row: f"{row['avg_exit_layer']:.1f}",
    "MFLOPs/token (conf.)":
        lambda row: f"{row['flops_per_token'] / 1e6:.1f} ({row['confidence_flops_per_token'] / row['flops_per_token']:.0%})",
    "conf. time": lambda row: percent(row["confidence_time_share"], 0),
    "perplexity": lambda row: "" if row["perplexity"] is None else f"{row['perplexity']:.1f}",
    "distinct-2": lambda row: "" if row["perplexity"] is None else f"{row['distinct_2']:.2f}",
    "repetition": lambda row: "" if row["perplexity"] is None else f"{row['repetition_4']:.2f}",
    "agreement": lambda row: f"{row['agreement']:.3f}",
    "ROUGE-L to full": lambda row: f"{row['rougeL_full']:.3f}",
    "missed": lambda row: percent(row["miss_rate"], 1),
    "drafts kept": lambda row: percent(row["accepted"], 1),
}  # fmt: skip


def percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def table(rows: list[dict], task: Task) -> str:
    """Rows of one task as aligned text, which is Markdown too."""
    scores = {TITLES[function]: lambda row, name=name: f"{100 * row['scores'][name]:.1f}" for name, function in task.scores.items()}
    columns = list(COLUMNS.items())
    at = list(COLUMNS).index("agreement")
    columns[at:at] = scores.items()
    filled = {title: [cell(row) for row in rows] for title, cell in columns}
    filled = {"": [row["name"] for row in rows]} | {title: cells for title, cells in filled.items() if any(cells)}
    widths = [max(map(len, [title, *cells])) for title, cells in filled.items()]
    lines = [list(filled), ["---"] * len(filled), *zip(*filled.values())]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def means(rows: list[dict], field: str) -> str:
    """Of a sweep's rows, for every value of one field, mean ± standard deviation over all others."""
    groups = defaultdict(list)
    for row in rows:
        value = row["config"][field]  # a list, where the row has been in a file
        groups[",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)].append(row)
    figures = {"speed-up": lambda row: row["speedup"], "exit layer": lambda row: row["avg_exit_layer"],
               "confidence MFLOPs": lambda row: row["confidence_flops_per_token"] / 1e6, "agreement": lambda row: row["agreement"],
               **{name: lambda row, name=name: 100 * row["scores"][name] for name in rows[0]["scores"]}}  # fmt: skip
    lines = []
    for value, members in groups.items():
        cells = [f"{title} {mean(map(get, members)):.3g} ± {pstdev(map(get, members)):.2g}" for title, get in figures.items()]
        lines.append(f"{field} {value} ({len(members)} rows): {', '.join(cells)}")
    return "\n".join(lines)


def peak_memory(model: Transformer) -> int:
    """The largest memory so far, in MiB: of the GPU that the model is on, or of this process."""
    if model.embedding.is_cuda:
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def quality(row: dict, full: dict) -> float:
    """How much of the full model's scores a row keeps: the least of their shares; of a task without scores, ROUGE-L to its texts."""
    shares = [row["scores"][name] / score if score else 1.0 for name, score in full["scores"].items()]
    return min(shares) if shares else row["rougeL_full"]


def pareto(points: dict[str, tuple[float, float]]) -> set[str]:
    """Names of the points (speed, quality) that no other beats: none is at least as fast and as good, and better in one of the two."""
    return {name for name, (speed, good) in points.items()
            if not any(s >= speed and g >= good and (s, g) != (speed, good) for s, g in points.values())}  # fmt: skip
