"""Heads in a file of their own: attached, they are the heads inside a model's file; another model's are
refused."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import convert
import decode
from common.errors import UserError
from decode import DecodeConfig, generate, load_checkpoint
from decoding.presets import DEFAULT_CHECKPOINT
from decoding.weights import packs
from formats.checkpoint import read_checkpoint, save_checkpoint, weights_of
from formats.heads import HEAD_WEIGHTS, fingerprint, read_heads, same_model, save_heads
from model import Transformer
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


# ---------------------------------------------------------------- attached


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("options", [
    {"form": "plain"}, {"form": "packed"}, {"dtype": torch.bfloat16}, {"dtype": torch.float64, "form": "plain"},
    {"dtype": torch.int8},
], ids=str)  # fmt: skip
def test_attached_heads_do_what_the_same_heads_do_inside_the_models_file(files, adapter, options):
    if options.get("form") == "packed" and not packs(torch.float32):
        pytest.skip("this machine does not multiply packed weights")
    whole, bare, heads = files(adapter)
    inside, _ = load_checkpoint(whole, **options)
    attached, _ = load_checkpoint(bare, heads=heads, **options)
    assert attached.config == inside.config and attached.config.exit_layers == (2, 3)
    assert attached.frequent_ids.tolist() == inside.frequent_ids.tolist() == [7, 5, 3, 1, 4, 2, 9]
    kinds = [{name: weight.dtype for name, weight in each.named_parameters()} for each in (attached, inside)]
    assert kinds[0] == kinds[1]
    early = False
    for changes in ({}, {"confidence": "classifier"}, {"verify": True, "shortlist": 5}, {"confidence": "jsd", "fill": "copy"}):
        config = replace(CONFIG, **changes)
        expected, found = generate(inside, PROMPT, config), generate(attached, PROMPT, config)
        assert found == expected
        early |= min(found.exit_layers) < 5
    assert early


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_attached_heads_leave_the_models_own_output_bit_identical(files, adapter):
    """In the form that this CPU takes by itself, whose matrices need not be comparable: their products are."""
    _, bare, heads = files(adapter)
    alone, _ = load_checkpoint(bare)
    attached, _ = load_checkpoint(bare, heads=heads)
    tokens, hidden = torch.arange(40)[None], torch.randn(3, 32)
    assert torch.equal(attached(tokens), alone(tokens))
    assert generate(attached, PROMPT, CONFIG.full()).tokens == generate(alone, PROMPT, CONFIG.full()).tokens
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
    assert attached.config == inside.config
    assert {name for name, _ in attached.named_parameters()} == {name for name, _ in inside.named_parameters()}
    assert generate(attached, PROMPT, CONFIG).confidences == generate(inside, PROMPT, CONFIG).confidences
    assert attached.frequent_ids.tolist() == inside.frequent_ids.tolist()


# ---------------------------------------------------------------- whose heads


@pytest.mark.parametrize("one", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_fit_their_model_in_a_file_of_another_dtype(files, tiny_model, tmp_path, one, other):
    model = without_heads(tiny_model(1, adapter="mlp:6", **SHAPE))
    with torch.no_grad():
        model.embedding.weight[:10] *= 1e-6  # of which float16 keeps a few bits, or none
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
    weights = {name: weight.clone() for name, weight in weights_of(tiny_model(1)).items()}
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
    save_heads(tmp_path / "heads.pt", other, fingerprint({"weights": weights_of(other)}))
    with pytest.raises(ValueError, match="belong to another model"):
        load_checkpoint(tmp_path / "small.pt", heads=tmp_path / "heads.pt")


def test_a_fingerprint_tells_nothing_of_heads(tiny_model):
    model = tiny_model(1, adapter="lowrank:2", **SHAPE)
    other = tiny_model(1, adapter="mlp:3", exit_norms=(1,))
    other.load_state_dict(other.state_dict() | without_heads(model).state_dict())
    assert same_model(fingerprint({"weights": weights_of(model)}), fingerprint({"weights": weights_of(other)}))


# ---------------------------------------------------------------- mistakes


def flip_a_bit(path) -> None:
    """Changes one bit of the numbers of a weight, which leaves all else readable."""
    data = bytearray(path.read_bytes())
    data[data.index(read_heads(path)["weights"]["exit_norms.3"].numpy().tobytes())] ^= 1
    path.write_bytes(data)


def edit(change):
    """A function of a path that changes the content of the file there."""

    def edited(path):
        content = torch.load(path)
        change(content)
        torch.save(content, path)

    return edited


@pytest.mark.parametrize("damage, message", [
    (flip_a_bit, "differs from its checksum"),
    (lambda path: path.write_bytes(path.read_bytes()[:-900]), "heads.pt: not a checkpoint, or cut short"),
    (edit(lambda content: content["weights"]["adapters.2"].fill_(torch.nan)), "the weight adapters.2 has values that are not finite"),
    (edit(lambda content: content["weights"].pop("classifiers.3")), "heads.pt: the weights do not fit the model"),
    (edit(lambda content: content.pop("model")), "does not say which model"),
])  # fmt: skip
def test_a_damaged_file_of_heads_is_one_line(files, damage, message):
    _, bare, heads = files()
    damage(heads)
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(bare, heads=heads)
    assert "\n" not in str(error.value)


def test_heads_of_another_model_and_files_in_each_others_place_are_refused(files, tiny_model, tmp_path):
    whole, bare, heads = files()
    save_checkpoint(tmp_path / "other.pt", tiny_model(2), None)
    for path, found, message in (
        (tmp_path / "other.pt", heads, "heads.pt: its heads belong to another model than"),
        (bare, whole, "whole.pt: holds a whole model"),
        (heads, None, "heads.pt: holds heads without their model"),
    ):
        with pytest.raises(UserError, match=message):
            load_checkpoint(path, heads=found)


def test_the_command_takes_heads(files, command):
    """Exits are where the heads were trained, settings those next to the heads' file."""
    blob = read_checkpoint(DEFAULT_CHECKPOINT)["tokenizer"].numpy().tobytes()
    _, bare, heads = files("lowrank:2", tokenizer=blob, vocab_size=4096)
    words = ("--checkpoint", bare, "--heads", heads)
    _, err, status = command(decode.main, *words, "--prompt", "Guten Tag", "--confidence", "classifier")
    assert status is None and "classifier at layers 2,3" in err
    heads.with_suffix(".json").write_text(json.dumps({"decode": {"threshold": 0.5}}))
    _, err, status = command(decode.main, *words, "--prompt", "Guten Tag")
    assert status is None and "softmax at layers 2,3, threshold 0.5" in err and "heads.json" in err


def test_a_second_model_keeps_its_own_heads(files, command, tiny_model, tmp_path):
    """--heads are those of --checkpoint, not of --amateur."""
    _, bare, heads = files()
    save_checkpoint(tmp_path / "second.pt", tiny_model(2), None)
    words = ("--checkpoint", bare, "--heads", heads, "--predict", "cd", "--amateur", tmp_path / "second.pt", "--prompt", "1,2,3")
    _, err, status = command(decode.main, *words, "--max-new-tokens", "3")
    assert status is None, err
