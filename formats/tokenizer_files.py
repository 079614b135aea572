"""Tokenizers that lie in or beside public checkpoints, as sentencepiece models: found, or rebuilt from a list of
pieces."""

import re
import struct
from pathlib import Path

from common.errors import UserError
from formats.tensors import check_regular
from formats.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, build_tokenizer


def find_tokenizer(*folders: Path) -> tuple[bytes | None, str]:
    """The first tokenizer.model in the folders, and a note if there is none."""
    for folder in folders:
        path = folder / "tokenizer.model"
        if path.is_file():
            raw = path.read_bytes()
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", raw[:200]):
                return None, "its tokenizer.model is byte-level BPE: no tokenizer"
            return raw, ""
    return None, "no tokenizer.model (sentencepiece): no tokenizer"


def read_tokenizer_file(path: Path) -> bytes:
    """A sentencepiece model, or one rebuilt from llama2.c's tokenizer.bin: the longest length, then score, length and
    bytes of each token. Raises UserError."""
    check_regular(path)
    raw = path.read_bytes()
    longest, at, tokens, scores = int.from_bytes(raw[:4], "little"), 4, [], []
    while longest < 1024 and at + 8 <= len(raw):  # a sentencepiece model begins with a tag that makes it larger
        score, length = struct.unpack_from("<fi", raw, at)
        if not 0 <= length <= longest:
            break
        tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        scores.append(score)
        at += 8 + length
    if at != len(raw) or len(tokens) < 3:
        return raw  # whether it is a sentencepiece model shows when it is loaded
    types = [BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    tokens[:3], types[:3] = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]  # run.c takes these for granted
    return build_tokenizer(tokens, scores, types, 0, 1, 2, True)


def gguf_tokenizer(path: Path, fields: dict) -> tuple[bytes | None, str]:
    """The sentencepiece model that a GGUF file was made from, as far as encoding and decoding go, and a note if it was
    made from none. Raises UserError for lists that do not belong together, and for an id beyond them."""

    def get(key: str, default=None):
        return fields.get(f"tokenizer.ggml.{key}", default)

    if get("model") != "llama":  # what llama.cpp calls sentencepiece's BPE
        return None, f"its tokenizer is {get('model')} (byte-level BPE is gpt2), not sentencepiece: no tokenizer"
    tokens, scores, types = (list(get(key, [])) for key in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(types) > 0:
        raise UserError(f"{path}: its tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
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
