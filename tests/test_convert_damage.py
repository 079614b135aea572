"""What is damaged, foreign or does not fit is refused by convert.py in one line that names it."""

import errno
import json
import os
from functools import partial

import pytest
import torch

import convert
from common.errors import UserError
from decode import load_checkpoint
from formats.huggingface import read_safetensors
from formats.tokenizers.pieces import train_tokenizer
from tests.public import LLAMA, convert_and_compare, safetensors, write_hf, write_safetensors


@pytest.fixture
def tiny_model(tiny_model):
    """Public checkpoints have no classifiers."""
    return partial(tiny_model, classifiers=())


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A Hugging Face folder of one safetensors file."""
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    return tmp_path / "hf"


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refused(source, message: str) -> None:
    """The source is refused in one line, and the file that was there stays as it was."""
    out = source.parent / "out.pt"
    out.write_text("old")
    with pytest.raises(UserError, match=message) as error:
        convert.convert(source, out)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert out.read_text() == "old" and not list(source.parent.glob("*.part"))


# ---------------------------------------------------------------- damaged safetensors

A = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
DAMAGE = {
    "header beyond the file": (A, bytes(16), 10**6), "header that is no JSON": (b"{no", b"", None),
    "truncated data": (A, bytes(12), None),
    "wrong size": ({"a": {**A["a"], "data_offsets": [0, 12]}}, bytes(12), None),
    "unknown dtype": ({"a": {**A["a"], "dtype": "F4"}}, bytes(16), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_safetensors_file_is_refused(folder, kind):
    header, data, length = DAMAGE[kind]
    if kind == "wrong size":  # which shows when the tensor is read, so the others must be there
        tensors = read_safetensors(folder / "model.safetensors")
        header, data = safetensors({name: stored.pieces()[0] for name, stored in tensors.items()})
        header["model.norm.weight"]["data_offsets"][1] -= 4
    write_safetensors(folder / "model.safetensors", header, data, length)
    refused(folder, "hf: cannot be read" if kind == "wrong size" else r"model\.safetensors: .*download it again")


def test_data_that_are_not_aligned_are_read(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.bfloat16), "b": torch.arange(4.0)}
    header, data = safetensors(tensors)
    for pad in (0, 1):
        write_safetensors(tmp_path / "a.safetensors", json.dumps(header).encode() + b" " * pad, data)
        for name, stored in read_safetensors(tmp_path / "a.safetensors").items():
            assert torch.equal(next(iter(stored.pieces())), tensors[name])


# ---------------------------------------------------------------- what does not fit

NEW = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(("header", "message"), [
    ({"model.layers.0.self_attn.q_proj.bias": NEW}, "unknown tensor model.layers.0.self_attn.q_proj.bias"),
    ({"model.norm.weight": NEW}, r"model.norm.weight has shape \[1\], but the configuration says \[32\]"),
    ({"model.norm.weight": {"dtype": "F8_E4M3", "shape": [32], "data_offsets": [0, 32]}}, "of torch.float8_e4m3fn"),
])  # fmt: skip
def test_tensors_that_do_not_fit_the_configuration_are_named(folder, header, message):
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    write_safetensors(folder / "model.safetensors", header, bytes(size))
    refused(folder, f"hf: .*{message}")


def test_what_is_missing_of_a_download_is_named(tiny_model, tmp_path):
    folder = tmp_path / "hf"
    write_hf(folder, tiny_model(1, **LLAMA), shards=3)
    (folder / "model-0.safetensors").unlink()
    refused(folder, "model-0.safetensors: named in model.safetensors.index.json, but missing; download it")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json: not an index of weights")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "there is no tensor for")
    for file in folder.glob("model*"):
        file.unlink()
    refused(folder, "neither .*safetensors nor pytorch_model")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: not JSON")
    (folder / "config.json").unlink()
    refused(folder, "nor a folder with config.json")


SLIDING = {"model_type": "gemma3_text", "sliding_window": 4}
CONFIGS = [
    ({"model_type": "bert"}, "model_type 'bert' is not supported; choose from llama"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling 'yarn' is not supported"),
    ({"rope_scaling": {"type": "linear"}}, "not that of a model .KeyError: 'factor'"),
    ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantized"),
    ({**SLIDING, "layer_types": ["linear_attention"] * 5}, "layer_types has linear_attention"),
]


@pytest.mark.parametrize(("words", "message"), CONFIGS, ids=lambda value: str(value)[:60])
def test_a_configuration_that_cannot_be_is_one_line(folder, words, message):
    change_config(folder, **words)
    refused(folder, f"hf: .*{message}")


@pytest.mark.parametrize(("change", "message"), [
    (lambda norm: norm.long(), "model.norm.weight is of torch.int64"),
    (lambda norm: norm / 0, "model.norm.weight has values that are not finite"),
    (lambda norm: print, "not a readable torch file of weights"),  # which would run code
])  # fmt: skip
def test_weights_of_a_foreign_kind_are_refused_by_name(tiny_model, tmp_path, change, message):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA), kind="torch")
    file = tmp_path / "hf" / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({**tensors, "model.norm.weight": change(tensors["model.norm.weight"])}, file)
    refused(tmp_path / "hf", message)


def test_double_precision_becomes_single_and_what_half_cannot_hold_is_refused(tiny_model, tmp_path):
    model = tiny_model(1, **LLAMA)
    write_hf(tmp_path / "hf", model, dtype=torch.float64, kind="torch")
    convert_and_compare(tmp_path / "hf", model, tmp_path)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["weights"]["embedding"].dtype == torch.float32
    model.embedding.weight.mul_(1e6)
    write_hf(tmp_path / "hf", model, kind="torch")
    with pytest.raises(UserError, match=r"embed_tokens\.weight has values that are not finite: it is damaged, or overflows float16"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt", torch.float16)


@pytest.mark.parametrize(("content", "message"), [
    (b"GGUF" + bytes(40), "not a readable GGUF file"), (b"x" * 500, "is neither a GGUF file"),
])  # fmt: skip
def test_foreign_files_are_refused(tmp_path, content, message):
    pytest.importorskip("gguf")
    (tmp_path / "in").write_bytes(content)
    refused(tmp_path / "in", message)


def test_links_that_lead_outside_of_the_folder_are_refused(folder):
    """In the cache of Hugging Face, files are links into a folder next to the folder of snapshots."""
    (folder.parent / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../tokenizer.json")
    refused(folder, "hf/tokenizer.json: is a link that leads outside of")
    snapshot, blobs = folder.parent / "snapshots" / "1", folder.parent / "blobs"
    (folder / "tokenizer.json").unlink()
    folder.rename(blobs)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert convert.convert(snapshot, folder.parent / "new.pt")


# ---------------------------------------------------------------- writing


def test_a_failure_while_writing_leaves_the_old_file(folder, monkeypatch):
    def full(content, file):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused(folder, "make room")
    monkeypatch.setattr(torch, "save", full)
    refused(folder, "out.pt: could not be written, .*is the disk full")
    monkeypatch.undo()
    monkeypatch.setattr(convert, "fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert.convert(folder, folder.parent / "out.pt")
    assert (folder.parent / "out.pt").read_text() == "old" and not list(folder.parent.glob("*.part"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot take room on a disk beforehand")
def test_a_disk_that_fills_meanwhile_is_one_line(tiny_model, tmp_path, monkeypatch):
    """The room, the tokenizer's with it, is taken before anything is written through memory, where a full
    disk is a signal."""

    def full(file: int, begin: int, size: int) -> None:
        assert begin == 0 and size == os.fstat(file).st_size > 4 * sum(weight.numel() for weight in model.parameters()) + size_of_tokenizer
        raise OSError(errno.ENOSPC, "No space left on device")

    model, tokenizer = tiny_model(1, **{**LLAMA, "vocab_size": 400}), train_tokenizer([("", "one two three\nfour")] * 20, 400)
    size_of_tokenizer = len(tokenizer)
    write_hf(tmp_path / "hf", model)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizer)
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(tmp_path / "hf", r"out\.pt: could not be written \(No space left on device\)")


def test_only_a_regular_file_other_than_the_source_is_written_with_its_checksums(folder, tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "out.pt")
    convert.convert(folder, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and load_checkpoint(tmp_path / "out.pt", check=True)
    with pytest.raises(UserError, match="is read here"):
        convert.convert(folder, folder / "config.json")


@pytest.mark.parametrize(("stated", "added", "ends"), [
    (2, {"eos_token_id": [2, 9]}, {2, 9}), ([2, 5], {"eos_token_id": 9}, {2, 5, 9}), (2, {}, {2}), (None, {"eos_token_id": [9]}, set()),
])  # fmt: skip
def test_every_id_that_ends_a_text_is_taken(folder, tmp_path, stated, added, ends):
    change_config(folder, eos_token_id=stated)
    (folder / "generation_config.json").write_text(json.dumps(added))
    convert.convert(folder, tmp_path / "out.pt")
    assert load_checkpoint(tmp_path / "out.pt")[0].config.ends == ends


def test_max_len_can_be_less_than_the_models(folder, tmp_path):
    convert.convert(folder, tmp_path / "out.pt", max_len=32)
    assert load_checkpoint(tmp_path / "out.pt")[0].config.max_len == 32
