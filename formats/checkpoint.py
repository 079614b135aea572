"""One-file checkpoints, which are written whole, read memory-mapped and checked, and the tokenizer inside.

A file is the zip archive that torch.save writes of one dictionary: `format`, `config` (fields of
ModelConfig), `weights` (name -> tensor), perhaps `scales` (name -> the scales of an int8 weight, see
decoding/weights.py), `tokenizer` (the bytes that formats/tokenizers/tokenizer.py reads, or None),
perhaps `chat_template` (text or None, see formats/chat.py), and whatever else its writer added (plain values,
tensors). A heads file (formats/heads.py) has the same structure, but another `format`.
"""

import functools
import os
import zipfile
import zlib
from dataclasses import asdict

import torch
from torch import Tensor

from common.errors import UserError
from common.files import in_short, reading, whole_file

FORMAT, HEADS = "early-exit checkpoint 1", "early-exit heads 1"
WHOLE, PART = "a whole model (for --checkpoint or --init)", "heads without their model (for --heads)"
HOLDS = {FORMAT: WHOLE, HEADS: PART}
STORED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that weights may have in a file


# ---------------------------------------------------------------- a model's weights, as a file has them


def weights_of(model) -> dict[str, Tensor]:
    """The weights of a model by their names in a file."""
    state = model.state_dict()
    return {name: state[place] for name, place in places(model).items()}


def load_weights(model, weights: dict[str, Tensor], assign: bool = False) -> list[str]:
    """Copies weights (or assigns them) to a model, and returns the names of those that are missing. Raises
    KeyError for a weight that the model does not have."""
    known, state = places(model), {}
    for name, weight in weights.items():
        if name not in known:
            raise KeyError(f"{name} has no place in it")
        state[known[name]] = weight
    model.load_state_dict(state, strict=False, assign=assign)
    model.tie()
    return [name for name in known if name not in weights]


def float_weights(content: dict) -> dict[str, Tensor]:
    """The weights of a checkpoint; those in int8 become float32."""
    scales, weights = content["scales"], dict(content["weights"])
    for name, scale in scales.items():
        weights[name] = weights[name].float() * scale.float()[:, None]
    return weights


def places(model) -> dict[str, str]:
    """The name of each weight in a file -> its name in the model."""
    shared = ("lm_head.", "unembedding.") if model.config.tie_embeddings else ("lm_head.",)
    names = [name for name in model.state_dict() if not name.startswith(shared)]
    return {name.removesuffix(".weight").replace(".bias", "_bias"): name for name in names}


# ---------------------------------------------------------------- writing


def save_checkpoint(path, model, tokenizer: bytes | None, dtype=None, **extra) -> None:
    """Writes config, weights (matrices as `dtype`, vectors as they are), the tokenizer and `extra` (plain
    values, tensors) to one file, whole or not at all. Raises UserError for a full disk."""
    content = {"format": FORMAT, "config": asdict(model.config), "tokenizer": as_blob(tokenizer)}
    content["weights"] = weights_of(model)
    write_content(path, {**content, **extra}, dtype)


def as_blob(tokenizer: bytes | None) -> Tensor | None:
    """The bytes of a tokenizer as the uint8 tensor that is stored."""
    return None if tokenizer is None else torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)


def write_content(path: str | os.PathLike, content: dict, dtype: torch.dtype | None) -> None:
    """Writes all entries of a checkpoint to a file, whole or not at all: matrices as `dtype` (None: as they
    are), vectors as they are. Raises UserError for a full disk."""
    stored = {}
    for name, weight in content["weights"].items():
        kept = dtype or weight.dtype if weight.dim() > 1 else weight.dtype
        stored[name] = weight.detach().to(kept).contiguous()
    with whole_file(path) as part:
        save_part(part, {**content, "weights": stored})


def save_part(part: str, content: dict) -> None:
    """Saves into the temporary file of `whole_file`. Raises UserError for a full disk."""
    try:
        torch.save(content, part)
    except RuntimeError as error:  # what torch makes of a full disk
        lost = "could not be written, the old file is kept; is the disk full?"
        raise UserError(f"{part.removesuffix('.part')}: {lost} ({in_short(error)})") from None


def seal(path: str | os.PathLike) -> None:
    """Corrects the checksums in a torch.save file whose data were written later, through a memory map."""
    with zipfile.ZipFile(path, "a") as archive:
        for entry in archive.infolist():
            del entry.CRC  # of the previous data; reading would compare with it
            crc = 0
            with archive.open(entry) as file:
                while block := file.read(2**20):
                    crc = zlib.crc32(block, crc)
            entry.CRC = crc
        archive.comment = b""  # marks the archive as changed, so that its directory is written anew


# ---------------------------------------------------------------- reading


def read_checkpoint(path: str | os.PathLike, check: bool = False, kind: str = FORMAT) -> dict:
    """All entries of a checkpoint file of this kind, FORMAT or HEADS, memory-mapped; with `check`, the file
    is compared with its checksums first. Raises UserError for a file that is not such a checkpoint, and for
    entries that are not valid."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a file in it, or convert it with convert.py")
    if is_gguf(path):
        raise UserError(f"{path}: is a GGUF file; convert it: python convert.py {path} model.pt")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; train one with train.py or name another")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a checkpoint, or cut short")
    if check:
        compare_checksums(path)
    with reading(path, "not a readable checkpoint, or cut short"):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    found = content.get("format") if isinstance(content, dict) else None
    if found not in HOLDS:
        raise UserError(f"{path}: not a checkpoint of this project")
    if found != kind:
        raise UserError(f"{path}: holds {HOLDS[found]}; expected {HOLDS[kind]}")
    check_entries(path, content)
    return content


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether this is a GGUF file, llama.cpp's format, which convert.py reads."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def compare_checksums(path: str | os.PathLike) -> None:
    """Raises UserError unless all data of the file have the checksums that were stored with them.
    (Memory-mapped reading does not look at them; this takes about half a second per GB.)"""
    with reading(path, "its archive is damaged"), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        changed = "differs from its checksum: changed since it was written; copy it anew"
        raise UserError(f"{path}: {damaged} {changed}")


def check_entries(path: str | os.PathLike, content: dict) -> None:
    """Raises UserError unless every entry of a checkpoint has the right type, and every weight is a plain
    tensor."""
    content.setdefault("scales", {})
    kinds = {"config": dict, "weights": dict, "scales": dict, "tokenizer": Tensor | None}
    kinds["chat_template"] = str | None
    for entry, kind in kinds.items():
        if not isinstance(content.get(entry), kind):
            found = type(content.get(entry)).__name__
            raise UserError(f"{path}: its {entry} is of type {found}; it is damaged")
    weights, scales = content["weights"], content["scales"]
    for name, weight in weights.items():
        if not is_plain(weight, (torch.int8,) if name in scales else STORED):
            raise UserError(f"{path}: the weight {name} is not a plain tensor of a known dtype")
    for name, scale in scales.items():
        if (
            name not in weights
            or not is_plain(scale, (torch.bfloat16,))
            or scale.shape != weights[name].shape[:1]
        ):
            raise UserError(f"{path}: the scales of {name} are not bfloat16, one for each row")


def is_plain(value, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a value is a tensor of one of these dtypes whose numbers lie side by side in memory: not
    sparse, not quantized, not without data."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in dtypes:
        return False
    return value.device.type == "cpu" and value.is_contiguous()


def check_finite(path: str | os.PathLike) -> None:
    """Raises UserError if a weight of the checkpoint has a NaN or an infinity. This reads all weights,
    through a memory map of its own, whose memory is free again afterwards."""
    content = read_checkpoint(path)
    for name, weight in [*content["weights"].items(), *content["scales"].items()]:
        check_values(weight, f"{path}: the weight {name}")


def check_values(weight: Tensor, what: str) -> None:
    """Raises UserError if a tensor has a NaN or an infinity. This needs no second tensor of the same size."""
    if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        kind = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{what} has values that are not finite: it is damaged, or overflows {kind}")


def check_size(weights: dict[str, Tensor], config) -> None:
    """Raises UserError unless there are weights of as many layers as the config says, so that no model larger
    than its file is built."""
    numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(numbers) != config.n_layers:
        raise UserError(f"n_layers is {config.n_layers}, but there are weights of {len(numbers)} layers")


fitting = functools.partial(reading, problem="the weights do not fit the model")


# ---------------------------------------------------------------- the tokenizer inside


def read_tokenizer(path: str | os.PathLike, blob: bytes, vocab_size: int):
    """The tokenizer of these bytes, which come from `path`. Raises UserError for damaged ones, and for more
    pieces than the model has."""
    from formats.tokenizers.tokenizer import read_blob  # here, so that `import decode` stays small

    with reading(path):
        tokenizer = read_blob(blob)
    if tokenizer.size > vocab_size:
        raise UserError(f"{path}: its tokenizer has {tokenizer.size} pieces, the model only {vocab_size}")
    return tokenizer
