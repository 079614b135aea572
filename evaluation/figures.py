"""The figures of a table's rows, each computed in one place: speed, work, likeness to the full model's
output, and quality.

docs/evaluation.md explains what they mean; `summarize` collects them under their names in --json.
"""

from dataclasses import asdict
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F

from decoding.record import first_difference
from evaluation import metrics
from evaluation.inputs import Setup, Table, encode_inputs
from evaluation.measure import Measured, confidence_share, run_in_turns
from evaluation.tasks import Task
from formats.data import Example
from model import Transformer

RESAMPLES = 1000  # for the interval of the speed-up

# ---------------------------------------------------------------- a row compared with the full model


def evaluate(setup: Setup, table: Table, time_checks: bool = True) -> list[dict]:
    """Measures the rows of a table, the first of which is the full model. The time of confidence checks is
    measured in a run of its own, on every third prompt."""
    prompts, configurations = encode_inputs(setup, table.task, table.examples, table.configurations)
    measured = run_in_turns(configurations, prompts, setup.config.repeat, table.task.name)
    rows = []
    for name, row in measured.items():
        checks = any(checked for out in row.outputs for checked in out.confidences)
        share = confidence_share(row.configuration, prompts[::3]) if checks and time_checks else None
        rows.append(summarize(setup.tokenizer, table, name, row, measured["full"], share))
    return rows


def summarize(
    tokenizer, table: Table, name: str, row: Measured, full: Measured, checks: float | None
) -> dict:
    """Returns one row of --json and of the table. `checks` is the share of the time that confidence checks
    take."""
    task, examples, configuration = table.task, table.examples, row.configuration
    texts, full_texts = written(tokenizer, row), written(tokenizer, full)
    references = [example.references for example in examples]
    work, speedup = work_figures(row), tokens_per_second(row) / tokens_per_second(full)
    if configuration.model is not full.configuration.model:
        work["ideal_speedup"] = None  # blocks of two models cannot be compared
    kept, resampled = quality_kept(task, texts, full_texts, references)
    return {
        "task": task.name,
        "name": name,
        "checkpoint": configuration.checkpoint,
        "inputs": len(examples),
        "config": asdict(configuration.decode),
        "tokens_per_s": tokens_per_second(row),
        "speedup": speedup,
        "speedup_ci": speedup_interval(row, full),
        "first_token_s": median(row.first),
        **work,
        "exit_efficiency": share(speedup, work["ideal_speedup"]),
        "confidence_time_share": checks,
        **likeness_figures(row, full, texts, full_texts),
        **quality_figures(task, texts, references),
        "kept": kept,
        "kept_ci": metrics.interval(resampled),
        "perplexity": None if task.metrics else perplexity(full.configuration.model, row),
        "distinct_2": metrics.distinct(texts, 2),
        "repetition_4": mean(metrics.repetition(out.tokens) for out in row.outputs),
        "prompts": prompt_records(row, full, examples, texts),
    }


def written(tokenizer, row: Measured) -> list[str]:
    """Decodes the outputs of a row into texts."""
    return [tokenizer.decode(out.tokens).strip() for out in row.outputs]


def prompt_records(row: Measured, full: Measured, examples: list[Example], texts: list[str]) -> list[dict]:
    """Returns what --json stores for every prompt."""
    columns = {
        "prompt": [example.prompt for example in examples],
        "references": [example.references for example in examples],
        "prompt_tokens": row.prompts,
        "text": texts,
        "tokens": [out.tokens for out in row.outputs],
        "exit_layers": [out.exit_layers for out in row.outputs],
        "confidences": [out.confidences for out in row.outputs],
        "seconds": row.seconds,
        "first_token_s": row.first,
        "first_difference": first_differences(row, full),
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


# ---------------------------------------------------------------- speed


def lengths(row: Measured) -> list[int]:
    """The number of tokens of every output."""
    return [len(out.tokens) for out in row.outputs]


def tokens_per_second(row: Measured) -> float:
    """Tokens per second over all prompts."""
    return sum(lengths(row)) / sum(row.seconds)


def speedup_interval(row: Measured, full: Measured) -> list[float]:
    """The 95 % bootstrap interval of the speed-up, in two stages: prompts are drawn with replacement, then
    the repeats of each drawn prompt. It therefore covers both the choice of prompts and the noise of the
    clock. The same repeats are drawn for both rows, since these ran one after the other. With one repeat, the
    second stage has no effect. The interval does not cover anything that affects the whole run."""
    prompts, repeats = np.shape(row.times)
    draw = np.random.default_rng(0)
    drawn = draw.integers(0, prompts, size=(RESAMPLES, prompts))
    turns = draw.integers(0, repeats, size=(RESAMPLES, prompts, repeats))

    def speeds(each: Measured) -> np.ndarray:
        times = np.array(each.times)[drawn[:, :, None], turns]  # (RESAMPLES, prompts, repeats)
        return np.array(lengths(each))[drawn].sum(1) / np.median(times, axis=2).sum(1)

    return metrics.interval(speeds(row) / speeds(full))


# ---------------------------------------------------------------- work


def work_figures(row: Measured) -> dict:
    """Returns figures of the work done: exit layers, blocks and their rows, FLOPs, the miss rate, and the
    acceptance rate of drafts."""
    total = row.total
    shape, shortlist = row.configuration.model.config, bool(row.configuration.decode.shortlist)
    return {
        "ideal_speedup": total.ideal_speedup(shape, shortlist),
        "avg_exit_layer": mean(layer for out in row.outputs for layer in out.exit_layers),
        "block_rows_per_token": total.block_rows / total.tokens,
        "rows_per_deep_pass": share(total.deep_rows, total.deep_passes),
        "flops_per_token": (total.block_flops + total.head_flops) / total.tokens,
        "confidence_flops_per_token": total.confidence_flops / total.tokens,
        "miss_rate": share(total.missed, total.pruned_deep),
        "accepted": share(total.accepted, total.drafted),
    }


def share(part: float, whole: float | None, otherwise: float | None = None) -> float | None:
    """part / whole; `otherwise` if the whole is 0, or does not apply."""
    return part / whole if whole else otherwise


# ---------------------------------------------------------------- likeness to the full model


def first_differences(row: Measured, full: Measured) -> list[int | None]:
    """Returns the first position at which each output differs from the full model's, or None."""
    return [first_difference(out.tokens, base.tokens) for out, base in zip(row.outputs, full.outputs)]


def likeness_figures(row: Measured, full: Measured, texts: list[str], full_texts: list[str]) -> dict:
    """Compares the outputs with the full model's: their tokens position by position, whole texts, and ROUGE-L
    F1 of the texts."""
    differences = first_differences(row, full)
    changed = [at for at in differences if at is not None]
    overlaps = [metrics.rouge_l_f1(*pair) for pair in zip(texts, full_texts)]
    pairs = zip(row.outputs, full.outputs)
    return {
        "agreement": mean(metrics.token_agreement(out.tokens, base.tokens) for out, base in pairs),
        "same_texts": mean(at is None for at in differences),
        "first_difference": median(changed) if changed else None,
        "rougeL_full": mean(overlaps),
        "rougeL_full_ci": metrics.interval(metrics.resampled_means(overlaps)),
    }


# ---------------------------------------------------------------- quality

References = list[tuple[str, ...]]  # the references of every text


def quality_figures(task: Task, texts: list[str], references: References) -> dict:
    """The scores of the task, each in [0, 1], and their bootstrap intervals over the prompts."""
    scores, intervals = {}, {}
    for name, metric in task.metrics.items():
        count, score = metrics.METRICS[metric].count, metrics.METRICS[metric].score
        counts = count(texts, references)
        scores[name] = score(counts.sum(0))
        intervals[name] = metrics.interval([score(sums) for sums in metrics.resampled_sums(counts)])
    return {"scores": scores, "scores_ci": intervals}


def quality_kept(
    task: Task, texts: list[str], full_texts: list[str], references: References
) -> tuple[float, np.ndarray]:
    """Returns the share of the full model's scores that a row keeps (the smallest share, if there are several
    scores), and the same for bootstrap resamples of the prompts, which are the same for both rows. The share
    is 1 where the full model's score is 0. A task without scores uses ROUGE-L to the full model's texts."""
    if not task.metrics:
        overlaps = [metrics.rouge_l_f1(*pair) for pair in zip(texts, full_texts)]
        return mean(overlaps), metrics.resampled_means(overlaps)
    shares, resampled = [], []
    for name in task.metrics.values():
        score, count = metrics.METRICS[name].score, metrics.METRICS[name].count
        own, whole = count(texts, references), count(full_texts, references)
        shares.append(share(score(own.sum(0)), score(whole.sum(0)), otherwise=1.0))
        sums = zip(metrics.resampled_sums(own), metrics.resampled_sums(whole))
        resampled.append([share(score(a), score(b), otherwise=1.0) for a, b in sums])
    return min(shares), np.min(resampled, axis=0)


@torch.inference_mode()
def perplexity(model: Transformer, row: Measured) -> float:
    """Returns exp of the mean loss (nats) of the row's output tokens under the full model, each output after
    its prompt."""
    losses = []
    for prompt, out in zip(row.prompts, row.outputs):
        text = torch.tensor([*prompt, *out.tokens], device=model.device)
        states = model.hidden_states(text[None, :-1])[-1][0, len(prompt) - 1 :]
        losses.append(F.cross_entropy(model.head(states), text[len(prompt) :], reduction="none"))
    return torch.cat(losses).mean().exp().item()


def best_rows(rows: list[dict]) -> set[str]:
    """Returns the names of the rows that are clearly on the Pareto front: every other row is slower or keeps
    less quality, by intervals that do not overlap."""

    def surely_better(row: dict, other: dict) -> bool:
        return any(row[key][0] > other[key][1] for key in ("speedup_ci", "kept_ci"))

    best = [row for row in rows if all(surely_better(row, other) for other in rows if other is not row)]
    return {row["name"] for row in best}
