"""Tokenizers of public checkpoints, as the bytes that `read_blob` of tokenizer.py reads: byte-level
BPE, or sentencepiece models, which are rebuilt from the list of pieces of a GGUF file."""

import zipfile
from pathlib import Path

from common.errors import UserError
from common.files import check_input, reading
from formats.checkpoint import read_checkpoint
from formats.tokenizers.bpe_sources import UNREADABLE, bpe_of_gguf, bpe_of_json, find_bpe
from formats.tokenizers.pieces import build_tokenizer
from formats.tokenizers.tokenizer import read_blob


def find_tokenizer(folder: Path) -> bytes | None:
    """The tokenizer of a Hugging Face folder, None if it has none. A sentencepiece model is preferred to a
    tokenizer.json, which then describes the same tokenizer less exactly. Raises UserError for one that cannot
    be read."""
    if (folder / "tokenizer.model").is_file():
        return (folder / "tokenizer.model").read_bytes()
    if (folder / "tokenizer.json").is_file():
        return find_bpe(folder).to_blob()
    return None


def load_tokenizer(path: str | Path) -> bytes:
    """The tokenizer in a checkpoint, or in a file of its own. Raises UserError if there is none."""
    check_input(path, "no such file; expected a tokenizer")
    if zipfile.is_zipfile(path):  # what torch.save writes
        blob = read_checkpoint(path)["tokenizer"]
        if blob is None:
            raise UserError(f"{path}: has no tokenizer")
        return blob.numpy().tobytes()
    return read_tokenizer_file(Path(path))


def read_tokenizer_file(path: Path) -> bytes:
    """A tokenizer in a file of its own: a sentencepiece model or a tokenizer.json. Raises UserError."""
    blob = path.read_bytes()
    if blob.lstrip()[:1] == b"{":
        return bpe_of_json(path).to_blob()
    with reading(path):
        read_blob(blob)
    return blob


def gguf_tokenizer(path: Path, fields: dict) -> bytes | None:
    """The tokenizer in the metadata of a GGUF file, None if there is none. For a sentencepiece model, the
    metadata hold only what encoding and decoding need. Raises UserError."""

    def get(key: str, default=None):
        return fields.get(f"tokenizer.ggml.{key}", default)

    kind = get("model")
    if kind is None:
        return None
    with reading(path, UNREADABLE):
        if kind == "gpt2":  # what llama.cpp calls byte-level BPE
            return bpe_of_gguf(fields).to_blob()
        if kind != "llama":  # what llama.cpp calls sentencepiece's BPE
            raise UserError(f"its tokenizer is {kind}, neither byte-level BPE nor sentencepiece")
        unk, eos = get("unknown_token_id", 0), get("eos_token_id")
        bos = get("bos_token_id") if get("add_bos_token", True) else None
        tokens, scores, types = (list(get(key)) for key in ("tokens", "scores", "token_type"))
        return build_tokenizer(tokens, scores, types, unk, bos, eos, bool(get("add_space_prefix", True)))
