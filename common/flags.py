"""What the command lines share: flags made from the fields of a config; checkpoint, device, dtype and
threads."""

import argparse
import dataclasses
import functools
import os
import sys
import typing

import torch

from common.config import check_range, reader
from common.errors import UserError

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
DEVICES = ("cpu", "cuda")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, for `run` to print in one line, whose help shows the
    module's text as it is, and which takes no shortened flags: a new one would change what they mean."""

    def __init__(self, description: str, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **options)

    def parse_args(self, *words, **more) -> argparse.Namespace:
        """The arguments. Raises UserError for a value that is empty: it would be taken for none."""
        args = super().parse_args(*words, **more)
        for name, value in vars(args).items():
            if value == "" and name != "prompt":
                raise UserError(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
        return args

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


# ---------------------------------------------------------------- the fields of a config


def add_flags(parser: argparse.ArgumentParser, defaults, title: str, skip: tuple[str, ...] = ()) -> None:
    """Adds --field-name for every field of a config, its default shown; a flag that is not given leaves
    nothing in the parsed arguments. In --help, fields without a group stand under `title`, the others under
    the title of their group, in the order of the fields."""
    kinds = typing.get_type_hints(type(defaults))
    groups = {"": parser.add_argument_group(title)}
    for field in dataclasses.fields(defaults):
        if field.name in skip:
            continue
        name = field.metadata.get("group", "")
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_flag(groups[name], field, kinds[field.name], getattr(defaults, field.name))


def add_flag(group, field: dataclasses.Field, kind, default) -> None:
    """Adds the flag of one field of this kind; a bool is a pair, --name and --no-name."""
    flag = "--" + field.name.replace("_", "-")
    if isinstance(default, tuple):
        default = ",".join(map(str, default)) or "none"
    text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    else:
        group.add_argument(
            flag, type=reader(kind), default=argparse.SUPPRESS, metavar=field.name.upper(), help=text
        )


def given(args: argparse.Namespace, config: type) -> dict:
    """The fields of `config` that were given as flags."""
    return {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(config)
        if hasattr(args, field.name)
    }


# ---------------------------------------------------------------- checkpoint, device, dtype, threads


def add_model_flags(parser: argparse.ArgumentParser, checkpoint) -> None:
    """Adds --checkpoint, --heads, --check, --frequent-ids, --device, --dtype, --weights and --threads."""
    parser.add_argument("--checkpoint", default=checkpoint, metavar="FILE", help="default: %(default)s")
    text = "heads that train.py --train heads made for it (default: those in the checkpoint)"
    parser.add_argument("--heads", metavar="FILE", help=text)
    parser.add_argument(
        "--check", action="store_true", help="first compare the checkpoint with its checksums"
    )
    text = "ids for --shortlist (default: those in the checkpoint, or in model.ids.npy beside model.pt)"
    parser.add_argument("--frequent-ids", metavar="FILE", help=text)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)} (default: the file's own; float32 where a float16 file meets a CPU)",
    )
    parser.add_argument(
        "--weights",
        help="how a CPU stores them: plain, folded or packed (default: by rule, see formats/weights.py)",
    )
    add_thread_flag(parser)


def add_thread_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --threads."""
    cores = "OMP_NUM_THREADS, else the cores that this process may use"
    parser.add_argument("--threads", type=int, metavar="N", help=f"threads of PyTorch (default: {cores})")


def loading(args: argparse.Namespace) -> dict:
    """What the model flags say to `load_checkpoint`. Sets --threads, and warns of a busy machine. Raises
    UserError for what is not there."""
    use_threads(args.threads)
    use_device(args.device)
    dtype = read_dtype(args.dtype)
    warn_if_busy()
    return {
        "device": args.device,
        "dtype": dtype,
        "form": args.weights,
        "check": args.check,
        "frequent_ids": args.frequent_ids,
        "heads": args.heads,
    }


def use_threads(count: int | None) -> None:
    """Sets PyTorch's threads, or leaves them as they are. Raises UserError for a number that cannot be."""
    if count is not None:
        check_range("threads", count, least=1, most=1024)
        torch.set_num_threads(count)


@functools.cache  # said once
def warn_if_busy() -> None:
    """One line on stderr, where that is a terminal, if more processes want to run than there are cores (the
    average of a minute, where the system has one)."""
    if not sys.stderr.isatty() or not hasattr(os, "getloadavg") or os.environ.get("RANK", "0") != "0":
        return
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load > cores:
        busy = f"warning: this machine is busy (load {load:.1f} on {cores} cores)"
        print(f"{busy}: figures of speed mean little, and fewer --threads may be faster", file=sys.stderr)


def use_device(device: str) -> None:
    """Makes one of several GPUs, as cuda:1, the one that torch names, waits for and tells the memory of.
    Raises UserError for a device that is not supported, or not there."""
    if device.partition(":")[0] not in DEVICES:
        raise UserError(f"device {device!r} is not there to use; supported are {' and '.join(DEVICES)}")
    try:
        torch.zeros(1, device=device).item()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"device {device!r} is not there ({reason}); cpu always is") from None


def read_dtype(name: str | None) -> torch.dtype | None:
    """A --dtype. Raises UserError for one that is not known."""
    if name not in (None, *DTYPES):
        raise UserError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES.get(name)
