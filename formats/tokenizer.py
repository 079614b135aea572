"""The one interface to tokenizers, whichever kind a checkpoint has: byte-level BPE (formats/bpe.py) or
sentencepiece; and how a prompt becomes tokens."""

import functools
import re
from collections.abc import Sequence
from typing import Protocol

import sentencepiece as spm

from common.errors import UserError
from formats.bpe import BPE, GUARD, any_of, check_text
from formats.pieces import SEP


class Tokenizer(Protocol):
    """Text to token ids and back."""

    size: int  # ids run from 0 to size - 1; the model may have more
    begin: int | None  # before every text
    ends: tuple[int, ...]  # any of these ends a text; the first is what training puts there
    separator: int | None  # between prompt and completion
    specials: dict[str, int]  # the texts of special tokens -> their ids

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text, without begin or end. `special`: the text comes from a template, not from a
        user, and the special tokens written in it are tokens; a GUARD in it, which keeps a piece of a user's
        text from being one, is left out. Raises UserError for a text that has no UTF-8."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens; special ones, and ids that no token has, add nothing. A text whose last
        character is unfinished ends in U+FFFD: who shows a text as it grows waits until it does not."""

    def piece(self, id: int) -> str:
        """What to show for one token by itself, special ones by their names."""

    def to_blob(self) -> bytes:
        """The tokenizer as bytes, for `read_blob`: equal if and only if the tokenizers are."""


class SentencePiece:
    """A sentencepiece model. Raises UserError for a damaged one."""

    def __init__(self, blob: bytes):
        if not blob:  # which sentencepiece takes without a word
            raise UserError("the tokenizer is empty")
        try:
            self.model = spm.SentencePieceProcessor(model_proto=blob)
        except RuntimeError:
            raise UserError("the tokenizer is damaged") from None
        model, self.blob = self.model, blob
        self.size = model.vocab_size()
        self.begin = model.bos_id() if model.bos_id() >= 0 else None
        self.ends = (model.eos_id(),) if model.eos_id() >= 0 else ()
        separator = model.piece_to_id(SEP)
        self.separator = None if separator == model.unk_id() else separator

    @functools.cached_property  # half a second for Gemma's 262,144 pieces, and only templates need it
    def specials(self) -> dict[str, int]:
        return {self.model.id_to_piece(id): id for id in range(self.size) if self.is_special(id)}

    @functools.cached_property
    def _special(self) -> re.Pattern | None:
        return any_of(list(self.specials))

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
        for number, part in enumerate(self._special.split(text) if self._special else [text]):
            if number % 2:  # what the pattern found, and what lies between, take turns
                ids.append(self.model.piece_to_id(part))
            elif part:
                ids += self.model.encode(part.replace(GUARD, ""))
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
    """The tokenizer of these bytes: JSON of a BPE, or a sentencepiece model, which begins with a tag that is
    no {. Raises UserError for damaged ones."""
    return BPE.from_blob(blob) if blob.startswith(b"{") else SentencePiece(blob)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[begin] prompt [separator], each only where the tokenizer has one. Raises UserError for a prompt that
    UTF-8 cannot write."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # what the shell gave as other bytes comes as surrogates
        raise UserError(
            f"the prompt {prompt!r:.40} holds bytes that are not UTF-8; give it in UTF-8"
        ) from None
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    separator = [] if tokenizer.separator is None else [tokenizer.separator]
    return [*begin, *tokenizer.encode(prompt), *separator]
