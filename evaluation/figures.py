"""The figures of a row, each computed in one place: speed, work, likeness to the full model's output,
quality.

docs explain what they mean to a reader of the table; `summarize` puts them together under the names of
--json.
"""

from collections import defaultdict
from dataclasses import asdict, fields, replace
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F

from decoding.record import Counters, first_difference
from decoding.settings import DecodeConfig
from evaluation.measure import Measured, confidence_share, encode_inputs, run_in_turns
from evaluation.metrics import (
    METRICS,
    bootstrap,
    distinct,
    repetition,
    resampled_sums,
    rouge_l_f1,
    token_agreement,
)
from evaluation.tasks import Task
from formats.data import Example
from model import ModelConfig, Transformer

RESAMPLES = 1000  # of the interval of the speed-up

# ---------------------------------------------------------------- a row beside the full model


def baseline(config: DecodeConfig) -> DecodeConfig:
    """The full model that a row is compared with: under the same length, prediction and sampling. A row
    without exits whose tokens come from a contrast (DoLa, ACD) is compared with the model's own
    prediction."""
    return config.full() if config.confidence else replace(config, predict="own").full()


def alike(configs: dict[str, DecodeConfig]) -> list[dict[str, DecodeConfig]]:
    """The configs in groups that one full model serves."""
    groups = defaultdict(dict)
    for name, config in configs.items():
        groups[baseline(config)][name] = config
    return list(groups.values())


def evaluate(
    model,
    tokenizer,
    task: Task,
    examples: list[Example],
    configs: dict[str, DecodeConfig],
    repeat: int,
    time_questions: bool = True,
) -> list[dict]:
    """Rows of one task, first that of the full model, which is one for all of these configs (see `alike`).
    The share of time for asking is measured in a run of its own, on every third prompt."""
    prompts, configs = encode_inputs(model, tokenizer, task, examples, configs)
    full = baseline(next(iter(configs.values())))
    rows = run_in_turns(model, prompts, {"full": full, **configs}, repeat, task.name)
    summaries = []
    for name, row in rows.items():
        asks = any(asked for out in row.outputs for asked in out.confidences)
        share = confidence_share(model, prompts[::3], row.config) if asks and time_questions else None
        summaries.append(summarize(model, tokenizer, task, examples, name, row, rows["full"], share))
    return summaries


def summarize(
    model: Transformer,
    tokenizer,
    task: Task,
    examples: list[Example],
    name: str,
    row: Measured,
    full: Measured,
    asking: float | None,
) -> dict:
    """One row of --json, and of the table. asking: share of the time spent on it; None: not measured."""
    texts, full_texts = written(tokenizer, row), written(tokenizer, full)
    references = [list(example.references) for example in examples]
    work = work_figures(row, model.config)
    speed = speed_figures(row, full)
    summary = {"task": task.name, "name": name, "inputs": len(examples), "config": asdict(row.config)}
    summary |= speed | work
    summary["exit_efficiency"] = speed["speedup"] / work["ideal_speedup"]
    summary["confidence_time_share"] = asking
    summary |= likeness_figures(row, full, texts, full_texts)
    summary |= quality_figures(task, texts, references)
    summary["kept"] = quality_kept(task, texts, full_texts, references)
    summary["kept_ci"] = quality_interval(task, texts, full_texts, references)
    summary["perplexity"] = None if task.metrics else perplexity(model, row)
    summary["distinct_2"] = distinct(texts, 2)
    summary["repetition_4"] = mean(repetition(out.tokens) for out in row.outputs)
    summary["prompts"] = prompt_records(row, full, examples, texts)
    return summary


def written(tokenizer, row: Measured) -> list[str]:
    """The texts of a row."""
    return [tokenizer.decode(out.tokens).strip() for out in row.outputs]


def prompt_records(row: Measured, full: Measured, examples: list[Example], texts: list[str]) -> list[dict]:
    """What --json keeps of every prompt."""
    records = []
    seconds = row.seconds
    for i, (example, out) in enumerate(zip(examples, row.outputs)):
        record = {"prompt": example.prompt, "references": example.references, "prompt_tokens": row.prompts[i]}
        record |= {"text": texts[i], "tokens": out.tokens, "exit_layers": out.exit_layers}
        record |= {"confidences": out.confidences, "seconds": seconds[i], "first_token_s": row.first[i]}
        record["first_difference"] = first_difference(out.tokens, full.outputs[i].tokens)
        records.append(record)
    return records


# ---------------------------------------------------------------- speed


def lengths(row: Measured) -> list[int]:
    """Tokens of every output."""
    return [len(out.tokens) for out in row.outputs]


def speed_figures(row: Measured, full: Measured) -> dict:
    """Tokens a second over all prompts, in how many times the full model's, with its interval, and what the
    first token and each later one took."""
    speed, full_speed = (sum(lengths(each)) / sum(each.seconds) for each in (row, full))
    later = []
    for count, seconds, first in zip(lengths(row), row.seconds, row.first):
        if count > 1:
            later.append((seconds - first) / (count - 1))
    return {
        "tokens_per_s": speed,
        "speedup": speed / full_speed,
        "speedup_ci": speedup_interval(row, full),
        "first_token_s": median(row.first),
        "later_token_s": median(later) if later else None,
    }


def speedup_interval(row: Measured, full: Measured) -> list[float]:
    """95 % bootstrap interval of the speed-up in two stages: prompts are drawn with replacement, then the
    repeats of each drawn prompt, so that it covers both what prompts were asked and the noise of the clock. A
    repeat is drawn for both rows alike, since they ran side by side. With one repeat the second stage is
    void. What changes the machine for the whole run is not covered by any interval."""
    tokens, full_tokens = np.array(lengths(row)), np.array(lengths(full))
    times, full_times = np.array(row.times), np.array(full.times)  # (prompts, repeats)
    prompts, repeats = times.shape
    draw = np.random.default_rng(0)
    drawn = draw.integers(0, prompts, size=(RESAMPLES, prompts))
    turns = draw.integers(0, repeats, size=(RESAMPLES, prompts, repeats))
    seconds = np.median(times[drawn[:, :, None], turns], axis=2).sum(1)
    full_seconds = np.median(full_times[drawn[:, :, None], turns], axis=2).sum(1)
    values = (tokens[drawn].sum(1) / seconds) / (full_tokens[drawn].sum(1) / full_seconds)
    return interval(values)


def interval(values, level: float = 0.95) -> list[float]:
    """The quantiles between which the share `level` of the values lies."""
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()


# ---------------------------------------------------------------- work


def work_figures(row: Measured, shape: ModelConfig) -> dict:
    """What the counters say, a token: blocks and their rows, FLOPs, and what became of candidates and
    drafts."""
    counts = [asdict(out.counters) for out in row.outputs]
    total = Counters(**{field.name: sum(count[field.name] for count in counts) for field in fields(Counters)})
    kept = share(total.accepted, total.drafted)
    return {
        "ideal_speedup": total.ideal_speedup(shape, bool(row.config.shortlist)),
        "avg_exit_layer": mean(layer for out in row.outputs for layer in out.exit_layers),
        "block_rows_per_token": total.block_rows / total.tokens,
        "rows_per_deep_pass": share(total.deep_rows, total.deep_passes),
        "flops_per_token": (total.block_flops + total.head_flops) / total.tokens,
        "confidence_flops_per_token": total.confidence_flops / total.tokens,
        "miss_rate": share(total.missed, total.pruned_deep),
        "accepted": kept,
        "rolled_back": None if kept is None else 1 - kept,
    }


def share(part: float, whole: float) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None


# ---------------------------------------------------------------- likeness to the full model


def likeness_figures(row: Measured, full: Measured, texts: list[str], full_texts: list[str]) -> dict:
    """How near the outputs are to the full model's: tokens position by position, whole texts, ROUGE-L F1 of
    the texts."""
    pairs = [(out.tokens, base.tokens) for out, base in zip(row.outputs, full.outputs)]
    differences = [first_difference(*pair) for pair in pairs]
    changed = [at for at in differences if at is not None]
    overlaps = [rouge_l_f1(*pair) for pair in zip(texts, full_texts)]
    return {
        "agreement": mean(token_agreement(*pair) for pair in pairs),
        "same_texts": mean(at is None for at in differences),
        "first_difference": median(changed) if changed else None,
        "rougeL_full": mean(overlaps),
        "rougeL_full_ci": bootstrap(np.mean, overlaps),
    }


# ---------------------------------------------------------------- quality


def quality_figures(task: Task, texts: list[str], references: list[list[str]]) -> dict:
    """The scores of the task, each in [0, 1], and their bootstrap intervals over the prompts."""
    scores, intervals = {}, {}
    for name, metric in metrics_of(task):
        counts = metric.count(texts, references)
        scores[name] = metric.score(counts.sum(0))
        intervals[name] = interval([metric.score(sums) for sums in resampled_sums(counts)])
    return {"scores": scores, "scores_ci": intervals}


def metrics_of(task: Task) -> list[tuple]:
    """(name, Metric) of every score of a task."""
    return [(name, METRICS[metric]) for name, metric in task.metrics.items()]


def quality_kept(task: Task, texts: list[str], full_texts: list[str], references: list[list[str]]) -> float:
    """How much of the full model's scores a row keeps: the least of their shares; of a task without scores,
    ROUGE-L to its texts."""
    if not task.metrics:
        return mean(rouge_l_f1(*pair) for pair in zip(texts, full_texts))
    return least_share(task.scores(texts, references).values(), task.scores(full_texts, references).values())


def least_share(scores, full_scores) -> float:
    """The least of score / full score; where the full model has nothing to lose, 1."""
    return min(score / whole if whole else 1.0 for score, whole in zip(scores, full_scores))


def quality_interval(
    task: Task, texts: list[str], full_texts: list[str], references: list[list[str]], level: float = 0.95
) -> list[float]:
    """Bootstrap interval of `quality_kept` over the prompts, of both rows the same in every resample."""
    metrics = [metric for _, metric in metrics_of(task)]
    if not metrics:
        return bootstrap(np.mean, [rouge_l_f1(*pair) for pair in zip(texts, full_texts)], level=level)
    shares = []
    for metric in metrics:
        own = resampled_sums(metric.count(texts, references))
        whole = resampled_sums(metric.count(full_texts, references))
        shares.append([least_share([metric.score(a)], [metric.score(b)]) for a, b in zip(own, whole)])
    return interval(np.min(shares, axis=0), level)


@torch.inference_mode()
def perplexity(model: Transformer, row: Measured) -> float:
    """exp of the mean loss in nats, under the full model, of the tokens of the row's outputs, each after its
    prompt."""
    losses = []
    for prompt, out in zip(row.prompts, row.outputs):
        text = torch.tensor([*prompt, *out.tokens], device=model.embedding.device)
        states = model.hidden_states(text[None, :-1])[-1][len(prompt) - 1 :]
        losses.append(F.cross_entropy(model.head(states), text[len(prompt) :], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def pareto(points: dict[str, tuple[float, float]]) -> set[str]:
    """Names of the points (speed, quality) that no other beats: none is at least as fast and as good, and
    better in one of the two."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point and other[0] >= point[0] and other[1] >= point[1] for other in points.values()
        )

    return {name for name, point in points.items() if not beaten(point)}
