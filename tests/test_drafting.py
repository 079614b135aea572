"""Drafting by measurement: its text is the full model's whatever it chooses, its choice is the best by the
costs, and what it learns is true."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_decode import PROMPT, chi_square, greedy_reference

import decode
from common.errors import run
from confidence import FUNCTIONS
from decode import Run, generate, stream
from decoding import drafting as module
from decoding.costs import Costs, costs_of, key_of, measure
from decoding.drafting import BINS, DRAFTS, Drafting, expected_paces
from decoding.prediction import distribution, penalize
from decoding.settings import DecodeConfig
from decoding.thresholds import THRESHOLDS
from formats.checkpoint import save_checkpoint

FLAT = {1: 1.0}  # seconds, whatever the rows
GOOD = Costs(5, FLAT, FLAT, {2: 0.1, 4: 0.1})


def auto(**changes) -> DecodeConfig:
    return DecodeConfig(**{"max_new_tokens": 40, "confidence": "softmax", "verify": True, "draft": "auto", **changes})


def random_costs(random, layers, exits) -> Costs:
    """Seconds in which heads cost anything from a tenth of a block to twenty."""
    block, top = random.uniform(1, 2), random.uniform(0.1, 20)
    ask = {layer: random.uniform(0.01, 1) for layer in exits}
    return Costs(layers, {1: block, 4: block * 1.3, 16: block * random.uniform(1.5, 4)}, {1: top, 16: top * random.uniform(1, 3)}, ask)


# ---------------------------------------------------------------- exact


def test_the_text_is_the_full_models_whatever_the_costs(tiny_model):
    """150 random settings: confidence, pruning, shortlist, penalty, an end token that does occur; costs from
    absurd to likely; three texts with one state."""
    random, kept, back, full = np.random.default_rng(0), 0, 0, 0
    for case in range(150):
        model = tiny_model(case // 5, eos_id=None if case % 3 else int(random.integers(50)))
        model.frequent_ids = torch.from_numpy(random.permutation(50))
        names = sorted(FUNCTIONS) if case % 2 else sorted(set(FUNCTIONS) - {"classifier"})  # there is none after the last layer
        config = auto(
            max_new_tokens=int(random.integers(1, 20)), confidence=str(random.choice(names)), shortlist=None if case % 2 else 20,
            prune=str(random.choice(["none", "fixed", "decaying"])), prune_k=6, prune_min=2, min_layer=int(random.integers(1, 4)),
            repetition_penalty=float(random.choice([1.0, 1.5])),
        )  # fmt: skip
        state = Drafting(random_costs(random, 5, config.exits(model.config)))
        for _ in range(3):
            prompt = random.integers(0, 50, random.integers(1, 6)).tolist()
            out = generate(model, prompt, config, drafting=state)
            assert out.tokens == generate(model, prompt, config.full()).tokens, config
            kept, back = kept + out.counters.accepted, back + out.counters.drafted - out.counters.accepted
            full += state.plan == state.full
    assert kept > 250 and back > 250 and 25 < full < 425


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "shortlist": 4}])
def test_samples_follow_the_full_models_distribution(tiny_model, changes):
    """As in test_decode.py, with costs that tempt to draft, and a state that goes on from draw to draw, so
    that what was sampled decides how is drafted."""
    model = tiny_model(3, vocab_size=6)
    model.frequent_ids = torch.arange(6)
    config = auto(max_new_tokens=3, **{"temperature": 1.0, **changes})
    joint, drafted = {}, 0
    for a in range(6):
        for b in range(6):
            p = [distribution(row, config) for row in model(torch.tensor([[1, 2, a, b]]))[0, 1:]]
            joint.update({(a, b, c): float(p[0][a] * p[1][b] * p[2][c]) for c in range(6)})
    state = Drafting(Costs(5, FLAT, {1: 20.0}, dict.fromkeys(config.exits(model.config), 0.01)))
    draws = []
    for seed in range(1500):
        out = generate(model, [1, 2], replace(config, seed=seed), drafting=state)
        draws.append(tuple(out.tokens))
        drafted += out.counters.drafted
    statistic, df = chi_square(joint, draws)
    assert statistic < df + 4.8 * (2 * df) ** 0.5 + 15 and drafted > 1500


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
    """5 layers, exit 2, blocks of 1 s (3 s for two rows), the top 2 s (4 s), asking 0.5 s. Of 8 positions 4
    reached the threshold of bin 8, and 2 of these agreed; with the draft of the doubt a = 2/5, q = 1/2. At
    most one draft: asked, 2 + 0.5; with 1/2 then the rest of one row, 3 + 2; with 1/2 two more blocks and
    three of two rows, 2 + 9 + 4. So 12.5 s for 1 + 1/5 tokens."""
    costs = Costs(5, {1: 1.0, 2: 3.0}, {1: 2.0, 2: 4.0}, {2: 0.5})
    asked, agreed = np.zeros((1, BINS)), np.zeros((1, BINS))
    asked[0, 2], asked[0, 8], asked[0, 15], agreed[0, 2], agreed[0, 15] = 4, 1, 3, 1, 2
    assert expected_paces(costs, asked, agreed)[0, 8, 0] == pytest.approx((2.5 + 0.5 * 5 + 0.5 * 15) / 1.2)


def test_expected_paces_are_those_of_simulated_rounds():
    """An independent reference: 40,000 rounds, drawn token by token. A token passes with q and is kept with
    a; relative error below 2 %."""
    random = np.random.default_rng(0)
    costs = Costs(6, {1: 1.0, 4: 1.5, 16: 4.0}, {1: 3.0, 16: 6.0}, {3: 0.3})
    asked, agreed = np.zeros((1, BINS)), np.zeros((1, BINS))
    asked[0, 3], asked[0, 12], agreed[0, 12] = 3000, 7000, 6000
    q, a = 0.7, 6000 / 7001
    for most in (1, 4, 15):
        seconds = tokens = 0
        for _ in range(40_000):
            drafts = 0
            while drafts < most:
                seconds += 3 * 1.0 + 0.3
                if random.random() > q:
                    break
                drafts += 1
            else:
                seconds += 3 * 1.0
            rows = drafts + 1
            seconds += 3 * np.interp(rows, [1, 4, 16], [1.0, 1.5, 4.0]) + np.interp(rows, [1, 16], [3.0, 6.0])
            kept = 0
            while kept < drafts and random.random() < a:
                kept += 1
            tokens += kept + 1
        assert expected_paces(costs, asked, agreed)[0, 12, most - 1] == pytest.approx(seconds / tokens, rel=0.02)


def test_costs_between_the_rows_measured_lie_on_a_line_and_beyond_stay():
    assert module.by_rows({1: 1.0, 3: 2.0, 5: 6.0})[:6].tolist() == [1.0, 1.5, 2.0, 4.0, 6.0, 6.0]
    assert len(module.by_rows(FLAT)) == DRAFTS + 1


def observed(costs, *seen) -> Drafting:
    """A state that has seen (layer, confidence, agreed) 100 times each."""
    state = Drafting(costs)
    for _ in range(100):
        for one in seen:
            state.observe(*one)
    return state


def test_the_plan_is_the_exit_that_promises_most():
    """Exit 2 agrees where it is confident, exit 4 always; exits that never agree, or whose questions cost
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
    dear = observed(replace(GOOD, ask={2: 5.0, 4: 5.0}), (2, 0.9, 1.0), (4, 0.9, 1.0))
    assert dear.best() == dear.full and dear.rivals() == []


def test_what_was_seen_long_ago_fades():
    state = observed(GOOD, (2, 0.9, 1.0))
    assert state.best().layer == 2
    for _ in range(1500):
        state.observe(2, 0.9, 0.0)
    assert state.best() == state.full and state.asked[0].sum() < 1 / (1 - module.FADING)


# ---------------------------------------------------------------- what it learns


@pytest.mark.parametrize("shortlist, penalty", [(None, 1.0), (15, 1.0), (None, 1.8)])
def test_what_it_learns_is_what_full_passes_say(tiny_model, monkeypatch, shortlist, penalty):
    """Every observation of a text, against whole forward passes: that an exit, asked by itself about one of
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
            logits = model.head(states[layer][position : position + 1], layer)[0, ids]
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
    running = Run(model, PROMPT, auto(temperature=0.8, shortlist=20), decode.Counters())
    with torch.inference_mode():
        trace, _ = running.advance(PROMPT, {})
        running.text.append(5)
        below = [state[-1:] for state in trace.hidden[:3]]
        alone = module.ask_alone(running, below, {})
        said = module.agreement(running, alone, 2, trace.final[-1], len(PROMPT))
    listed = alone.candidates.numpy()
    p = np.exp(trace.final[-1].double().numpy() / 0.8)
    q = np.exp(model.head(trace.hidden[2][-1:])[0].double().numpy() / 0.8)
    q = np.where(np.isin(np.arange(50), listed), q, 0)
    assert said == pytest.approx(np.minimum(p / p.sum(), q / q.sum()).sum(), abs=1e-5) and 0 < said < 1


def test_useless_exits_cost_little_and_are_tried_again(tiny_model):
    """By the table: of 400 tokens under exits that never agree, at most 3 % of the time is spent on asking
    them, yet they are asked in the last hundred, too."""
    model = tiny_model(0)
    state = Drafting(Costs(5, FLAT, FLAT, dict.fromkeys(range(1, 5), 0.3)))
    learn, asked, spent = state.observe, [], []
    state.observe = lambda layer, confidence, agreed: asked.append(len(spent)) or learn(layer, confidence, 0.0)
    for prompt in range(10):
        for token in stream(model, [prompt], auto(), drafting=state):
            spent.append(token.id)
    assert len(spent) == 400 and state.plan == state.full
    assert 0 < len(asked) * 0.3 <= 0.03 * 400 * 6 and max(asked) > 300


def test_dear_questions_are_put_off_until_they_are_a_small_share(tiny_model):
    """Asking all four exits costs 34 s, a token 14 s, two of which may be spent at the start, and 1 % of the
    time: after 40 tokens nothing was asked, after 80 something was."""
    state = Drafting(Costs(5, FLAT, {1: 9.0}, dict.fromkeys(range(1, 5), 8.5)))
    asked = []
    state.observe = lambda *one: asked.append(one)
    generate(tiny_model(0), PROMPT, auto(), drafting=state)
    assert not asked and state.plan == state.full
    generate(tiny_model(0), PROMPT, auto(), drafting=state)
    assert len(asked) == 4


def test_good_exits_are_used_and_save_passes(tiny_model):
    """A model whose upper three layers change nothing: all drafts of layer 2 are kept, and most tokens are
    drafts."""
    model = tiny_model(4)
    for block in model.blocks[2:]:
        block.out.zero_()
        block.down.zero_()
    state = Drafting(GOOD)
    outs = [generate(model, [prompt], auto(), drafting=state) for prompt in range(5)]
    assert all(out.counters.accepted == out.counters.drafted for out in outs)
    assert state.plan.layer == 2 and outs[-1].exit_layers.count(2) > 30 and outs[-1].counters.deep_passes < 10


# ---------------------------------------------------------------- the table of costs, and mistakes


def test_costs_are_measured_once_and_then_read(tiny_model, monkeypatch, capsys):
    """Of a model and its questions: other questions, dtypes or forms have a table of their own."""
    model, config, calls = tiny_model(0), auto(), []
    monkeypatch.setattr("decoding.costs.measure", lambda *asked: calls.append(asked) or GOOD)
    assert costs_of(model, config, Run) == costs_of(model, config, Run) == GOOD and len(calls) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("measured what passes cost here")
    costs_of(model, replace(config, seed=3, max_new_tokens=9), Run)
    assert len(calls) == 1
    costs_of(model, replace(config, confidence="jsd"), Run)
    costs_of(tiny_model(0, n_layers=6), config, Run)
    assert len(calls) == 3
    path = said.split()[-1]
    for damage in ('{"layers": 5}', '{"layers": 5, "block": {"1": -1}, "top": {"1": 1}, "ask": {"2": 1}}', "{"):
        with open(path, "w") as file:
            file.write(damage)
        with pytest.raises(ValueError, match="costs"):
            costs_of(model, config, Run)


@pytest.mark.parametrize("shape", [{}, {"max_len": 12}])
@pytest.mark.parametrize("changes", [{}, {"confidence": "jsd", "shortlist": 10}, {"temperature": 1.0, "prune": "fixed", "prune_k": 4}])
def test_what_is_measured_is_a_whole_table(tiny_model, monkeypatch, changes, shape):
    monkeypatch.setattr("decoding.costs.AT_LEAST", 0.0)
    model, config = tiny_model(0, **shape), auto(**changes)
    model.frequent_ids = torch.arange(50)
    costs = measure(model, config, Run)
    assert list(costs.ask) == list(config.exits(model.config)) and costs.layers == 5
    assert list(costs.block) == list(costs.top) == ([1, 2, 4, 8] if shape else [1, 2, 4, 8, 16])
    assert Costs(**json.loads(json.dumps(asdict(costs)))) == costs
    assert "exits" in key_of(model, config)


@pytest.mark.parametrize("changes, message", [
    ({"verify": False}, "draft is auto, but verify is False"),
    ({"confidence": None}, "draft is auto, but confidence is none"),
    ({"exit_layers": (2,)}, "draft is auto, which chooses exit_layers itself"),
    ({"max_owed": 4}, "draft is auto, which chooses max_owed itself"),
    *[({"threshold_schedule": name}, f"threshold_schedule is {name}") for name in THRESHOLDS if name != "constant"],
    ({"draft": "best"}, "unknown draft 'best'; choose from fixed, auto"),
])  # fmt: skip
def test_what_contradicts_it_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        auto(**changes)


def test_the_command_says_what_it_measured_and_drafts(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0), None)
    flags = ["--prompt=1,7,3,9", "--draft=auto", "--verify", "--max-new-tokens=20"]
    monkeypatch.setattr("sys.argv", ["decode.py", f"--checkpoint={tmp_path / 'tiny.pt'}", *flags])
    for first in (True, False):
        run(decode.main)
        said = capsys.readouterr()
        assert " ".join(map(str, greedy_reference(tiny_model(0), PROMPT, 20))) in said.out
        assert "softmax at one of the layers 1,2,3,4, as measured" in said.err
        assert ("measured what passes cost here" in said.err) == first


def test_costs_that_are_none_are_refused():
    for changes in ({"block": {}}, {"ask": {6: 1.0}}, {"top": {1: math.inf}}):
        with pytest.raises(ValueError, match="costs: "):
            replace(GOOD, **changes)


@pytest.mark.parametrize("confidence", ["softmax", "classifier", "hidden"])
def test_every_head_is_counted(tiny_model, monkeypatch, confidence):
    """Those that drafting learns from, too, where the function reads none: by the products themselves."""
    made, model = [], tiny_model(0)
    score = type(model).score
    monkeypatch.setattr(type(model), "score", lambda self, x, w: made.append(2 * len(x) * w.numel()) or score(self, x, w))
    counters = generate(model, PROMPT, auto(confidence=confidence)).counters
    assert counters.head_flops == sum(made)


def test_what_was_learned_is_not_asked_where_drafts_are_fixed(tiny_model):
    config = DecodeConfig(confidence="softmax", threshold=0.0, exit_layers=(2,), verify=True, max_new_tokens=10)
    alone, given = (generate(tiny_model(0), PROMPT, config, drafting=each).counters for each in (None, Drafting(GOOD)))
    assert given == alone
