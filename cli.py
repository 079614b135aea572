"""What the command lines share: flags made from the fields of a config, and one line with exit status 2 for a user's mistake."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, for `run` to print in one line, and whose help shows the module's text as it is."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


@contextlib.contextmanager
def whole_file(path) -> Iterator[str]:
    """Gives a temporary name to write to; renames it to `path` at the end, so that the file is written whole or not at all."""
    part = f"{os.fspath(path)}.part"
    try:
        yield part
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    with whole_file(path) as part:
        Path(part).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def option(default, text: str):
    """A field of a config dataclass that is also a flag; `text` describes it, with unit or range."""
    return dataclasses.field(default=default, metadata={"help": text})


def add_flags(parser: argparse.ArgumentParser, defaults, title: str, skip: tuple[str, ...] = ()) -> None:
    """Adds --field-name for every field of a config, its default shown; a flag that is not given leaves nothing in the parsed arguments."""
    group = parser.add_argument_group(title)
    kinds = typing.get_type_hints(type(defaults))
    for field in (field for field in dataclasses.fields(defaults) if field.name not in skip):
        kind, default = kinds[field.name], getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        default = (",".join(map(str, default)) or "none") if isinstance(default, tuple) else default
        text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=_reader(kind), default=argparse.SUPPRESS, metavar=field.name.upper(), help=text)


def _reader(kind) -> Callable[[str], object]:
    """Text -> a value of `kind`: int, float, str, a tuple of these (comma-separated), or one of them or None (the word none)."""
    if isinstance(kind, types.UnionType):
        inner = _reader(next(arm for arm in typing.get_args(kind) if arm is not types.NoneType))
        read = lambda text: None if text.lower() == "none" else inner(text)  # noqa: E731
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        read = lambda text: tuple(item(part) for part in text.split(",") if part)  # noqa: E731
        read.__name__ = f"list of {item.__name__}, separated by commas,"
        return read
    else:
        return kind
    read.__name__ = inner.__name__  # what argparse calls it in its message
    return read


def read_field(config: type, name: str, text: str):
    """The value of a field of a config from text, as its flag reads it; of a bool, without text, True. Raises ValueError."""
    kinds = typing.get_type_hints(config)
    field = name.replace("-", "_")
    if field not in kinds:
        raise ValueError(f"unknown setting {name!r}; choose from {', '.join(kinds)}")
    try:
        return {"": True, "true": True, "false": False}[text.lower()] if kinds[field] is bool else _reader(kinds[field])(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} cannot be {text!r}") from None


def given(args: argparse.Namespace, config: type) -> dict:
    """The fields of `config` that were given as flags."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(config) if hasattr(args, field.name)}


def add_model_flags(parser: argparse.ArgumentParser, checkpoint) -> None:
    """Adds --checkpoint, --device and --dtype."""
    parser.add_argument("--checkpoint", default=checkpoint, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: the file's own; float32 where a float16 file meets a CPU)")


def check_device(device: str) -> None:
    """Raises ValueError for a device that is not there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not there ({str(error).splitlines()[0][:80]}); cpu always is") from None


def device_and_dtype(args: argparse.Namespace) -> tuple[str, torch.dtype | None]:
    """--device and --dtype. Raises ValueError for what is not there."""
    check_device(args.device)
    return args.device, read_dtype(args.dtype)


def read_dtype(name: str | None) -> torch.dtype | None:
    """A --dtype. Raises ValueError for one that is not known."""
    if name not in (None, *DTYPES):
        raise ValueError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES.get(name)


def run(main: Callable[[], None]) -> None:
    """Runs a command; a mistake of the user ends it with one line and status 2, Ctrl-C with status 130."""
    sys.path.append(os.getcwd())  # where a user's own confidence function may lie
    try:
        main()
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        full = "the GPU's memory is full; take fewer rows or positions, --recompute (train.py), or a smaller dtype"
        print(f"error: {full if isinstance(error, torch.OutOfMemoryError) else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
