"""What is damaged, foreign or does not fit is refused by convert.py in one line that names it."""

import errno
import json
import math
import os
import struct
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

import convert
from common.errors import UserError
from formats.pieces import CONTROL, NORMAL, UNKNOWN, build_tokenizer
from formats.tensors import read_safetensors
from model import load_checkpoint
from tests.public import LLAMA, convert_and_compare, safetensors, write_hf, write_llama2c, write_safetensors


@pytest.fixture
def tiny_model(tiny_model):
    """Public checkpoints have no classifiers."""
    return partial(tiny_model, classifiers=())


# ---------------------------------------------------------------- damaged safetensors

A = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
DAMAGE = {
    "empty": (b"", b"", None, "cut short"),
    "header beyond the file": (A, bytes(16), 10**6, "cut short"),
    "oversized header": (A, bytes(16), 2**63, "cut short"),
    "header that is no JSON": (b"{no", b"", None, "not JSON"),
    "header that is no object": (b"[]", b"", None, "no JSON object"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", None, "occurs twice"),
    "truncated data": (A, bytes(12), None, "need 16 bytes of data, the file has 12"),
    "too much data": (A, bytes(20), None, "need 16 bytes of data, the file has 20"),
    "negative offset": ({"a": {**A["a"], "data_offsets": [-16, 0]}}, bytes(16), None, "at least 0"),
    "negative shape": ({"a": {**A["a"], "shape": [-2, -2]}}, bytes(16), None, "at least 0"),
    "offsets that are no integers": ({"a": {**A["a"], "data_offsets": [0, 16.0]}}, bytes(16), None, "integers"),
    "one offset": ({"a": {**A["a"], "data_offsets": [16]}}, bytes(16), None, "takes 16 bytes"),
    "wrong size": ({"a": {**A["a"], "data_offsets": [0, 12]}}, bytes(12), None, "takes 16 bytes"),
    "overlap": ({**A, "b": {**A["a"], "data_offsets": [8, 24]}}, bytes(24), None, "b begins at byte 8, where 16 was expected"),
    "gap": ({**A, "b": {**A["a"], "data_offsets": [20, 36]}}, bytes(36), None, "b begins at byte 20, where 16 was expected"),
    "unknown dtype": ({"a": {**A["a"], "dtype": "F8_E4M3"}}, bytes(16), None, "a is of dtype F8_E4M3"),
    "entry that is no object": ({"a": 3}, bytes(16), None, "a is of dtype None"),
    "dtype that is a list": ({"a": {**A["a"], "dtype": ["F32"]}}, bytes(16), None, "a is of dtype"),
    "huge shape": ({"a": {**A["a"], "shape": [2**70, 0]}}, bytes(16), None, "a has shape"),
    "integer of 5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", b"", None, "its header: not JSON .*4300"),
    "header nested too deep": (b"[" * 100_000, b"", None, "its header: not JSON .nested too deep"),
    "header that is not UTF-8": (b'{"\xff": 1}', b"", None, "its header: not JSON .bytes that are not UTF-8"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_safetensors_file_is_refused(tmp_path, kind):
    header, data, length, message = DAMAGE[kind]
    write_safetensors(tmp_path / "a.safetensors", header, data, length)
    if kind == "empty":
        (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value) and "a.safetensors" in str(error.value)


def test_data_that_are_not_aligned_are_read(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.bfloat16), "b": torch.arange(4.0)}
    header, data = safetensors(tensors)
    for pad in range(4):
        write_safetensors(tmp_path / "a.safetensors", json.dumps(header).encode() + b" " * pad, data)
        for name, stored in read_safetensors(tmp_path / "a.safetensors").items():
            assert torch.equal(next(iter(stored.pieces())), tensors[name])


# ---------------------------------------------------------------- what does not fit


def spoil(folder, kind: str) -> None:
    """Damages a Hugging Face folder of three safetensors files."""
    config, first = json.loads((folder / "config.json").read_text()), folder / "model-0.safetensors"
    raw = first.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    extra = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    if kind == "unknown tensor":
        write_safetensors(first, {**header, "model.layers.0.self_attn.q_proj.bias": extra}, data + bytes(4))
    elif kind == "layer too many":
        write_safetensors(first, {**header, "model.layers.7.mlp.up_proj.weight": extra}, data + bytes(4))
    elif kind == "missing tensor":
        name = list(header)[-1]
        stop = header.pop(name)["data_offsets"][0]
        write_safetensors(first, header, data[:stop])
    elif kind == "missing file":
        first.unlink()
    elif kind == "path in the index":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    elif kind == "no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "no weights":
        for file in folder.glob("model*"):
            file.unlink()
    else:
        changes = {
            "shape": {"intermediate_size": 64},
            "family": {"model_type": "bert"},
            "activation": {"hidden_act": "relu"},
            "rope": {"rope_scaling": {"type": "yarn", "factor": 2}},
            "size": {"hidden_size": None},
            "kind": {"vocab_size": "many"},
        }
        (folder / "config.json").write_text(json.dumps({**config, **changes[kind]}))


@pytest.mark.parametrize(("kind", "message"), [
    ("unknown tensor", "unknown tensor model.layers.0.self_attn.q_proj.bias"),
    ("layer too many", "unknown tensor model.layers.7.mlp.up_p"),
    ("missing tensor", r"tensor \S+\.weight is missing"), ("missing file", "model-0.safetensors: named in"),
    ("path in the index", "no weight_map"), ("no JSON", "not JSON"), ("no weights", "neither"),
    ("shape", r"_proj.weight has the shape \[48, 32\], but by the configuration \[64, 32\]"),
    ("family", "unknown model_type 'bert'"),
    ("activation", "relu"), ("rope", "yarn"), ("size", "hf"), ("kind", "hf"),
])  # fmt: skip
def test_what_does_not_fit_is_named_and_leaves_the_old_file(tiny_model, tmp_path, kind, message):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA), "llama", "safetensors", 3)
    (tmp_path / "out.pt").write_text("old")
    spoil(tmp_path / "hf", kind)
    with pytest.raises(ValueError, match=message) as error:
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert "\n" not in str(error.value)
    assert (tmp_path / "out.pt").read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_a_failure_while_writing_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    (tmp_path / "out.pt").write_text("old")
    monkeypatch.setattr(convert, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_text() == "old" and not list(tmp_path.glob("*.part"))


def test_a_full_disk_is_seen_before(tiny_model, tmp_path, monkeypatch):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="make room"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot take room on a disk beforehand")
def test_a_disk_that_fills_meanwhile_is_one_line(tiny_model, tmp_path, monkeypatch):
    """The room, the tokenizer's with it, is taken before anything is written through memory, where a full
    disk is a signal."""

    def full(file: int, begin: int, size: int) -> None:
        assert begin == 0 and size == os.fstat(file).st_size > 4 * sum(weight.numel() for weight in model.parameters()) + 300_000
        raise OSError(errno.ENOSPC, "No space left on device")

    model, pieces = (tiny_model(1, **{**LLAMA, "vocab_size": 400}), ["<unk>", "<s>", "</s>", *(f"{i}{'a' * 1000}" for i in range(300))])
    tokenizer = build_tokenizer(pieces, [0.0] * 303, [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 300], 0, 1, 2, True)
    write_hf(tmp_path / "hf", model)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizer)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"out\.pt: could not be written \(No space left on device\)"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert not list(tmp_path.glob("out*"))


CONFIGS = [
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
    ({"rope_scaling": [1]}, "rope_scaling is"),
    ({"rope_scaling": {"type": "linear"}}, "factor is None; it must be a number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor is 1000"),
    ({"rope_scaling": {"type": [1]}}, "not supported"),
    ({"rope_parameters": 3}, "rope_parameters is 3"),
    ({"vocab_size": 10**30}, "vocab_size is 1000"),
    ({"num_hidden_layers": 10**9}, "n_layers is 1000000000"),
    ({"num_hidden_layers": 9999}, "num_hidden_layers is 9999, but there are only 48 tensors"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"head_dim": "8"}, "head_dim is '8'"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ({"model_type": ["llama"]}, "unknown model_type"),
    ({"model_type": None}, "unknown model_type None"),
    ({"hidden_act": ["silu"]}, "unknown activation"),
    ({"eos_token_id": [2, "x"]}, "eos_id is"),
    ({"eos_token_id": 77}, "eos_id is 77"),
    ({"tie_word_embeddings": "no"}, "tie_embeddings is 'no'; it must be bool"),
    ({"sliding_window": 2.5}, "sliding_window is 2.5"),
    ({"max_position_embeddings": [64]}, "max_position_embeddings is"),
    ({"intermediate_size": 2**31 - 1}, "has the shape"),
    ({"hidden_size": 2**30, "head_dim": 2**30, "num_attention_heads": 2**30}, "impossible sizes"),
    ({"num_key_value_heads": 3}, "n_kv_heads"),
    ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
    ({"model_type": "gemma3_text", "sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types is"),
    ({"model_type": "qwen3_moe"}, "model_type qwen3_moe is a mixture of experts, which is not supported; supported are"),
    ({"model_type": "qwen3_next"}, "model_type qwen3_next is a model with linear attention"),
    ({"model_type": "qwen2_5_vl"}, "model_type qwen2_5_vl is a model of several modalities"),
    ({"num_local_experts": 8}, "num_local_experts is 8: llama as a mixture of experts is not supported"),
    ({"attention_bias": True}, "attention_bias is set"),
    ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantized .awq."),
    ({"sliding_window": 4, "layer_types": ["linear_attention"] * 5}, "layer_types has 'linear_attention'"),
    ({"model_type": "qwen2"}, "tensor model.layers.0.self_attn.k_proj.bias is missing"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": "2"}, "max_window_layers is '2'"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0, 2, 1, 1]}, "no_rope_layers is"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers is"),
]


@pytest.mark.parametrize(("words", "message"), CONFIGS, ids=lambda value: str(value)[:60])
def test_a_configuration_that_cannot_be_is_one_line(tiny_model, tmp_path, words, message):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **words}))
    with pytest.raises(UserError, match=f"hf: .*{message}") as error:
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.filterwarnings("ignore")  # torch says that its quantized tensors are old
@pytest.mark.parametrize(("change", "message"), [
    (lambda norm: norm.to_sparse(), "model.norm.weight is torch.float32, torch.sparse_coo"),
    (lambda norm: torch.quantize_per_tensor(norm, 0.1, 0, torch.qint8), "model.norm.weight is torch.qint8"),
    (lambda norm: norm.to("meta"), "model.norm.weight is .*meta"),
    (lambda norm: norm.long(), "model.norm.weight is of torch.int64"),
    (lambda norm: norm.to(torch.complex64), "of torch.complex64"),
    (lambda norm: norm.to(torch.float8_e5m2), "of torch.float8_e5m2"),
    (lambda norm: 3, "model.norm.weight is int"), (lambda norm: {"a": norm}, "model.norm.weight is dict"),
    (lambda norm: norm / 0, "model.norm.weight has values that are not finite in float32"),
])  # fmt: skip
def test_weights_of_a_foreign_kind_are_refused_by_name(tiny_model, tmp_path, change, message):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA), kind="torch")
    file = tmp_path / "hf" / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "model.norm.weight": change(tensors["model.norm.weight"])}, file)
    with pytest.raises(UserError, match=message) as error:
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def test_double_precision_becomes_single_and_what_half_cannot_hold_is_refused(tiny_model, tmp_path):
    model = tiny_model(1, **LLAMA)
    write_hf(tmp_path / "hf", model, dtype=torch.float64, kind="torch")
    convert_and_compare(tmp_path / "hf", model, tmp_path)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["weights"]["embedding"].dtype == torch.float32
    model.embedding.mul_(1e6)
    write_hf(tmp_path / "hf", model, kind="torch")
    with pytest.raises(UserError, match=r"embed_tokens\.weight has values that are not finite in float16; try --dtype fp32"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt", torch.float16)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize(("kind", "file"), [("safetensors", "model.safetensors"), ("torch", "pytorch_model.bin")])
def test_a_folder_or_fifo_in_the_place_of_weights_is_refused(tiny_model, tmp_path, make, kind, file):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA), kind=kind)
    (tmp_path / "hf" / file).unlink()
    make(tmp_path / "hf" / file)
    with pytest.raises(UserError, match=f"{file}: is no regular file"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    with pytest.raises(UserError, match=f"{file}: is no regular file"):
        convert.open_source(write_tiny_llama2c(tiny_model, tmp_path), tokenizer=tmp_path / "hf" / file)


def write_tiny_llama2c(tiny_model, folder):
    write_llama2c(folder / "model.bin", tiny_model(3, **LLAMA), 0)
    return folder / "model.bin"


def test_only_a_regular_file_other_than_the_source_is_written(tiny_model, tmp_path):
    source = write_tiny_llama2c(tiny_model, tmp_path)
    (tmp_path / "link.pt").symlink_to(tmp_path / "out.pt")
    convert.convert(source, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and load_checkpoint(tmp_path / "out.pt")
    for out, message in ((Path("/dev/null"), "no regular file"), (tmp_path, "no regular file"), (source, "is read here")):
        with pytest.raises(UserError, match=message):
            convert.convert(source, out)
    assert not Path("/dev/null").is_file()


def test_what_is_converted_has_its_checksums(tiny_model, tmp_path):
    convert.convert(write_tiny_llama2c(tiny_model, tmp_path), tmp_path / "out.pt")
    load_checkpoint(tmp_path / "out.pt", check=True)
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(("stated", "beside", "ends"), [
    (2, None, {2}), (2, [2, 9], {2, 9}), ([2, 5], 9, {2, 5, 9}), (2, {}, {2}), (None, [9], set()),
])  # fmt: skip
def test_every_id_that_ends_a_text_is_taken(tiny_model, tmp_path, stated, beside, ends):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": stated}))
    if beside is not None:
        content = {"eos_token_id": beside} if beside != {} else {}
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(content))
    convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert load_checkpoint(tmp_path / "out.pt")[0].config.ends == ends


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file"), (b"", "no checkpoint"), (b"GGUF" + bytes(40), "GGUF"), (b"x" * 500, "neither GGUF"),
    (struct.pack("<Ii", 0x616B3432, 2).ljust(300, b"\0"), "int8"),
])  # fmt: skip
def test_foreign_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "in").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        convert.convert(tmp_path / "in", tmp_path / "out.pt")
    assert "\n" not in str(error.value)


def test_a_torch_file_that_runs_code_is_refused(tiny_model, tmp_path):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA), kind="torch")
    torch.save({"a": print}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a readable torch file of weights"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")


def test_max_len_is_the_models_at_most(tiny_model, tmp_path):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    convert.convert(tmp_path / "hf", tmp_path / "out.pt", max_len=32)
    assert load_checkpoint(tmp_path / "out.pt")[0].config.max_len == 32
    with pytest.raises(ValueError, match="--max-len is 65, but the model was made for 64 positions"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt", max_len=65)
