"""One run measured: every setting on every prompt, in turn; its speed, quality and work; and the table of it.

All rows share code, cache, dtype and prompts; they take turns prompt by prompt, so that a drift of the machine meets all alike.
"""

import platform
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

from confidence import Trace
from data import Example
from decode import Counters, DecodeConfig, Generation, generate
from metrics import bleu, bootstrap, rouge_l, rouge_l_f1, token_agreement
from model import Transformer
from tokenizer import encode_prompt

LOWERCASE_BLEU = ("e2e",)  # as its published results; translation keeps its capitals


@dataclass
class Measured:
    """One row's outputs and times over all prompts."""

    config: DecodeConfig
    outputs: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each prompt, the median of its repeats


def measure(model: Transformer, prompts: list[list[int]], configs: dict[str, DecodeConfig], repeat: int, title: str) -> dict[str, Measured]:
    """Decodes every prompt under every config, in turn, `repeat` times, after a warm-up."""
    for config in configs.values():
        generate(model, prompts[0], config)
    rows = {name: Measured(config) for name, config in configs.items()}
    for prompt in tqdm(prompts, desc=title, unit="prompt", dynamic_ncols=True):
        times = defaultdict(list)
        for turn in range(repeat):
            for name, row in rows.items():
                synchronize(model)
                started = time.perf_counter()
                out = generate(model, prompt, row.config)
                synchronize(model)
                times[name].append(time.perf_counter() - started)
                if turn == 0:
                    row.outputs.append(out)
        for name, row in rows.items():
            row.seconds.append(median(times[name]))
    return rows


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
    return (asking - again) / (time.perf_counter() - started - again)


def summarize(model, tokenizer, task: str, examples: list[Example], name: str, row: Measured, full: Measured, share: float | None) -> dict:
    """One row of the table and of --json; the README says what each figure means. `share`: of the time, for asking; None: not asked."""
    total = Counters(*(sum(getattr(out.counters, f.name) for out in row.outputs) for f in fields(Counters)))
    lengths, full_lengths = ([len(out.tokens) for out in measured.outputs] for measured in (row, full))

    def speedup(tokens, seconds, full_tokens, full_seconds):
        return (sum(tokens) / sum(seconds)) / (sum(full_tokens) / sum(full_seconds))

    columns = (lengths, row.seconds, full_lengths, full.seconds)
    ideal = model.config.n_layers * total.tokens / total.block_runs
    texts, full_texts = ([tokenizer.decode(out.tokens) for out in measured.outputs] for measured in (row, full))
    references = [list(example.references) for example in examples]
    return {
        "task": task,
        "name": name,
        "config": asdict(row.config),
        "tokens_per_s": total.tokens / sum(row.seconds),
        "speedup": speedup(*columns),
        "speedup_ci": bootstrap(speedup, *columns),
        "ideal_speedup": ideal,
        "exit_efficiency": speedup(*columns) / ideal,
        "avg_exit_layer": mean(layer for out in row.outputs for layer in out.exit_layers),
        "block_rows_per_token": total.block_rows / total.tokens,
        "rows_per_deep_pass": total.deep_rows / total.deep_passes if total.deep_passes else None,
        "flops_per_token": (total.block_flops + total.head_flops) / total.tokens,
        "confidence_flops_per_token": total.confidence_flops / total.tokens,
        "confidence_time_share": share,
        "agreement": mean(token_agreement(out.tokens, base.tokens) for out, base in zip(row.outputs, full.outputs)),
        "rougeL_full": mean(map(rouge_l_f1, texts, full_texts)),
        "scores": {"bleu": bleu(texts, references, lowercase=task in LOWERCASE_BLEU), "rougeL": mean(map(rouge_l, texts, references))},
        "miss_rate": total.missed / total.pruned_deep if total.pruned_deep else None,
        "accepted": total.accepted / total.drafted if total.drafted else None,
        "rolled_back": (total.drafted - total.accepted) / total.drafted if total.drafted else None,
        "prompts": [
            {"prompt": example.prompt, "references": example.references, "text": text, "tokens": out.tokens, "exit_layers": out.exit_layers,
             "confidences": out.confidences, "seconds": seconds}
            for example, text, out, seconds in zip(examples, texts, row.outputs, row.seconds)
        ],
    }  # fmt: skip


def evaluate(model, tokenizer, task: str, examples: list[Example], configs: dict[str, DecodeConfig], repeat: int) -> list[dict]:
    """Rows of one task, first that of the full model under the same length and sampling."""
    prompts = [encode_prompt(tokenizer, example.prompt) for example in examples]
    full = next(iter(configs.values())).full()
    rows = measure(model, prompts, {"full": full, **configs}, repeat, task)
    summaries = []
    for name, row in rows.items():
        asks = any(asked for out in row.outputs for asked in out.confidences)
        share = confidence_share(model, prompts[::3], row.config) if asks else None
        summaries.append(summarize(model, tokenizer, task, examples, name, row, rows["full"], share))
    return summaries


def environment(model: Transformer) -> dict:
    """Where the figures were measured."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {
        "device": torch.cuda.get_device_name() if model.embedding.is_cuda else cpu, "threads": torch.get_num_threads(),
        "dtype": str(model.embedding.dtype).removeprefix("torch."), "weights": model.form, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Rows of one task as aligned text, which is Markdown too."""
    head = ["", "tokens/s", "speed-up (95 %)", "ideal", "efficiency", "exit layer", "MFLOPs/token (conf.)", "conf. time", "BLEU", "ROUGE-L",
            "agreement", "ROUGE-L to full", "missed", "drafts kept"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        share = row["confidence_flops_per_token"] / row["flops_per_token"]
        low, high = row["speedup_ci"]
        lines.append([
            row["name"], f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f} ({low:.2f}-{high:.2f})", f"{row['ideal_speedup']:.2f}",
            f"{row['exit_efficiency']:.2f}", f"{row['avg_exit_layer']:.1f}", f"{row['flops_per_token'] / 1e6:.1f} ({share:.0%})",
            "" if row["confidence_time_share"] is None else f"{row['confidence_time_share']:.0%}",
            *(f"{100 * row['scores'][score]:.1f}" for score in ("bleu", "rougeL")), f"{row['agreement']:.3f}", f"{row['rougeL_full']:.3f}",
            *("" if row[key] is None else f"{row[key]:.1%}" for key in ("miss_rate", "accepted")),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
