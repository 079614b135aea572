"""The loop: exact where it must be, early where it may be, and honest about the work done."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import decode
from common.errors import run
from common.flags import given
from confidence import FUNCTIONS, SCHEDULES, register
from decode import generate, stream
from decoding.choosing import COMMAND, settings_of, variants
from decoding.flops import block_flops
from decoding.prediction import distribution
from decoding.record import Generation
from decoding.settings import DecodeConfig
from decoding.thresholds import THRESHOLDS
from formats.checkpoint import save_checkpoint
from model import ModelConfig, Transformer

PROMPT = [1, 7, 3, 9]


def greedy_reference(model: Transformer, prompt: list[int], steps: int, layer: int | None = None) -> list[int]:
    """The naive loop: a whole forward pass for every token, reading out after `layer`."""
    tokens = list(prompt)
    for _ in range(steps):
        states = model.hidden_states(torch.tensor([tokens]))
        tokens.append(int(model.head(states[layer or -1][-1:], layer).argmax()))
        if tokens[-1] == model.config.eos_id:
            break
    return tokens[len(prompt) :]


def exact_tokens(model: Transformer, prompt: list[int], out: Generation) -> list[int]:
    """What a full pass over the generated text reads out at each token's own exit layer."""
    states = model.hidden_states(torch.tensor([prompt + out.tokens]))
    return [int(model.head(states[layer][i : i + 1], layer).argmax()) for i, layer in enumerate(out.exit_layers, len(prompt) - 1)]


@pytest.mark.parametrize("confidence", [None, *sorted(FUNCTIONS)])
@pytest.mark.parametrize("fill", ["parallel", "copy"])
def test_an_unreachable_threshold_gives_the_full_models_tokens(tiny_model, confidence, fill):
    """No confidence reaches 1 on these models: rounding aside it takes a distribution on a single token."""
    model = tiny_model(0)
    out = generate(model, PROMPT, DecodeConfig(max_new_tokens=20, confidence=confidence, threshold=1.0, fill=fill, exit_layers=(2, 3, 4)))
    assert out.tokens == greedy_reference(model, PROMPT, 20)
    assert out.exit_layers == [5] * 20


@pytest.mark.parametrize("confidence", sorted(FUNCTIONS))
def test_threshold_zero_exits_at_the_first_allowed_layer_without_asking(tiny_model, confidence):
    model = tiny_model(1)
    for exits, least, first in ((None, 1, 1), (None, 3, 3), ((2, 4), 1, 2), ((2, 4), 3, 4)):
        config = DecodeConfig(max_new_tokens=9, confidence=confidence, threshold=0.0, exit_layers=exits, min_layer=least)
        out = generate(model, PROMPT, config)
        assert out.exit_layers == [first] * 9 and out.confidences == [{}] * 9
        assert out.counters.block_runs == 9 * first and out.counters.confidence_flops == 0


@pytest.mark.parametrize("fill", ["parallel", "copy"])
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_a_static_exit_is_the_model_cut_there(tiny_model, fill, layer):
    model = tiny_model(2, exit_norms=(2,))
    config = DecodeConfig(max_new_tokens=15, confidence="softmax", threshold=0.0, exit_layers=(layer,), fill=fill)
    assert generate(model, PROMPT, config).tokens == greedy_reference(model, PROMPT, 15, layer)


@pytest.mark.parametrize("confidence", sorted(FUNCTIONS))
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_the_full_passs_token_at_its_exit_layer(tiny_model, confidence, seed):
    """The parallel pass is exact: whatever the pattern of exits, decoding equals re-reading the text without
    a cache."""
    model = tiny_model(seed)
    threshold = {"softmax": 0.15, "hidden": 0.85, "entropy": 0.25, "weighted": 0.1, "jsd": 0.1}.get(confidence, 0.2)
    out = generate(model, PROMPT, DecodeConfig(max_new_tokens=30, confidence=confidence, threshold=threshold))
    assert out.tokens == exact_tokens(model, PROMPT, out)


def test_exits_at_several_layers_do_happen(tiny_model):
    """So that the test above means something."""
    layers = {layer for seed in range(5) for layer in mixed(tiny_model(seed)).exit_layers}
    assert len(layers) >= 4


def mixed(model, **changes) -> Generation:
    return generate(model, PROMPT, DecodeConfig(**{"max_new_tokens": 30, "confidence": "softmax", "threshold": 0.15, **changes}))


def test_the_exit_is_at_the_first_layer_whose_confidence_reaches_the_threshold(tiny_model):
    out = mixed(tiny_model(3), exit_layers=(1, 2, 4))
    for layer, asked in zip(out.exit_layers, out.confidences):
        assert list(asked) == [exit_layer for exit_layer in (1, 2, 4) if exit_layer <= layer]
        assert [c >= 0.15 for c in asked.values()] == [exit_layer == layer for exit_layer in asked]


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
            shallow = model.head(states[layer][-1:], layer)[0]
            first, second = shallow.softmax(-1).topk(2).values.tolist()
            paths.add(first - second >= 0.12)
            text.append(int((shallow if first - second >= 0.12 else model.head(states[-1][-1:])[0]).argmax()))
        config = DecodeConfig(max_new_tokens=25, confidence="softmax", threshold=0.12, exit_layers=(layer,))
        assert generate(model, PROMPT, config).tokens == text[len(PROMPT) :]
    assert paths == {True, False}


def test_max_owed_bounds_what_is_owed(tiny_model):
    model = tiny_model(1)
    out = generate(model, [1], DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.0, exit_layers=(2,), max_owed=3))
    assert out.exit_layers == [2, 2, 2, 5] * 3
    assert out.counters.deep_passes == 3 and out.counters.deep_rows == 12
    assert out.tokens == exact_tokens(model, [1], out)


def test_pruning_changes_neither_the_static_exit_nor_the_full_model(tiny_model):
    """The best candidate survives any pruning, and the last layer asks the whole vocabulary."""
    model = tiny_model(4)
    for threshold in (0.0, 1.0):
        assert mixed(model, threshold=threshold, prune="fixed", prune_k=2).tokens == mixed(model, threshold=threshold).tokens
    pruned = mixed(model, threshold=0.999, prune="fixed", prune_k=2)
    deep = [i for i, layer in enumerate(pruned.exit_layers) if layer == 5]
    assert [pruned.tokens[i] for i in deep] == [exact_tokens(model, PROMPT, pruned)[i] for i in deep]
    assert 0 < pruned.counters.missed <= pruned.counters.pruned_deep == len(deep)


def test_pruned_checks_cost_what_their_candidates_cost(tiny_model):
    """Threshold unreachable, exits 2 and 4: one head over V = 50 and one over k = 8, both asked in vain, and
    the final head."""
    counters = mixed(tiny_model(0), max_new_tokens=3, threshold=1.0, exit_layers=(2, 4), prune="fixed", prune_k=8).counters
    assert counters.confidence_flops == 3 * 2 * 32 * (50 + 8)
    assert counters.head_flops == counters.confidence_flops + 3 * 2 * 32 * 50


def test_counters_add_up(tiny_model):
    model = tiny_model(2)
    out = mixed(model)
    c = out.counters
    assert c.tokens == len(out.tokens) == 30 and c.block_runs == sum(out.exit_layers)
    assert c.deep_passes == out.exit_layers.count(5)
    rows = {layer: 0 for layer in range(1, 6)}  # positions that ran a layer: all up to the last token that reached it
    for i, reached in enumerate(out.exit_layers):
        rows.update({layer: len(PROMPT) + i for layer in range(1, reached + 1)})
    assert c.block_rows == sum(rows.values())
    before, flops = dict.fromkeys(range(1, 6), 0), 0
    for i, reached in enumerate(out.exit_layers):
        for layer in range(1, reached + 1):
            flops, before[layer] = flops + block_flops(model.config, before[layer], len(PROMPT) + i), len(PROMPT) + i
    assert c.block_flops == flops


def test_copy_fill_owes_nothing(tiny_model):
    """One pass to the top for all of the prompt but its last token, then one row a pass."""
    outs = [mixed(tiny_model(seed), fill="copy") for seed in range(6)]
    assert any(1 < out.exit_layers.count(5) < 29 for out in outs)
    for out in outs:
        assert out.counters.deep_passes == out.exit_layers.count(5)
        assert out.counters.deep_rows == out.exit_layers.count(5)
        assert out.counters.block_rows == 5 * (len(PROMPT) - 1) + sum(out.exit_layers)


def test_copied_keys_and_values_are_projected_from_the_exit_state(tiny_model):
    model = tiny_model(5)
    cache, trace = decode.KVCache(model, 4), decode.Trace(model)
    with torch.inference_mode():
        decode.run_pass(model, cache, [3], trace, {2: 0.0})
        counters = decode.Counters()
        decode.copy_up(model, cache, 2, counters)
        assert counters.block_flops == 3 * 2 * 32 * 64  # three layers project 4 + 2 + 2 heads of width 8 from one row
        assert cache.filled == [1] * 6 + [0]
        block, state = model.blocks[4], trace.hidden[2][0]
        value = (block.qkv @ (state * block.attn_norm / (state.square().mean() + 1e-6).sqrt()))[-16:]  # K C = 2 x 8
        exact = decode.KVCache(model, 4)
        decode.run_pass(model, exact, [3], decode.Trace(model), {})
    copied, exact = (each.keys_values[4][0, 2:, 0] for each in (cache, exact))  # the last two of four heads are values
    torch.testing.assert_close(copied.flatten(), value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(copied, exact, atol=0.1)  # approximate, as CALM's is


def test_generation_ends_with_the_end_token(tiny_model):
    full = greedy_reference(tiny_model(0), PROMPT, 20)
    model = tiny_model(0, eos_id=full[6])
    expected = full[: full.index(full[6]) + 1]
    assert generate(model, PROMPT, DecodeConfig(max_new_tokens=20)).tokens == expected


def test_generation_ends_where_the_models_positions_end(tiny_model):
    assert len(generate(tiny_model(0, max_len=16), PROMPT, DecodeConfig(max_new_tokens=50)).tokens) == 12


def test_a_new_confidence_function_takes_one_function(tiny_model):
    """Exit when the best token has not changed since the layer below."""
    try:

        @register("stable")
        def stable(trace, layer):
            return (trace.logits(layer).argmax() == trace.logits(layer - 1).argmax()).float() if layer > 1 else torch.tensor(0.0)

        model = tiny_model(1)
        out = generate(model, PROMPT, DecodeConfig(max_new_tokens=20, confidence="stable", threshold=1.0))
    finally:
        del FUNCTIONS["stable"]
    assert set(out.exit_layers) - {5} and out.tokens == exact_tokens(model, PROMPT, out)
    states = model.hidden_states(torch.tensor([PROMPT + out.tokens]))
    for i, layer in enumerate(out.exit_layers, len(PROMPT) - 1):
        best = [int(model.head(state[i : i + 1]).argmax()) for state in states]
        assert layer == next((j for j in range(2, 5) if best[j] == best[j - 1]), 5)


def test_a_decaying_threshold_starts_high_and_falls(tiny_model):
    model = tiny_model(1)
    loose = mixed(model, threshold=0.3, threshold_schedule="decaying", tau=50.0)
    bars = [0.9 * 0.3 + 0.1 * math.exp(-50 * i / 30) for i in range(30)]
    for bar, layer, asked in zip(bars, loose.exit_layers, loose.confidences):
        assert [c >= bar for c in asked.values()] == [j == layer for j in asked]


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
        torch.testing.assert_close(distribution(logits, config), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_samples_follow_the_distribution_and_the_seed(tiny_model):
    """4,000 first tokens against the full model's softmax; chi-square at 49 degrees of freedom exceeds 100
    with probability 2e-5."""
    model = tiny_model(0)
    p = model(torch.tensor([PROMPT]))[0, -1].softmax(-1).numpy()
    draws = [generate(model, PROMPT, DecodeConfig(max_new_tokens=1, temperature=1.0, seed=seed)).tokens[0] for seed in range(4000)]
    counts = np.bincount(draws, minlength=50)
    assert ((counts - 4000 * p) ** 2 / (4000 * p)).sum() < 100
    config = DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.15, temperature=1.0, seed=3)
    assert generate(model, PROMPT, config).tokens == generate(model, PROMPT, config).tokens


def test_top_k_one_is_greedy(tiny_model):
    assert mixed(tiny_model(0), temperature=0.7, top_k=1).tokens == mixed(tiny_model(0)).tokens


# ---------------------------------------------------------------- verified mode


def test_verified_greedy_output_is_the_full_models(tiny_model):
    """600 random settings: confidence, threshold, exits, pruning, bound, prompt, length, and an end token
    that does occur."""
    random, drafted, rolled_back = np.random.default_rng(0), 0, 0
    for case in range(600):
        prompt = random.integers(0, 50, random.integers(1, 6)).tolist()
        model = tiny_model(case // 10, eos_id=None if case % 3 else int(random.integers(50)))
        config = DecodeConfig(
            verify=True, max_new_tokens=int(random.integers(1, 14)), confidence=str(random.choice(sorted(FUNCTIONS))),
            threshold=float(random.choice([0, 0.05, 0.2, 0.6])), exit_layers=None if case % 2 else (1, 3),
            max_owed=random.choice([None, 1, 2, 5]), prune=str(random.choice(sorted(SCHEDULES))), prune_k=6,
            prune_min=3, threshold_schedule=str(random.choice(sorted(THRESHOLDS))),
        )  # fmt: skip
        out = generate(model, prompt, config)
        assert out.tokens == greedy_reference(model, prompt, config.max_new_tokens), config
        assert out.counters.tokens == len(out.tokens) and out.counters.accepted <= out.counters.drafted
        drafted, rolled_back = drafted + out.counters.drafted, rolled_back + out.counters.drafted - out.counters.accepted
    assert rolled_back > 300 and drafted - rolled_back > 300


def test_a_verified_end_is_a_draft_like_any_other(tiny_model):
    """A static exit drafts an end token that the full model rejects; the text goes on."""
    wrong = 0
    for seed in range(30):
        drafted_end = greedy_reference(tiny_model(seed), PROMPT, 1, layer=1)[0]
        model = tiny_model(seed, eos_id=drafted_end)
        out = generate(model, PROMPT, DecodeConfig(max_new_tokens=8, confidence="softmax", threshold=0.0, exit_layers=(1,), verify=True))
        assert out.tokens == greedy_reference(model, PROMPT, 8)
        wrong += out.tokens[0] != drafted_end
    assert wrong > 5


@pytest.mark.parametrize("changes", [{}, {"prune": "fixed", "prune_k": 3}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"max_owed": 1}])
def test_verified_samples_follow_the_full_models_distribution(tiny_model, changes):
    """Three tokens of a vocabulary of 6, 1,500 draws against the exact joint distribution. The bound, df +
    4.8 sqrt(2 df) + 15, lies above the 1 - 1e-6 quantile of chi-square, so that a false alarm has less than
    that chance; and without verification the same exits exceed it twice over."""
    model, draws = tiny_model(3, vocab_size=6), range(1500)
    base = {"max_new_tokens": 3, "confidence": "softmax", "threshold": 0.0, "exit_layers": (1,), "temperature": 1.0, "verify": True}
    config = DecodeConfig(**{**base, **changes})
    joint = {}
    for a in range(6):
        for b in range(6):
            p = [distribution(row, config) for row in model(torch.tensor([[1, 2, a, b]]))[0, 1:]]
            joint.update({(a, b, c): float(p[0][a] * p[1][b] * p[2][c]) for c in range(6)})
    assert sum(joint.values()) == pytest.approx(1, abs=1e-4)
    statistic, df = chi_square(joint, [tuple(generate(model, [1, 2], replace(config, seed=seed)).tokens) for seed in draws])
    assert statistic < df + 4.8 * (2 * df) ** 0.5 + 15
    loose = [tuple(generate(model, [1, 2], replace(config, seed=seed, verify=False, max_owed=None)).tokens) for seed in draws]
    statistic, df = chi_square(joint, loose)
    assert statistic > 2 * (df + 4.8 * (2 * df) ** 0.5 + 15)


def chi_square(joint: dict[tuple, float], draws: list[tuple]) -> tuple[float, int]:
    """Pearson's statistic and degrees of freedom, outcomes expected fewer than 5 times pooled into one."""
    often = [outcome for outcome, p in joint.items() if p * len(draws) >= 5]
    expected = [joint[outcome] * len(draws) for outcome in often]
    found = [draws.count(outcome) for outcome in often]
    expected, found = [*expected, max(len(draws) - sum(expected), 1e-3)], [*found, len(draws) - sum(found)]
    return sum((f - e) ** 2 / e for f, e in zip(found, expected)), len(often)


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


def test_streaming_yields_only_what_is_verified(tiny_model):
    model = tiny_model(2)
    config = DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.0, exit_layers=(1,), max_owed=2, verify=True)
    for n, token in enumerate(stream(model, PROMPT, config)):
        assert token.id == greedy_reference(model, PROMPT, 12)[n]


# ---------------------------------------------------------------- mistakes and the command line


@pytest.mark.parametrize(("field", "value"), [
    ("threshold", 1.5), ("threshold", -0.1), ("threshold", math.nan), ("confidence", "magic"), ("fill", "none"), ("top_p", 0.0),
    ("threshold_schedule", "rising"), ("prune", "all"), ("prune_k", 1), ("max_owed", 0), ("max_new_tokens", 0), ("min_layer", 0),
    ("temperature", -1.0), ("top_k", 0), ("prune_min", 1), ("prune_min", 65), ("target", 1.0), ("tau", 0.0),
    ("predict", "next"), ("form", "sum"), ("repetition_penalty", 0.5),
    ("contrast", "best"), ("alpha", 0.0), ("beta", 0.0), ("amateur_temperature", math.inf),
])  # fmt: skip
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        DecodeConfig(**{"prune": "decaying", field: value})


@pytest.mark.parametrize("other", [{"fill": "copy"}, {"predict": "contrast"}])
def test_what_cannot_be_verified_is_refused(other):
    with pytest.raises(ValueError, match=f"verify is True, but {next(iter(other))} is {next(iter(other.values()))}"):
        DecodeConfig(verify=True, **other)


@pytest.mark.parametrize(("prompt", "config", "message"), [
    ([], {}, "non-empty"), ([[1, 2], [3, 4]], {}, "batch size 1"), ([1] * 64, {}, "64 tokens"), ([1, 50], {}, "0 to 49"),
    ([1], {"confidence": "softmax", "min_layer": 5}, "min_layer is 5, which leaves no exit layer"),
    ([1], {"confidence": "softmax", "exit_layers": (5,)}, "layer 5"), ([1], {"confidence": "softmax", "exit_layers": (0,)}, "layer 0"),
])  # fmt: skip
def test_impossible_requests_are_refused(tiny_model, prompt, config, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(0), prompt, DecodeConfig(**config))


def test_streaming_yields_tokens_as_they_come(tiny_model):
    model = tiny_model(0)
    tokens = stream(model, PROMPT, DecodeConfig(max_new_tokens=5))
    assert next(tokens).id == greedy_reference(model, PROMPT, 1)[0]


def test_the_command_streams_ids_where_there_is_no_tokenizer_and_refuses_mistakes_in_one_line(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0), None)

    def command(*words):
        monkeypatch.setattr("sys.argv", ["decode.py", f"--checkpoint={tmp_path / 'tiny.pt'}", *words])
        run(decode.main)

    command("--prompt=1,7,3,9", "--confidence=none", "--max-new-tokens=6")
    assert " ".join(map(str, greedy_reference(tiny_model(0), PROMPT, 6))) in capsys.readouterr().out
    trace = tmp_path / "trace.jsonl"
    trace.write_text("old")
    mistakes = {"--prompt=hello": "token ids", "--prompt=": "token ids", "--exit-layers=9": "layer 9", "--prompt=1,99": "0 to 49",
                "--threshold=2": "threshold", "--dtype=int3": "int3", "--thresholds=no.json": "no.json",
                "--amateur=no.pt": "no such checkpoint", "--compare=softmax,magic": "magic",
                "--compare=softmax+speed=2": "speed", "--contrast=9": "layer 9", "--stop-tokens=99": "stop_tokens has 99",
                "--shortlist=10": "no frequent ids are known", "--exit-layers=1,,2": "invalid list", "--stop-tokens=": "invalid list",
                "--weights=int8": "unknown form", "--amateur-temperature=2": "name that model with --amateur"}  # fmt: skip
    for mistake, message in mistakes.items():
        with pytest.raises(SystemExit) as end:
            command("--prompt=1", f"--trace={trace}", mistake)
        line = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and line.startswith("error: ") and message in line and trace.read_text() == "old"


def test_settings_side_by_side(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0), None)
    names = "full,softmax+threshold=0+exit-layers=1,softmax+threshold=0+exit-layers=2+max-owed=2+verify"
    monkeypatch.setattr("sys.argv", ["decode.py", f"--checkpoint={tmp_path / 'tiny.pt'}", "--prompt=1,7,3,9", f"--compare={names}"])
    run(decode.main)
    _, *parts = capsys.readouterr().out.split("--- ")
    assert [part.splitlines()[0] for part in parts] == names.split(",")
    full = greedy_reference(tiny_model(0), PROMPT, 60)
    for part in (parts[0], parts[2]):
        assert part.splitlines()[1] == " ".join(map(str, full)) and "the same text as the full model's" in part
    early = greedy_reference(tiny_model(0), PROMPT, 60, layer=1)
    at = next(i for i in range(60) if early[i] != full[i])
    assert f"first at token {at + 1}: {early[at]} in place of {full[at]}" in parts[1]
    assert "drafts: " in parts[2] and "drafts: " not in parts[1]


FIVE, TWELVE = ModelConfig(n_layers=5), ModelConfig(n_layers=12, exit_layers=(3, 4, 6))


def chosen(*words) -> DecodeConfig:
    """The settings that the command takes from its flags and from files."""
    args = decode.make_parser().parse_args(["--prompt=1", *words])
    return settings_of(args.checkpoint, args.thresholds, given(args, DecodeConfig))[0]


def test_thresholds_from_a_file_give_way_to_flags(tmp_path):
    (tmp_path / "t.json").write_text('{"confidence": "jsd", "exit_layers": [1, 2], "layer_thresholds": [0.5, 0.6]}')
    read = partial(chosen, f"--thresholds={tmp_path / 't.json'}")
    assert read().exits(FIVE) == {1: 0.5, 2: 0.6} and read().confidence == "jsd"
    assert read("--threshold=0.7").exits(FIVE) == {1: 0.7, 2: 0.7}
    assert read("--layer-thresholds=0.1,0.2").exits(FIVE) == {1: 0.1, 2: 0.2}
    assert read("--exit-layers=3,4").exits(FIVE) == dict.fromkeys((3, 4), read().threshold)  # 0.5 and 0.6 were of others
    assert variants(read(), "softmax+exit-layers=3,4")["softmax+exit-layers=3,4"].layer_thresholds is None


def test_settings_beside_a_checkpoint_are_its_defaults(tmp_path):
    read = partial(chosen, f"--checkpoint={tmp_path / 'x.pt'}")
    assert read() == COMMAND
    (tmp_path / "x.json").write_text('{"decode": {"temperature": 0.8, "top_p": 0.9}, "stories": {}}')
    assert read() == replace(COMMAND, temperature=0.8, top_p=0.9) and read("--temperature=0").temperature == 0
    (tmp_path / "x.json").write_text('{"decode": {"temperature": -1}}')
    with pytest.raises(ValueError, match=r"x.json: not usable as settings of decode"):
        read()


@pytest.mark.parametrize("name", ["x.json", "t.json"])
def test_code_comes_from_flags_only(tmp_path, name):
    content = {"confidence": "os:system"}
    (tmp_path / name).write_text(json.dumps({"decode": content} if name == "x.json" else content))
    words = [f"--checkpoint={tmp_path / 'x.pt'}"] + ([f"--thresholds={tmp_path / 't.json'}"] if name == "t.json" else [])
    with pytest.raises(ValueError, match=f"{name}: .*'os:system' is none of .* named by the flag --confidence alone"):
        chosen(*words)


def test_exits_default_to_those_trained_and_else_to_every_layer():
    config = DecodeConfig(confidence="softmax", threshold=0.5)
    assert config.exits(TWELVE) == {3: 0.5, 4: 0.5, 6: 0.5}
    assert list(config.exits(FIVE)) == [1, 2, 3, 4]
    assert list(replace(config, exit_layers=(2, 5)).exits(TWELVE)) == [2, 5]


def test_compared_settings_may_hold_lists():
    found = variants(COMMAND, "full,softmax+exit-layers=4,8+verify,jsd+exit-layers=3")
    assert list(found) == ["full", "softmax+exit-layers=4,8+verify", "jsd+exit-layers=3"]
    both = found["softmax+exit-layers=4,8+verify"]
    assert both.exit_layers == (4, 8) and both.verify and found["full"].confidence is None


def test_a_layer_without_classifier_is_refused_before_a_token_is_made():
    shape = replace(FIVE, classifiers=(1, 2, 3, 4))
    config = DecodeConfig(confidence="classifier", threshold=0.5)
    assert list(replace(config, shortlist=8).exits(shape)) == [1, 2, 3, 4]  # softmax: 5, too, which has no classifier
    assert replace(config, shortlist=8, exit_layers=(2, 5), layer_thresholds=(0.9, 0.0)).exits(shape) == {2: 0.9, 5: 0.0}
    with pytest.raises(ValueError, match=r"layer 5 has no confidence classifier \(layers with one: 1, 2, 3, 4\)"):
        replace(config, shortlist=8, exit_layers=(2, 5)).exits(shape)
    with pytest.raises(ValueError, match="layer 1 has no confidence classifier"):
        config.exits(FIVE)


def test_one_layer_has_no_exit():
    with pytest.raises(ValueError, match="exit_layers are none; give a shortlist, or confidence none: one layer has no exit"):
        DecodeConfig(confidence="softmax").exits(ModelConfig(n_layers=1))


def test_heads_that_thresholds_learn_from_are_counted_as_confidence(tiny_model):
    """`classifier` reads no head; its learned threshold compares the tokens of heads with the full
    model's."""
    config = DecodeConfig(confidence="classifier", threshold=0.99, exit_layers=(1, 2, 3, 4), max_new_tokens=20)
    plain = generate(tiny_model(0), PROMPT, config).counters
    counters = generate(tiny_model(0), PROMPT, replace(config, threshold_schedule="adaptive")).counters
    assert plain.confidence_flops == 0 < counters.confidence_flops


def test_what_a_token_was_drawn_from_is_kept_to_judge_drafts_alone(tiny_model):
    config = DecodeConfig(max_new_tokens=8, confidence="softmax", threshold=0.2, temperature=1.0, exit_layers=(2,))
    for verify in (False, True):
        tokens = list(stream(tiny_model(0), PROMPT, replace(config, verify=verify)))
        assert all(token.probs is None for token in tokens)


def test_a_trace_of_several_settings_names_them(tiny_model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0), None)
    words = ["--prompt=1,7", "--compare=full,softmax", "--max-new-tokens=2", f"--trace={tmp_path / 't.jsonl'}"]
    monkeypatch.setattr("sys.argv", ["decode.py", f"--checkpoint={tmp_path / 'tiny.pt'}", *words])
    run(decode.main)
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["setting"] for row in rows] == ["full"] * 2 + ["softmax"] * 2


def test_max_owed_does_not_count_the_prompt(tiny_model):
    """A prompt owes its upper layers, too, but only early tokens wait for the top."""
    config = DecodeConfig(max_new_tokens=12, confidence="softmax", threshold=0.0, exit_layers=(2,), max_owed=3)
    assert generate(tiny_model(0), PROMPT, config).exit_layers == [2, 2, 2, 5] * 3
    assert generate(tiny_model(0), PROMPT * 5, config).exit_layers == [2, 2, 2, 5] * 3


def test_what_a_command_reads_is_not_overwritten(tiny_model, tmp_path, monkeypatch, capsys):
    """Checkpoint and settings survive an output of the same name; two outputs need two names."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("tiny.pt", tiny_model(0), None)
    Path("tiny.json").write_text('{"decode": {"threshold": 0.5}}')
    before = {name: Path(name).read_bytes() for name in ("tiny.pt", "tiny.json")}
    mistakes = {
        "--trace tiny.pt": "tiny.pt: is read here", "--html ./tiny.pt": "tiny.pt: is read here", "--trace tiny.json": "tiny.json: is read",
        "--html a.html --trace a.html": "a.html: two files would be written there", "--trace nowhere/x": "there is no folder nowhere",
        "--html=": "--html is empty", "--stop-tokens 50": "stop_tokens has 50; this model's ids lie in 0 to 49",
        "--exit-layers 2,2": "each can be given once", "--layer-thresholds 0.5": "layer_thresholds belong to exit_layers",
    }  # fmt: skip
    for words, message in mistakes.items():
        monkeypatch.setattr("sys.argv", ["decode.py", "--checkpoint=tiny.pt", "--prompt=1,7", *words.split()])
        with pytest.raises(SystemExit) as end:
            run(decode.main)
        assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
        assert before == {name: Path(name).read_bytes() for name in before} and not Path("a.html").exists()
