"""Adaptive drafting: its text is the full model's whatever it chooses, its choice is the best by the
costs, and what it learns is true."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from confidence import FUNCTIONS
from decode import Run, generate, stream
from decoding import drafting as module
from decoding.costs import Costs, costs_of, measure_costs
from decoding.drafting import BINS, Drafting, expected_paces
from decoding.prediction import penalize
from decoding.record import Counters
from decoding.settings import DecodeConfig
from tests.reference import PROMPT, exceeds, joint_distribution

FLAT = {1: 1.0}  # seconds, whatever the rows
GOOD = Costs(5, FLAT, FLAT, {2: 0.1, 4: 0.1})


def auto(**changes) -> DecodeConfig:
    return DecodeConfig(**{"max_new_tokens": 40, "confidence": "softmax", "verify": True, "draft": "auto", **changes})


def random_costs(random, layers, exits) -> Costs:
    """Seconds in which heads cost anything from a tenth of a block to twenty."""
    block, top = random.uniform(1, 2), random.uniform(0.1, 20)
    check = {layer: random.uniform(0.01, 1) for layer in exits}
    return Costs(layers, {1: block, 4: block * 1.3, 16: block * random.uniform(1.5, 4)}, {1: top, 16: top * random.uniform(1, 3)}, check)


# ---------------------------------------------------------------- exact


def test_the_text_is_the_full_models_whatever_the_costs(model_with_ids):
    """40 random settings: confidence, pruning, shortlist, penalty, an end token that does occur; costs from
    absurd to likely; two texts with one state."""
    random, kept, back, full = np.random.default_rng(0), 0, 0, 0
    for case in range(40):
        model = model_with_ids(case // 5, eos_id=None if case % 3 else int(random.integers(50)))
        names = sorted(FUNCTIONS) if case % 2 else sorted(set(FUNCTIONS) - {"classifier"})  # there is none after the last layer
        config = auto(
            max_new_tokens=int(random.integers(1, 16)), confidence=str(random.choice(names)), shortlist=None if case % 2 else 20,
            prune=str(random.choice(["none", "fixed:6", "decaying:6:2"])),
            repetition_penalty=float(random.choice([1.0, 1.5])),
        )  # fmt: skip
        state = Drafting(random_costs(random, 5, config.exits(model.config)))
        for _ in range(2):
            prompt = random.integers(0, 50, random.integers(1, 6)).tolist()
            out = generate(model, prompt, config, drafting=state)
            assert out.tokens == generate(model, prompt, config.full()).tokens, config
            kept, back = kept + out.counters.accepted, back + out.counters.drafted - out.counters.accepted
            full += state.plan == state.full
    assert kept > 40 and back > 40 and 5 < full < 75


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "shortlist": 3}])
def test_samples_follow_the_full_models_distribution(model_with_ids, changes):
    """500 draws as in test_decode.py, with costs that tempt to draft, and a state that goes on from draw to
    draw, so that what was sampled decides how is drafted."""
    model, config = model_with_ids(3, vocab_size=4, n_layers=2), auto(max_new_tokens=3, **{"temperature": 1.0, **changes})
    state = Drafting(Costs(2, FLAT, {1: 20.0}, dict.fromkeys(config.exits(model.config), 0.01)))
    outs = [generate(model, [1, 2], replace(config, seed=seed), drafting=state) for seed in range(500)]
    assert exceeds(joint_distribution(model, [1, 2], config), [tuple(out.tokens) for out in outs]) < 1
    assert sum(out.counters.drafted for out in outs) > 500


def test_with_the_costs_fixed_a_run_can_be_repeated(tiny_model):
    """Passes, drafts and counters, not the text alone; and a state that has learned drafts otherwise than a
    new one."""
    model = tiny_model(1)
    runs = [[generate(model, PROMPT, auto(), drafting=state) for _ in range(3)] for state in (Drafting(GOOD), Drafting(GOOD))]
    assert runs[0] == runs[1]
    assert runs[0][0].counters != runs[0][2].counters and runs[0][0].tokens == runs[0][2].tokens
    assert generate(model, PROMPT, auto()).counters == generate(model, PROMPT, auto()).counters  # by itself each text begins anew


# ---------------------------------------------------------------- what it expects


def test_the_expected_pace_by_hand():
    """5 layers, exit 2, blocks of 1 s (3 s for two rows), the top 2 s (4 s), a check 0.5 s. Of 8 positions 4
    reached the threshold of bin 8, and 2 of these agreed; with the draft of the doubt a = 2/5, q = 1/2. At
    most one draft: checked, 2 + 0.5; with 1/2 then the rest of one row, 3 + 2; with 1/2 two more blocks and
    three of two rows, 2 + 9 + 4. So 12.5 s for 1 + 1/5 tokens."""
    costs = Costs(5, {1: 1.0, 2: 3.0}, {1: 2.0, 2: 4.0}, {2: 0.5})
    checked, agreed = np.zeros((1, BINS)), np.zeros((1, BINS))
    checked[0, 2], checked[0, 8], checked[0, 15], agreed[0, 2], agreed[0, 15] = 4, 1, 3, 1, 2
    assert expected_paces(costs, checked, agreed)[0, 8, 0] == pytest.approx((2.5 + 0.5 * 5 + 0.5 * 15) / 1.2)


def test_expected_paces_are_those_of_simulated_rounds():
    """An independent reference: 40,000 rounds. A token passes with q and is kept with a; relative error below
    2 %."""
    random = np.random.default_rng(0)
    costs = Costs(6, {1: 1.0, 4: 1.5, 16: 4.0}, {1: 3.0, 16: 6.0}, {3: 0.3})
    checked, agreed = np.zeros((1, BINS)), np.zeros((1, BINS))
    checked[0, 3], checked[0, 12], agreed[0, 12] = 3000, 7000, 6000
    q, a = 0.7, 6000 / 7001
    for most in (1, 4, 15):
        drafts = np.minimum(random.geometric(1 - q, 40_000) - 1, most)  # before the first token that does not pass
        kept = np.minimum(random.geometric(1 - a, 40_000) - 1, drafts)
        rows = drafts + 1
        seconds = 3 * 1.0 * rows + 0.3 * np.minimum(rows, most)  # after the last draft that is allowed, no check
        seconds += 3 * np.interp(rows, [1, 4, 16], [1.0, 1.5, 4.0]) + np.interp(rows, [1, 16], [3.0, 6.0])
        expected = seconds.sum() / (kept + 1).sum()
        assert expected_paces(costs, checked, agreed)[0, 12, most - 1] == pytest.approx(expected, rel=0.02)


def observed(costs, *seen) -> Drafting:
    """A state that has seen (layer, confidence, agreed) 100 times each."""
    state = Drafting(costs)
    for _ in range(100):
        for one in seen:
            state.observe(*one)
    return state


def test_the_plan_is_the_exit_that_promises_most():
    """Exit 2 agrees where it is confident, exit 4 always; exits that never agree, or whose checks cost
    what they save, leave full depth."""
    plan = observed(GOOD, (2, 0.9, 1.0), (2, 0.3, 0.0), (4, 0.5, 0.0)).best()
    assert plan.layer == 2 and 0.3 < plan.threshold <= 0.9 and plan.drafts > 1 and plan.pace < Drafting(GOOD).full.pace
    assert observed(GOOD, (2, 0.9, 0.0), (4, 0.5, 1.0)).best().layer == 4
    both = observed(GOOD, (2, 0.9, 1.0), (4, 0.9, 1.0))
    assert both.rivals() == [2, 4]
    both.plan = both.best()
    assert both.plan.layer == 2 and both.rivals() == []  # exit 4 could not be better
    both.plan = replace(both.plan, pace=both.full.pace)
    assert both.rivals() == [4]
    wrong = observed(GOOD, (2, 0.9, 0.0), (4, 0.9, 0.0))
    assert wrong.best() == wrong.full
    dear = observed(replace(GOOD, check={2: 5.0, 4: 5.0}), (2, 0.9, 1.0), (4, 0.9, 1.0))
    assert dear.best() == dear.full and dear.rivals() == []


def test_what_was_seen_long_ago_fades():
    state = observed(GOOD, (2, 0.9, 1.0))
    assert state.best().layer == 2
    for _ in range(1500):
        state.observe(2, 0.9, 0.0)
    assert state.best() == state.full and state.observed[0].sum() < 1 / (1 - module.FADING)


# ---------------------------------------------------------------- what it learns


@pytest.mark.parametrize("shortlist, penalty", [(None, 1.0), (15, 1.0), (None, 1.8)])
def test_what_it_learns_is_what_full_passes_say(tiny_model, monkeypatch, shortlist, penalty):
    """Every observation of a text, against whole forward passes: that an exit, checked by itself at one of
    its positions, has this confidence, and that its best token is the text's or not. Once it drafts, exits in
    use and others are observed."""
    model, seen = tiny_model(2), []
    model.frequent_ids = torch.arange(50)
    monkeypatch.setattr(module, "SHARE", 0.2)
    state = Drafting(Costs(5, FLAT, {1: 9.0}, dict.fromkeys(auto(shortlist=shortlist).exits(model.config), 0.1)))
    learn = state.observe
    state.observe = lambda *one: seen.append((one, state.plan.layer)) or learn(*one)
    out = generate(model, PROMPT, auto(shortlist=shortlist, repetition_penalty=penalty), drafting=state)
    text = PROMPT + out.tokens
    states, known = model.hidden_states(torch.tensor([text])), {}
    for position in range(len(PROMPT) - 1, len(text) - 1):
        ids = torch.arange(50)
        if shortlist:
            ids = torch.tensor(sorted({*range(shortlist), *text[: position + 1]}))
        for layer in state.layers:
            logits = model.head(states[layer][0, position], layer)[ids]
            first, second = logits.softmax(-1).topk(2).values.tolist()
            best = ids[penalize(logits, text[: position + 1], penalty, ids).argmax()]
            known.setdefault(layer, []).append((first - second, float(best == text[position + 1])))
    for (layer, confidence, agreed), _ in seen:
        assert any(abs(confidence - c) < 1e-4 and agreed == a for c, a in known[layer])
    assert {layer for (layer, *_), _ in seen} == set(state.layers) and {a for (*_, a), _ in seen} == {0.0, 1.0}
    assert any(layer != plan for (layer, *_), plan in seen if plan) and any(layer == plan for (layer, *_), plan in seen)


def test_sampled_agreement_is_the_chance_to_be_kept(tiny_model):
    """The sum of min(p, q), with q cut to a shortlist, against NumPy."""
    model = tiny_model(1)
    model.frequent_ids = torch.arange(50)
    run = Run(model, PROMPT, auto(temperature=0.8, shortlist=20), Counters(), None)
    with torch.inference_mode():
        trace, _ = run.advance(PROMPT, {})
        alone = trace.checked_at([state[:, -1:] for state in trace.hidden[:3]])
        said = module.agreement(run.config, [*PROMPT, 5], alone, 2, trace.final[-1], len(PROMPT))
    listed = alone.candidates.numpy()
    p = np.exp(trace.final[-1].double().numpy() / 0.8)
    q = np.exp(model.head(trace.state(2)).double().numpy() / 0.8)
    q = np.where(np.isin(np.arange(50), listed), q, 0)
    assert said == pytest.approx(np.minimum(p / p.sum(), q / q.sum()).sum(), abs=1e-5) and 0 < said < 1


def test_useless_exits_cost_little_and_are_tried_again(tiny_model):
    """By the table: of 400 tokens under exits that never agree, at most 3 % of the time is spent on checking
    them, yet they are checked in the last hundred, too."""
    model = tiny_model(0)
    state = Drafting(Costs(5, FLAT, FLAT, dict.fromkeys(range(1, 5), 0.3)))
    learn, checked, spent = state.observe, [], []
    state.observe = lambda layer, confidence, agreed: checked.append(len(spent)) or learn(layer, confidence, 0.0)
    for prompt in range(10):
        for token in stream(model, [prompt], auto(), drafting=state):
            spent.append(token.id)
    assert len(spent) == 400 and state.plan == state.full
    assert 0 < len(checked) * 0.3 <= 0.03 * 400 * 6 and max(checked) > 300


def test_good_exits_are_used_and_save_passes(tiny_model):
    """A model whose upper three layers change nothing: all drafts of layer 2 are kept, and most tokens are
    drafts."""
    model = tiny_model(4)
    for block in model.blocks[2:]:
        block.out.weight.zero_()
        block.down.weight.zero_()
    state = Drafting(GOOD)
    outs = [generate(model, [prompt], auto(), drafting=state) for prompt in range(5)]
    assert all(out.counters.accepted == out.counters.drafted for out in outs)
    assert state.plan.layer == 2 and outs[-1].exit_layers.count(2) > 30 and outs[-1].counters.deep_passes < 10


# ---------------------------------------------------------------- the table of costs, and mistakes


def test_costs_are_measured_once_in_a_process(tiny_model, monkeypatch, capsys):
    """Of a model and what is checked: other models and other settings have costs of their own."""
    model, config, calls = tiny_model(0), auto(), []
    monkeypatch.setattr("decoding.costs.measure_costs", lambda *given: calls.append(given) or GOOD)
    assert costs_of(model, config) == costs_of(model, replace(config, seed=3, max_new_tokens=9)) == GOOD and len(calls) == 1
    assert capsys.readouterr().err.count("\n") == 1  # it says so once
    costs_of(model, replace(config, confidence="jsd"))
    costs_of(tiny_model(0), config)
    assert len(calls) == 3


@pytest.mark.parametrize("shape, rows", [({}, [1, 2, 4, 8, 16]), ({"max_len": 12}, [1, 2, 4, 8])])
@pytest.mark.parametrize("changes", [{}, {"confidence": "jsd", "shortlist": 10}, {"temperature": 1.0, "prune": "fixed:4"}])
def test_what_is_measured_is_a_whole_table(model_with_ids, monkeypatch, changes, shape, rows):
    monkeypatch.setattr("decoding.costs.AT_LEAST", 0.0)
    model, config = model_with_ids(0, **shape), auto(**changes)
    costs = measure_costs(model, config)
    assert list(costs.check) == list(config.exits(model.config)) and costs.layers == 5
    assert list(costs.block) == list(costs.top) == rows
    assert all(seconds > 0 for table in (costs.block, costs.top, costs.check) for seconds in table.values())


@pytest.mark.parametrize("confidence", ["softmax", "classifier", "hidden"])
def test_every_head_is_counted(tiny_model, monkeypatch, confidence):
    """Those that drafting learns from, too, where the function reads none: by the products themselves."""
    made, model = [], tiny_model(0)
    score = type(model).score

    def counting(self, normed, weight=None):
        made.append(2 * len(normed) * (model.lm_head.weight if weight is None else weight).numel())
        return score(self, normed, weight)

    monkeypatch.setattr(type(model), "score", counting)
    counters = generate(model, PROMPT, auto(confidence=confidence)).counters
    assert counters.head_flops == sum(made)
