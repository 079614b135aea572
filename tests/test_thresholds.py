"""Thresholds: each by hand, and the one that learns against data whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from decode import generate, stream
from decoding.choosing import read_thresholds, settings_of, with_thresholds
from decoding.settings import DecodeConfig
from decoding.thresholds import THRESHOLDS, Adaptive, Constant, Decaying, fit_beta
from model import ModelConfig

PROMPT = [1, 7, 3, 9]


def test_thresholds_by_hand():
    assert [Constant({2: 0.8, 4: 0.5}).at(step, 100) for step in (0, 100)] == [{2: 0.8, 4: 0.5}] * 2
    values = [Decaying({3: 0.8}, tau=4.0).at(step, 100)[3] for step in (0, 50, 100)]
    assert values == pytest.approx([0.72 + 0.1, 0.72 + 0.1 * math.exp(-2), 0.72 + 0.1 * math.exp(-4)])
    assert Decaying({1: 0.0}).at(0, 10) == {1: 0.0}  # a static exit stays one


@pytest.mark.parametrize("schedule", THRESHOLDS)
@pytest.mark.parametrize("seed", range(20))
def test_thresholds_stay_between_zero_and_one_whatever_they_see(schedule, seed):
    random = np.random.default_rng(seed)
    for t, tau, target in ((0.0, 1e-9, 0.01), (0.3, 1.0, 0.5), (1.0, 1e9, 0.999)):
        bar = THRESHOLDS[schedule]({2: t, 3: t}, tau, target)
        for step in range(8):
            assert all(0 <= value <= 1 for value in bar.at(step, 7).values()) and set(bar.at(step, 7)) == {2, 3}
            if bar.learns:
                for confidence in random.choice([0.0, 1.0, 0.5, random.random()], 5):
                    bar.learn(float(confidence), bool(random.integers(2)) if seed % 3 else seed % 2 == 0)
                bar.update()
                low, high = (Adaptive.LOW, Adaptive.HIGH) if t else (0, 0)  # a static exit stays one
                assert all(low <= value <= high for value in bar.at(step, 7).values())


def test_a_beta_distribution_is_found_again():
    values = np.random.default_rng(0).beta(2.0, 5.0, 20_000).tolist()
    assert fit_beta(values) == pytest.approx((2.0, 5.0), rel=0.05)


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
    for agreed, better in ((True, lambda value: value < 0.5), (False, lambda value: value == Adaptive.HIGH)):
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
    the layers asked in it."""
    seen = []
    monkeypatch.setattr(Adaptive, "learn", lambda self, confidence, agreed: seen.append((round(confidence, 5), agreed)))
    monkeypatch.setattr(Adaptive, "update", lambda self: None)
    model = tiny_model(2)
    out = generate(model, PROMPT, DecodeConfig(max_new_tokens=25, confidence="softmax", threshold=0.2, threshold_schedule="adaptive"))
    states = model.hidden_states(torch.tensor([PROMPT + out.tokens]))
    expected, waiting = [], []
    for i, (layer, asked) in enumerate(zip(out.exit_layers, out.confidences), len(PROMPT) - 1):
        best = [int(model.head(state[i : i + 1]).argmax()) for state in states]
        if layer < 5:
            waiting.append((round(asked[layer], 5), best[layer] == best[5]))
        else:
            expected += waiting + [(round(c, 5), best[j] == best[5]) for j, c in asked.items()]
            waiting = []
    assert seen == expected and {agreed for _, agreed in seen} == {False, True}


def test_thresholds_of_single_layers(tiny_model):
    config = DecodeConfig(max_new_tokens=30, confidence="softmax", exit_layers=(2, 4), layer_thresholds=(0.9, 0.1))
    out = generate(tiny_model(1), PROMPT, config)
    for layer, asked in zip(out.exit_layers, out.confidences):
        assert [c >= {2: 0.9, 4: 0.1}[j] for j, c in asked.items()] == [j == layer for j in asked]
    assert config.exits(ModelConfig(n_layers=5)) == {2: 0.9, 4: 0.1}
    assert replace(config, min_layer=3).exits(ModelConfig(n_layers=5)) == {4: 0.1}


@pytest.mark.parametrize("settings", [
    {"confidence": "softmax", "exit_layers": [2, 4], "layer_thresholds": [0.5, 0.25], "provenance": {"error": 0.05}},
    {"confidence": "jsd", "threshold": 0.3},
])  # fmt: skip
def test_a_file_of_thresholds_gives_settings(tmp_path, settings):
    (tmp_path / "t.json").write_text(json.dumps(settings))
    read = read_thresholds(tmp_path / "t.json")
    assert read == {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items() if name != "provenance"}
    assert DecodeConfig(**read).confidence == settings["confidence"] and with_thresholds(None, {}) == {}


def test_a_threshold_outranks_those_of_single_layers_from_below(tmp_path):
    (tmp_path / "m.json").write_text('{"decode": {"exit_layers": [2, 4], "layer_thresholds": [0.9, 0.8]}}')
    config, _ = settings_of(str(tmp_path / "m.pt"), None, {"threshold": 0.1})
    assert config.layer_thresholds is None and config.threshold == 0.1 and config.exit_layers == (2, 4)
    assert settings_of(str(tmp_path / "m.pt"), None, {})[0].layer_thresholds == (0.9, 0.8)
    both = {"threshold": 0.1, "layer_thresholds": (0.5, 0.4)}
    assert settings_of(str(tmp_path / "m.pt"), None, both)[0].layer_thresholds == (0.5, 0.4)


def test_a_file_for_a_function_of_ones_own_needs_the_flag_that_names_it(tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "my_file:stable", "threshold": 0.3}')
    assert with_thresholds(tmp_path / "t.json", {"confidence": "my_file:stable"}) == {"confidence": "my_file:stable", "threshold": 0.3}
    with pytest.raises(ValueError, match="named by the flag --confidence alone"):
        with_thresholds(tmp_path / "t.json", {"confidence": "my_file:other"})


@pytest.mark.parametrize("content, complaint", [
    ("{", "not JSON"), ("[1]", "not usable"), ("[" * 100_000, "nested too deep"),
    ('{"threshold": 2}', "threshold is 2"), ('{"treshold": 0.5}', "treshold"),
    (None, "no such file"), ('{"layer_thresholds": [0.5], "exit_layers": [2, 3]}', "has 1 values"), ('{"threshold": "high"}', "not usable"),
    ('{"exit_layers": ["a"]}', "exit_layers cannot be 'a'"), ('{"verify": 3}', "verify cannot be '3'"),
    ('{"max_new_tokens": 2.5}', "cannot be '2.5'"),
])  # fmt: skip
def test_a_file_that_holds_none_is_one_clear_error(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        read_thresholds(tmp_path / "t.json")
    assert str(error.value).startswith(str(tmp_path / "t.json")) and "\n" not in str(error.value)
