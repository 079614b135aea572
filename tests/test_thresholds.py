"""Thresholds: each by hand, and the one that learns against data whose answer is known."""

import math

import numpy as np
import pytest
import torch

from decode import generate, stream
from decoding.settings import DecodeConfig
from decoding.thresholds import THRESHOLDS, Adaptive, Constant, Decaying, fit_beta, read_schedule
from model import ModelConfig
from tests.reference import PROMPT


def test_thresholds_by_hand():
    assert [Constant({2: 0.8, 4: 0.5}).at(step, 100) for step in (0, 100)] == [{2: 0.8, 4: 0.5}] * 2
    values = [Decaying({3: 0.8}, tau=4.0).at(step, 100)[3] for step in (0, 50, 100)]
    assert values == pytest.approx([0.72 + 0.1, 0.72 + 0.1 * math.exp(-2), 0.72 + 0.1 * math.exp(-4)])
    assert Decaying({1: 0.0}).at(0, 10) == {1: 0.0}  # a static exit stays one


@pytest.mark.parametrize("schedule", THRESHOLDS)
@pytest.mark.parametrize("seed", range(5))
def test_thresholds_stay_between_zero_and_one_whatever_they_see(schedule, seed):
    random = np.random.default_rng(seed)
    for t, tau, target in ((0.0, 1e-9, 0.01), (0.3, 1.0, 0.5), (1.0, 1e9, 0.999)):
        numbers = {"constant": (), "decaying": (tau,), "adaptive": (target,)}[schedule]
        bar = THRESHOLDS[schedule]({2: t, 3: t}, *numbers)
        for step in range(8):
            assert all(0 <= value <= 1 for value in bar.at(step, 7).values()) and set(bar.at(step, 7)) == {2, 3}
            if bar.learns:
                for confidence in random.choice([0.0, 1.0, 0.5, random.random()], 5):
                    bar.learn(float(confidence), bool(random.integers(2)) if seed % 3 else seed % 2 == 0)
                bar.update()
                low, high = (0.05 - 1e-6, 0.99 + 1e-6) if t else (0, 0)  # a static exit stays one
                assert all(low <= value <= high for value in bar.at(step, 7).values())


def test_a_schedule_is_read_with_its_number_or_its_default():
    found = [read_schedule(text) for text in ("constant", "decaying", "decaying:0.5", "adaptive", "adaptive:0.75")]
    assert found == [(Constant, []), (Decaying, [4.0]), (Decaying, [0.5]), (Adaptive, [0.9]), (Adaptive, [0.75])]
    schedule = DecodeConfig(confidence="softmax", threshold_schedule="decaying:0.5").thresholds(ModelConfig(n_layers=3))
    assert type(schedule) is Decaying and schedule.tau == 0.5 and schedule.thresholds == {1: 0.8, 2: 0.8}


def test_a_beta_distribution_is_found_again():
    values = np.random.default_rng(0).beta(2.0, 5.0, 20_000).tolist()
    fitted = fit_beta(values)
    assert (fitted.concentration1.item(), fitted.concentration0.item()) == pytest.approx((2.0, 5.0), rel=0.05)


def test_the_learned_threshold_is_where_agreement_reaches_its_target():
    """Agreed ~ Beta(6, 2) with share 0.7, disagreed ~ Beta(2, 4): P(agreed | c) = 0.9 has its root at c =
    0.601, by bisection of the densities below."""
    random = np.random.default_rng(1)

    def posterior(c: float) -> float:
        yes, no = 0.7 * 42 * c**5 * (1 - c), 0.3 * 20 * c * (1 - c) ** 3
        return yes / (yes + no)

    low, high = 0.1, 0.99
    while high - low > 1e-6:
        low, high = ((low + high) / 2, high) if posterior((low + high) / 2) < 0.9 else (low, (low + high) / 2)
    bar = Adaptive({4: 0.9}, target=0.9)
    for _ in range(6000):
        agreed = bool(random.random() < 0.7)
        bar.learn(float(random.beta(6, 2) if agreed else random.beta(2, 4)), agreed)
    bar.update()
    assert bar.at(0, 1)[4] == pytest.approx(low, abs=0.03)


def test_exits_that_always_agree_lower_the_bar_and_exits_that_never_do_raise_it():
    for agreed, better in ((True, lambda value: value < 0.5), (False, lambda value: value > 0.98)):
        bar = Adaptive({4: 0.8})
        for confidence in np.linspace(0.2, 0.9, 60):
            bar.learn(float(confidence), agreed)
        bar.update()
        assert better(bar.at(0, 1)[4])


@pytest.mark.parametrize("verify", [False, True])
def test_a_text_is_a_run_of_its_own_and_its_thresholds_show_in_the_trace(tiny_model, verify):
    config = DecodeConfig(max_new_tokens=30, confidence="softmax", threshold=0.1, exit_layers=(2, 3), threshold_schedule="adaptive",
                          verify=verify, max_owed=4)  # fmt: skip
    runs = [list(stream(tiny_model(1), PROMPT, config)) for _ in range(2)]
    assert [token.id for token in runs[0]] == [token.id for token in runs[1]]
    bars = [token.thresholds for token in runs[0] if token.thresholds]
    assert bars[0] == {2: 0.1} or bars[0] == {2: 0.1, 3: 0.1}
    assert len({value for bar in bars for value in bar.values()}) > 3


def test_what_is_learned_is_what_the_full_model_says(tiny_model, monkeypatch):
    """Every pair, against whole forward passes: of the early tokens that a deep pass catches up on, and of
    the layers checked in it."""
    seen = []
    monkeypatch.setattr(Adaptive, "learn", lambda self, confidence, agreed: seen.append((round(confidence, 5), agreed)))
    monkeypatch.setattr(Adaptive, "update", lambda self: None)
    model = tiny_model(2)
    out = generate(model, PROMPT, DecodeConfig(max_new_tokens=25, confidence="softmax", threshold=0.2, threshold_schedule="adaptive"))
    states = model.hidden_states(torch.tensor([PROMPT + out.tokens]))
    expected, waiting = [], []
    for i, (layer, checked) in enumerate(zip(out.exit_layers, out.confidences), len(PROMPT) - 1):
        best = [int(model.head(state[0, i]).argmax()) for state in states]
        if layer < 5:
            waiting.append((round(checked[layer], 5), best[layer] == best[5]))
        else:
            expected += waiting + [(round(c, 5), best[j] == best[5]) for j, c in checked.items()]
            waiting = []
    assert seen == expected and {agreed for _, agreed in seen} == {False, True}
