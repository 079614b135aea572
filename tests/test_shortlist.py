"""The head over the vocabulary as the topmost step: exact where verified, left out where not, over any
shortlist."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from confidence import FUNCTIONS
from decode import generate
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from decoding.weights import packs, prepare
from tests.reference import PROMPT, naive


@pytest.mark.parametrize("form", ["plain", "packed", "int8"])
def test_a_shortlist_holds_frequent_ids_and_those_of_the_text_each_once_with_its_row(model_with_ids, form):
    model = model_with_ids(0)
    if form == "packed" and not packs(torch.float32):
        pytest.skip("this machine does not multiply packed weights")
    prepare(model, form, torch.float32, {})
    listed = Shortlist(model, 10, 20)
    frequent = model.frequent_ids[:10].tolist()
    rare = [token for token in range(50) if token not in frequent]
    listed.add([frequent[3], rare[0], rare[1], rare[0]])
    listed.add([rare[1], rare[5]])
    assert listed.ids.tolist() == [*frequent, rare[0], rare[1], rare[5]]
    normed = torch.randn(2, 32)
    logits, expected = torch.cat([model.score(normed, weight) for weight in listed.weights], -1), model.score(normed)[:, listed.ids]
    assert_close(logits, expected, rtol=1e-4, atol=0.05 if form == "int8" else 1e-5)  # the kernel rounds to bfloat16


def test_texts_share_no_ids_that_they_add_and_new_frequent_ids_make_a_new_shortlist(model_with_ids):
    model = model_with_ids(0)
    first, second = Shortlist(model, 5, 50), Shortlist(model, 5, 50)
    first.add(list(range(50)))
    assert len(first.ids) == 50 and second.ids.tolist() == model.frequent_ids[:5].tolist()
    model.frequent_ids = model.frequent_ids.flip(0)
    assert Shortlist(model, 5, 4).ids.tolist() == model.frequent_ids[:5].tolist()


@pytest.mark.parametrize("confidence", sorted(FUNCTIONS))
def test_over_all_ids_every_exit_says_what_it_says_without_a_shortlist(model_with_ids, confidence):
    for seed in range(2):
        model = model_with_ids(seed)
        config = DecodeConfig(max_new_tokens=20, confidence=confidence, threshold=0.2, exit_layers=(1, 2, 3, 4))
        short, plain = generate(model, PROMPT, replace(config, shortlist=50)), generate(model, PROMPT, config)
        assert short.tokens == plain.tokens and short.exit_layers == plain.exit_layers


@pytest.mark.parametrize("confidence", sorted(FUNCTIONS))
def test_verified_over_random_shortlists_is_the_full_models_text(model_with_ids, confidence):
    """Random sizes, thresholds, exits (the last layer among them), pruning and bounds; drafts are kept and
    rolled back."""
    random, kept, back = np.random.default_rng(len(confidence)), 0, 0
    for seed in range(10):
        model = model_with_ids(seed)
        exits = sorted(random.choice([1, 2, 3, 4, 5], int(random.integers(1, 4)), replace=False).tolist())
        if confidence == "classifier" and 5 in exits:
            exits = [layer for layer in exits if layer < 5] or [4]
        config = DecodeConfig(
            max_new_tokens=20, confidence=confidence, threshold=float(random.choice([0.0, 0.1, 0.4])), exit_layers=exits, verify=True,
            max_owed=random.choice([None, 1, 4]), shortlist=int(random.integers(2, 30)),
            prune=str(random.choice(["none", "fixed:6", "decaying:6:2"])),
        )  # fmt: skip
        out = generate(model, PROMPT, config)
        assert out.tokens == naive(model, PROMPT, 20), config
        kept, back = kept + out.counters.accepted, back + out.counters.drafted - out.counters.accepted
    assert kept > 5 and back > 5


def test_an_exit_after_all_blocks_leaves_out_the_head_over_the_vocabulary(model_with_ids):
    """With threshold 0 at layer L no pass reaches the top: the token is the last layer's best of the
    shortlist."""
    model, config = model_with_ids(3), DecodeConfig(max_new_tokens=15, confidence="softmax", threshold=0.0, exit_layers=(5,), shortlist=12)
    out = generate(model, PROMPT, config)
    allowed, text = set(model.frequent_ids[:12].tolist()) | set(PROMPT), list(PROMPT)
    for token in out.tokens:
        logits = model(torch.tensor([text]))[0, -1]
        assert token == max(allowed, key=lambda each: logits[each])
        text.append(token)
        allowed.add(token)
    counters = out.counters
    assert out.exit_layers == [5] * 15 and counters.deep_passes == 0 and counters.block_runs == 5 * 15
    n = [len({*model.frequent_ids[:12].tolist(), *PROMPT, *out.tokens[:i]}) for i in range(15)]
    assert counters.head_flops == sum(2 * 32 * each for each in n)  # two operations a weight, none over the vocabulary


def test_verified_the_head_takes_all_rows_that_owe_it_at_once(model_with_ids):
    """Exits at L alone, four drafts at most: then a pass to the top, whose head sees the four and the
    newest."""
    model = model_with_ids(1)
    config = DecodeConfig(max_new_tokens=16, confidence="softmax", threshold=0.0, exit_layers=(5,), shortlist=49, max_owed=4, verify=True)
    out = generate(model, PROMPT, config)
    counters = out.counters
    assert out.tokens == naive(model, PROMPT, 16)
    assert counters.deep_passes < 16 / 2 and counters.drafted > counters.deep_passes
    assert counters.deep_rows == counters.deep_passes - (counters.drafted - 4 * (counters.deep_passes - 1) < 4)


def test_missing_tokens_are_counted_where_the_full_model_speaks(model_with_ids):
    model = model_with_ids(2)
    config = DecodeConfig(max_new_tokens=40, confidence="softmax", threshold=0.9, exit_layers=(5,), shortlist=3)
    out = generate(model, PROMPT, config)
    assert 0 < out.counters.missed <= out.counters.pruned_deep == out.counters.deep_passes


def test_a_shortlist_beyond_the_ids_counted_is_refused(model_with_ids):
    with pytest.raises(ValueError, match="shortlist is 20, but only 8 ids occurred in the corpus"):
        generate(model_with_ids(0, count=8), PROMPT, DecodeConfig(confidence="softmax", shortlist=20))


def test_the_ideal_counts_the_head_as_a_step_that_a_shortlist_leaves_out(model_with_ids):
    """V = 50 against blocks of 2 (4 + 2) 8 + 3 48 = 240 columns: a head is 50/240 blocks. Exits at layer 5
    alone, threshold 0: 5 of 5.208 steps a token; without a shortlist the head is no step."""
    model = model_with_ids(0)
    config = DecodeConfig(max_new_tokens=10, confidence="softmax", threshold=0.0, exit_layers=(5,), shortlist=12)
    counters = generate(model, PROMPT, config).counters
    assert counters.ideal_speedup(model.config, shortlist=True) == pytest.approx((5 + 50 / 240) / 5)
    full = generate(model, PROMPT, DecodeConfig(max_new_tokens=10)).counters
    assert full.ideal_speedup(model.config, shortlist=True) == pytest.approx(1)
    assert full.ideal_speedup(model.config, shortlist=False) == 1
