"""The benchmark: its baseline decodes what this project decodes, its clock changes nothing and misses
nothing, and every line is printed."""

import json
import re
from collections import Counter

import pytest
import torch

from common.errors import run
from confidence import Trace
from decode import generate
from decoding.choosing import DEFAULT_CHECKPOINT
from decoding.record import Counters, Generation
from decoding.settings import DecodeConfig
from decoding.shortlist import Shortlist
from formats.checkpoint import read_checkpoint, save_checkpoint
from model import ModelConfig
from tools import bench, bench_split, bench_training
from training.losses import LOSSES
from training.settings import TrainConfig


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"tie_embeddings": False}])
def test_the_plain_loop_gives_the_same_tokens(tiny_model, shape):
    for seed in range(3):
        model = tiny_model(seed, **shape)
        assert bench.plain_loop(model, [1, 2, 3], 12) == generate(model, [1, 2, 3], DecodeConfig(max_new_tokens=12)).tokens


def test_the_command_prints_its_figures(tiny_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, max_len=128), None)
    monkeypatch.setattr("sys.argv", ["bench.py", f"--checkpoint={tmp_path / 'tiny.pt'}", "--repeat=1"])
    run(bench.main)
    printed = capsys.readouterr().out
    assert "the same tokens" in printed and "a pass of 16 rows" in printed
    assert "questions after layers 2,3, all in vain" in printed
    assert all(f"  {name}: all 50 ids" in printed for name in ("softmax", "weighted", "jsd"))
    assert "shortlist" not in printed


# ---------------------------------------------------------------- questions


def test_a_large_vocabulary_is_asked_whole_and_over_a_shortlist(monkeypatch, capsys):
    small = {"vocab_size": 600, "n_layers": 5, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 16, "eos_id": None}
    monkeypatch.setattr(bench, "LARGE", small)
    monkeypatch.setattr(bench, "SHORTLIST", 40)
    monkeypatch.setattr("sys.argv", ["bench.py", "--large-vocabulary", "--repeat=1", "--weights=plain"])
    run(bench.main)
    printed = capsys.readouterr().out
    layers = ["2", "2,3", "2,3,4"]  # one question, three where the model is deep enough, and all layers from 2 on
    assert re.findall("questions after layers (.*), all in vain", printed) == layers
    for name in ("softmax", "weighted", "jsd"):
        assert printed.count(f"  {name}: all 600 ids ") == printed.count(f"  {name}: a shortlist of 40 ") == 3
    assert printed.count("%)") == 3 * 3 * 2 * 2  # layers, functions, lists, pruned or not


@pytest.mark.parametrize("confidence, prune, shortlist, rows", [
    ("softmax", "none", None, [50, 50, 50]),  # every layer asked has its head
    ("softmax", "fixed", None, [50, 4, 4]),   # the first, over all, chooses the candidates of the others
    ("softmax", "none", 20, [21, 21, 21]),    # the frequent ids and the prompt's
    ("softmax", "fixed", 20, [21, 4, 4]),
    ("jsd", "fixed", 20, [21, 4, 4]),         # layer 3 is contrasted with 2, and 4 with 2 or 3, whose heads are known
])  # fmt: skip
def test_a_question_costs_the_heads_that_its_confidence_reads(tiny_model, monkeypatch, confidence, prune, shortlist, rows):
    model, read = tiny_model(0), []
    model.frequent_ids = torch.arange(10, 50)
    short = Shortlist(model, shortlist, 5) if shortlist else None
    if short:
        short.add([5, 11])
    with torch.inference_mode():
        states = [state[-1:] for state in model.hidden_states(torch.tensor([[5, 11]]))]

    class Watched(Trace):
        def stack(self, layers):
            before = dict(self.flops)
            result = super().stack(layers)
            read.extend(self.n for layer in self.flops if layer not in before)
            return result

    monkeypatch.setattr(bench, "Trace", Watched)
    question = bench.Question(confidence, (2, 3, 4), prune, shortlist)
    bench.ask(model, states, question, 4, short, 2)
    assert read == rows * 2


# ---------------------------------------------------------------- where the missing efficiency goes


def work(config: DecodeConfig, tokens: int, runs: int, seconds: dict, count: dict, given: int = 0):
    """What one text took, by hand."""
    counters = Counters(tokens=tokens, block_runs=runs)
    output = Generation(tokens=[0] * tokens, exit_layers=[4] * tokens, counters=counters)
    return bench_split.Spent(config, [output], Counter(seconds), Counter(count), given)


def test_the_parts_of_the_missing_efficiency_by_hand():
    """A model of 4 layers. Full: 10 tokens in 10 s; 36 runs of one row take 0.2 s each, 4 with the prompt 0.4
    s each, heads 0.1 s each, 0.2 s remain. The setting: 10 tokens, 20 block runs, so ideally twice as fast,
    in 8 s: 4 runs with the prompt of 0.4 s (0.8 above 0.2 each, of which a half was to be saved), 6 of
    several rows of 0.3 s (0.6 above 0.2), questions of 1.5 s, of which five heads of 0.1 s gave tokens."""
    config = DecodeConfig(confidence="softmax")
    full = work(
        config.full(),
        10,
        40,
        {"one row": 7.2, "the prompt": 1.6, "head": 1.0, "the rest": 0.2},
        {"one row": 36, "the prompt": 4, "head": 10},
    )
    spent = work(
        config,
        10,
        20,
        {"one row": 2.0, "the prompt": 1.6, "several rows": 1.8, "questions": 1.5, "head": 0.5, "the rest": 0.6},
        {"one row": 10, "the prompt": 4, "several rows": 6, "questions": 15, "head": 5},
        given=5,
    )
    figures = bench_split.split(full, spent, ModelConfig(n_layers=4))
    assert figures["speed-up"] == pytest.approx(10 / 8) and figures["ideal"] == 2
    assert figures["efficiency"] == pytest.approx(5 / 8)
    assert figures["questions"] == pytest.approx((1.5 - 5 * 0.1) / 8)
    assert figures["several rows"] == pytest.approx((1.8 - 6 * 0.2) / 8)
    assert figures["the prompt"] == pytest.approx((0.8 - 0.8 / 2) / 8)
    assert figures["the rest"] == pytest.approx((8 - 10 / 2 - 1.0 - 0.6 - 0.4) / 8)


def test_of_every_segment_the_median_of_its_turns_counts(tiny_model):
    turns = []
    for a, b, c in [(1.0, 2.0, 4.0), (9.0, 3.0, 4.0), (2.0, 1.0, 4.0)]:
        clock = bench_split.Clock(tiny_model(0))
        clock.segments, clock.given = [("head", a), ("the rest", b), ("head", c)], 1
        turns.append(clock)
    spent = bench_split.Spent(DecodeConfig())
    spent.add(turns, Generation(tokens=[1, 2]))
    assert spent.seconds == {"head": 6.0, "the rest": 2.0} and spent.count == {"head": 2, "the rest": 1}
    assert spent.token == 4.0 and spent.mean("head") == 3.0 and spent.given == 1 and spent.above("head", 1.0) == 2.0


@pytest.mark.parametrize("changes", [{}, {"verify": True, "max_owed": 3}, {"prune": "fixed", "prune_k": 8}])
def test_the_clock_sees_every_block_run_head_and_question_once_and_changes_nothing(tiny_model, changes):
    config = DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.1, exit_layers=(1, 3), **changes)
    for seed in (0, 3, 5):
        model = tiny_model(seed)
        plain = generate(model, [1, 2, 3], config)
        clock, output = bench_split.timed(model, [1, 2, 3], config)
        assert output == plain
        kinds, counters = Counter(kind for kind, _ in clock.segments), output.counters
        assert kinds["one row"] + kinds["several rows"] + kinds["the prompt"] == counters.block_runs
        assert kinds["the prompt"] == model.config.n_layers and kinds["several rows"] > 0
        assert kinds["head"] == counters.deep_passes and kinds["questions"] >= sum(map(len, output.confidences)) > 0
        assert not any("forward" in vars(block) for block in model.blocks) and "head" not in vars(model)


def test_tokens_that_a_questions_whole_head_gave_are_counted(tiny_model):
    """At layer 1 the head is one over the vocabulary; at layer 3 it is, unless pruning left fewer
    candidates."""
    for prune, whole in (("none", (1, 3)), ("fixed", (1,))):
        config = DecodeConfig(max_new_tokens=30, confidence="softmax", threshold=0.1, exit_layers=(1, 3), prune=prune, prune_k=8)
        clock, output = bench_split.timed(tiny_model(0), [1, 2, 3], config)
        assert clock.given == sum(layer in whole for layer in output.exit_layers) > 0
        assert {1, 3} <= set(output.exit_layers)


def test_the_split_is_printed_for_the_settings_beside_the_checkpoint(tiny_model, tmp_path, monkeypatch, capsys):
    tokenizer = read_checkpoint(DEFAULT_CHECKPOINT)["tokenizer"].numpy().tobytes()
    save_checkpoint(tmp_path / "tiny.pt", tiny_model(0, vocab_size=4096, max_len=256), tokenizer)
    fields = {"confidence": "softmax", "threshold": 0.002, "exit_layers": [2], "max_new_tokens": 8}
    rows = {"softmax": fields, "jsd": fields, "verified": {**fields, "verify": True}}
    (tmp_path / "tiny.json").write_text(json.dumps({"translation": rows}))
    monkeypatch.setattr("sys.argv", ["bench.py", f"--checkpoint={tmp_path / 'tiny.pt'}", "--split", "--repeat=1"])
    run(bench.main)
    lines = capsys.readouterr().out.splitlines()
    columns = ["speed-up", "ideal", "efficiency", "questions", "several rows", "the prompt", "the rest"]
    assert re.split("  +", lines[1].strip()) == columns
    assert [line[:20].strip() for line in lines[2::2]] == ["translation softmax", "translation verified"]
    for line in lines[2::2]:
        efficiency, *parts = line.split()[-5:]
        total = float(efficiency) + sum(float(part.rstrip("%")) for part in parts) / 100
        assert total == pytest.approx(1, abs=0.01)  # they are rounded
    (tmp_path / "tiny.json").write_text(json.dumps({"translation": {"jsd": fields}}))
    with pytest.raises(SystemExit):
        run(bench.main)
    assert "neither softmax nor verified" in capsys.readouterr().err


# ---------------------------------------------------------------- training, copy fill


def test_the_training_benchmark_prints_every_loss_beside_a_plain_model(monkeypatch, capsys):
    small = ModelConfig(vocab_size=50, n_layers=3, d_model=16, n_heads=2, n_kv_heads=2, d_ff=16)
    monkeypatch.setattr(bench_training, "ModelConfig", lambda: small)
    bench_training.print_training(TrainConfig(rows=2, length=8, exits=(1, 2), device="cpu"), 1)
    printed = capsys.readouterr().out
    names = ("plain PyTorch", *LOSSES, "rotate, layer dropout 0.2")
    assert all(f"  {name}: " in printed for name in names) and "GFLOP/s" in printed
    monkeypatch.setattr("sys.argv", ["bench.py", "--training", "--dtype=float16"])
    with pytest.raises(SystemExit):
        run(bench.main)
    assert "unknown dtype 'float16'" in capsys.readouterr().err


def test_copied_keys_and_values_are_off_only_above_the_layer_after_the_exit(tiny_model):
    """Layer 3 reads the state after layer 2, so that a copy from exit 2 is exact there, as long as no earlier
    copy is attended to."""
    config = DecodeConfig(max_new_tokens=1, confidence="softmax", threshold=0.0, exit_layers=(2,), fill="copy")
    errors = bench.copy_error(tiny_model(0), [[1, 2, 3, 4], [5]], config)
    assert set(errors) == {3, 4, 5} and max(errors[3]) < 1e-5 and min(*errors[4], *errors[5]) > 0.05
    never = DecodeConfig(max_new_tokens=4, confidence="softmax", threshold=1.0, fill="copy")
    assert bench.copy_error(tiny_model(0), [[1, 2, 3]], never) == {}
