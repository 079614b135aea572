"""A public checkpoint -> one file of this project.

    python convert.py SOURCE out.pt --dtype bf16

SOURCE is a Hugging Face folder (config.json with *.safetensors or pytorch_model*.bin), a folder of Meta's (params.json with
consolidated.*.pth), a .bin of llama2.c, or a GGUF file (with the package gguf): the Llama family (Llama, TinyLlama, OpenLLaMA, Mistral,
CodeLlama, LayerSkip) and Gemma 1, 2 and 3. Tensors stream one by one from file to file.
"""

import common.threads  # noqa: F401  before torch

import math
import mmap
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, run
from common.files import whole_file
from common.flags import DTYPES, Parser, read_dtype
from formats.checkpoint import FORMAT, read_tokenizer
from formats.sources import Source, Stored, open_source
from model import ModelConfig, Transformer

MAX_LEN = 8192  # positions kept unless asked for more: the rotary table takes memory for each

# What a config.json may leave out, by model_type (the defaults of transformers' configuration classes).
LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False, "eos_token_id": 2}
GEMMA = {**LLAMA, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": 1}
GEMMA_2 = {**GEMMA, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
           "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2,
           "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # fmt: skip
GEMMA_3 = {**GEMMA_2, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
           "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None}  # fmt: skip
FAMILIES = {"llama": LLAMA, "mistral": {**LLAMA, "num_key_value_heads": 8, "sliding_window": 4096}, "gemma": GEMMA, "gemma2": GEMMA_2,
            "gemma3_text": GEMMA_3}  # fmt: skip


def model_config(words: dict, max_len: int | None) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ValueError for a family that is not known, and for what is missing or not supported."""
    words = {**words, **words.get("text_config", {})} if words.get("model_type") == "gemma3" else words
    family = {"gemma3": "gemma3_text"}.get(words.get("model_type"), words.get("model_type"))
    if family not in FAMILIES:
        raise UserError(f"unknown model_type {family!r}; known are {', '.join(FAMILIES)}")
    stated, words = words.get("max_position_embeddings"), {**FAMILIES[family], **words}
    gemma, sandwich = family.startswith("gemma"), family in ("gemma2", "gemma3_text")
    try:
        d, L, H = (words[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        if stated and max_len is not None and max_len > stated:
            raise UserError(f"--max-len is {max_len}, but the model was made for {stated} positions")
        C, eos, scalar = words.get("head_dim") or d // H, words["eos_token_id"], words.get("query_pre_attn_scalar")
        return ModelConfig(
            vocab_size=words["vocab_size"], n_layers=L, d_model=d, n_heads=H, n_kv_heads=words.get("num_key_value_heads") or H,
            d_ff=words["intermediate_size"], norm_eps=words["rms_norm_eps"],
            max_len=min(words["max_position_embeddings"], MAX_LEN) if max_len is None else max_len,
            tie_embeddings=words["tie_word_embeddings"], eos_id=eos[0] if isinstance(eos, list) else eos, head_dim=C,
            activation=activation(words, gemma), embedding_scale=math.sqrt(d) if gemma else 1.0,
            query_scale=scalar**-0.5 if scalar and scalar != C else None, qk_norm=family == "gemma3_text", post_norms=sandwich,
            attention_cap=words.get("attn_logit_softcapping"), logit_cap=words.get("final_logit_softcapping"),
            **windows(words, L), **rotation(words, local=family == "gemma3_text"),
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"the configuration lacks {error}") from None
    except TypeError as error:
        raise UserError(f"the configuration has a value of the wrong type ({error})") from None


def activation(words: dict, gemma: bool) -> str:
    """Gemma's is GELU-tanh, whatever its first config.json called it."""
    name = (words.get("hidden_activation") or "gelu_pytorch_tanh") if gemma else words.get("hidden_act", "silu")
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise UserError(f"unknown activation {name!r}; known are {', '.join(known)}")
    return known[name]


def windows(words: dict, n_layers: int) -> dict:
    """The fields on sliding windows: by the kinds of layers listed, else every so many layers one without, else all with one."""
    if words.get("sliding_window") is None:
        return {}
    if words.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is set: an embedding model, which cannot decode")
    layers, kinds, every = range(1, n_layers + 1), words.get("layer_types"), words.get("sliding_window_pattern")
    if kinds:
        whole = [layer for layer in layers if kinds[layer - 1] == "full_attention"]
    else:
        whole = [layer for layer in layers if every and layer % every == 0]
    return {"window": words["sliding_window"], "global_layers": tuple(whole)}


def rotation(words: dict, local: bool) -> dict:
    """The fields on rotary embedding: rope_theta and rope_scaling, or rope_parameters, which hold both, perhaps for each kind of layer."""
    parameters = words.get("rope_parameters") or {}
    whole, sliding = parameters.get("full_attention", parameters), parameters.get("sliding_attention", {})
    scaling = words.get("rope_scaling") or whole
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope_scaling {kind!r} is not supported; known are default, linear and llama3")
    bands = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    return {
        "rope_base": whole.get("rope_theta", words["rope_theta"]),
        "local_rope_base": sliding.get("rope_theta", words["rope_local_base_freq"]) if local else None,
        "rope_factor": 1.0 if kind == "default" else float(scaling["factor"]),
        "rope_bands": tuple(float(scaling[name]) for name in bands),
    }


# ---------------------------------------------------------------- names

BLOCK = ("attn_norm", "q", "k", "v", "out", "mlp_norm", "gate", "up", "down")
HF = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
      "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
META = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm", "feed_forward.w1", "feed_forward.w3",
        "feed_forward.w2")  # fmt: skip
GGUF = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
HF_SANDWICH = {"post_attention_layernorm": "attn_post_norm", "pre_feedforward_layernorm": "mlp_norm",
               "post_feedforward_layernorm": "mlp_post_norm"}  # fmt: skip
HF_NORMS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
GGUF_NORMS = {"post_attention_norm": "attn_post_norm", "post_ffw_norm": "mlp_post_norm", "attn_q_norm": "q_norm", "attn_k_norm": "k_norm"}
SKIPPED = re.compile(r"rotary_emb\.inv_freq|rope\.freqs|rope_freqs|vision_tower\.|multi_modal_projector\.")


def name_table(names: str, config: ModelConfig) -> dict[str, str]:
    """Their names -> ours, without .weight, # for the number of a block, from 0. What lies fused in ours goes by its parts: q, k, v; gate,
    up."""
    prefix, outer, block = {
        "hf": ("model.layers", ("model.embed_tokens", "model.norm", "lm_head"), dict(zip(HF, BLOCK)) | HF_NORMS),
        "meta": ("layers", ("tok_embeddings", "norm", "output"), dict(zip(META, BLOCK))),
        "gguf": ("blk", ("token_embd", "output_norm", "output"), dict(zip(GGUF, BLOCK)) | GGUF_NORMS),
    }[names]
    if names == "hf" and config.post_norms:
        block |= HF_SANDWICH
    return dict(zip(outer, ("embedding", "norm", "unembedding"))) | {f"{prefix}.#.{a}": f"blocks.#.{b}" for a, b in block.items()}


def pattern(name: str) -> str:
    """A tensor's name as the table has it: without .weight, # for the number of a block, and of a model for images too only the text's."""
    name = name.replace("language_model.model.", "model.").replace("model.language_model.", "model.").replace("language_model.", "")
    return re.sub(r"\.\d+\.", ".#.", name.removesuffix(".weight"), count=1)


def place(name: str, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """Where the tensor or part of our `name` goes: a weight, or some rows of a fused one."""
    block, _, part = name.rpartition(".")
    q, k, ff = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_ff
    rows = {"q": ("qkv", 0, q), "k": ("qkv", q, k), "v": ("qkv", q + k, k), "gate": ("gate_up", 0, ff), "up": ("gate_up", ff, ff)}
    if part not in rows:
        return weights[name]
    whole, first, count = rows[part]
    return weights[f"{block}.{whole}"][first : first + count]


def match(source: Source, config: ModelConfig, shapes: dict[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """(our name -> theirs, theirs that are skipped). Raises ValueError for a tensor that is unknown, missing, or of another shape than the
    configuration says. `shapes`: our weights, without data."""
    table = name_table(source.names, config)
    fused = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
    split = [(name.rpartition(".")[0], fused.get(name.rpartition(".")[2])) for name in shapes]
    needed = [part for name, (block, parts) in zip(shapes, split) for part in ([f"{block}.{p}" for p in parts] if parts else [name])]
    found, skipped = {}, []
    for theirs, stored in source.tensors.items():
        number = re.search(r"\.(\d+)\.", theirs)
        ours = table.get(pattern(theirs), "").replace("#", str(int(number[1])) if number else "#")
        if SKIPPED.search(theirs) or (ours == "unembedding" and config.tie_embeddings):
            skipped.append(theirs)
        elif ours not in needed or ours in found:
            raise UserError(f"unknown tensor {theirs} {list(stored.shape)}: the model of this configuration has no place for it")
        else:
            found[ours] = theirs
            if stored.shape != tuple(place(ours, shapes, config).shape):
                there, here = list(stored.shape), list(place(ours, shapes, config).shape)
                raise UserError(f"{theirs} has the shape {there}, but by the configuration {here}")
    back = {ours: theirs for theirs, ours in table.items()}
    for ours in needed:
        if ours not in found:
            theirs = back[re.sub(r"\.\d+\.", ".#.", ours)].replace("#", re.sub(r"\D", "", ours))
            raise UserError(f"tensor {theirs}.weight is missing")
    return found, skipped


# ---------------------------------------------------------------- writing


def fill(target: Tensor, stored: Stored, half: int | None, plus_one: bool) -> None:
    """Copies a tensor to its place, piece by piece. `half`: its rows are the interleaved rotary pairs (2i, 2i + 1) of heads of width
    2 half, and become (i, i + half)."""
    at = 0
    for piece in stored.pieces():
        part = target.narrow(stored.dim, at, piece.shape[stored.dim])
        if plus_one:
            part.copy_(piece.float() + 1)
        elif half:
            part.view(-1, 2, half, part.shape[1]).copy_(piece.view(-1, half, 2, piece.shape[1]).transpose(1, 2))
        else:
            part.copy_(piece)
        at += piece.shape[stored.dim]


def convert(path: Path, out: Path, dtype: torch.dtype | None = None, max_len: int | None = None, tokenizer: Path | None = None) -> str:
    """Writes the checkpoint at `path` to `out`, whole or not at all, and returns a report. dtype None: the source's own, for GGUF float32;
    vectors are always float32, so that Gemma's norms, stored here as w + 1, lose nothing. Raises ValueError, OSError."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent} to write to")
    source = open_source(path, tokenizer)
    try:
        config = model_config(source.config, max_len)
        with torch.device("meta"):
            shapes = Transformer(config).state_dict()
        found, skipped = match(source, config, shapes)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
    blob = None if source.tokenizer is None else torch.frombuffer(bytearray(source.tokenizer), dtype=torch.uint8)
    if blob is not None:
        processor = read_tokenizer(path, source.tokenizer, config.vocab_size)
        if config.eos_id is None and processor.eos_id() >= 0:
            config = ModelConfig(**{**asdict(config), "eos_id": processor.eos_id()})
    dtype = dtype or source.tensors[found["embedding"]].dtype
    weights = {name: torch.empty(shape.shape, dtype=dtype if shape.dim() > 1 else torch.float32) for name, shape in shapes.items()}
    size = sum(weight.nbytes for weight in weights.values())
    if (free := shutil.disk_usage(out.absolute().parent).free) < size:
        raise OSError(f"{out}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f}; make room, or convert to a smaller --dtype")
    content = {"format": FORMAT, "config": asdict(config), "weights": weights, "tokenizer": blob}
    with whole_file(out) as part:
        with torch.serialization.skip_data():  # the file with holes for all data, which the untouched memory of `weights` never enters
            torch.save(content, part)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):  # what is written to these tensors is written to the file
            there = torch.load(part, weights_only=True, mmap=True)
        if blob is not None:
            there["tokenizer"].copy_(blob)
        with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, desc=out.name) as bar:
            for ours, theirs in found.items():
                target, kind = place(ours, there["weights"], config), ours.rpartition(".")[2]
                half = config.head_dim // 2 if source.interleaved and kind in ("q", "k") else None
                plus_one = source.names == "hf" and source.config["model_type"].startswith("gemma") and "norm" in kind
                fill(target, source.tensors[theirs], half, plus_one)
                bar.update(target.nbytes)
    return report(path, out, source, config, found, skipped, size, dtype)


def report(path: Path, out: Path, source: Source, config: ModelConfig, found: dict, skipped: list, size: int, dtype: torch.dtype) -> str:
    """What was read, renamed and skipped, blocks taken together."""
    def grouped(names: Iterable[str]) -> str:
        return ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in Counter(names).items()) or "nothing"

    default = ModelConfig()
    settings = {name: value for name, value in asdict(config).items() if value != getattr(default, name)}
    return "\n".join([
        f"read {path}: {source.layout}, {len(source.tensors)} tensors, {source.config['model_type']}",
        *filter(None, [source.note]),
        "config: " + ", ".join(f"{name} {value}" for name, value in settings.items()),
        "renamed: " + grouped(f"{pattern(theirs)} -> {re.sub(r'[.][0-9]+[.]', '.#.', ours)}" for ours, theirs in found.items()),
        "skipped: " + grouped(map(pattern, skipped)),
        f"wrote {out}: {size / 1e9:.2f} GB, {str(dtype).removeprefix('torch.')}, "
        + ("with its tokenizer" if source.tokenizer else "without a tokenizer: decode.py takes and prints token ids"),
    ])  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: the source's own; float32 for GGUF)")
    parser.add_argument("--max-len", type=int, help=f"positions (default: the model's, at most {MAX_LEN})")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="sentencepiece model or llama2.c tokenizer.bin (default: SOURCE's)")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    print(convert(args.source, args.out, read_dtype(args.dtype), args.max_len, args.tokenizer))


if __name__ == "__main__":
    run(main)
