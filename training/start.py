"""What a training run starts from: tokenizer, data and model, which are read or made."""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from common.files import check_input, digest, reading, whole_file
from decoding.shortlist import find_frequent_ids, ids_beside
from formats.checkpoint import fitting, float_weights, load_weights, read_checkpoint, read_tokenizer
from formats.data import Corpus
from formats.heads import HEAD_WEIGHTS
from formats.tokenizers.files import load_tokenizer
from formats.tokenizers.pieces import train_tokenizer
from formats.tokenizers.tokenizer import read_blob
from model import ModelConfig, Transformer, check_exit_layers
from training.batches import LEARN, START, tokenize
from training.parallel import tell
from training.settings import TrainConfig

# The fields of --init's model that flags may change; --n-layers keeps only its first layers.
ADDED = {"n_layers", "exit_norms", "classifiers", "adapter", "max_len", "eos_id"}
HELD_OUT = 0.05, 500  # without --dev: share of the documents, and their largest number
# Characters of text that a new tokenizer needs for each piece, and the smallest number of pieces.
TEXT_PER_PIECE, FEWEST_PIECES = 32, 1024

# ---------------------------------------------------------------- tokenizer and data


def check_start(config: TrainConfig, shape: ModelConfig) -> None:
    """Raises UserError for batch rows longer than the model's context, and for missing files, before anything
    is made."""
    if shape.max_len < config.length:
        lengths = f"length is {config.length}, but the model has {shape.max_len} positions"
        raise UserError(f"{lengths}; lower --length or raise --max-len")
    for file in (*config.data, *config.dev):
        check_input(file, "no such data file; check --data and --dev")


def prepare_tokenizer(config: TrainConfig, folder: Path, vocab_size: int) -> bytes:
    """The tokenizer that the settings name; otherwise one that is trained on the files and kept in the
    folder."""
    if config.tokenizer or config.init:
        return load_tokenizer(config.tokenizer or config.init)
    files = tuple(dict.fromkeys(config.data))
    path = folder / f"{digest(*map(Path, files), vocab_size)}.model"
    if not path.exists():
        with whole_file(path) as part:
            Path(part).write_bytes(train_tokenizer(Corpus(files), vocab_size))
    return path.read_bytes()


def new_vocab_size(files: tuple[str, ...], most: int) -> int:
    """The size of a new tokenizer for these files: `most`, or less where there is little text."""
    characters = 0
    for prompt, completion in Corpus(files):
        characters += len(prompt) + len(completion)
        if characters >= most * TEXT_PER_PIECE:
            return most
    return min(most, max(FEWEST_PIECES, characters // TEXT_PER_PIECE))


def prepare_data(files: tuple[str, ...], tokenizer: bytes, folder: Path, length: int) -> np.ndarray:
    """The files' documents as one memory-mapped array, which is made once for these files, this tokenizer and
    this length. Raises UserError if that is damaged."""
    path = folder / f"{digest(*map(Path, files), tokenizer, length)}.npy"
    if not path.exists():
        reader = read_blob(tokenizer)
        stats = tokenize(Corpus(files, templates=reader.separator is None), reader, path, length)
        tokens = f"{stats['tokens']:,} tokens, {stats['learned']:,} of them learned"
        found = (
            f"{stats['documents']:,} documents, {tokens}; {stats['shortened']:,} documents shortened to fit"
        )
        tell(f"{', '.join(files)}: {found}")
    with reading(path, "is damaged; delete it"):
        return np.load(path, mmap_mode="r")


class Data(NamedTuple):
    """What a model is trained on. Arrays are those of `tokenize` (training/batches.py)."""

    tokenizer: bytes
    records: np.ndarray
    dev: dict[str, np.ndarray]  # validation data by the name of their file


def load_data(config: TrainConfig, shape: ModelConfig, folder: Path) -> Data:
    """The data, each part of which is made once in the folder. Raises UserError for a tokenizer that does not
    fit the model."""
    tokenizer = prepare_tokenizer(config, folder, shape.vocab_size)
    ends = read_tokenizer(config.tokenizer or config.init or folder, tokenizer, shape.vocab_size).ends
    if not config.heads_alone and ends and ends[0] not in shape.ends:
        differs = f"eos_id is {shape.eos_id}, but the tokenizer ends texts with {ends[0]}"
        raise UserError(f"{differs}; give --eos-id {ends[0]}")
    dev = {file: prepare_data((file,), tokenizer, folder, config.length) for file in config.dev}
    records = prepare_data(config.data, tokenizer, folder, config.length)
    if not config.dev:
        records, dev = hold_out(records, config)
    if config.learn_prompts:
        records = records.copy()  # the file stays as it is
        records["flags"] |= LEARN
    return Data(tokenizer, records, dev)


def hold_out(records: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Splits the documents: the last ones are for validation, the others for training. Raises UserError if
    validation documents would be trained on, too."""
    if len(set(config.data)) < len(config.data):
        raise UserError("a file is named twice in --data, so none of it can be held out; give --dev")
    begins = np.flatnonzero(records["flags"] & START)
    share, most = HELD_OUT
    count = min(most, int(share * len(begins)))
    tell(f"no --dev: the last {count} of {len(begins)} documents of --data are held out")
    if not count:
        return records, {}
    cut = begins[-count]
    return records[:cut], {"held out": records[cut:]}


# ---------------------------------------------------------------- the model


def shape_from(config: TrainConfig, given: dict) -> ModelConfig:
    """The shape of the model to train, with the heads that the settings need: the shape of --init, or else
    the default, changed by the flags, which are `given`. Raises UserError."""
    shape = asdict(ModelConfig()) | {"head_dim": None}  # follows from the d_model and n_heads given
    if config.init:
        content = read_checkpoint(config.init)
        with fitting(config.init):
            shape = asdict(ModelConfig(**content["config"]))
        other = sorted(given.keys() - ADDED)
        if other:
            raise UserError(f"{other[0]} comes from --init {config.init}; leave the flag out")
        shape |= first_layers(shape, given.get("n_layers", shape["n_layers"]))
    elif "n_heads" in given:
        shape["n_kv_heads"] = given["n_heads"]
    if not (config.init or config.tokenizer or "vocab_size" in given):
        shape["vocab_size"] = new_vocab_size(config.data, shape["vocab_size"])
    shape |= given
    check_exit_layers("--exits", config.exits, shape["n_layers"])

    def with_exits(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({*layers, *config.exits}))

    if config.loss != "none":
        shape["exit_layers"] = with_exits(shape["exit_norms"] if config.heads_alone else ())
    if config.heads_alone:
        shape["exit_norms"] = with_exits(shape["exit_norms"])
    if config.classifier:
        shape["classifiers"] = with_exits(shape["classifiers"])
    return ModelConfig(**shape)


def first_layers(shape: dict, count: int) -> dict:
    """The changes to the shape of a model if only its first `count` layers are kept. Raises UserError if it
    has fewer."""
    if count > shape["n_layers"]:
        raise UserError(f"--n-layers is {count}, but the model of --init has {shape['n_layers']} layers")
    kept = {"n_layers": count}
    for name in ("exit_norms", "classifiers", "exit_layers"):
        kept[name] = tuple(layer for layer in shape[name] if layer < count)
    for name in ("global_layers", "unrotated_layers"):
        kept[name] = tuple(layer for layer in shape[name] if layer <= count)
    return kept


def make_model(config: TrainConfig, shape: ModelConfig) -> Transformer:
    """The model at the start. Its weights are float32; with --train heads, those that are not trained
    have the dtype of training."""
    torch.manual_seed(config.seed)
    model = Transformer(shape)
    if config.init:
        load_start(model, config)
    if config.heads_alone:
        for name, weight in model.named_parameters():
            if not name.startswith(HEAD_WEIGHTS):
                weight.requires_grad_(False).data = weight.data.to(getattr(torch, config.dtype))
    return model.to(config.device)


def load_start(model: Transformer, config: TrainConfig) -> None:
    """Loads the weights of --init, without layers that the model does not have, and the frequent ids. Heads
    that --init lacks begin as the final norm, the identity, and an undecided classifier. Raises UserError if
    --init has other weights, or fewer frequent ids than --train all:N or heads:N needs."""
    content = read_checkpoint(config.init)
    with fitting(config.init):
        weights = float_weights(content)
        kept = {name: weight for name, weight in weights.items() if depth_of(name) <= model.config.n_layers}
        missing = load_weights(model, kept)
        wrong = [name for name in missing if not name.startswith(HEAD_WEIGHTS)]
        if wrong:
            raise KeyError(f"{wrong[0]} is missing; flags may only add heads")
    for name in missing:
        if name.startswith("exit_norms"):
            model.get_submodule(name).load_state_dict(model.norm.state_dict())
    model.frequent_ids = find_frequent_ids(None, config.init, None, content, model.config.vocab_size)
    known = 0 if model.frequent_ids is None else len(model.frequent_ids)
    if (config.shortlist or 0) > known:
        remedy = f"count them with python -m tools.shortlist --out {ids_beside(config.init)}"
        raise UserError(f"train is {config.train}, but {known} frequent ids are known; {remedy}")


def depth_of(name: str) -> int:
    """The number of layers that a model must have for a weight of this name: 3 for the third block
    ("blocks.2.qkv") and for an exit at layer 2 ("exit_norms.2"); 0 for a weight of the whole model."""
    number = name.split(".")[1] if "." in name else ""
    return int(number) + 1 if number.isdecimal() else 0
