"""Hugging Face folders: config.json with *.safetensors or else pytorch_model*.bin, one or several, with an
index or without."""

from functools import partial
from pathlib import Path

from common.errors import UserError
from common.files import read_json
from formats.chat import find_template
from formats.sources import Source, Stored
from formats.tensors import read_safetensors, read_torch
from formats.tokenizer_files import find_tokenizer

KINDS = {"safetensors": ("*.safetensors", read_safetensors), "torch": ("pytorch_model*.bin", read_torch)}


def open_hf(folder: Path) -> Source:
    """A folder, of whose weights safetensors are taken if there are any. Raises UserError."""
    config = read_json(folder / "config.json", "a configuration")
    config["eos_token_id"] = end_tokens(folder, config)
    for kind, (pattern, read) in KINDS.items():
        files = weight_files(folder, pattern)
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, stored in read(file).items():
                if name in tensors:
                    raise UserError(f"{file}: {name} is in another file, too; keep one set of files")
                tensors[name] = stored
        if files:
            layout = f"Hugging Face folder, {len(files)} {kind} file(s)"
            template = find_template(folder)
            return Source(
                layout, config, "hf", tensors, False, partial(find_tokenizer, folder), chat_template=template
            )
    raise UserError(f"{folder}: has a config.json, but neither *.safetensors nor pytorch_model*.bin")


def weight_files(folder: Path, pattern: str) -> list[Path]:
    """The files that an index names, else all with such a name."""
    indices = sorted(folder.glob(f"{pattern}.index.json"))
    if not indices:
        return sorted(folder.glob(pattern))
    places = read_json(indices[0], "an index of weights").get("weight_map")
    if not isinstance(places, dict) or not all(is_name(name) for name in places.values()):
        raise UserError(f"{indices[0]}: has no weight_map from tensors to files beside it")
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: named in {indices[0].name}, but missing; download it")
    return files


def is_name(name) -> bool:
    """Whether it is the name of a file, without any folder."""
    return isinstance(name, str) and Path(name).name == name


def end_tokens(folder: Path, config: dict):
    """The ids that end a text: those of config.json, and those that generation_config.json adds, as for the
    end of a turn in a chat; None if config.json does not say."""
    found = config.get("eos_token_id")
    beside = folder / "generation_config.json"
    if found is None or not beside.is_file():
        return found
    more = read_json(beside, "a configuration of generation").get("eos_token_id")
    return as_list(found) + as_list(more)


def as_list(value) -> list:
    """A list as it is, nothing as an empty one, anything else as a list of one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
