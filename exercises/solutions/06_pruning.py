"""It can change the text at the exits: among fewer candidates the probabilities are larger, so a margin
reaches the threshold sooner, and a token that would have risen to the top there may be gone."""

import math


def halving(n, k, k_min):
    if n > k:
        return k
    return max(k_min, math.ceil(n / 2))


def keep(logits, candidates, size):
    best = logits.topk(size).indices  # of the candidates, not of the vocabulary
    return candidates[best]
