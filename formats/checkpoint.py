"""One-file checkpoints: written whole, read memory-mapped, and the tokenizer inside."""

import contextlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict

import torch

from common.errors import UserError
from common.files import whole_file

FORMAT = "early-exit checkpoint 1"


def save_checkpoint(path: str | os.PathLike, model, tokenizer: bytes | None, dtype: torch.dtype | None = None, **extra):
    """Writes config, weights (matrices as `dtype`, vectors as they are), the sentencepiece model and `extra` (plain values, tensors) to one
    file, whole or not at all."""
    cast = {name: dtype or weight.dtype if weight.dim() > 1 else weight.dtype for name, weight in model.state_dict().items()}
    weights = {name: weight.detach().to(cast[name]).contiguous() for name, weight in model.state_dict().items()}
    blob = None if tokenizer is None else torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    content = {"format": FORMAT, "config": asdict(model.config), "weights": weights, "tokenizer": blob, **extra}
    try:
        with whole_file(path) as part:
            torch.save(content, part)
    except RuntimeError as error:  # what torch makes of a full disk
        reason = str(error).splitlines()[0][:80]
        raise OSError(f"{path}: could not be written, the old file is kept; is the disk full? ({reason})") from None


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint file, memory-mapped. Raises ValueError for a file that is not one."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; train one with train.py or name another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable checkpoint, or cut short ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project")
    return content


@contextlib.contextmanager
def fitting(path: str | os.PathLike) -> Iterator[None]:
    """What goes wrong inside is a ValueError: the content of this checkpoint does not fit."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: the weights do not fit the model ({str(error).splitlines()[-1].strip()[:120]})") from None


def read_tokenizer(path: str | os.PathLike, blob: bytes, vocab_size: int):
    """The SentencePieceProcessor of these bytes, which come from `path`. Raises ValueError for damaged ones, and for more pieces than the
    model has."""
    import sentencepiece

    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=blob)
    except RuntimeError:
        raise UserError(f"{path}: its tokenizer is damaged") from None
    if tokenizer.vocab_size() > vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size()} pieces, the model only {vocab_size}")
    return tokenizer


def load_tokenizer(path: str | os.PathLike) -> bytes:
    """The sentencepiece model in a checkpoint, or in a file of its own. Raises ValueError if there is none."""
    import sentencepiece

    try:
        if zipfile.is_zipfile(path):  # what torch.save writes
            blob = read_checkpoint(path)["tokenizer"]
            if blob is None:
                raise UserError(f"{path}: has no tokenizer")
            return blob.numpy().tobytes()
        with open(path, "rb") as file:
            model = file.read()
        if not model:  # which sentencepiece takes without a word
            raise RuntimeError("an empty file")
        sentencepiece.SentencePieceProcessor(model_proto=model)
        return model
    except RuntimeError:
        raise UserError(f"{path}: neither a checkpoint nor a sentencepiece model") from None
