"""Every layout, written here in tiny form from a known model, gives that model back; damaged ones give their error."""

import errno
import io
import json
import math
import os
import struct
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

import convert
import decode
from common.errors import UserError, run
from convert import model_config
from formats.tensors import read_safetensors
from formats.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, build_tokenizer, encode_prompt
from formats.tokenizer_files import gguf_tokenizer
from model import Transformer, load_checkpoint


@pytest.fixture
def tiny_model(tiny_model):
    """Public checkpoints have no classifiers."""
    return partial(tiny_model, classifiers=())


LLAMA = {"tie_embeddings": False, "head_dim": 8, "eos_id": 2}
SANDWICH = {"head_dim": 6, "activation": "gelu_tanh", "embedding_scale": math.sqrt(32), "post_norms": True, "window": 4, "eos_id": 1}
FAMILIES = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "eos_id": (2, 9), "tie_embeddings": True, "rope_factor": 8.0, "rope_bands": (1.0, 4.0, 32.0)},
    "mistral": {**LLAMA, "window": 5},
    "gemma": {"head_dim": 6, "activation": "gelu_tanh", "embedding_scale": math.sqrt(32), "eos_id": 1},
    "gemma2": {**SANDWICH, "global_layers": (2, 4), "attention_cap": 50.0, "logit_cap": 30.0, "query_scale": 0.25},
    "gemma3_text": {**SANDWICH, "global_layers": (3,), "qk_norm": True, "local_rope_base": 100.0, "rope_factor": 8.0},
}
TOKENS = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
HF = {"attn_norm": "input_layernorm", "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "down": "mlp.down_proj",
      "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
      "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}  # fmt: skip
HF_SANDWICH = {"mlp_norm": "pre_feedforward_layernorm", "attn_post_norm": "post_attention_layernorm",
               "mlp_post_norm": "post_feedforward_layernorm"}  # fmt: skip
META = {"attn_norm": "attention_norm", "out": "attention.wo", "mlp_norm": "ffn_norm", "down": "feed_forward.w2", "q": "attention.wq",
        "k": "attention.wk", "v": "attention.wv", "gate": "feed_forward.w1", "up": "feed_forward.w3"}  # fmt: skip
GGUF = {"attn_norm": "attn_norm", "out": "attn_output", "mlp_norm": "ffn_norm", "down": "ffn_down", "q": "attn_q", "k": "attn_k",
        "v": "attn_v", "gate": "ffn_gate", "up": "ffn_up", "attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm",
        "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}  # fmt: skip


# ---------------------------------------------------------------- writers


def named(model: Transformer, block: dict, layer: str, outer: tuple[str, str, str], interleaved: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights under other names, the fused ones in parts."""
    c, out = model.config, {}
    q, k, ff = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.d_ff
    for name, weight in model.state_dict().items():
        _, _, rest = name.partition("blocks.")
        if not rest:
            out[dict(zip(("embedding", "norm", "unembedding"), outer))[name] + ".weight"] = weight
            continue
        number, kind = rest.split(".")
        sizes = {"qkv": (("q", q), ("k", k), ("v", k)), "gate_up": (("gate", ff), ("up", ff))}.get(kind, ((kind, len(weight)),))
        for (part, _), rows in zip(sizes, weight.split([size for _, size in sizes])):
            if interleaved and part in ("q", "k"):  # row i of a head goes to 2i, row i + C/2 to 2i + 1
                heads = rows.view(-1, c.head_dim, rows.shape[1])
                rows = torch.empty_like(heads)
                rows[:, 0::2], rows[:, 1::2] = heads.chunk(2, dim=1)
                rows = rows.flatten(0, 1)
            out[f"{layer}.{number}.{block[part]}.weight"] = rows.contiguous()
    return out


def hf_tensors(model: Transformer, family: str) -> dict[str, torch.Tensor]:
    block = HF | (HF_SANDWICH if model.config.post_norms else {})
    tensors = named(model, block, "model.layers", ("model.embed_tokens", "model.norm", "lm_head"))
    return {name: tensor - 1 if family.startswith("gemma") and "norm" in name else tensor for name, tensor in tensors.items()}


def hf_config(model: Transformer, family: str) -> dict:
    c = model.config
    words = {
        "model_type": family, "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim, "intermediate_size": c.d_ff,
        "max_position_embeddings": c.max_len, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base,
        "tie_word_embeddings": c.tie_embeddings, "sliding_window": c.window,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
    }  # fmt: skip
    if family in ("gemma2", "gemma3_text"):
        words |= {"query_pre_attn_scalar": c.query_scale**-2 if c.query_scale else c.head_dim,
                  "sliding_window_pattern": c.global_layers[0], "attn_logit_softcapping": c.attention_cap,
                  "final_logit_softcapping": c.logit_cap, "rope_local_base_freq": c.local_rope_base}  # fmt: skip
    if c.rope_bands:
        low, high, length = c.rope_bands
        words["rope_scaling"] = {"rope_type": "llama3", "factor": c.rope_factor, "low_freq_factor": low, "high_freq_factor": high,
                                 "original_max_position_embeddings": length}  # fmt: skip
    elif c.rope_factor != 1:
        words["rope_scaling"] = {"rope_type": "linear", "factor": c.rope_factor}
    return words


def safetensors(tensors: dict[str, torch.Tensor]) -> tuple[dict, bytes]:
    """Header and data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write_safetensors(path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def write_hf(folder, model: Transformer, family: str = "llama", kind: str = "safetensors", shards: int = 1, dtype=torch.float32) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model, family)))
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(model, family).items()}
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"{stem}-{shard}.{ending}" if shards > 1 else f"{stem}.{ending}"
        places |= dict.fromkeys(part, name)
        if kind == "safetensors":
            write_safetensors(folder / name, *safetensors(part))
        else:
            torch.save(part, folder / name)
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def write_meta(folder, model: Transformer, shards: int, rows: bool = False) -> None:
    """`rows`: the embedding is cut by rows, as in Llama 3."""
    c = model.config
    folder.mkdir(exist_ok=True)
    params = {"dim": c.d_model, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "norm_eps": c.norm_eps}
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1, "rope_theta": c.rope_base}))
    tensors = named(model, META, "layers", ("tok_embeddings", "norm", "output"), interleaved=True)
    for shard in range(shards):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in tensors.items():
            columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok") and not rows)
            part[name] = tensor.chunk(shards, int(columns))[shard].clone() if tensor.dim() > 1 else tensor
        torch.save(part, folder / f"consolidated.0{shard}.pth")


def write_llama2c(path, model: Transformer, version: int) -> None:
    c = model.config
    tensors = named(model, META, "layers", ("tok_embeddings", "norm", "output"), interleaved=True)
    every = lambda kind: [tensors[f"layers.{i}.{kind}.weight"] for i in range(c.n_layers)]  # noqa: E731
    attention, mlp = [f"attention.w{x}" for x in "qkvo"], [f"feed_forward.w{x}" for x in "123"]
    tail = [] if c.tie_embeddings else [tensors["output.weight"]]
    numbers = (c.d_model, c.d_ff, c.n_layers, c.n_heads, c.n_kv_heads)
    if version == 0:
        header = struct.pack("<7i", *numbers, c.vocab_size if c.tie_embeddings else -c.vocab_size, c.max_len)
        weights = [tensors["tok_embeddings.weight"]]
        for kind in ("attention_norm", *attention, "ffn_norm", *mlp):
            weights += every(kind)
        weights += [tensors["norm.weight"], torch.zeros(c.max_len * c.head_dim), *tail]
    else:
        header = struct.pack("<Ii7iB", 0x616B3432, 1, *numbers, c.vocab_size, c.max_len, c.tie_embeddings).ljust(256, b"\0")
        weights = [*every("attention_norm"), *every("ffn_norm"), tensors["norm.weight"], tensors["tok_embeddings.weight"]]
        for kind in (*attention, *mlp):
            weights += every(kind)
        weights += tail
    path.write_bytes(header + b"".join(weight.numpy().tobytes() for weight in weights))


def convert_and_compare(path, model: Transformer, tmp_path, exact: bool = False, **options) -> str:
    """Converts, loads and compares configuration and logits; returns the report."""
    report = convert.convert(path, tmp_path / "out.pt", **options)
    loaded, _ = load_checkpoint(tmp_path / "out.pt", dtype=torch.float32)
    different = {name for name in vars(model.config) if getattr(loaded.config, name) != getattr(model.config, name)}
    assert different <= ({"eos_id", "max_len", "norm_eps"} if not exact else set()), different
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    return report


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
    "gemma3": {**SANDWICH, "qk_norm": True, "local_rope_base": 10000.0, "n_layers": 7, "global_layers": (6,)},
}


@pytest.mark.parametrize("family", GGUF_SHAPES)
def test_gguf_files(tiny_model, tmp_path, family):
    gguf = pytest.importorskip("gguf")
    model = tiny_model(4, **GGUF_SHAPES[family])
    c, arch = model.config, family.split()[0]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch)
    for add, value in ((writer.add_block_count, c.n_layers), (writer.add_embedding_length, c.d_model), (writer.add_head_count, c.n_heads),
                       (writer.add_head_count_kv, c.n_kv_heads), (writer.add_feed_forward_length, c.d_ff),
                       (writer.add_context_length, c.max_len), (writer.add_layer_norm_rms_eps, c.norm_eps),
                       (writer.add_key_length, c.head_dim), (writer.add_rope_freq_base, c.rope_base)):  # fmt: skip
        add(value)
    if c.window:
        writer.add_sliding_window(c.window)
    for name, tensor in named(model, GGUF, "blk", ("token_embd", "output_norm", "output"), interleaved=arch == "llama").items():
        writer.add_tensor(name, tensor.numpy())
    if c.rope_bands:  # what the frequencies of the four pairs, 1, 0.0376, 0.00141 and 0.0000532, are divided by: the third turns 1.84 times
        smooth = (8192 * 5e5**-0.5 / (2 * math.pi) - 1) / 3
        writer.add_tensor("rope_freqs.weight", torch.tensor([1, 1, 1 / (smooth + (1 - smooth) / 8), 8]).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    report = convert_and_compare(tmp_path / "model.gguf", model, tmp_path)
    assert "without a tokenizer: decode.py takes and prints token ids" in report


def test_newer_and_nested_configurations_say_the_same(tiny_model):
    """transformers 5 puts rope_theta and rope_scaling into rope_parameters and lists the kind of every layer; a Gemma 3 with images holds
    the text's configuration inside its own."""
    words = hf_config(tiny_model(0, **FAMILIES["gemma3_text"]), "gemma3_text")
    old = model_config(words, None)
    new = {name: value for name, value in words.items() if not name.startswith(("rope_", "sliding_window_"))}
    new["layer_types"] = [f"{'full' if layer == 3 else 'sliding'}_attention" for layer in range(1, 6)]
    new["rope_parameters"] = {"sliding_attention": {"rope_type": "default", "rope_theta": words["rope_local_base_freq"]},
                              "full_attention": {"rope_theta": words["rope_theta"], **words["rope_scaling"]}}  # fmt: skip
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
    """Matrices have the dtype asked for, else the source's; vectors stay float32, so that w + 1 loses nothing."""
    model = tiny_model(1, **FAMILIES["gemma"])
    write_hf(tmp_path / "hf", model, "gemma", dtype=torch.bfloat16)
    convert.convert(tmp_path / "hf", tmp_path / "out.pt", dtype)
    weights = torch.load(tmp_path / "out.pt", weights_only=True)["weights"]
    assert {weight.dtype for weight in weights.values() if weight.dim() > 1} == {stored}
    assert torch.equal(weights["norm"], (model.norm - 1).bfloat16().float() + 1)


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
        changes = {"shape": {"intermediate_size": 64}, "family": {"model_type": "bert"}, "activation": {"hidden_act": "relu"},
                   "rope": {"rope_scaling": {"type": "yarn", "factor": 2}}, "size": {"hidden_size": None}, "kind": {"vocab_size": "many"}}
        (folder / "config.json").write_text(json.dumps({**config, **changes[kind]}))


@pytest.mark.parametrize(("kind", "message"), [
    ("unknown tensor", "unknown tensor model.layers.0.self_attn.q_proj.bias"), ("layer too many", "unknown tensor model.layers.7.mlp.up_p"),
    ("missing tensor", r"tensor \S+\.weight is missing"), ("missing file", "model-0.safetensors: named in"),
    ("path in the index", "no weight_map"), ("no JSON", "not JSON"), ("no weights", "neither"),
    ("shape", r"_proj.weight has the shape \[48, 32\], but by the configuration \[64, 32\]"), ("family", "unknown model_type 'bert'"),
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
    """The room, the tokenizer's with it, is taken before anything is written through memory, where a full disk is a signal."""
    def full(file: int, begin: int, size: int) -> None:
        assert begin == 0 and size == os.fstat(file).st_size > 4 * sum(weight.numel() for weight in model.parameters()) + 300_000
        raise OSError(errno.ENOSPC, "No space left on device")

    model, pieces = tiny_model(1, **{**LLAMA, "vocab_size": 400}), ["<unk>", "<s>", "</s>", *(f"{i}{'a' * 1000}" for i in range(300))]
    tokenizer = build_tokenizer(pieces, [0.0] * 303, [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 300], 0, 1, 2, True)
    write_hf(tmp_path / "hf", model)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizer)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"out\.pt: could not be written \(No space left on device\)"):
        convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    assert not list(tmp_path.glob("out*"))


CONFIGS = [
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"), ({"rope_scaling": [1]}, "rope_scaling is"),
    ({"rope_scaling": {"type": "linear"}}, "factor is None; it must be a number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor is 1000"), ({"rope_scaling": {"type": [1]}}, "not supported"),
    ({"rope_parameters": 3}, "rope_parameters is 3"), ({"vocab_size": 10**30}, "vocab_size is 1000"),
    ({"num_hidden_layers": 10**9}, "n_layers is 1000000000"),
    ({"num_hidden_layers": 9999}, "num_hidden_layers is 9999, but there are only 48 tensors"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"), ({"head_dim": "8"}, "head_dim is '8'"), ({"head_dim": 7}, "head_dim is 7"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"), ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    ({"model_type": ["llama"]}, "unknown model_type"), ({"model_type": None}, "unknown model_type None"),
    ({"hidden_act": ["silu"]}, "unknown activation"), ({"eos_token_id": [2, "x"]}, "eos_id is"), ({"eos_token_id": 77}, "eos_id is 77"),
    ({"tie_word_embeddings": "no"}, "tie_embeddings is 'no'; it must be bool"), ({"sliding_window": 2.5}, "sliding_window is 2.5"),
    ({"max_position_embeddings": [64]}, "max_position_embeddings is"), ({"intermediate_size": 2**31 - 1}, "has the shape"),
    ({"hidden_size": 2**30, "head_dim": 2**30, "num_attention_heads": 2**30}, "impossible sizes"),
    ({"num_key_value_heads": 3}, "n_kv_heads"), ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
    ({"model_type": "gemma3_text", "sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types is"),
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
    (lambda norm: norm.to("meta"), "model.norm.weight is .*meta"), (lambda norm: norm.long(), "model.norm.weight is of torch.int64"),
    (lambda norm: norm.to(torch.complex64), "of torch.complex64"), (lambda norm: norm.to(torch.float8_e5m2), "of torch.float8_e5m2"),
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
    for out, message in ((Path("/dev/null"), "no regular file"), (tmp_path, "no regular file"), (source, "is what is read")):
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


# ---------------------------------------------------------------- tokenizers

TEXTS = ["Grüße aus dem Café, señor!", "👍🏽 ok 🧑‍🚀", "日本語と中文 한국어", "a\nb\n\n\nc\n", "  two   three    spaces ", "\ttab",
         "x<b>y</b>", " ", "the cat"]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def original(request) -> spm.SentencePieceProcessor:
    """A sentencepiece model as Llama's (with a space put before the text) or Gemma's (without)."""
    out, lines = io.BytesIO(), ["the cat sat on the mat, and two cats sat too", "Grüße aus dem Café", "a cat is a cat is a cat"] * 5
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=320, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=request.param,
        user_defined_symbols=["<b>", "▁▁", "▁▁▁", "\n"], hard_vocab_limit=False,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


def described(sp: spm.SentencePieceProcessor) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as a GGUF file has them: spaces in user-defined tokens are written as such."""
    ids = range(sp.vocab_size())
    user = {sp.piece_to_id(piece) for piece in ("<b>", "▁▁", "▁▁▁", "\n")}
    tests = ((sp.is_unknown, UNKNOWN), (sp.is_control, CONTROL), (sp.is_byte, BYTE), (user.__contains__, USER_DEFINED))
    types = [next((kind for test, kind in tests if test(i)), NORMAL) for i in ids]
    tokens = [sp.id_to_piece(i).replace("▁", " ") if i in user else sp.id_to_piece(i) for i in ids]
    return tokens, [sp.get_score(i) for i in ids], types


def test_the_rebuilt_tokenizer_equals_the_original(original):
    tokens, scores, types = described(original)
    prefix = original.encode("cat", out_type=str)[0].startswith("▁")
    rebuilt = spm.SentencePieceProcessor(model_proto=build_tokenizer(tokens, scores, types, 0, 1, 2, prefix))
    for text in TEXTS:
        ids = original.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == original.decode(ids) == text
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)
    assert encode_prompt(rebuilt, "cat") == [1, *original.encode("cat")]


def test_a_tokenizer_without_bos_puts_none(original):
    tokens, scores, types = described(original)
    rebuilt = spm.SentencePieceProcessor(model_proto=build_tokenizer(tokens, scores, types, 0, None, 2, True))
    assert rebuilt.bos_id() == -1 and encode_prompt(rebuilt, "cat") == rebuilt.encode("cat")


@pytest.mark.parametrize("original", [True], indirect=True, ids=["prefix"])
@pytest.mark.parametrize("beside", ["tokenizer.bin", "tokenizer.model", None])
def test_the_tokenizer_of_llama2c(tiny_model, tmp_path, original, beside):
    model = tiny_model(3, **{**LLAMA, "vocab_size": original.vocab_size()})
    write_llama2c(tmp_path / "model.bin", model, 0)
    exported = struct.pack("<i", 20)  # tokenizer.py of llama2.c
    for i in range(original.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, original.id_to_piece(i)).replace("▁", " ").encode()
        exported += struct.pack("<fi", original.get_score(i), len(piece)) + piece
    if beside:
        (tmp_path / beside).write_bytes(exported if beside.endswith("bin") else original.serialized_model_proto())
    report = convert.convert(tmp_path / "model.bin", tmp_path / "out.pt")
    _, tokenizer = load_checkpoint(tmp_path / "out.pt")
    if beside is None:
        assert tokenizer is None and "no tokenizer, unless --tokenizer" in report
        return
    for text in ["the cat sat", "Grüße aus dem Café, señor!", "👍🏽"]:
        assert tokenizer.encode(text) == original.encode(text)
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (1, 2)


@pytest.mark.parametrize(("change", "message"), [
    ({"unknown_token_id": 5}, "its unknown_token_id is 5; the tokenizer has the ids 0 to 2"), ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"bos_token_id": 2**40}, "bos_token_id"), ({"bos_token_id": "1"}, "bos_token_id is '1'"), ({"scores": [0.0]}, "3 tokens, 1 scores"),
    ({"tokens": ["a", 3, "b"]}, "tokens that are no text"),
])  # fmt: skip
def test_a_tokenizer_in_gguf_whose_parts_do_not_fit_is_refused(tmp_path, change, message):
    fields = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>"], "scores": [0.0] * 3, "token_type": [2, 3, 3], "eos_token_id": 2}
    assert gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in fields.items()})[0]
    with pytest.raises(UserError, match=message):
        gguf_tokenizer(tmp_path, {f"tokenizer.ggml.{name}": value for name, value in {**fields, **change}.items()})


def test_a_tokenizer_that_does_not_fit_is_refused(tiny_model, tmp_path, original):
    write_hf(tmp_path / "hf", tiny_model(1, **LLAMA))
    for content, message in ((original.serialized_model_proto(), "pieces, the model only 50"), (b"\x0a\x05damaged", "is damaged")):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert.convert(tmp_path / "hf", tmp_path / "out.pt")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's is byte-level BPE
    assert "byte-level BPE" in convert.convert(tmp_path / "hf", tmp_path / "out.pt")


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
    assert [int(word) for word in shown.out.split("\n")[0].split()] == out.tokens
    assert "token ids" in shown.err


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    for words in ([tmp_path / "none", tmp_path / "out.pt"], [tmp_path, tmp_path / "out.pt"], [tmp_path, tmp_path / "no" / "out.pt"],
                  [tmp_path, tmp_path / "out.pt", "--dtype", "int8"], [tmp_path]):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            command(monkeypatch, convert.main, *words)
        assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
