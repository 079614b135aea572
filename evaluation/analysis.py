"""Measures how well each layer predicts the next token, and how well each confidence function judges that
prediction, on texts that the full model wrote."""

from dataclasses import dataclass

import numpy as np
import torch

from confidence import FUNCTIONS, jensen_shannon
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from model import Transformer

BINS = 10  # number of confidence bins in reliability diagrams and the calibration error
Text = tuple[list[int], list[int]]  # the token ids of a prompt and of the output


@dataclass
class Views:
    """The predictions of layers 1 .. L-1 of a model at n positions; arrays are (n, L - 1)."""

    ranks: np.ndarray  # of the last layer's token at this layer; 1 is the most probable
    agrees: np.ndarray  # whether the layer's most probable token is the last layer's
    confidence: dict[str, np.ndarray]  # by function


@torch.inference_mode()
def look(model: Transformer, texts: list[Text], functions: tuple[str, ...], positions: int = 400) -> Views:
    """Runs the full model over texts, and evaluates every layer and function at the first `positions`
    positions that predict a token of an output. Texts that are not needed for these are not read."""
    L, ranks, agrees = model.config.n_layers, [], []
    confidence = {name: [] for name in functions}
    for prompt, output in texts:
        wanted = min(len(output), positions - len(ranks))
        if wanted == 0:
            break
        tokens = torch.tensor([prompt + output[: wanted - 1]], device=model.device)
        states = model.hidden_states(tokens)
        for at in range(len(prompt) - 1, len(prompt) - 1 + wanted):
            rows = [state[:, at : at + 1] for state in states]
            token = int(model.head(rows[L]).argmax())
            logits = [model.head(rows[layer], layer)[0, 0] for layer in range(1, L)]
            ranks.append([int((z > z[token]).sum()) + 1 for z in logits])
            agrees.append([int(z.argmax()) == token for z in logits])
            for name, found in confidence.items():
                trace = Trace(model, DecodeConfig(confidence=FUNCTIONS[name]))  # layers share their logits
                trace.hidden = rows
                found.append([float(FUNCTIONS[name](trace, layer)) for layer in range(1, L)])
    arrays = {name: np.array(values) for name, values in confidence.items()}
    return Views(np.array(ranks), np.array(agrees), arrays)


@torch.inference_mode()
def divergences(model: Transformer, prompt: list[int], output: list[int]) -> np.ndarray:
    """Returns the JSD between each layer 1 .. L-1 and the last, in [0, log 2], at every position that
    predicts a token of the output: (L - 1, T)."""
    tokens = torch.tensor([prompt + output[:-1]], device=model.device)
    rows = [state[0, len(prompt) - 1 :] for state in model.hidden_states(tokens)]
    final = model.head(rows[-1]).log_softmax(-1)
    heads = [model.head(row, layer).log_softmax(-1) for layer, row in enumerate(rows[1:-1], 1)]
    return torch.stack([jensen_shannon(final, head) for head in heads]).cpu().numpy()


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """Divides [0, 1] into BINS bins of equal width, and returns (mean confidence, share right, count) of each
    bin that is not empty."""
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [which == number for number in np.unique(which)]
    return [(confidence[inside].mean(), right[inside].mean(), int(inside.sum())) for inside in bins]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Returns the expected calibration error in [0, 1]: the mean over bins of the distance between mean
    confidence and share of right answers, weighted by count (Naeini 2015)."""
    distances = [count * abs(c - r) for c, r, count in reliability(confidence, right)]
    return sum(distances) / len(confidence)


def auroc(confidence: np.ndarray, right: np.ndarray) -> float:
    """Returns the probability that a right answer has a higher confidence than a wrong one. A tie counts
    half. It is NaN if all answers are right, or all are wrong."""
    positives, negatives = right.sum(), (~right).sum()
    if not positives or not negatives:
        return np.nan
    _, index, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]  # mean rank of equal values
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))
