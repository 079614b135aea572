"""What a training starts from: tokenizer, data and model, found or made."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.files import check_input, digest, whole_file
from common.processes import by_first
from formats.checkpoint import fitting, read_tokenizer
from formats.data import Corpus
from formats.frequent_ids import find_frequent_ids
from formats.heads import HEAD_WEIGHTS, read_model
from formats.int8 import dequantized
from formats.pieces import train_tokenizer
from formats.shape import check_layers
from formats.tokenizer_files import load_tokenizer
from model import ModelConfig, Transformer
from training.batches import LEARN, describe, prepare_file, read_prepared
from training.settings import TrainConfig

ADDED = {
    "exit_norms",
    "classifiers",
    "adapter",
    "max_len",
    "eos_id",
}  # what flags may change of the model of --init


# ---------------------------------------------------------------- tokenizer and data


def check_start(config: TrainConfig, shape: ModelConfig) -> None:
    """Raises UserError for layers, lengths or files that cannot be trained with, before anything is made."""
    check_layers("exits", config.exits, shape.n_layers)
    if shape.max_len < config.length:
        raise UserError(
            f"length is {config.length}, the model has {shape.max_len} positions; lower --length or raise --max-len"
        )
    for file in (*config.data, *config.dev):
        check_input(file, "no such data file; check --data and --dev")


def prepare_tokenizer(config: TrainConfig, folder: Path, vocab_size: int) -> bytes:
    """The tokenizer that the settings name, or one trained on the files, once for these files and this
    size."""
    if config.tokenizer or config.init:
        return load_tokenizer(config.tokenizer or config.init)
    files = tuple(dict.fromkeys(config.data))
    prepared = [file for file in files if file.endswith(".npy")]
    if prepared:
        raise UserError(
            f"{prepared[0]} is prepared data; name the tokenizer that it was made with: --tokenizer FILE"
        )
    path = folder / f"{digest(*map(Path, files), vocab_size)}.model"
    if not path.exists():
        model = train_tokenizer(Corpus(files), vocab_size)
        with whole_file(path) as part:
            Path(part).write_bytes(model)
    return path.read_bytes()


def prepare_data(files: tuple[str, ...], tokenizer: bytes, folder: Path, length: int) -> np.ndarray:
    """The files' documents as one memory-mapped array, tokenized once for these files, tokenizer and length;
    a prepared file as it is."""
    if any(file.endswith(".npy") for file in files):
        if len(files) > 1:
            raise UserError(
                f"{', '.join(files)}: a prepared file comes alone; prepare all of the data in one"
            )
        return read_prepared(Path(files[0]), tokenizer, length)
    path = folder / f"{digest(*map(Path, files), tokenizer, length)}.npy"
    if not path.with_suffix(".json").exists():  # written last
        tqdm.write(f"{', '.join(files)}: {describe(prepare_file(files, tokenizer, path, length))}")
    return read_prepared(path, tokenizer, length)


def load_data(
    config: TrainConfig, shape: ModelConfig, folder: Path
) -> tuple[bytes, np.ndarray, dict[str, np.ndarray]]:
    """Tokenizer, training data, and validation data by file, in every process; what is not there yet, the
    first one makes."""
    by_first(find_data, config, shape, folder)
    return find_data(config, shape, folder)


def find_data(
    config: TrainConfig, shape: ModelConfig, folder: Path
) -> tuple[bytes, np.ndarray, dict[str, np.ndarray]]:
    """As `load_data`, for one process. Raises UserError for a tokenizer that does not fit the model."""
    tokenizer = prepare_tokenizer(config, folder, shape.vocab_size)
    ends = read_tokenizer(config.tokenizer or config.init or folder, tokenizer, shape.vocab_size).ends
    if config.train == "all" and ends and ends[0] not in shape.ends:
        differs = f"eos_id is {shape.eos_id}, but the tokenizer ends texts with {ends[0]}"
        raise UserError(f"{differs}; give --eos-id {ends[0]}")
    dev = {file: prepare_data((file,), tokenizer, folder, config.length) for file in config.dev}
    records = prepare_data(config.data, tokenizer, folder, config.length)
    if config.learn_prompts:
        records = records.copy()  # the file stays as it is
        records["flags"] |= LEARN
    return tokenizer, records, dev


# ---------------------------------------------------------------- the model


def shape_from(config: TrainConfig, given: dict) -> ModelConfig:
    """The shape of the model to train: that of --init, or of the flags; with the heads that the settings ask
    for. Raises UserError."""
    shape = {}
    if config.init:
        content = read_model(config.init, config.heads)
        with fitting(config.heads or config.init):
            shape = asdict(ModelConfig(**content["config"]))
        other = sorted(set(given) - ADDED)
        if other:
            raise UserError(f"{other[0]} comes from --init {config.init}; leave the flag out")
    shape |= given
    if config.loss != "none":
        before = shape.get("exit_norms", ()) if config.train == "heads" else ()  # heads trained before
        shape["exit_layers"] = tuple(sorted({*before, *config.exits}))
    if config.train == "heads":
        shape["exit_norms"] = tuple(sorted({*shape.get("exit_norms", ()), *config.exits}))
    if config.classifier:
        shape["classifiers"] = tuple(sorted({*shape.get("classifiers", ()), *config.exits}))
    return ModelConfig(**shape)


def make_model(config: TrainConfig, shape: ModelConfig) -> Transformer:
    """The model at the start, its weights float32; with --train heads those that stay as they are in the
    dtype of training. To be sharded, in main memory, and all float32: what is gathered together has one
    dtype."""
    torch.manual_seed(config.seed)
    model = Transformer(shape)
    if config.init:
        load_start(model, config)
    if config.train == "heads":
        frozen = torch.float32 if config.shard else getattr(torch, config.dtype)
        for name, weight in model.named_parameters():
            if not name.startswith(HEAD_WEIGHTS):
                weight.requires_grad_(False).data = weight.data.to(frozen)
    return model if config.shard else model.to(config.device)


def load_start(model: Transformer, config: TrainConfig) -> None:
    """Gives the model the weights and the frequent ids of --init. Heads that it lacks begin as the final
    norm, the identity, and a classifier that is undecided. Raises UserError if it has other weights, or fewer
    frequent ids than --shortlist asks for."""
    content, source = read_model(config.init, config.heads), config.heads or config.init
    with fitting(source):
        weights = dequantized(content["weights"], content.get("scales", {}))
        missing, more = model.load_state_dict(weights, strict=False)
        lost = [name for name in missing if not name.startswith(HEAD_WEIGHTS)]
        if lost:
            raise KeyError(f"{lost[0]} is missing")
        if more:
            raise KeyError(
                f"{more[0]} has no place in it; exit_norms, classifiers and adapter may only add to it"
            )
    model.frequent_ids = find_frequent_ids(
        config.frequent_ids, config.init, config.heads, content, model.config.vocab_size
    )
    known = 0 if model.frequent_ids is None else len(model.frequent_ids)
    if config.shortlist is not None and config.shortlist > known:
        raise UserError(
            f"shortlist is {config.shortlist}, but {known} frequent ids are known; count them with python "
            "-m tools.shortlist, and name the file with --frequent-ids"
        )
    for name in missing:
        if name.startswith("exit_norms"):
            model.get_parameter(name).data.copy_(model.norm.data)
