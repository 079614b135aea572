"""Tokenizers that lie in or beside public checkpoints, as the bytes that formats/tokenizer.py reads:
byte-level BPE, or sentencepiece models, some of them rebuilt from a list of pieces."""

import re
import struct
import zipfile
from pathlib import Path

from common.errors import UserError
from common.files import check_input, read_json
from formats.bpe_sources import find_bpe, from_gguf, from_json, from_ranks, reading
from formats.checkpoint import read_checkpoint
from formats.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, build_tokenizer
from formats.tensors import check_regular
from formats.tokenizer import read_blob

WITHOUT = "--tokenizer none converts the model without one"


def is_ranks(raw: bytes) -> bool:
    """Whether this is tiktoken's file of ranks, by its first line: base64 and a number."""
    return re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", raw[:200]) is not None


def find_tokenizer(*folders: Path) -> tuple[bytes | None, str]:
    """The tokenizer of the first of the folders that has one, and a note if none has. A sentencepiece model
    goes before the tokenizer.json beside it, which then says the same less exactly. Raises UserError for one
    that cannot be read."""
    for folder in folders:
        path = folder / "tokenizer.model"
        if path.is_file() and not is_ranks(path.read_bytes()):
            return path.read_bytes(), ""
        try:
            tokenizer = find_bpe(folder)
        except UserError as error:
            raise UserError(f"{error}; {WITHOUT}") from None
        if tokenizer is not None:
            return tokenizer.to_blob(), ""
    return None, "no tokenizer.model, tokenizer.json, or vocab.json with merges.txt: no tokenizer"


def load_tokenizer(path: str | Path) -> bytes:
    """The tokenizer in a checkpoint, or in a file of its own. Raises UserError if there is none."""
    check_input(path, "no such file; it was to hold a tokenizer")
    if zipfile.is_zipfile(path):  # what torch.save writes
        blob = read_checkpoint(path)["tokenizer"]
        if blob is None:
            raise UserError(f"{path}: has no tokenizer")
        return blob.numpy().tobytes()
    blob = read_tokenizer_file(Path(path))
    try:
        read_blob(blob)
    except UserError:
        kinds = "a sentencepiece model, tokenizer.json, or a file of ranks"
        raise UserError(f"{path}: neither a checkpoint nor a tokenizer ({kinds})") from None
    return blob


def read_tokenizer_file(path: Path) -> bytes:
    """A tokenizer in a file of its own: a sentencepiece model, tokenizer.json, tiktoken's ranks, or
    llama2.c's tokenizer.bin: the longest length, then score, length and bytes of each token. Raises
    UserError."""
    check_regular(path)
    raw = path.read_bytes()
    if raw.lstrip()[:1] == b"{" or is_ranks(raw):
        with reading(path):
            tokenizer = from_ranks(raw) if is_ranks(raw) else from_json(read_json(path, "a tokenizer"))
            return tokenizer.to_blob()
    longest, at, tokens, scores = int.from_bytes(raw[:4], "little"), 4, [], []
    while longest < 1024 and at + 8 <= len(
        raw
    ):  # a sentencepiece model begins with a tag that makes it larger
        score, length = struct.unpack_from("<fi", raw, at)
        if not 0 <= length <= longest:
            break
        tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        scores.append(score)
        at += 8 + length
    if at != len(raw) or len(tokens) < 3:
        return raw  # whether it is a sentencepiece model shows when it is loaded
    types = [BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    tokens[:3], types[:3] = (
        ["<unk>", "<s>", "</s>"],
        [UNKNOWN, CONTROL, CONTROL],
    )  # run.c takes these for granted
    return build_tokenizer(tokens, scores, types, 0, 1, 2, True)


def gguf_tokenizer(path: Path, fields: dict) -> tuple[bytes | None, str]:
    """The tokenizer in a GGUF file, and a note if it is of a kind that is not known here. Of a sentencepiece
    model there is as much as encoding and decoding need. Raises UserError for lists that do not belong
    together, and for an id beyond them."""

    def get(key: str, default=None):
        return fields.get(f"tokenizer.ggml.{key}", default)

    if get("model") == "gpt2":  # what llama.cpp calls byte-level BPE
        try:
            return from_gguf(fields).to_blob(), ""
        except UserError as error:
            raise UserError(f"{path}: {error}; {WITHOUT}") from None
    if get("model") != "llama":  # what llama.cpp calls sentencepiece's BPE
        return (
            None,
            f"its tokenizer is {get('model')}, neither byte-level BPE nor sentencepiece: no tokenizer",
        )
    tokens, scores, types = (list(get(key, [])) for key in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(types) > 0:
        raise UserError(
            f"{path}: its tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types"
        )
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path}: its tokenizer has tokens that are no text")
    unk, bos, eos = get("unknown_token_id", 0), get("bos_token_id"), get("eos_token_id")
    for name, token in (("unknown", unk), ("bos", bos), ("eos", eos)):
        if token is not None and not (isinstance(token, int) and 0 <= token < len(tokens)):
            known = f"the tokenizer has the ids 0 to {len(tokens) - 1}"
            raise UserError(f"{path}: its {name}_token_id is {token!r:.40}; {known}")
    if not get("add_bos_token", True):
        bos = None
    return build_tokenizer(tokens, scores, types, unk, bos, eos, bool(get("add_space_prefix", True))), ""
