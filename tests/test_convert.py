"""Every layout, written in tiny form from a known model, gives that model back."""

import math
import sys
from functools import partial

import pytest
import torch

import convert
import decode
from common.errors import run
from convert import model_config
from model import load_checkpoint
from tests.public import (
    FAMILIES,
    GGUF,
    LLAMA,
    SANDWICH,
    convert_and_compare,
    hf_config,
    hf_tensors,
    named,
    safetensors,
    write_hf,
    write_llama2c,
    write_meta,
    write_safetensors,
)


@pytest.fixture
def tiny_model(tiny_model):
    """Public checkpoints have no classifiers."""
    return partial(tiny_model, classifiers=())


# ---------------------------------------------------------------- every layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("torch", 1), ("torch", 2)])
def test_hugging_face_folders(tiny_model, tmp_path, family, kind, shards):
    model = tiny_model(1, **FAMILIES[family])
    write_hf(tmp_path / "hf", model, family.split()[0], kind, shards)
    report = convert_and_compare(tmp_path / "hf", model, tmp_path, exact=True)
    assert f"{shards} {kind} file(s)" in report and "blocks.#.k (5 times)" in report and "skipped: nothing" in report


def test_sharded_and_single_files_give_the_same_file(tiny_model, tmp_path):
    model, files = tiny_model(1, **LLAMA), []
    for shards in (1, 3):
        write_hf(tmp_path / str(shards), model, "llama", "safetensors", shards)
        convert.convert(tmp_path / str(shards), tmp_path / "out.pt")
        files.append(torch.load(tmp_path / "out.pt", weights_only=True))
    assert files[0]["config"] == files[1]["config"]
    assert all(torch.equal(weight, files[1]["weights"][name]) for name, weight in files[0]["weights"].items())


@pytest.mark.parametrize(("shards", "rows"), [(1, False), (2, False), (2, True)])
def test_meta_folders(tiny_model, tmp_path, shards, rows):
    model = tiny_model(2, **LLAMA)
    write_meta(tmp_path / "meta", model, shards, rows)
    report = convert_and_compare(tmp_path / "meta", model, tmp_path, max_len=64)
    assert "skipped: rope.freqs" in report


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_llama2c_files(tiny_model, tmp_path, version, tied):
    model = tiny_model(3, **{**LLAMA, "tie_embeddings": tied, "norm_eps": 1e-5})
    write_llama2c(tmp_path / "model.bin", model, version)
    convert_and_compare(tmp_path / "model.bin", model, tmp_path)
    (tmp_path / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut short"):
        convert.convert(tmp_path / "model.bin", tmp_path / "out.pt")


GGUF_SHAPES = {
    "llama": LLAMA,
    "llama 3": {**LLAMA, "tie_embeddings": True, "rope_base": 5e5, "rope_factor": 8.0, "rope_bands": (1.0, 4.0, 8192.0)},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "head_dim": 16, "qk_norm": True, "tie_embeddings": True},
    "smollm3": {**LLAMA, "tie_embeddings": True, "unrotated_layers": (4,)},
    "gemma3": {**SANDWICH, "qk_norm": True, "local_rope_base": 10000.0, "n_layers": 7, "global_layers": (6,)},
}


@pytest.mark.parametrize("family", GGUF_SHAPES)
def test_gguf_files(tiny_model, tmp_path, family):
    gguf = pytest.importorskip("gguf")
    model = tiny_model(4, **GGUF_SHAPES[family])
    c, arch = model.config, family.split()[0]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    writer.add_block_count(c.n_layers)
    writer.add_embedding_length(c.d_model)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_context_length(c.max_len)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(9)
    if c.window:
        writer.add_sliding_window(c.window)
    tensors = named(model, GGUF, "blk", ("token_embd", "output_norm", "output"), interleaved=arch in ("llama", "smollm3"))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    if c.rope_bands:  # what the frequencies of the four pairs are divided by: the third turns 1.84 times
        smooth = (8192 * 5e5**-0.5 / (2 * math.pi) - 1) / 3
        writer.add_tensor("rope_freqs.weight", torch.tensor([1, 1, 1 / (smooth + (1 - smooth) / 8), 8]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = convert_and_compare(tmp_path / "model.gguf", model, tmp_path)
    assert "without a tokenizer: decode.py takes and prints token ids" in report
    assert load_checkpoint(tmp_path / "out.pt")[0].config.ends == {2, 9}  # of a text, and of a turn


def test_newer_and_nested_configurations_say_the_same(tiny_model):
    """transformers 5 puts rope_theta and rope_scaling into rope_parameters and lists the kind of every layer;
    a Gemma 3 with images holds the text's configuration inside its own."""
    words = hf_config(tiny_model(0, **FAMILIES["gemma3_text"]), "gemma3_text")
    old = model_config(words, None)
    new = {name: value for name, value in words.items() if not name.startswith(("rope_", "sliding_window_"))}
    new["layer_types"] = [f"{'full' if layer == 3 else 'sliding'}_attention" for layer in range(1, 6)]
    sliding = {"rope_type": "default", "rope_theta": words["rope_local_base_freq"]}
    whole = {"rope_theta": words["rope_theta"], **words["rope_scaling"]}
    new["rope_parameters"] = {"sliding_attention": sliding, "full_attention": whole}
    assert model_config(new, None) == old
    assert model_config({"model_type": "gemma3", "text_config": words}, None) == old


def test_gemma_3_as_published():
    """Sizes that its config.json leaves out, and every sixth layer without a window."""
    words = {"hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6912, "sliding_window": 512}
    config = model_config({"model_type": "gemma3_text", **words}, None)
    assert (config.head_dim, config.rope_base, config.local_rope_base, config.max_len) == (256, 1e6, 1e4, 8192)
    assert config.global_layers == (6, 12, 18, 24) and config.query_scale is None


def test_only_the_text_of_a_model_for_images_is_taken(tiny_model, tmp_path):
    model = tiny_model(1, **FAMILIES["gemma3_text"])
    write_hf(tmp_path / "hf", model, "gemma3_text")
    tensors = {f"language_model.{name}": tensor for name, tensor in hf_tensors(model, "gemma3_text").items()}
    tensors["vision_tower.encoder.layers.0.fc1.weight"] = torch.ones(3)
    write_safetensors(tmp_path / "hf" / "model.safetensors", *safetensors(tensors))
    assert "skipped: vision_tower.encoder.layers.#.fc1" in convert_and_compare(tmp_path / "hf", model, tmp_path)


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32)])
def test_dtypes(tiny_model, tmp_path, dtype, stored):
    """Matrices have the dtype asked for, else the source's; vectors stay float32, so that w + 1 loses
    nothing."""
    model = tiny_model(1, **FAMILIES["gemma"])
    write_hf(tmp_path / "hf", model, "gemma", dtype=torch.bfloat16)
    convert.convert(tmp_path / "hf", tmp_path / "out.pt", dtype)
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["weights"]
    assert {weight.dtype for weight in weights.values() if weight.dim() > 1} == {stored}
    assert torch.equal(weights["norm"], (model.norm - 1).bfloat16().float() + 1)


# ---------------------------------------------------------------- the command line


def command(monkeypatch, main, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    run(main)


def test_the_command_converts_and_decode_takes_and_prints_token_ids(tiny_model, tmp_path, monkeypatch, capsys):
    model = tiny_model(1, **LLAMA)
    write_hf(tmp_path / "hf", model)
    command(monkeypatch, convert.main, tmp_path / "hf", tmp_path / "out.pt", "--dtype", "fp32")
    assert "float32, without a tokenizer: decode.py takes and prints token ids" in capsys.readouterr().out
    words = ("--prompt", "1,7,3", "--max-new-tokens", "5", "--confidence", "none")
    command(monkeypatch, decode.main, "--checkpoint", tmp_path / "out.pt", *words)
    shown, out = capsys.readouterr(), decode.generate(model, [1, 7, 3], decode.DecodeConfig(max_new_tokens=5))
    assert [int(word) for word in shown.out.split("\n")[1].split()] == out.tokens  # the prompt is echoed above
    assert "token ids" in shown.err


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.pt"
    for words in (
        [tmp_path / "none", out], [tmp_path, out], [tmp_path, tmp_path / "no" / "out.pt"],
        [tmp_path, out, "--dtype", "int8"], [tmp_path],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            command(monkeypatch, convert.main, *words)
        assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
