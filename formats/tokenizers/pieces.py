"""Sentencepiece models as bytes: trained on a corpus, or rebuilt from a list of pieces."""

import io
import os
import struct
from collections.abc import Iterable, Iterator

import sentencepiece as spm

from common.errors import UserError

SEP = "<sep>"  # the piece between prompt and completion; without it, a completion follows its prompt directly
LINE = 10_000  # characters; longer lines are trained on in parts, for sentencepiece leaves out very long ones


def train_tokenizer(pairs: Iterable[tuple[str, str]], vocab_size: int) -> bytes:
    """Trains a sentencepiece model, line by line, and returns it: BPE that can represent every byte, leaves
    characters as they are and turns several spaces into one; it has a separator if there are prompts. This
    reads the pairs twice. Raises UserError for too little text, and whatever reading the pairs raises."""
    prompted = [bool(prompt) for prompt, _ in pairs]  # all are read here: sentencepiece would hide an error
    symbols = [SEP] if any(prompted) else []
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=lines_of(pairs), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
            user_defined_symbols=symbols, num_threads=os.cpu_count(), max_sentence_length=65536,
            hard_vocab_limit=False, minloglevel=2,  # without the limit, little text gives fewer pieces
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"no tokenizer of {vocab_size} pieces from this text: {reason}") from None
    return model.getvalue()


def lines_of(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yields all lines of prompts and completions, long ones in parts."""
    for pair in pairs:
        for text in pair:
            for line in text.splitlines():
                if line.strip():
                    yield from (line[at : at + LINE] for at in range(0, len(line), LINE))


# types of pieces (sentencepiece_model.proto), in GGUF files, too
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def build_tokenizer(tokens, scores, types, unk: int, bos: int | None, eos: int | None, prefix: bool) -> bytes:
    """A sentencepiece BPE model of these tokens, with their scores and types, as the bytes of a ModelProto
    (sentencepiece_model.proto). Text is kept as it is, with runs of spaces; spaces become ▁, with `prefix`
    one is put before the text, and what has no piece is written in bytes."""
    pieces, types = [token.replace(" ", "▁").encode() for token in tokens], list(types)
    types[unk] = UNKNOWN
    parts = []
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        parts.append(_field(1, _field(1, piece) + _field(2, float(score)) + _field(3, int(kind))))
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, BYTE in types)  # BPE, size, byte fallback
    for number, at in enumerate((unk, bos, eos, None)):  # with pad; each by id and by name
        trainer += _field(40 + number, -1 if at is None else at)
        trainer += _field(45 + number, b"(none)" if at is None else pieces[at])
    normalizer = _field(1, b"identity") + _field(3, prefix) + _field(4, False) + _field(5, True)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: bytes | float | int) -> bytes:
    """One field of a protobuf message: a string or message, a float, or an integer."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value, out = value % (1 << 64), bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
