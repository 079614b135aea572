"""Heads in a file of their own: attached, they are the heads inside a model's file; another model's are
refused."""

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import convert
import decode
import eval as evaluate
from common.errors import UserError, run
from decode import DecodeConfig, generate
from decoding.choosing import DEFAULT_CHECKPOINT
from decoding.flops import head_flops
from formats.adapters import adapt
from formats.checkpoint import read_checkpoint, save_checkpoint
from formats.heads import HEAD_WEIGHTS, fingerprint, read_heads, read_model, same_model, save_heads
from model import Transformer, load_checkpoint
from tests.public import LLAMA, write_hf

PROMPT = [3, 1, 4, 1, 5]
SHAPE = {"exit_norms": (2, 3), "classifiers": (2, 3), "exit_layers": (2, 3)}
CONFIG = DecodeConfig(max_new_tokens=20, confidence="softmax", threshold=0.4)
ADAPTERS = (None, "lowrank:4", "mlp:6")


def without_heads(model: Transformer) -> Transformer:
    """The same model before any heads were trained."""
    bare = Transformer(replace(model.config, exit_norms=(), classifiers=(), exit_layers=(), adapter=None))
    bare.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith(HEAD_WEIGHTS)})
    return bare.requires_grad_(False).eval()


@pytest.fixture
def files(tiny_model, tmp_path):
    """A factory of three files: a model with its heads inside, the model alone, and its heads alone."""

    def make(adapter: str | None = "mlp:6", dtype: torch.dtype | None = None, tokenizer: bytes | None = None, **shape):
        model = tiny_model(1, adapter=adapter, **SHAPE, **shape)
        model.frequent_ids = torch.tensor([7, 5, 3, 1, 4, 2, 9])
        whole, bare, heads = tmp_path / "whole.pt", tmp_path / "bare.pt", tmp_path / "heads.pt"
        save_checkpoint(whole, model, tokenizer, dtype, frequent_ids=model.frequent_ids)
        save_checkpoint(bare, without_heads(model), tokenizer, dtype)
        save_heads(heads, model, fingerprint(read_checkpoint(bare)), dtype)
        return whole, bare, heads

    return make


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command's main: its output, and how it ended (None: well)."""

    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        try:
            run(main)
            status = None
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return said.out, said.err, status

    return call


# ---------------------------------------------------------------- attached


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("options", [
    {"form": "plain"}, {"form": "packed"}, {"dtype": torch.bfloat16, "form": "plain"}, {"dtype": torch.float64, "form": "plain"},
    {"dtype": torch.int8},
])  # fmt: skip
def test_attached_heads_do_what_the_same_heads_do_inside_the_models_file(files, adapter, options):
    whole, bare, heads = files(adapter)
    inside, _ = load_checkpoint(whole, **options)
    attached, _ = load_checkpoint(bare, heads=heads, **options)
    assert attached.config == inside.config and attached.config.exit_layers == (2, 3)
    assert attached.frequent_ids.tolist() == inside.frequent_ids.tolist() == [7, 5, 3, 1, 4, 2, 9]
    kinds = {name: weight.dtype for name, weight in attached.named_parameters()}
    assert kinds == {name: weight.dtype for name, weight in inside.named_parameters()}
    early = False
    for changes in ({}, {"confidence": "classifier"}, {"verify": True, "shortlist": 5}, {"confidence": "jsd", "fill": "copy"}):
        config = replace(CONFIG, **changes)
        expected, found = generate(inside, PROMPT, config), generate(attached, PROMPT, config)
        assert found.tokens == expected.tokens and found.exit_layers == expected.exit_layers
        assert found.confidences == expected.confidences and found.counters == expected.counters
        early |= min(found.exit_layers) < 5
    assert early


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_attached_heads_leave_the_models_own_output_bit_identical(files, adapter):
    _, bare, heads = files(adapter)
    alone, _ = load_checkpoint(bare)
    attached, _ = load_checkpoint(bare, heads=heads)
    tokens = torch.arange(40)[None]
    assert torch.equal(attached(tokens), alone(tokens))
    assert generate(attached, PROMPT, CONFIG.full()).tokens == generate(alone, PROMPT, CONFIG.full()).tokens
    hidden = torch.randn(3, 32)
    assert not torch.equal(attached.head(hidden, 2), alone.head(hidden, 2))  # so there was something to attach


def test_heads_take_the_place_of_those_inside(files, tmp_path, tiny_model):
    """Other layers, another adapter: nothing of the old heads is left."""
    _, _, heads = files("mlp:6")
    old = tiny_model(1, exit_norms=(1, 4), classifiers=(4,), adapter="lowrank:2", exit_layers=(4,))
    source, _ = load_checkpoint(tmp_path / "bare.pt", form="plain")
    old.load_state_dict(old.state_dict() | source.state_dict())
    save_checkpoint(tmp_path / "old.pt", old, None, frequent_ids=torch.tensor([1, 2]))
    attached, _ = load_checkpoint(tmp_path / "old.pt", heads=heads)
    inside, _ = load_checkpoint(tmp_path / "whole.pt")
    assert attached.config == inside.config and set(attached.state_dict()) == set(inside.state_dict())
    assert generate(attached, PROMPT, CONFIG).confidences == generate(inside, PROMPT, CONFIG).confidences
    assert attached.frequent_ids.tolist() == inside.frequent_ids.tolist()


# ---------------------------------------------------------------- whose heads


@pytest.mark.parametrize("one", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_fit_their_model_in_a_file_of_another_dtype(files, tiny_model, tmp_path, one, other):
    model = without_heads(tiny_model(1, adapter="mlp:6", **SHAPE))
    with torch.no_grad():
        model.embedding[:10] *= 1e-6  # of which float16 keeps a few bits, or none
    save_checkpoint(tmp_path / "one.pt", model, None, one)
    save_checkpoint(tmp_path / "other.pt", model, None, other)
    prints = [fingerprint(read_checkpoint(tmp_path / name)) for name in ("one.pt", "other.pt")]
    assert same_model(*prints) and prints[0]["samples"].shape == (3 + 5 * 6 - 1, 16)


@pytest.mark.parametrize("change", [
    lambda w: w["blocks.3.down"].mul_(1 + 2**-7),                         # one matrix by a step of bfloat16
    lambda w: w.update(embedding=torch.cat([w["embedding"], w["embedding"][:1]])),
    lambda w: w.pop("blocks.0.out"),
    lambda w: w.update({"blocks.0.qkv_bias": torch.zeros(64)}),
    lambda w: w["norm"].neg_(),
])  # fmt: skip
def test_another_model_has_another_fingerprint(tiny_model, change):
    weights = {name: weight.clone() for name, weight in tiny_model(1).state_dict().items()}
    before = fingerprint({"weights": weights})
    change(weights)
    assert not same_model(before, fingerprint({"weights": weights})) and same_model(before, before)


def test_heads_fit_their_model_in_int8(tiny_model, tmp_path):
    model = tiny_model(1, adapter="mlp:6", **SHAPE, **LLAMA)
    write_hf(tmp_path / "hf", without_heads(model), "llama")
    for name, dtype in (("whole.pt", torch.float32), ("small.pt", torch.int8)):
        convert.convert(tmp_path / "hf", tmp_path / name, dtype)
    save_heads(tmp_path / "heads.pt", model, fingerprint(read_checkpoint(tmp_path / "whole.pt")), torch.bfloat16)
    from_file, _ = load_checkpoint(tmp_path / "small.pt", heads=tmp_path / "heads.pt")
    in_memory, _ = load_checkpoint(tmp_path / "whole.pt", dtype=torch.int8, heads=tmp_path / "heads.pt")
    for attached in (from_file, in_memory):
        assert attached.form == "int8" and attached.config.exit_layers == model.config.exit_layers
        hidden = torch.randn(3, 32)
        assert attached.adapters["2"].dtype == torch.float32
        assert_close(attached.exit_norm(hidden, 2), model.exit_norm(hidden, 2), rtol=0.02, atol=0.02)
    other = tiny_model(2, **SHAPE, **LLAMA)
    save_heads(tmp_path / "heads.pt", other, fingerprint({"weights": other.state_dict()}))
    with pytest.raises(ValueError, match="belong to another model"):
        load_checkpoint(tmp_path / "small.pt", heads=tmp_path / "heads.pt")


def test_a_fingerprint_tells_nothing_of_heads(tiny_model):
    model = tiny_model(1, adapter="lowrank:2", **SHAPE)
    other = tiny_model(1, adapter="mlp:3", exit_norms=(1,))
    other.load_state_dict(other.state_dict() | without_heads(model).state_dict())
    assert same_model(fingerprint({"weights": model.state_dict()}), fingerprint({"weights": other.state_dict()}))


# ---------------------------------------------------------------- mistakes


def damage(path) -> None:
    """Changes one bit of the numbers of a weight, which leaves all else readable."""
    content, data = read_heads(path), bytearray(path.read_bytes())
    numbers = content["weights"]["exit_norms.3"].numpy().tobytes()
    place = data.index(numbers)
    del content
    data[place] ^= 1
    path.write_bytes(data)


def test_wrong_files_of_heads_are_one_line(files, command, tiny_model, tmp_path):
    whole, bare, heads = files()
    save_checkpoint(tmp_path / "other.pt", tiny_model(2), None)
    damaged, cut, text = tmp_path / "damaged.pt", tmp_path / "cut.pt", tmp_path / "text.pt"
    damaged.write_bytes(heads.read_bytes())
    damage(damaged)
    cut.write_bytes(heads.read_bytes()[:-900])
    text.write_text("no heads")
    nan = torch.load(heads)
    nan["weights"]["adapters.2"][0, 0, 0] = float("nan")
    torch.save(nan, tmp_path / "nan.pt")
    less = torch.load(heads)
    del less["weights"]["classifiers.3"]
    torch.save(less, tmp_path / "less.pt")
    anonymous = torch.load(heads)
    del anonymous["model"]
    torch.save(anonymous, tmp_path / "anonymous.pt")
    for words, message in [
        (("--checkpoint", tmp_path / "other.pt", "--heads", heads), "heads.pt: its heads belong to another model than"),
        (("--checkpoint", bare, "--heads", damaged), "differs from its checksum"),
        (("--checkpoint", bare, "--heads", cut), "cut.pt: its archive"),
        (("--checkpoint", bare, "--heads", text), "text.pt: its archive"),
        (("--checkpoint", bare, "--heads", tmp_path / "gone.pt"), "gone.pt: no such checkpoint"),
        (("--checkpoint", bare, "--heads", whole), "whole.pt: holds a whole model"),
        (("--checkpoint", heads), "heads.pt: holds heads without their model"),
        (("--checkpoint", bare, "--heads", tmp_path / "nan.pt"), "the weight adapters.2 has values that are not finite"),
        (("--checkpoint", bare, "--heads", tmp_path / "less.pt"), "less.pt: the weights do not fit the model"),
        (("--checkpoint", bare, "--heads", tmp_path / "anonymous.pt"), "does not say which model"),
    ]:
        out, err, status = command(decode.main, "--prompt", "1,2", *words)
        assert status == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1, words


def test_every_command_takes_heads(files, command, tmp_path):
    """decode.py and eval.py with heads: exits where the heads were trained, settings beside the heads'
    file."""
    blob = read_checkpoint(DEFAULT_CHECKPOINT)["tokenizer"].numpy().tobytes()
    _, bare, heads = files("lowrank:2", tokenizer=blob, vocab_size=4096)
    words = ("--checkpoint", bare, "--heads", heads)
    _, err, status = command(decode.main, *words, "--prompt", "Guten Tag", "--confidence", "classifier")
    assert status is None and "settings: classifier at layers 2,3 from 0.8 on" in err
    heads.with_suffix(".json").write_text(json.dumps({"decode": {"threshold": 0.5}}))
    _, err, status = command(decode.main, *words, "--prompt", "Guten Tag")
    assert status is None and "softmax at layers 2,3 from 0.5 on" in err and "(defaults, then heads.json)" in err
    few = ("--tasks", "translation", "--limit", "2", "--max-new-tokens", "4")
    _, err, status = command(evaluate.main, *words, *few, "--confidence", "classifier", "--json", tmp_path / "out.json")
    assert status is None and f"checkpoint {bare} with {heads}" in err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["rows"][-1]["config"]["exit_layers"] in (None, [2, 3])
    before = heads.read_bytes()
    for main, flag in ((decode.main, "--trace"), (evaluate.main, "--json")):
        more = ("--prompt", "Guten Tag") if main is decode.main else few
        _, err, status = command(main, *words, *more, flag, heads)
        assert status == 2 and "is read here, and would be overwritten" in err and heads.read_bytes() == before


def test_a_second_model_keeps_its_own_heads(files, command, tiny_model, tmp_path):
    """--heads are those of --checkpoint, not of --amateur."""
    _, bare, heads = files()
    save_checkpoint(tmp_path / "second.pt", tiny_model(2), None)
    words = ("--checkpoint", bare, "--heads", heads, "--amateur", tmp_path / "second.pt", "--prompt", "1,2,3")
    _, err, status = command(decode.main, *words, "--max-new-tokens", "3")
    assert status is None, err


# ---------------------------------------------------------------- adapters


def test_an_mlp_adapter_is_a_gated_mlp_of_the_state_at_size_one_begins_as_nothing_and_counts(tiny_model):
    model, hidden = tiny_model(exit_norms=(2, 3), adapter="mlp:6"), torch.randn(7, 32) * 50
    gate, up, down = (part.double().numpy() for part in model.adapters["2"])  # (6, 32) each
    h = hidden.double().numpy()
    x = h / ((h**2).mean(-1, keepdims=True) + 1e-6) ** 0.5
    pre = x @ gate.T
    expected = x + (pre / (1 + np.exp(-pre)) * (x @ up.T)) @ down
    assert_close(adapt(hidden, model.adapters["2"], 1e-6).double().numpy(), expected, rtol=1e-4, atol=1e-4)
    assert head_flops(model.config, 2, 50) - head_flops(model.config, 4, 50) == 2 * 3 * 6 * 32
    fresh = Transformer(replace(model.config, classifiers=()))
    assert_close(fresh.exit_norm(hidden, 2), fresh.exit_norm(hidden, 5), rtol=1e-5, atol=1e-6)
    assert fresh.adapters["2"][0].abs().sum() > 0 and fresh.adapters["2"][1].abs().sum() > 0


def test_an_mlp_adapter_turns_states_of_all_sizes_alike(tiny_model):
    model, hidden = tiny_model(exit_norms=(2, 3), adapter="mlp:6"), torch.randn(7, 32)
    small, large = model.exit_norm(hidden * 10, 2), model.exit_norm(hidden * 1000, 2)
    assert_close(small, large, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adapter", ["lowrank", "lowrank:", "mlp:0", "mlp:-3", "mlp:x", "tall:2", "mlp:70000", "", "mlp:²"])
def test_an_adapter_that_is_none_is_one_line(tiny_model, adapter):
    with pytest.raises(UserError, match="it must be one of lowrank:SIZE, mlp:SIZE, with a size from 1 to 65536, or none"):
        tiny_model(exit_norms=(2,), adapter=adapter)


@pytest.mark.parametrize("rank, adapter", [(4, "lowrank:4"), (0, None)])
def test_a_file_that_tells_a_rank_has_low_rank_adapters(tiny_model, tmp_path, rank, adapter):
    """As files were written before there were other adapters."""
    model = tiny_model(1, adapter=adapter, **SHAPE)
    save_checkpoint(tmp_path / "new.pt", model, None)
    content = torch.load(tmp_path / "new.pt")
    del content["config"]["adapter"]
    content["config"]["adapter_rank"] = rank
    torch.save(content, tmp_path / "old.pt")
    old, _ = load_checkpoint(tmp_path / "old.pt", form="plain")
    assert asdict(old.config) == asdict(model.config)
    assert generate(old, PROMPT, CONFIG).confidences == generate(model, PROMPT, CONFIG).confidences


def test_a_model_without_heads_named_is_read_as_it_is(files):
    whole, bare, _ = files()
    assert set(read_model(bare)["weights"]) == {name for name in read_model(whole)["weights"] if not name.startswith(HEAD_WEIGHTS)}
