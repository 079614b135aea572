"""What the command lines share: flags made from the fields of a config, checkpoint, device and dtype."""

import argparse
import dataclasses
import typing

import torch

from common.config import reader
from common.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, for `run` to print in one line, and whose help shows the module's text as it is."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


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
            group.add_argument(flag, type=reader(kind), default=argparse.SUPPRESS, metavar=field.name.upper(), help=text)


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
        raise UserError(f"device {device!r} is not there ({str(error).splitlines()[0][:80]}); cpu always is") from None


def device_and_dtype(args: argparse.Namespace) -> tuple[str, torch.dtype | None]:
    """--device and --dtype. Raises ValueError for what is not there."""
    check_device(args.device)
    return args.device, read_dtype(args.dtype)


def read_dtype(name: str | None) -> torch.dtype | None:
    """A --dtype. Raises ValueError for one that is not known."""
    if name not in (None, *DTYPES):
        raise UserError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES.get(name)
