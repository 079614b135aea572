"""7. Judging drafts: early exit that cannot change the output.

In verified mode early tokens are drafts. When a pass reaches the top, the full model has a distribution for
every one of them, and one more: row i judges draft i, and the last row predicts what follows if all are kept.

Greedy: keep drafts while each is the full model's best token. At the first that is not, put the full model's
in its place.

Sampled (Leviathan 2023, Chen 2023): draft x was drawn from the exit's distribution q; p is the full model's.
Keep x with probability min(1, p(x) / q(x)). At the first that is not kept, draw another from max(p - q, 0),
made to sum to 1. If all are kept, draw one more from the last row. The output is then distributed exactly as
if the full model had drawn it.

    python -m pytest exercises/07_judging.py

(To think about: prove the last sentence for one draft. Where does the mass of max(p - q, 0) come from?)
"""

import torch


def greedy(logits, drafts):
    """How many drafts are kept, and the token that follows them: (int, int). logits (R, V), drafts R - 1
    token ids."""
    raise NotImplementedError("your turn")


def sampled(p, q, drafts, generator):
    """The same for samples. p (R, V) and q (R - 1, V): distributions. Draw with torch.rand((),
    generator=generator) and torch.multinomial(probs, 1, generator=generator), which takes weights of any
    sum."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def test_greedy_by_hand():
    logits = torch.tensor([[0.0, 5.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0]])  # the best: 1, 0, 2
    assert greedy(logits, [1, 0]) == (2, 2)  # all kept, and one more
    assert greedy(logits, [1, 2]) == (1, 0)
    assert greedy(logits, [0, 0]) == (0, 1)  # what follows a wrong draft is not looked at
    assert greedy(logits[:1], []) == (0, 1)


def test_drafts_from_the_full_models_own_distribution_are_always_kept():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0]])
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        drafts = torch.multinomial(p[:2], 1, generator=generator)[:, 0].tolist()
        assert sampled(p, p[:2], drafts, generator) == (2, 1)


def test_what_the_full_model_never_says_is_never_kept():
    p = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.9, 0.1, 0.0]])
    for seed in range(50):
        assert sampled(p, q, [seed % 2], torch.Generator().manual_seed(seed)) == (0, 2)


def test_what_comes_out_is_distributed_as_the_full_model_says():
    """5,000 draws with a fixed seed: the standard deviation of a share is at most 0.007, so 0.03 is more than
    four of them."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    q = torch.tensor([[0.1, 0.2, 0.0, 0.7]])
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(5000):
        draft = int(torch.multinomial(q[0], 1, generator=generator))
        kept, token = sampled(p, q, [draft], generator)
        counts[draft if kept else int(token)] += 1
    assert (counts / 5000 - p[0]).abs().max() < 0.03
