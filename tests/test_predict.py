"""What is emitted: contrastive prediction against NumPy and naive loops, the recipes of the README, and the
repetition penalty by hand."""

import numpy as np
import pytest
import torch

from decode import generate
from decoding.prediction import contrast_logits, penalize
from decoding.record import block_flops
from decoding.settings import DecodeConfig
from decoding.trace import Trace
from tests.reference import PROMPT


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def jsd(p, q):
    m = (p + q) / 2
    return sum(np.sum(a * np.log(a / m)) for a in (p, q)) / 2


def layers_ref(model, tokens) -> list[np.ndarray]:
    """p_1 .. p_L after tokens, in NumPy; index 0 is empty."""
    states = model.hidden_states(torch.tensor([tokens]))
    return [None, *(softmax(model.head(state[0, -1], layer).double().numpy()) for layer, state in enumerate(states) if layer)]


def penalized(s, seen, penalty):
    s = s.copy()
    for token in set(seen):
        s[token] = s[token] / penalty if s[token] > 0 else s[token] * penalty
    return s


@pytest.mark.parametrize("predict", ["acd", "dola", "cd"])
@pytest.mark.parametrize("prune", ["none", "fixed:30"])
def test_contrasted_scores_equal_their_formulas(tiny_model, predict, prune):
    """Of layer 4, whose amateur is layer 2, the more different of 2 and 3, or a second model."""
    for seed in range(5):
        model, second = tiny_model(seed), torch.randn(50, generator=torch.Generator().manual_seed(seed))
        trace = Trace(model, DecodeConfig(prune=prune))
        trace.hidden = model.hidden_states(torch.tensor([PROMPT]))[:5]
        trace.prune()
        found = contrast_logits(trace, 4, predict, second if predict == "cd" else None).double().numpy()
        kept = list(range(50)) if trace.candidates is None else trace.candidates.tolist()
        layers = {layer: layers_ref(model, PROMPT)[layer][kept] for layer in (2, 3, 4)}
        layers = {layer: p / p.sum() for layer, p in layers.items()}
        p, q = layers[4], layers[2]
        if predict == "dola":
            q = max(q, layers[3], key=lambda q: jsd(p, q))
        elif predict == "cd":
            q = softmax(second.double().numpy()[kept] / 0.5)
        head = p >= 0.1 * p.max()
        if predict == "acd":
            expected = np.log(np.where(head, p[head].sum() * (p / q) / (p / q)[head].sum(), p))
        else:
            expected = np.where(head, np.log(p / q), -np.inf)
        assert found == pytest.approx(expected, abs=1e-4) and 0 < head.sum()
        assert set(trace.amateurs) == ({4} if predict != "cd" else set())


def recipe(model, steps, choose, **settings):
    """Tokens of the settings, and of a naive loop that calls `choose` with all layers' distributions and the
    text so far."""
    text = list(PROMPT)
    for _ in range(steps):
        text.append(choose(layers_ref(model, text), text))
    return generate(model, PROMPT, DecodeConfig(max_new_tokens=steps, **settings)).tokens, text[len(PROMPT) :]


def test_acd_contrasts_the_last_layer_with_the_one_at_half_the_depth(tiny_model):
    for seed in range(5):
        model = tiny_model(seed)

        def choose(p, text):
            head = p[5] >= 0.1 * p[5].max()
            ratio = p[5] / p[2]
            return int(np.argmax(np.where(head, p[5][head].sum() * ratio / ratio[head].sum(), p[5])))

        found, expected = recipe(model, 20, choose, predict="acd")
        assert found == expected != generate(model, PROMPT, DecodeConfig(max_new_tokens=20)).tokens


def test_dola_contrasts_with_the_most_different_layer_under_a_repetition_penalty(tiny_model):
    layers, otherwise = set(), 0
    for seed in range(5):

        def choose(p, text):
            nonlocal otherwise
            amateur = max((2, 3, 4), key=lambda j: jsd(p[5], p[j]))
            layers.add(amateur)
            otherwise += amateur != max((2, 3, 4), key=lambda j: jsd(p[5], p[j]) / (5 - j))
            s = np.where(p[5] >= 0.1 * p[5].max(), np.log(p[5] / p[amateur]), -np.inf)
            return int(np.argmax(penalized(s, text, 1.2)))

        found, expected = recipe(tiny_model(seed), 20, choose, predict="dola", repetition_penalty=1.2)
        assert found == expected
    assert len(layers) > 1 and otherwise > 2  # without the distance, which would choose otherwise


def test_contrastive_decoding_runs_a_second_model_in_step(tiny_model):
    """With and without early exits of the first; the second has other shapes, and its own temperature."""
    layers = set()
    for seed in range(4):
        model, amateur = tiny_model(seed), tiny_model(seed + 10, n_layers=2, d_model=16)
        for exits in (None, "softmax"):
            config = DecodeConfig(max_new_tokens=20, predict="cd", confidence=exits, threshold=0.15)
            out = generate(model, PROMPT, config, amateur=amateur)
            text = list(PROMPT)
            for layer in out.exit_layers:
                p = layers_ref(model, text)[layer]
                q = softmax(np.log(layers_ref(amateur, text)[2]) / 0.5)
                text.append(int(np.argmax(np.where(p >= 0.1 * p.max(), np.log(p / q), -np.inf))))
            assert out.tokens == text[len(PROMPT) :]
        layers.update(out.exit_layers)
    assert len(layers) > 1


def test_what_an_amateur_costs_is_counted(tiny_model):
    model, amateur = tiny_model(0), tiny_model(1, n_layers=2)
    config = DecodeConfig(max_new_tokens=5, predict="cd")
    alone = generate(model, PROMPT, DecodeConfig(max_new_tokens=5)).counters
    both = generate(model, PROMPT, config, amateur=amateur).counters
    assert both.block_runs == alone.block_runs and both.head_flops == 2 * alone.head_flops
    steps = [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    assert both.block_flops == alone.block_flops + 2 * sum(block_flops(amateur.config, *rows) for rows in steps)


def test_contrasted_samples_leave_out_what_is_not_plausible(tiny_model):
    model = tiny_model(2)
    p = layers_ref(model, PROMPT)[5]
    config = DecodeConfig(max_new_tokens=1, predict="dola", temperature=1.0)
    drawn = {generate(model, PROMPT, DecodeConfig(**{**vars(config), "seed": seed})).tokens[0] for seed in range(400)}
    assert drawn == set(np.flatnonzero(p >= 0.1 * p.max()))


def test_the_repetition_penalty_by_hand():
    z = torch.tensor([2.0, -1.0, 0.5, -3.0])
    assert penalize(z, [0, 1, 1], 1.5).tolist() == pytest.approx([2 / 1.5, -1.5, 0.5, -3.0])
    assert penalize(z, [9, 7], 2.0, torch.tensor([7, 5, 8, 9])).tolist() == [1.0, -1.0, 0.5, -6.0]  # over candidates
    assert penalize(z, [0], 1.0) is z


@pytest.mark.parametrize("verify", [False, True])
def test_the_repetition_penalty_reads_the_whole_text(tiny_model, verify):
    """Greedy decoding of the full model under the penalty, early drafts verified under it too."""
    for seed in range(5):
        model, text = tiny_model(seed), list(PROMPT)
        for _ in range(20):
            z = model(torch.tensor([text]))[0, -1].double().numpy()
            text.append(int(np.argmax(penalized(z, text, 1.3))))
        config = DecodeConfig(max_new_tokens=20, repetition_penalty=1.3, confidence="softmax" if verify else None, threshold=0.2,
                              verify=verify, prune="fixed:6")  # fmt: skip
        assert generate(model, PROMPT, config).tokens == text[len(PROMPT) :]


@pytest.mark.parametrize("amateur, predict, complaint", [
    ({}, "own", "predict is own, but there is an amateur"), ({}, "dola", "predict is dola, but there is an amateur"),
    (None, "cd", "predict is cd, but there is no amateur"), ({"vocab_size": 49}, "cd", "has 49 tokens and the model 50"),
    ({"max_len": 10}, "cd", "has 10 positions of 24 needed"),
])  # fmt: skip
def test_an_amateur_that_cannot_be_is_refused(tiny_model, amateur, predict, complaint):
    second = None if amateur is None else tiny_model(1, **amateur)
    with pytest.raises(ValueError, match=complaint):
        generate(tiny_model(0), PROMPT, DecodeConfig(max_new_tokens=20, predict=predict), amateur=second)
