"""JSD is log 2 if no token is possible under both. Neighbours are alike just because they are neighbours:
after the division, a layer is chosen only if it differs by more than its distance explains."""

import torch


def kl(p, m):
    return torch.xlogy(p, p / m)[p > 0].sum()  # where p is 0, m may be, too


def jsd(p, q):
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def most_different(probs, layer):
    best, largest = None, -1.0
    for j in probs:
        if j < layer:
            distance = float(jsd(probs[layer], probs[j])) / (layer - j)
            if distance > largest:
                best, largest = j, distance
    return best
