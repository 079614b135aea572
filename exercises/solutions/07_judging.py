"""x is emitted in two ways. It is drawn and kept: q(x) min(1, p(x)/q(x)) = min(p(x), q(x)). Or it replaces
another: a draft is rejected with probability 1 - sum min(p, q) = sum max(p - q, 0), and x is then drawn with
max(p(x) - q(x), 0) divided by that same sum. Together, min(p, q) + max(p - q, 0) = p. The mass comes from the
tokens to which q gave too much."""

import torch


def greedy(logits, drafts):
    best = logits.argmax(-1).tolist()
    for i, draft in enumerate(drafts):
        if draft != best[i]:
            return i, best[i]
    return len(drafts), best[-1]


def sampled(p, q, drafts, generator):
    for i, draft in enumerate(drafts):
        if torch.rand((), generator=generator) * q[i, draft] >= p[i, draft]:
            rest = (p[i] - q[i]).clamp(min=0)
            return i, int(torch.multinomial(rest, 1, generator=generator))
    return len(drafts), int(torch.multinomial(p[-1], 1, generator=generator))
