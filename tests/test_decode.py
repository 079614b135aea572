"""The loop: exact where it must be, early where it may be, and honest about the work done."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cache import KVCache
from confidence import FUNCTIONS, register
from decode import copy_up, generate, run_pass, stream
from decoding.prediction import distribution
from decoding.record import Generation, block_flops
from decoding.settings import DecodeConfig
from decoding.thresholds import THRESHOLDS
from decoding.trace import Trace
from tests.reference import PROMPT, exact_tokens, exceeds, first_gap, joint_distribution, naive, read_out

PRUNINGS = ("none", "fixed:6", "decaying:6:3", "adaptive:6:3")
EARLY = {"softmax": 0.15, "hidden": 0.85, "entropy": 0.3, "weighted": 0.1, "jsd": 0.1, "classifier": 0.6}  # thresholds
every_function = pytest.mark.parametrize("confidence", sorted(EARLY))


def mixed(model, **changes) -> Generation:
    return generate(model, PROMPT, DecodeConfig(**{"max_new_tokens": 30, "confidence": "softmax", "threshold": 0.15, **changes}))


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("confidence", [None, *sorted(EARLY)])
@pytest.mark.parametrize("fill", ["parallel", "copy"])
def test_an_unreachable_threshold_gives_the_full_models_tokens(tiny_model, confidence, fill):
    """No confidence reaches 1 on these models: rounding aside it takes a distribution on a single token."""
    out = mixed(tiny_model(0), max_new_tokens=20, confidence=confidence, threshold=1.0, fill=fill, exit_layers=(2, 3, 4))
    assert out.tokens == naive(tiny_model(0), PROMPT, 20) and out.exit_layers == [5] * 20


@every_function
def test_threshold_zero_exits_at_the_first_exit_layer_without_a_check(tiny_model, confidence):
    for exits, first in ((None, 1), ((3,), 3), ((2, 4), 2)):
        out = mixed(tiny_model(1), max_new_tokens=9, confidence=confidence, threshold=0.0, exit_layers=exits)
        assert out.exit_layers == [first] * 9 and out.confidences == [{}] * 9
        assert out.counters.block_runs == 9 * first and out.counters.confidence_flops == 0


@pytest.mark.parametrize("fill", ["parallel", "copy"])
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_a_static_exit_is_the_model_cut_there(tiny_model, fill, layer):
    model = tiny_model(2, exit_norms=(2,))
    assert mixed(model, threshold=0.0, exit_layers=(layer,), fill=fill).tokens == naive(model, PROMPT, 30, layer)


def random_config(random, verify: bool) -> DecodeConfig:
    """Without verification nothing is pruned, since an exit takes the best of its candidates."""
    prune = str(random.choice(PRUNINGS)) if verify else "none"
    return DecodeConfig(
        max_new_tokens=int(random.integers(1, 10)), confidence=str(random.choice(sorted(EARLY))),
        threshold=float(random.choice([0, 0.05, 0.2, 0.6])), exit_layers=None if random.integers(2) else (2,),
        max_owed=random.choice([None, 1, 2, 5]), prune=prune, threshold_schedule=str(random.choice(sorted(THRESHOLDS))), verify=verify,
    )  # fmt: skip


@pytest.mark.parametrize("verify, runs", [(False, 400), (True, 600)])
def test_random_runs_equal_what_is_computed_without_a_cache(tiny_model, verify, runs):
    """Confidence, threshold and its schedule, exits, pruning, bound, prompt, length, and an end token that does
    occur. Verified, the text is the naive loop's."""
    random, drafted, rolled_back, early = np.random.default_rng(verify), 0, 0, 0
    for case in range(runs):
        prompt = random.integers(0, 50, random.integers(1, 6)).tolist()
        if case % 10 == 0:
            model = tiny_model(case // 10, n_layers=3)
        model.config = replace(model.config, eos_id=None if case % 3 else int(random.integers(50)))
        config = random_config(random, verify)
        out = generate(model, prompt, config)
        expected = naive(model, prompt, config.max_new_tokens) if verify else exact_tokens(model, prompt, out)
        assert out.tokens == expected, config
        assert len(out.tokens) == config.max_new_tokens or out.tokens[-1] == model.config.eos_id
        assert out.counters.tokens == len(out.tokens) and out.counters.accepted <= out.counters.drafted
        drafted, rolled_back = drafted + out.counters.drafted, rolled_back + out.counters.drafted - out.counters.accepted
        early += sum(layer < 3 for layer in out.exit_layers)
    assert early > 300 and (rolled_back > 300) == (drafted - rolled_back > 300) == verify


@pytest.mark.parametrize("layer", [2, 3])
def test_one_exit_layer_is_frees_shallow_deep_module(tiny_model, layer):
    """FREE (Bae 2023): a shallow model of the first layers speaks where its softmax margin reaches the
    threshold, else the deep model does, whose missing keys and values are computed in parallel, so that both
    read the whole text exactly."""
    paths = set()
    for seed in range(6):
        model, text = tiny_model(seed), list(PROMPT)
        for _ in range(25):
            states = model.hidden_states(torch.tensor([text]))
            first, second = model.head(states[layer][0, -1], layer).softmax(-1).topk(2).values.tolist()
            shallow = first - second >= 0.12
            paths.add(shallow)
            text.append(read_out(model, states, -1, layer if shallow else None))
        assert mixed(model, max_new_tokens=25, threshold=0.12, exit_layers=(layer,)).tokens == text[len(PROMPT) :]
    assert paths == {True, False}


def test_generation_ends_with_the_end_token_or_where_the_models_positions_end(tiny_model):
    full = naive(tiny_model(0), PROMPT, 20)
    found = generate(tiny_model(0, eos_id=full[6]), PROMPT, DecodeConfig(max_new_tokens=20)).tokens
    assert found == full[: full.index(full[6]) + 1]
    assert len(generate(tiny_model(0, max_len=16), PROMPT, DecodeConfig(max_new_tokens=50)).tokens) == 12


# ---------------------------------------------------------------- early


def test_the_exit_is_at_the_first_layer_whose_confidence_reaches_the_threshold(tiny_model):
    out = mixed(tiny_model(0), exit_layers=(1, 2, 4), layer_thresholds=(0.2, 0.15, 0.1))
    for layer, checked in zip(out.exit_layers, out.confidences):
        assert list(checked) == [exit_layer for exit_layer in (1, 2, 4) if exit_layer <= layer]
        assert [c >= {1: 0.2, 2: 0.15, 4: 0.1}[j] for j, c in checked.items()] == [j == layer for j in checked]
    assert set(out.exit_layers) == {1, 2, 4, 5}


@pytest.mark.parametrize("prompt", [[1], PROMPT, PROMPT * 5])
def test_max_owed_bounds_what_is_owed_and_does_not_count_the_prompt(tiny_model, prompt):
    """A prompt owes its upper layers, too, but only early tokens wait for the top."""
    config = DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.0, exit_layers=(2,), max_owed=3)
    out = generate(tiny_model(1), prompt, config)
    assert out.exit_layers == [2, 2, 2, 5] * 3
    assert out.counters.deep_passes == 3 and out.counters.deep_rows == 12 + len(prompt) - 1
    assert out.tokens == exact_tokens(tiny_model(1), prompt, out)


def test_a_new_confidence_function_takes_one_function(tiny_model):
    """Exit when the best token has not changed since the layer below."""
    try:

        @register("stable")
        def stable(trace, layer):
            return (trace.logits(layer).argmax() == trace.logits(layer - 1).argmax()).float() if layer > 1 else torch.tensor(0.0)

        model = tiny_model(1)
        out = mixed(model, confidence="stable", threshold=1.0)
    finally:
        del FUNCTIONS["stable"]
    assert set(out.exit_layers) - {5} and out.tokens == exact_tokens(model, PROMPT, out)
    states = model.hidden_states(torch.tensor([PROMPT + out.tokens]))
    for i, layer in enumerate(out.exit_layers, len(PROMPT) - 1):
        best = [int(model.head(state[0, i]).argmax()) for state in states]
        assert layer == next((j for j in range(2, 5) if best[j] == best[j - 1]), 5)


# ---------------------------------------------------------------- counting work


def test_pruning_changes_neither_the_static_exit_nor_the_full_model(tiny_model):
    """The best candidate survives any pruning, and the last layer reads the whole vocabulary."""
    model = tiny_model(4)
    for threshold in (0.0, 1.0):
        assert mixed(model, threshold=threshold, prune="fixed:2").tokens == mixed(model, threshold=threshold).tokens
    pruned = mixed(model, threshold=0.999, prune="fixed:2")
    exact = exact_tokens(model, PROMPT, pruned)
    deep = [i for i, layer in enumerate(pruned.exit_layers) if layer == 5]
    assert all(pruned.tokens[i] == exact[i] for i in deep)
    assert 0 < pruned.counters.missed <= pruned.counters.pruned_deep == len(deep)


def test_pruned_checks_cost_what_their_candidates_cost(tiny_model):
    """Threshold unreachable, exits 2 and 4: one head over V = 50 and one over k = 8, both read in vain, and
    the final head."""
    counters = mixed(tiny_model(0), max_new_tokens=3, threshold=1.0, exit_layers=(2, 4), prune="fixed:8").counters
    assert counters.confidence_flops == 3 * 2 * 32 * (50 + 8)
    assert counters.head_flops == counters.confidence_flops + 3 * 2 * 32 * 50


def test_counters_add_up(tiny_model):
    model = tiny_model(2)
    out = mixed(model)
    c = out.counters
    assert c.tokens == len(out.tokens) == 30 and c.block_runs == sum(out.exit_layers) and c.deep_passes == out.exit_layers.count(5)
    before, flops = dict.fromkeys(range(1, 6), 0), 0
    for i, reached in enumerate(out.exit_layers):
        for layer in range(1, reached + 1):
            flops, before[layer] = flops + block_flops(model.config, before[layer], len(PROMPT) + i), len(PROMPT) + i
    assert c.block_flops == flops
    assert c.block_rows == sum(before.values())  # positions that ran a layer: all up to the last token that reached it


# ---------------------------------------------------------------- copy fill


def test_copy_fill_owes_nothing(tiny_model):
    """One pass to the top for all of the prompt but its last token, then one row a pass."""
    outs = [mixed(tiny_model(seed), fill="copy") for seed in range(6)]
    assert any(1 < out.exit_layers.count(5) < 29 for out in outs)
    for out in outs:
        assert out.counters.deep_passes == out.counters.deep_rows == out.exit_layers.count(5)
        assert out.counters.block_rows == 5 * (len(PROMPT) - 1) + sum(out.exit_layers)


def test_copied_keys_and_values_are_projected_from_the_exit_state(tiny_model):
    model, config = tiny_model(5), DecodeConfig()
    cache, exact, trace = KVCache(model, 4), KVCache(model, 4), Trace(model, config)
    with torch.inference_mode():
        run_pass(model, cache, [3], trace, {2: 0.0})
        copy_up(model, cache, 2)
        run_pass(model, exact, [3], Trace(model, config), {})
    assert cache.heights() == [1] * 6 + [0]
    block, state = model.blocks[4], trace.state(2)
    value = (block.qkv.weight @ (state * block.attn_norm.weight / (state.square().mean() + 1e-6).sqrt()))[-16:]  # K C = 2 x 8
    copied, right = (each.values[5][0, :, 0].flatten() for each in (cache, exact))
    assert_close(copied, value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(copied, right, atol=0.1)  # approximate, as CALM's is


def test_copies_are_counted(tiny_model):
    """Three layers project 4 + 2 + 2 heads of width 8 from the one row that stops at layer 2."""
    settings = {"max_new_tokens": 1, "confidence": "softmax", "threshold": 0.0, "exit_layers": (2,)}
    copied, owed = (generate(tiny_model(0), [3], DecodeConfig(fill=fill, **settings)).counters for fill in ("copy", "parallel"))
    assert copied.block_flops - owed.block_flops == 3 * 2 * 32 * 64


# ---------------------------------------------------------------- sampling


def test_the_sampling_distribution_by_hand():
    """p = (0.5, 0.3, 0.15, 0.05)."""
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    cases = {
        (1.0, None, 1.0): [0.3, 0.05, 0.5, 0.15],
        (1.0, 2, 1.0): [0.375, 0, 0.625, 0],
        (1.0, None, 0.79): [0.375, 0, 0.625, 0],
        (1.0, None, 0.81): [0.3 / 0.95, 0, 0.5 / 0.95, 0.15 / 0.95],
        (1.0, 3, 0.5): [0, 0, 1.0, 0],
        (0.5, None, 1.0): [0.09 / 0.365, 0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365],
    }
    for (temperature, top_k, top_p), expected in cases.items():
        config = DecodeConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        assert_close(distribution(logits, config), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_samples_follow_the_distribution_and_the_seed(tiny_model):
    """500 texts of three tokens against the full model's joint distribution."""
    model, config = tiny_model(3, vocab_size=4, n_layers=2), DecodeConfig(max_new_tokens=3, temperature=1.0)
    draws = [tuple(generate(model, [1, 2], replace(config, seed=seed)).tokens) for seed in range(500)]
    assert exceeds(joint_distribution(model, [1, 2], config), draws) < 1
    model = tiny_model(0)
    assert mixed(model, temperature=1.0, seed=3).tokens == mixed(model, temperature=1.0, seed=3).tokens
    assert mixed(model, temperature=0.7, top_k=1).tokens == mixed(model).tokens


# ---------------------------------------------------------------- verified mode


def test_a_verified_end_is_a_draft_like_any_other(tiny_model):
    """A static exit drafts an end token that the full model rejects; the text goes on."""
    wrong = 0
    for seed in range(10):
        drafted_end = naive(tiny_model(seed), PROMPT, 1, layer=1)[0]
        model = tiny_model(seed, eos_id=drafted_end)
        out = mixed(model, max_new_tokens=8, threshold=0.0, exit_layers=(1,), verify=True)
        assert out.tokens == naive(model, PROMPT, 8)
        wrong += out.tokens[0] != drafted_end
    assert wrong > 3


@pytest.mark.parametrize("changes", [{}, {"prune": "fixed:3", "temperature": 0.7, "top_k": 3, "top_p": 0.9}, {"max_owed": 1}])
def test_verified_samples_follow_the_full_models_distribution(tiny_model, changes):
    """Three tokens of a vocabulary of 4, 500 draws against the exact joint distribution; without verification
    the same exits exceed the bound twice over."""
    model = tiny_model(3, vocab_size=4, n_layers=2)
    base = {"max_new_tokens": 3, "confidence": "softmax", "threshold": 0.0, "exit_layers": (1,), "temperature": 1.0}
    config = DecodeConfig(**{**base, **changes, "verify": True})
    joint = joint_distribution(model, [1, 2], config)
    assert sum(joint.values()) == pytest.approx(1, abs=1e-4)
    runs = [(config, 0, 1)] if changes else [(config, 0, 1), (replace(config, verify=False), 2, float("inf"))]
    for each, low, high in runs:
        draws = [tuple(generate(model, [1, 2], replace(each, seed=seed)).tokens) for seed in range(500)]
        assert low <= exceeds(joint, draws) < high


def test_verified_counters_by_hand(tiny_model):
    """Static exit 3 of 5 layers, two owed at most: two drafts, then a pass to the top that judges them,
    unless the length ends it first."""
    config = DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.0, exit_layers=(3,), max_owed=2, verify=True)
    outs = [generate(tiny_model(seed), [1], config) for seed in range(10)]
    for out in outs:
        c = out.counters
        assert out.exit_layers.count(3) == c.accepted and len(out.tokens) == c.accepted + out.exit_layers.count(5) == c.tokens == 12
        assert 2 * c.deep_passes - 1 <= c.drafted <= 2 * c.deep_passes and c.drafted <= c.deep_rows <= 3 * c.deep_passes
    assert any(0 < out.counters.accepted < out.counters.drafted for out in outs)


@pytest.mark.parametrize("verify", [False, True])
def test_streaming_yields_tokens_as_they_come_and_only_what_is_verified(tiny_model, verify):
    settings = {"confidence": "softmax", "threshold": 0.0, "exit_layers": (1,), "max_owed": 2, "verify": True} if verify else {}
    expected = naive(tiny_model(2), PROMPT, 12)
    for n, token in enumerate(stream(tiny_model(2), PROMPT, DecodeConfig(max_new_tokens=12, **settings))):
        assert token.id == expected[n]


@pytest.mark.parametrize("verify", [False, True])
def test_what_a_token_was_drawn_from_is_kept_to_judge_drafts_alone(tiny_model, verify):
    config = DecodeConfig(max_new_tokens=8, confidence="softmax", threshold=0.2, temperature=1.0, exit_layers=(2,), verify=verify)
    assert all(token.probs is None for token in stream(tiny_model(0), PROMPT, config))


def test_in_plain_bfloat16_a_verified_text_is_the_full_models_up_to_rounding(tiny_model, reloaded):
    """Rows that are judged together round otherwise than one by one. So what holds is this: every token is the
    full model's best one within the rounding of its logits, and two texts part only where two tokens are as close
    as that."""
    same, accepted = 0, 0
    for seed in range(5):
        model = reloaded(tiny_model(seed), dtype=torch.bfloat16, form="plain")
        full, out = mixed(model, confidence=None).tokens, mixed(model, verify=True)
        logits = model(torch.tensor([PROMPT + out.tokens]))[0, len(PROMPT) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(out.tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.1 and first_gap(model, PROMPT, out.tokens, full) < 0.1
        same, accepted = same + (out.tokens == full), accepted + out.counters.accepted
    assert same > 2 and accepted > 5
