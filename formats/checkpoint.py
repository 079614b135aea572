"""One-file checkpoints: written whole, read memory-mapped, checked; and the tokenizer inside.

A file is what torch.save writes, a zip archive, of one dictionary: `format`, `config` (fields of
ModelConfig), `weights` (name -> tensor), perhaps `scales` (name -> those of a weight in int8, see
formats/int8.py), `tokenizer` (the bytes that formats/tokenizer.py reads, or None), perhaps `chat_template`
(text, see formats/chat.py), and whatever else its writer had to say (plain values, tensors). A file of heads
(formats/heads.py) is of the same kind, by another `format`.
"""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from common.errors import UserError
from common.files import whole_file
from formats.tokenizer import Tokenizer, read_blob

FORMAT, HEADS = "early-exit checkpoint 1", "early-exit heads 1"
HOLDS = {
    FORMAT: "a whole model (for --checkpoint or --init)",
    HEADS: "heads without their model (for --heads)",
}
STORED = (torch.float32, torch.bfloat16, torch.float16)  # what weights may be in a file


# ---------------------------------------------------------------- writing


def save_checkpoint(
    path: str | os.PathLike,
    model,
    tokenizer: bytes | None,
    dtype: torch.dtype | None = None,
    weights=None,
    **extra,
):
    """Writes config, weights (matrices as `dtype`, vectors as they are), the tokenizer and `extra` (plain
    values, tensors) to one file, whole or not at all. `weights`: in place of the model's. Raises UserError
    for a full disk."""
    stored, blob = as_stored(weights or model.state_dict(), dtype), as_blob(tokenizer)
    content = {
        "format": FORMAT,
        "config": asdict(model.config),
        "weights": stored,
        "tokenizer": blob,
        **extra,
    }
    write_content(path, content)


def as_stored(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights as they are written: matrices as `dtype` (None: as they are), vectors as they are."""
    stored = {}
    for name, weight in weights.items():
        kept = dtype or weight.dtype if weight.dim() > 1 else weight.dtype
        stored[name] = weight.detach().to(kept).contiguous()
    return stored


def as_blob(tokenizer: bytes | None) -> Tensor | None:
    """The bytes of a tokenizer as they are written."""
    return None if tokenizer is None else torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)


def write_content(path: str | os.PathLike, content: dict) -> None:
    """Writes a whole checkpoint, all its entries, or nothing. Raises UserError for a full disk."""
    try:
        with whole_file(path) as part:
            torch.save(content, part)
    except RuntimeError as error:  # what torch makes of a full disk
        reason = str(error).splitlines()[0][:80]
        raise UserError(
            f"{path}: could not be written, the old file is kept; is the disk full? ({reason})"
        ) from None


def seal(path: str | os.PathLike) -> None:
    """Puts the right checksums into a file of torch.save whose data were written later, through memory."""
    with zipfile.ZipFile(path, "a") as archive:
        for entry in archive.infolist():
            del entry.CRC  # that of the data before; reading would compare with it
            entry.CRC = checksum(archive, entry)
        archive.comment = b""  # marks the archive as changed, so that its directory is written anew


def checksum(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """The CRC-32 of an entry's data."""
    crc = 0
    with archive.open(entry) as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


# ---------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike, check: bool = False, kind: str = FORMAT) -> dict:
    """The content of a checkpoint file of this kind, FORMAT or HEADS, all its entries, memory-mapped; with
    `check` compared with its checksums first. Raises UserError for a file that is not one, and for entries
    that are not what they must be."""
    if os.path.isdir(path):
        raise UserError(
            f"{path}: is a folder, no checkpoint; name a file in it, or convert it with convert.py"
        )
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; train one with train.py or name another")
    if check:
        compare_checksums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"{path}: not a readable checkpoint, or cut short ({reason})") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found not in (FORMAT, HEADS):
        raise UserError(f"{path}: not a checkpoint of this project")
    if found != kind:
        raise UserError(f"{path}: holds {HOLDS[found]}; here belongs {HOLDS[kind]}")
    check_entries(path, content)
    update(content)
    return content


def update(content: dict) -> None:
    """What files of earlier versions say in other words."""
    config = content["config"]
    if "exit_layers" not in config:
        config["exit_layers"] = exits_of_training(content)
    if "adapter_rank" in config:
        rank = config.pop("adapter_rank")
        config["adapter"] = f"lowrank:{rank}" if rank else None


def exits_of_training(content: dict) -> tuple[int, ...]:
    """The exit layers of a file written before its config told them: those of the training's settings in it,
    if any."""
    for entry in ("training", "provenance"):
        try:
            settings = content[entry]["config"]
            return () if settings["loss"] == "none" else tuple(settings["exits"])
        except (KeyError, TypeError):
            continue
    return ()


def compare_checksums(path: str | os.PathLike) -> None:
    """Raises UserError unless all data of the file have the checksums that were stored with them.
    (Memory-mapped reading does not look at them; this takes about half a second per GB.)"""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile has many for damaged headers
        damaged = f"its archive ({error})"
    if damaged:
        raise UserError(
            f"{path}: {damaged} differs from its checksum: changed since it was written; copy it anew"
        )


def check_entries(path: str | os.PathLike, content: dict) -> None:
    """Raises UserError unless the entries of a checkpoint are of their kinds, and every weight a plain tensor
    of finite numbers."""
    config, weights, blob = (content.get(name) for name in ("config", "weights", "tokenizer"))
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise UserError(f"{path}: its config is no dictionary of settings")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path}: its weights are no dictionary of tensors")
    if blob is not None and not (is_plain(blob) and blob.dtype == torch.uint8 and blob.dim() == 1):
        raise UserError(f"{path}: its tokenizer is no row of bytes")
    if not isinstance(content.get("chat_template"), str | None):
        raise UserError(f"{path}: its chat template is no text")
    scales = content.get("scales", {})
    if not isinstance(scales, dict) or not scales.keys() <= weights.keys():
        raise UserError(f"{path}: its scales are no dictionary of those of weights")
    for name, weight in weights.items():
        known = (torch.int8,) if name in scales else STORED
        if not is_plain(weight) or weight.dtype not in known:
            kinds = ", ".join(map(str, known))
            raise UserError(
                f"{path}: the weight {name} is {in_words(weight)}; it must be a plain tensor of {kinds}"
            )
    for name, scale in scales.items():
        if not is_plain(scale) or scale.dtype != torch.bfloat16 or scale.shape != weights[name].shape[:1]:
            raise UserError(
                f"{path}: the scales of {name} are {in_words(scale)}; they must be bfloat16, one a row"
            )


def check_finite(path: str | os.PathLike) -> None:
    """Raises UserError if a weight of the checkpoint has a NaN or an infinity. It reads all of them, through
    a mapping of its own, whose memory is free again when this is done."""
    content = read_checkpoint(path)
    for name, weight in [*content["weights"].items(), *content.get("scales", {}).items()]:
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise UserError(
                f"{path}: the weight {name} has values that are not finite, so the model is of no use"
            )


def in_words(value) -> str:
    """What kind of thing this is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype}, {value.layout}, on {value.device}"


def is_plain(value) -> bool:
    """Whether it is a tensor whose numbers lie side by side in memory: not sparse, quantized or without
    data."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and not value.is_quantized and value.is_contiguous()


def check_size(weights: dict[str, Tensor], config) -> None:
    """Raises UserError unless the weights are as many layers as the config says, so that no model larger than
    its file is built."""
    numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(numbers) != config.n_layers:
        raise UserError(f"n_layers is {config.n_layers}, but there are weights of {len(numbers)} layers")


@contextlib.contextmanager
def fitting(path: str | os.PathLike) -> Iterator[None]:
    """What goes wrong inside is a UserError: the content of this checkpoint does not fit."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise UserError(f"{path}: the weights do not fit the model ({reason})") from None


# ---------------------------------------------------------------- the tokenizer inside


def read_tokenizer(path: str | os.PathLike, blob: bytes, vocab_size: int) -> Tokenizer:
    """The tokenizer of these bytes, which come from `path`. Raises UserError for damaged ones, and for more
    pieces than the model has."""
    try:
        tokenizer = read_blob(blob)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if tokenizer.size > vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.size} pieces, the model only {vocab_size}")
    return tokenizer
