"""2. JSD by hand: how different are two layers' opinions?

DoLa (Chuang 2023) contrasts the last layer with the earlier layer that differs from it most. The distance is
the Jensen-Shannon divergence: with m = (p + q) / 2,

    JSD(p, q) = KL(p‖m) / 2 + KL(q‖m) / 2        KL(p‖m) = sum over x of p(x) log(p(x) / m(x))

The logarithm is the natural one, and 0 log 0 = 0. JSD is symmetric, 0 for equal distributions, and never
above log 2: a value above that, which users of DoLa have reported, shows a mistake (the wrong direction of
the KL, logits instead of probabilities, or a mean over the vocabulary instead of the sum).

Write both functions, then

    python -m pytest exercises/02_jsd.py

(To think about: for which p and q is it log 2? And why does the project divide by the distance l - j of the
layers?)
"""

import math

import torch


def jsd(p, q):
    """The Jensen-Shannon divergence of the distributions p and q, (n,) each, which may hold zeros: a scalar
    tensor."""
    raise NotImplementedError("your turn")


def most_different(probs, layer):
    """The layer j below `layer` with the largest JSD(p_layer, p_j) / (layer - j). probs: layer ->
    distribution (n,)."""
    raise NotImplementedError("your turn")


# ---------------------------------------------------------------- the test: nothing to change below


def test_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2 + math.log(1 / 0.75) / 2
    assert abs(float(jsd(p, q)) - expected) < 1e-6
    assert float(jsd(p, p)) == 0


def test_it_is_symmetric_and_at_most_log_2():
    torch.manual_seed(0)
    for _ in range(20):
        p, q = torch.randn(2, 50).mul(4).softmax(-1)
        assert abs(float(jsd(p, q) - jsd(q, p))) < 1e-6
        assert 0 <= float(jsd(p, q)) <= math.log(2) + 1e-6
    assert abs(float(jsd(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) - math.log(2)) < 1e-6


def test_distance_decides_between_equally_different_layers():
    near, far = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    assert most_different({2: far, 4: far, 6: near}, 6) == 4
    assert most_different({2: far, 4: near, 6: near}, 6) == 2
    assert most_different({2: near, 4: torch.tensor([0.8, 0.2]), 6: near, 8: far}, 6) == 4  # 8 lies above 6
