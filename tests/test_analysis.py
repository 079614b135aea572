"""What the layers see, against a reading by hand; calibration error and AUROC against their definitions."""

import math

import numpy as np
import pytest
import torch

from confidence import FUNCTIONS
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from evaluation.analysis import auroc, calibration_error, divergences, look, reliability


def test_views_by_hand(tiny_model):
    model, prompt, output = tiny_model(), [1, 2, 3], [4, 5, 6]
    views = look(model, [(prompt, output), (prompt, output)], ("softmax", "jsd"), positions=4)
    assert views.ranks.shape == views.agrees.shape == views.confidence["jsd"].shape == (4, 4)  # positions, layers below the last
    for row, text in enumerate(([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5])):
        states = [state[:, -1:] for state in model.hidden_states(torch.tensor([text]))]
        best = int(model.head(states[5]).argmax())
        for layer in range(1, 5):
            order = model.head(states[layer], layer)[0, 0].argsort(descending=True).tolist()
            assert views.ranks[row, layer - 1] == order.index(best) + 1
            assert views.agrees[row, layer - 1] == (order[0] == best)
            for name, values in views.confidence.items():
                trace = Trace(model, DecodeConfig())
                trace.hidden = states[: layer + 1]
                assert values[row, layer - 1] == pytest.approx(float(FUNCTIONS[name](trace, layer)), abs=1e-5)


def test_divergences_lie_in_their_range_and_are_nothing_for_equal_layers(tiny_model):
    model = tiny_model()
    found = divergences(model, [1, 2, 3], [4, 5])
    assert found.shape == (4, 2) and (found > 0).all() and (found <= math.log(2) + 1e-6).all()
    for block in model.blocks[2:]:
        block.out.weight.zero_()
        block.down.weight.zero_()
    assert np.allclose(divergences(model, [1, 2, 3], [4, 5])[1:], 0, atol=1e-6)


def test_reliability_and_calibration_error_by_hand():
    confidence, right = np.array([0.0, 0.05, 0.72, 0.78, 1.0]), np.array([False, True, True, False, True])
    assert reliability(confidence, right) == [(pytest.approx(0.025), 0.5, 2), (pytest.approx(0.75), 0.5, 2), (1.0, 1.0, 1)]
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.475 + 2 * 0.25 + 0) / 5)


def test_auroc_is_the_share_of_pairs_in_order():
    draw = np.random.default_rng(0)
    for _ in range(20):
        confidence, right = draw.integers(0, 6, 30) / 5, draw.random(30) < 0.5
        pairs = [(a > b) + 0.5 * (a == b) for a in confidence[right] for b in confidence[~right]]
        assert auroc(confidence, right) == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc(np.array([0.1, 0.2]), np.array([True, True])))
