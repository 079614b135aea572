"""One-file checkpoints: they give the model back, and what is damaged or foreign is refused in one line."""

import math
import mmap
import random
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from confidence import FUNCTIONS
from decode import generate, load_checkpoint
from decoding.settings import DecodeConfig
from formats.checkpoint import compare_checksums, read_checkpoint, save_checkpoint, seal


@pytest.mark.parametrize("shape", [{"tie_embeddings": False}, {"exit_norms": (1, 3)}, {"eos_id": (3, 7)}])
def test_a_checkpoint_gives_back_the_model(tiny_model, reloaded, shape):
    model, tokens = tiny_model(5, **shape), torch.arange(10)[None]
    loaded = reloaded(model, form="plain")
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))


def test_a_model_stored_in_float16_runs_in_float32(tiny_model, reloaded):
    assert reloaded(tiny_model(6), torch.float16).embedding.weight.dtype == torch.float32


def refused(path, match: str, load=load_checkpoint, **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(path, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A checkpoint of a tiny model, and its content."""
    path = tmp_path / "model.pt"
    save_checkpoint(path, tiny_model(7), None)
    return path, torch.load(path, weights_only=True)


DAMAGE = {
    "cut short": lambda path, content: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "foreign": lambda path, content: torch.save({"model": torch.zeros(3)}, path),
    "without a tensor": lambda path, content: torch.save({**content, "weights": drop(content["weights"], "norm")}, path),
}


def drop(weights: dict, name: str) -> dict:
    return {each: weight for each, weight in weights.items() if each != name}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(saved, kind):
    path, content = saved
    DAMAGE[kind](path, content)
    refused(path, r"model\.pt")


@pytest.mark.parametrize("setting", [
    {"n_layers": 3}, {"norm_eps": math.nan}, {"eos_id": 50}, {"n_heads": "four"}, {"d_ff": 64}, {"vocab_size": None}, {"colour": 3},
], ids=str)  # fmt: skip
def test_an_impossible_config_is_refused_before_a_model_is_built(saved, setting, monkeypatch):
    path, content = saved
    torch.save({**content, "config": {**content["config"], **setting}}, path)
    if "d_ff" not in setting:  # which the shapes of the weights show
        monkeypatch.setattr("decoding.loading.Transformer", lambda config: pytest.fail("a model was built"))
    refused(path, r"model\.pt: ")


FOREIGN = {
    "float64": lambda weight: weight.double(),
    "meta": lambda weight: weight.to("meta"),
    "transposed": lambda weight: weight.T.contiguous().T,
    "a number": lambda weight: 3.0,
    "NaN": lambda weight: weight.clone().index_fill_(0, torch.tensor([7]), math.nan),
    "infinity": lambda weight: weight.half().index_fill_(1, torch.tensor([3]), math.inf),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_weight_of_a_foreign_kind_is_refused_by_name(saved, kind):
    path, content = saved
    content["weights"]["blocks.3.qkv"] = FOREIGN[kind](content["weights"]["blocks.3.qkv"])
    torch.save(content, path)
    refused(path, r"model\.pt: the weight blocks\.3\.qkv")


@pytest.mark.parametrize("entry", [{"tokenizer": "text"}, {"config": None}, {"weights": {}}, {"weights": [torch.zeros(3)]}], ids=str)
def test_an_entry_that_is_not_what_it_must_be_is_refused(saved, entry):
    path, content = saved
    torch.save({**content, **entry}, path)
    refused(path, r"model\.pt: ")


def test_further_entries_are_kept(tiny_model, tmp_path):
    save_checkpoint(tmp_path / "model.pt", tiny_model(7), None, shortlist=torch.arange(5), provenance={"steps": 3})
    content = read_checkpoint(tmp_path / "model.pt")
    assert content["shortlist"].tolist() == [0, 1, 2, 3, 4] and content["provenance"] == {"steps": 3}


# ---------------------------------------------------------------- norms keep their precision


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16, torch.float32, None])
def test_vectors_keep_the_precision_of_the_file(tiny_model, reloaded, stored, asked):
    model = tiny_model(6, exit_norms=(2,)).to(stored)
    loaded = reloaded(model, dtype=asked, form="plain")
    assert loaded.embedding.weight.dtype == (asked or stored)
    for name in ("norm.weight", "blocks.2.mlp_norm.weight", "exit_norms.2.weight", "classifiers.3"):
        weight = loaded.get_parameter(name)
        assert weight.dtype == (torch.float32 if asked == torch.float16 else torch.promote_types(stored, asked or stored))
        assert torch.equal(weight.float(), model.get_parameter(name).float())


@pytest.mark.parametrize("confidence", FUNCTIONS)
def test_every_confidence_decodes_with_norms_finer_than_the_matrices(tiny_model, reloaded, confidence):
    """Heads and blocks of two precisions meet in every confidence; the logits stay near those of float32."""
    model, tokens = tiny_model(6, exit_norms=(1, 2, 3, 4), adapter="lowrank:2", qk_norm=True, post_norms=True), torch.arange(10)[None]
    fine = reloaded(model, dtype=torch.bfloat16)
    assert fine.norm.weight.dtype == torch.float32 and fine.blocks[0].q_norm.weight.dtype == torch.float32
    assert len(generate(fine, [3, 1, 4], DecodeConfig(max_new_tokens=8, confidence=confidence, threshold=0.5)).tokens) == 8
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
    raw, before, shown = path.read_bytes(), parts(path), 0
    compare_checksums(path)
    for _ in range(60):
        at = chance.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :])
        try:
            compare_checksums(path)
            assert parts(path) == before
        except UserError as error:
            shown += 1
            assert "model.pt" in str(error) and "\n" not in str(error)
    assert shown > 30  # most of the file are weights


def test_a_changed_weight_loads_unless_the_checksum_is_asked_for(tiny_model, saved):
    path, _ = saved
    raw, needle = path.read_bytes(), tiny_model(7).norm.weight.numpy().tobytes()
    path.write_bytes(raw.replace(needle, needle[:-1] + bytes([needle[-1] ^ 1])))
    load_checkpoint(path)
    refused(path, r"model\.pt: .*differs from its checksum", check=True)


def test_a_file_filled_through_memory_is_sealed(tmp_path):
    path = tmp_path / "a.pt"
    with torch.serialization.skip_data():
        torch.save({"a": torch.zeros(1000), "b": torch.zeros(3)}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        torch.load(path, mmap=True)["a"].copy_(torch.arange(1000.0))
    refused(path, "differs from its checksum", compare_checksums)
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
