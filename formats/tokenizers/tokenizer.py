"""The one interface to tokenizers, whichever kind a checkpoint has: byte-level BPE (bpe.py in this folder) or
sentencepiece; and how a prompt becomes tokens."""

import functools
from collections.abc import Sequence
from typing import Protocol

import sentencepiece as spm

from common.errors import UserError
from common.files import reading
from formats.tokenizers.bpe import BPE, GUARD, check_text, split_at
from formats.tokenizers.pieces import SEP


class Tokenizer(Protocol):
    """Text to token ids and back."""

    size: int  # ids run from 0 to size - 1; the model may have more
    begin: int | None  # the id before every text
    ends: tuple[int, ...]  # any of these ends a text; the first is what training puts there
    separator: int | None  # between prompt and completion
    specials: dict[str, int]  # the texts of special tokens -> their ids

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The token ids of a text, without begin or end. With `special`, the text comes from a template, not
        from a user: special tokens written in it become tokens, and every GUARD in it, which keeps a user's
        text from becoming one, is left out. Raises UserError for text that cannot be encoded as UTF-8."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens. Special tokens and ids that no token has add nothing. A text whose last
        character is incomplete ends in U+FFFD; a display of a growing text waits for the rest of it."""

    def piece(self, id: int) -> str:
        """The text to show for a single token; for a special token, its name."""

    def to_blob(self) -> bytes:
        """The tokenizer as bytes, for `read_blob`: equal if and only if the tokenizers are."""


class SentencePiece:
    """A sentencepiece model. Raises UserError for a damaged one."""

    def __init__(self, blob: bytes):
        with reading("the tokenizer", "damaged, or no sentencepiece model"):
            model = spm.SentencePieceProcessor(model_proto=blob)
            model.id_to_piece(list(range(model.vocab_size())))
        if not blob:  # which sentencepiece accepts silently
            raise UserError("the tokenizer is empty")
        self.model, self.blob, self.size = model, blob, model.vocab_size()
        self.begin = model.bos_id() if model.bos_id() >= 0 else None
        self.ends = (model.eos_id(),) if model.eos_id() >= 0 else ()
        separator = model.piece_to_id(SEP)
        self.separator = None if separator == model.unk_id() else separator

    @functools.cached_property  # half a second for Gemma's 262,144 pieces, and only templates need it
    def specials(self) -> dict[str, int]:
        return {self.model.id_to_piece(id): id for id in range(self.size) if self.is_special(id)}

    def is_special(self, id: int) -> bool:
        """Whether a piece is a control symbol; or one like <end_of_turn>, which some models find in any
        text."""
        piece = self.model.id_to_piece(id)
        if self.model.is_byte(id) or self.model.is_unknown(id):
            return False
        return self.model.is_control(id) or (len(piece) > 2 and piece[0] == "<" and piece[-1] == ">")

    def encode(self, text: str, special: bool = False) -> list[int]:
        check_text(text)
        if not special:
            return self.model.encode(text)
        ids = []
        for part, id in split_at(self.specials, text):
            ids += self.model.encode(part.replace(GUARD, "")) if id is None else [id]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([id for id in ids if 0 <= id < self.size])

    def piece(self, id: int) -> str:
        if not 0 <= id < self.size:
            return ""
        piece = self.model.id_to_piece(id)
        if self.model.is_byte(id):  # <0x0A>
            return bytes([int(piece[3:5], 16)]).decode("utf-8", "replace")
        return piece.replace("▁", " ")

    def to_blob(self) -> bytes:
        return self.blob


def read_blob(blob: bytes) -> Tokenizer:
    """The tokenizer in these bytes: a BPE as JSON, or a sentencepiece model, whose first byte is never "{".
    Raises UserError for damaged ones."""
    return BPE.from_blob(blob) if blob.startswith(b"{") else SentencePiece(blob)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[begin] prompt [separator], each only where the tokenizer has one. Raises UserError for a prompt that
    cannot be encoded as UTF-8."""
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    separator = [] if tokenizer.separator is None else [tokenizer.separator]
    return [*begin, *tokenizer.encode(prompt), *separator]
