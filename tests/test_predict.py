"""What is emitted: contrastive prediction against NumPy and naive loops, the recipes of the README, and the
repetition penalty by hand."""

import numpy as np
import pytest
import torch

from confidence import Trace
from decode import generate
from decoding.flops import block_flops
from decoding.prediction import CONTRASTS, contrast_logits, penalize
from decoding.settings import DecodeConfig

PROMPT = [1, 7, 3, 9]


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def jsd(p, q):
    m = (p + q) / 2
    return sum(np.sum(a * np.log(a / m)) for a in (p, q)) / 2


def layers_ref(model, tokens) -> list[np.ndarray]:
    """p_1 .. p_L after tokens, in NumPy; index 0 is empty."""
    states = model.hidden_states(torch.tensor([tokens]))
    return [None, *(softmax(model.head(state[-1:], layer)[0].double().numpy()) for layer, state in enumerate(states) if layer)]


def best_ratio(p, q, alpha=0.1):
    """argmax of p / q among the plausible tokens."""
    return int(np.argmax(np.where(p >= alpha * p.max(), p / q, -1)))


def penalized(s, seen, penalty):
    s = s.copy()
    for token in set(seen):
        s[token] = s[token] / penalty if s[token] > 0 else s[token] * penalty
    return s


@pytest.mark.parametrize("form", CONTRASTS)
@pytest.mark.parametrize("prune", ["none", "fixed"])
def test_contrasted_scores_equal_their_formulas(tiny_model, form, prune):
    config = DecodeConfig(predict="contrast", form=form, contrast="2", alpha=0.4, beta=0.7)
    for seed in range(5):
        model = tiny_model(seed)
        trace = Trace(model, prune=prune, prune_k=30)
        trace.hidden = model.hidden_states(torch.tensor([PROMPT]))[:5]
        trace.prune()
        found = contrast_logits(trace, 4, config.contrasting).double().numpy()
        kept = range(50) if trace.candidates is None else trace.candidates.tolist()
        p, q = (layers_ref(model, PROMPT)[layer][list(kept)] for layer in (4, 2))
        p, q = p / p.sum(), q / q.sum()
        head = p >= 0.4 * p.max()
        dcd = np.where(head, p[head].sum() * (p / q) / (p / q)[head].sum(), p)
        expected = {"dcd": np.log(dcd), "ratio": np.where(head, np.log(p / q), -np.inf),
                    "beta": np.where(head, 1.7 * np.log(p) - 0.7 * np.log(q), -np.inf)}[form]  # fmt: skip
        assert found == pytest.approx(expected, abs=1e-4) and 0 < head.sum() < len(kept)
        assert trace.amateurs == {4: 2}


def recipe(model, steps, choose, **settings):
    """Tokens of the settings, and of a naive loop that calls `choose` with all layers' distributions and the
    text so far."""
    text = list(PROMPT)
    for _ in range(steps):
        text.append(choose(layers_ref(model, text), text))
    return generate(model, PROMPT, DecodeConfig(max_new_tokens=steps, predict="contrast", **settings)).tokens, text[len(PROMPT) :]


def test_acd_contrasts_the_last_layer_with_a_fixed_one(tiny_model):
    for seed in range(5):
        model = tiny_model(seed)

        def choose(p, text):
            head = p[5] >= 0.1 * p[5].max()
            ratio = p[5] / p[2]
            return int(np.argmax(np.where(head, p[5][head].sum() * ratio / ratio[head].sum(), p[5])))

        found, expected = recipe(model, 20, choose, contrast="2")
        assert found == expected != generate(model, PROMPT, DecodeConfig(max_new_tokens=20)).tokens


def test_dola_contrasts_with_the_most_different_candidate_layer_under_a_repetition_penalty(tiny_model):
    layers = set()
    for seed in range(5):

        def choose(p, text):
            amateur = max((1, 3, 4), key=lambda j: jsd(p[5], p[j]))
            layers.add(amateur)
            s = np.where(p[5] >= 0.1 * p[5].max(), np.log(p[5] / p[amateur]), -np.inf)
            return int(np.argmax(penalized(s, text, 1.2)))

        dola = {"contrast": "dola", "premature_layers": (1, 3, 4), "form": "ratio", "repetition_penalty": 1.2}
        found, expected = recipe(tiny_model(seed), 20, choose, **dola)
        assert found == expected
    assert len(layers) > 1


def test_the_distance_decides_where_jsd_and_dola_differ(tiny_model):
    differ = 0
    for seed in range(10):

        def choose(p, text):
            return best_ratio(p[5], p[max((1, 2, 3, 4), key=lambda j: jsd(p[5], p[j]) / (5 - j))])

        found, expected = recipe(tiny_model(seed), 6, choose, contrast="jsd", premature_layers=(1, 2, 3, 4), form="ratio")
        dola = DecodeConfig(max_new_tokens=6, predict="contrast", contrast="dola", premature_layers=(1, 2, 3, 4), form="ratio")
        differ += generate(tiny_model(seed), PROMPT, dola).tokens != found
        assert found == expected
    assert differ > 2


@pytest.mark.parametrize("form", ["ratio", "beta"])
def test_contrastive_decoding_runs_a_second_model_in_step(tiny_model, form):
    """With and without early exits of the first; the second has other shapes, and its own temperature."""
    layers = set()
    for seed in range(4):
        model, amateur = tiny_model(seed), tiny_model(seed + 10, n_layers=2, d_model=16)
        config = DecodeConfig(max_new_tokens=20, predict="contrast", form=form, beta=0.3, amateur_temperature=0.5, confidence="softmax",
                              threshold=0.15)  # fmt: skip
        for exits in (None, "softmax"):
            out = generate(model, PROMPT, DecodeConfig(**{**vars(config), "confidence": exits}), amateur=amateur)
            text = list(PROMPT)
            for layer in out.exit_layers:
                p = layers_ref(model, text)[layer]
                q = softmax(np.log(layers_ref(amateur, text)[2]) / 0.5)
                s = np.log(p / q) if form == "ratio" else 1.3 * np.log(p) - 0.3 * np.log(q)
                text.append(int(np.argmax(np.where(p >= 0.1 * p.max(), s, -np.inf))))
            assert out.tokens == text[len(PROMPT) :]
        layers.update(out.exit_layers)
    assert len(layers) > 1


def test_what_an_amateur_costs_is_counted(tiny_model):
    model, amateur = tiny_model(0), tiny_model(1, n_layers=2)
    config = DecodeConfig(max_new_tokens=5, predict="contrast")
    alone = generate(model, PROMPT, DecodeConfig(max_new_tokens=5)).counters
    both = generate(model, PROMPT, config, amateur=amateur).counters
    assert both.block_runs == alone.block_runs and both.head_flops == 2 * alone.head_flops
    steps = [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    assert both.block_flops == alone.block_flops + 2 * sum(block_flops(amateur.config, *rows) for rows in steps)


def test_contrasted_samples_leave_out_what_is_not_plausible(tiny_model):
    model = tiny_model(3)
    p = layers_ref(model, PROMPT)[5]
    config = DecodeConfig(max_new_tokens=1, predict="contrast", form="ratio", contrast="1", temperature=1.0, alpha=0.5)
    drawn = {generate(model, PROMPT, DecodeConfig(**{**vars(config), "seed": seed})).tokens[0] for seed in range(200)}
    assert drawn == set(np.flatnonzero(p >= 0.5 * p.max()))


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
                              verify=verify, prune="fixed", prune_k=6)  # fmt: skip
        assert generate(model, PROMPT, config).tokens == text[len(PROMPT) :]


@pytest.mark.parametrize("amateur, config, complaint", [
    ({}, {}, "predict is own"), ({"vocab_size": 49}, {"predict": "contrast"}, "knows 49 tokens, the model 50"),
    ({"max_len": 10}, {"predict": "contrast"}, "has 10 positions, 24 are needed"),
    ({}, {"predict": "contrast", "contrast": "3"}, "contrast 3 names an amateur within the model, but there is a second"),
])  # fmt: skip
def test_an_amateur_that_cannot_be_is_refused(tiny_model, amateur, config, complaint):
    with pytest.raises(ValueError, match=complaint):
        generate(tiny_model(0), PROMPT, DecodeConfig(max_new_tokens=20, **config), amateur=tiny_model(1, **amateur))
