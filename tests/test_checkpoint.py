"""One-file checkpoints: they give the model back, and what is damaged or foreign is refused in one line."""

import math
import mmap
import random
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from confidence import FUNCTIONS
from decode import generate
from decoding.settings import DecodeConfig
from formats.checkpoint import compare_checksums, read_checkpoint, save_checkpoint, seal
from model import load_checkpoint

SHAPES = [{"tie_embeddings": False}, {"exit_norms": (1, 3)}, {"eos_id": (3, 7)}]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_gives_back_the_model(tiny_model, tmp_path, shape):
    model = tiny_model(5, **shape)
    save_checkpoint(tmp_path / "model.pt", model, None)
    loaded, tokenizer = load_checkpoint(tmp_path / "model.pt", form="plain")
    assert tokenizer is None and loaded.config == model.config
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)


def test_stored_dtype_and_asked_dtype(tiny_model, tmp_path):
    model = tiny_model(6)
    save_checkpoint(tmp_path / "half.pt", model, None, torch.float16)
    save_checkpoint(tmp_path / "brain.pt", model, None, torch.bfloat16)
    assert load_checkpoint(tmp_path / "half.pt")[0].embedding.dtype == torch.float32
    assert load_checkpoint(tmp_path / "brain.pt")[0].embedding.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path / "brain.pt", dtype=torch.float32)[0].embedding.dtype == torch.float32


def damage(path, kind, content):
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "not a checkpoint":
        path.write_text("hello")
    elif kind == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif kind == "wrong shape":
        torch.save({**content, "config": {**content["config"], "d_ff": 64}}, path)
    elif kind == "missing tensor":
        torch.save({**content, "weights": {name: weight for name, weight in content["weights"].items() if name != "norm"}}, path)
    elif kind == "unknown setting":
        torch.save({**content, "config": {**content["config"], "colour": 3}}, path)


KINDS = ["missing", "cut short", "not a checkpoint", "foreign", "wrong shape", "missing tensor", "unknown setting"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_refused_in_one_line(tiny_model, tmp_path, kind):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(7), None)
    damage(path, kind, torch.load(path, weights_only=True))
    with pytest.raises(ValueError, match=r"model\.pt") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [
    {"n_layers": 10**9}, {"n_layers": 9999}, {"n_layers": 3}, {"max_len": 10**10}, {"norm_eps": -1.0},
    {"norm_eps": math.nan},
    {"window": 2.5}, {"eos_id": -5}, {"eos_id": 50}, {"global_layers": (77,)}, {"n_heads": "four"}, {"exit_norms": 3},
    {"d_model": 10**9}, {"n_heads": 2**30}, {"vocab_size": None}, {"tie_embeddings": "yes"}, {"rope_base": "x"},
], ids=str)  # fmt: skip
def test_an_impossible_config_is_refused_before_a_model_is_built(tiny_model, tmp_path, setting, monkeypatch):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(7), None)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "config": {**content["config"], **setting}}, path)
    if not {"d_model", "n_heads"} & set(setting):  # which the shapes of the weights show
        monkeypatch.setattr("model.Transformer", lambda config: pytest.fail("a model was built"))
    with pytest.raises(UserError, match=r"model\.pt: ") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


FOREIGN = {
    "complex": lambda weight: weight.to(torch.complex64),
    "float8": lambda weight: weight.to(torch.float8_e4m3fn),
    "float64": lambda weight: weight.double(),
    "int": lambda weight: weight.long(),
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "transposed": lambda weight: weight.T.contiguous().T,
    "a number": lambda weight: 3.0,
    "NaN": lambda weight: weight.clone().index_fill_(0, torch.tensor([7]), math.nan),
    "infinity": lambda weight: weight.half().index_fill_(1, torch.tensor([3]), math.inf),
}


@pytest.mark.filterwarnings("ignore")  # torch says that its quantized tensors are old
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_weight_of_a_foreign_kind_is_refused_by_name(tiny_model, tmp_path, kind):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(7), None)
    content = torch.load(path, weights_only=True)
    content["weights"]["blocks.3.qkv"] = FOREIGN[kind](content["weights"]["blocks.3.qkv"])
    torch.save(content, path)
    with pytest.raises(UserError, match=r"model\.pt: the weight blocks\.3\.qkv") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", [
    {"tokenizer": "text"}, {"tokenizer": torch.zeros(9)}, {"tokenizer": torch.zeros(3, 3, dtype=torch.uint8)},
    {"tokenizer": torch.zeros(9, dtype=torch.uint8)},
    {"config": None}, {"config": {3: 4}}, {"weights": [torch.zeros(3)]}, {"weights": {}},
    {"weights": {3: torch.zeros(3)}},
], ids=str)  # fmt: skip
def test_an_entry_that_is_not_what_it_must_be_is_refused(tiny_model, tmp_path, entry):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(7), None)
    torch.save({**torch.load(path, weights_only=True), **entry}, path)
    with pytest.raises(UserError, match=r"model\.pt: ") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_further_entries_are_kept(tiny_model, tmp_path):
    save_checkpoint(tmp_path / "model.pt", tiny_model(7), None, shortlist=torch.arange(5), provenance={"steps": 3})
    content = read_checkpoint(tmp_path / "model.pt")
    assert content["shortlist"].tolist() == [0, 1, 2, 3, 4] and content["provenance"] == {"steps": 3}


# ---------------------------------------------------------------- norms keep their precision


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_vectors_keep_the_precision_of_the_file(tiny_model, tmp_path, stored):
    model = tiny_model(6, exit_norms=(2,))
    model.to(stored)
    save_checkpoint(tmp_path / "model.pt", model, None)
    for asked in (torch.bfloat16, torch.float16, torch.float32, None):
        loaded, _ = load_checkpoint(tmp_path / "model.pt", dtype=asked, form="plain")
        assert loaded.embedding.dtype == (asked or stored)
        for name in ("norm", "blocks.2.mlp_norm", "exit_norms.2", "classifiers.3"):
            weight = loaded.get_parameter(name)
            assert weight.dtype == (torch.float32 if asked == torch.float16 else torch.promote_types(stored, asked or stored))
            assert torch.equal(weight.float(), model.get_parameter(name).float())


@pytest.mark.parametrize("confidence", FUNCTIONS)
def test_every_confidence_decodes_with_norms_finer_than_the_matrices(tiny_model, tmp_path, confidence):
    """Heads and blocks of two precisions meet in every confidence; the logits stay near those of float32."""
    model = tiny_model(6, exit_norms=(1, 2, 3, 4), adapter="lowrank:2", qk_norm=True, post_norms=True)
    save_checkpoint(tmp_path / "model.pt", model, None)
    config = DecodeConfig(max_new_tokens=8, confidence=confidence, threshold=0.5)
    fine, _ = load_checkpoint(tmp_path / "model.pt", dtype=torch.bfloat16)
    assert fine.norm.dtype == torch.float32 and fine.blocks[0].q_norm.dtype == torch.float32
    assert len(generate(fine, [3, 1, 4], config).tokens) == 8
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(fine(tokens), model(tokens), rtol=0.1, atol=0.4)


# ---------------------------------------------------------------- checksums


def parts(path) -> tuple:
    """What a checkpoint file holds, to compare."""
    content = read_checkpoint(path)
    weights = {name: weight.numpy().tobytes() for name, weight in content.pop("weights").items()}
    return weights, content.pop("tokenizer").numpy().tobytes(), repr(content)


def test_checksums_show_every_flipped_bit(tiny_model, tmp_path):
    """A flip anywhere in the file is refused, or changes nothing that is read."""
    path, chance = tmp_path / "model.pt", random.Random(0)
    save_checkpoint(path, tiny_model(7, n_layers=2), b"some bytes of a tokenizer", note="a note")
    raw, before, refused = path.read_bytes(), parts(path), 0
    compare_checksums(path)
    for _ in range(200):
        at = chance.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :])
        try:
            compare_checksums(path)
            assert parts(path) == before
        except UserError as error:
            refused += 1
            assert "model.pt" in str(error) and "\n" not in str(error)
    assert refused > 100  # most of the file are weights


def test_a_changed_weight_loads_unless_the_checksum_is_asked_for(tiny_model, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(7), None)
    raw, needle = path.read_bytes(), tiny_model(7).norm.numpy().tobytes()
    path.write_bytes(raw.replace(needle, needle[:-1] + bytes([needle[-1] ^ 1])))
    load_checkpoint(path)
    with pytest.raises(UserError, match=r"model\.pt: .*differs from its checksum: changed since it was written; copy it anew"):
        load_checkpoint(path, check=True)


def test_a_file_filled_through_memory_is_sealed(tmp_path):
    path = tmp_path / "a.pt"
    with torch.serialization.skip_data():
        torch.save({"a": torch.zeros(1000), "b": torch.zeros(3)}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        torch.load(path, mmap=True)["a"].copy_(torch.arange(1000.0))
    with pytest.raises(UserError, match="differs from its checksum"):
        compare_checksums(path)
    seal(path)
    compare_checksums(path)
    for how in (True, False):
        assert torch.equal(torch.load(path, mmap=how)["a"], torch.arange(1000.0))


def test_a_text_ends_at_the_first_of_its_ends(tiny_model):
    model, config = tiny_model(6), DecodeConfig(max_new_tokens=20, temperature=2.0)
    text = generate(model, [3, 1, 4], config).tokens
    one, two = [token for token in dict.fromkeys(text) if token not in text[:2]][:2]  # in the order of the text
    early, late = text.index(one) + 1, text.index(two) + 1
    assert len(text) == 20 and 2 < early < late
    for ends, length in (((one, two), early), ((two, one), early), (two, late), ((), 20)):
        model.config = replace(model.config, eos_id=ends)
        assert generate(model, [3, 1, 4], config).tokens == text[:length]


@pytest.mark.parametrize("entry", ["provenance", "training"])
@pytest.mark.parametrize("loss, exits", [("rotate", (1, 3)), ("none", ())])
def test_a_file_whose_config_tells_no_exits_has_those_of_its_training(tiny_model, tmp_path, entry, loss, exits):
    """As files were written before: the exit layers stand among the training's settings."""
    save_checkpoint(tmp_path / "model.pt", tiny_model(0), None, **{entry: {"config": {"loss": loss, "exits": (1, 3)}}})
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content["config"]["exit_layers"], content["tokenizer"]
    torch.save(content, tmp_path / "model.pt")
    assert load_checkpoint(tmp_path / "model.pt")[0].config.exit_layers == exits
