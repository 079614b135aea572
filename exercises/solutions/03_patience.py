"""Entropy needs one head, which is needed anyway to emit the token; patience needs three, unless every layer
is checked in turn: then two of them have been computed already. On this model a head costs as much as a block
and a half, so patience is best checked late, or over few candidates (exercise 6)."""

import math

import torch


def entropy(trace, layer):
    log_p = trace.logits(layer).log_softmax(-1)
    return 1 + (log_p.exp() * log_p).sum() / math.log(len(log_p))


def patience(trace, layer):
    if layer < 3:
        return torch.tensor(0.0)
    best = trace.logits(layer).argmax()
    same = best == trace.logits(layer - 1).argmax() and best == trace.logits(layer - 2).argmax()
    return torch.tensor(1.0 if same else 0.0)
