"""Every layout, written in tiny form from a known model, gives that model back."""

import math
from functools import partial

import pytest
import torch

import convert
import decode
from decode import load_checkpoint
from formats.families import model_config
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
    write_safetensors,
)


@pytest.fixture
def tiny_model(tiny_model):
    """Public checkpoints have no classifiers."""
    return partial(tiny_model, classifiers=())


# ---------------------------------------------------------------- every layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("torch", 2)])
def test_hugging_face_folders(tiny_model, tmp_path, family, kind, shards):
    model = tiny_model(1, **FAMILIES[family])
    write_hf(tmp_path / "hf", model, family.split()[0], kind, shards)
    report = convert_and_compare(tmp_path / "hf", model, tmp_path, exact=True)
    assert f"{shards} {kind} file(s)" in report and "blocks.#.k (5 times)" in report and "skipped: nothing" in report


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
    values = {
        "block_count": c.n_layers, "embedding_length": c.d_model, "head_count": c.n_heads, "head_count_kv": c.n_kv_heads,
        "feed_forward_length": c.d_ff, "context_length": c.max_len, "layer_norm_rms_eps": c.norm_eps, "key_length": c.head_dim,
        "rope_freq_base": c.rope_base, "eos_token_id": 2, "eot_token_id": 9,
    }  # fmt: skip
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)
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
    """Matrices have the dtype that is given, else the source's; vectors stay float32, so that w + 1 loses
    nothing."""
    model = tiny_model(1, **FAMILIES["gemma"])
    write_hf(tmp_path / "hf", model, "gemma", dtype=torch.bfloat16)
    convert.convert(tmp_path / "hf", tmp_path / "out.pt", dtype)
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["weights"]
    assert {weight.dtype for weight in weights.values() if weight.dim() > 1} == {stored}
    assert torch.equal(weights["norm"], (model.norm.weight - 1).bfloat16().float() + 1)


# ---------------------------------------------------------------- the command line


def test_the_command_converts_and_decode_takes_and_prints_token_ids(tiny_model, tmp_path, command):
    model = tiny_model(1, **LLAMA)
    write_hf(tmp_path / "hf", model)
    printed, _, _ = command(convert.main, tmp_path / "hf", tmp_path / "out.pt", "--dtype", "fp32")
    assert "float32, without a tokenizer: decode.py takes and prints token ids" in printed
    words = ("--prompt", "1,7,3", "--max-new-tokens", "5", "--confidence", "none")
    shown, _, _ = command(decode.main, "--checkpoint", tmp_path / "out.pt", *words)
    out = decode.generate(model, [1, 7, 3], decode.DecodeConfig(max_new_tokens=5))
    assert [int(word) for word in shown.split("\n")[1].split()] == out.tokens  # the prompt is echoed above


@pytest.mark.parametrize("words", [("none",), ("hf",), ("hf", "--max-len", "65", "--overwrite")])
def test_a_mistake_ends_in_one_line_with_status_2_and_leaves_the_old_file(tiny_model, tmp_path, command, words):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    (tmp_path / "out.pt").write_text("old")
    _, said, status = command(convert.main, tmp_path / words[0], tmp_path / "out.pt", *words[1:])
    assert status == 2 and said.count("\n") == 1 and (tmp_path / "out.pt").read_text() == "old"
    command(convert.main, tmp_path / "hf", tmp_path / "out.pt", "--overwrite")
    assert load_checkpoint(tmp_path / "out.pt")
