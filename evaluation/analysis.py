"""What every layer knows of the next token, and how well each confidence function tells: over texts that the
full model has written."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from confidence import FUNCTIONS, Trace, jensen_shannon
from model import Transformer

BINS = 10  # of confidence, in reliability diagrams and the calibration error


@dataclass
class Views:
    """What the layers 1 .. L-1 of a model see at n positions; arrays are (n, L - 1)."""

    ranks: np.ndarray  # of the last layer's token among all; 1 is the first
    agrees: np.ndarray  # whether the layer's own token is the last layer's
    confidence: dict[str, np.ndarray]  # of each function


@torch.inference_mode()
def look(
    model: Transformer,
    texts: Iterable[tuple[list[int], list[int]]],
    functions: tuple[str, ...],
    positions: int = 400,
) -> Views:
    """Reads texts (prompt, output) at full depth, and asks every layer and function at the positions that
    gave the outputs, the first `positions` of them; unpruned. Texts that are not needed for these are not
    read."""
    L, ranks, agrees = model.config.n_layers, [], []
    confidence = {name: [] for name in functions}
    for prompt, output in texts:
        wanted = min(len(output), positions - len(ranks))
        if wanted == 0:
            break
        tokens = torch.tensor([prompt + output[: wanted - 1]], device=model.embedding.device)
        states = model.hidden_states(tokens)
        for at in range(len(prompt) - 1, len(prompt) - 1 + wanted):
            rows = [state[at : at + 1] for state in states]
            token = int(model.head(rows[L]).argmax())
            logits = [model.head(rows[layer], layer)[0] for layer in range(1, L)]
            ranks.append([int((z > z[token]).sum()) + 1 for z in logits])
            agrees.append([int(z.argmax()) == token for z in logits])
            for name in functions:
                confidence[name].append(asked(model, name, rows))
    return Views(
        np.array(ranks), np.array(agrees), {name: np.array(values) for name, values in confidence.items()}
    )


def asked(model: Transformer, name: str, rows: list[torch.Tensor]) -> list[float]:
    """The confidence of one function after each layer below the last. rows: h_0 .. h_L of one position,
    (1, d) each."""
    trace, answers = Trace(model, FUNCTIONS[name]), []
    for layer in range(1, len(rows) - 1):
        trace.hidden = rows[: layer + 1]
        answers.append(float(FUNCTIONS[name](trace, layer)))
    return answers


@torch.inference_mode()
def divergences(model: Transformer, prompt: list[int], output: list[int]) -> np.ndarray:
    """JSD of every layer 1 .. L-1 to the last, at each position that gave a token of the output: (L - 1, T),
    in [0, log 2]."""
    tokens = torch.tensor([prompt + output[:-1]], device=model.embedding.device)
    rows = [state[len(prompt) - 1 :] for state in model.hidden_states(tokens)]
    final = model.head(rows[-1]).log_softmax(-1)
    each = [
        jensen_shannon(final, model.head(row, layer).log_softmax(-1))
        for layer, row in enumerate(rows[1:-1], 1)
    ]
    return torch.stack(each).cpu().numpy()


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, count) of each of the equal bins of [0, 1] that holds something."""
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    for i in range(BINS):
        inside = which == i
        if inside.any():
            bins.append((confidence[inside].mean(), right[inside].mean(), int(inside.sum())))
    return bins


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in [0, 1]: the mean distance of confidence and share right, over bins,
    weighted by count (Naeini 2015)."""
    distances = [count * abs(c - r) for c, r, count in reliability(confidence, right)]
    return sum(distances) / len(confidence)


def auroc(confidence: np.ndarray, right: np.ndarray) -> float | None:
    """Probability that a right answer has the higher confidence than a wrong one, ties counting half; None if
    all are right, or wrong."""
    positives, negatives = right.sum(), (~right).sum()
    if not positives or not negatives:
        return None
    _, index, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]  # mean rank of equal values
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))
