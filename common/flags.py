"""What the command lines share: flags made from the fields of a config, and the text of their values;
checkpoint, device, dtype and threads."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable

import torch

from common.config import check_range
from common.errors import UserError

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, which `run` prints in one line, and whose help shows
    the module's text as it is. It accepts no abbreviated flags, because a new flag could change their
    meaning. --help leaves out flags that are `rare`; --help-all shows them."""

    def __init__(self, description: str, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **options)
        text = "show this help message with all flags and exit"
        self.add_argument("--help-all", action=HelpAll, nargs=0, help=text)

    def parse_args(self, *words, **more) -> argparse.Namespace:
        """The arguments. Raises UserError for an empty value, which would otherwise mean none."""
        args = super().parse_args(*words, **more)
        for name, value in vars(args).items():
            if value == "" and name != "prompt":
                raise UserError(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
        return args

    def error(self, message: str) -> typing.NoReturn:
        unknown, _, words = message.partition("unrecognized arguments: ")
        flag = (words.split("=")[0].split() or [""])[0]
        known = self._option_string_actions
        remedy = "" if unknown or flag in known else did_you_mean(flag, known)
        raise UserError(f"{message}{remedy}; see {self.prog} --help-all")


def rare(action: argparse.Action) -> argparse.Action:
    """Hides a flag that was just added from --help, so that only --help-all shows it."""
    action.help_all, action.help = action.help, argparse.SUPPRESS
    return action


class HelpAll(argparse.Action):
    """Prints the help of all flags, including the rare ones."""

    def __call__(self, parser, *_):
        for action in parser._actions:
            action.help = getattr(action, "help_all", action.help)
        parser.print_help()
        parser.exit()


# ---------------------------------------------------------------- values from text


def reader(kind) -> Callable[[str], object]:
    """Text -> a value of `kind`: int, float, str; tuple[kind, ...], separated by commas, empty for the word
    none; or kind | None, None for the word none."""
    if not typing.get_args(kind):
        return kind
    inner, is_list = reader(typing.get_args(kind)[0]), typing.get_origin(kind) is tuple

    def read(text: str):
        if text.lower() == "none":
            return () if is_list else None
        return tuple(map(inner, text.split(","))) if is_list else inner(text)

    # argparse names it in messages
    read.__name__ = f"list of {inner.__name__}, separated by commas," if is_list else inner.__name__
    return read


def placeholder(name: str, kind) -> str:
    """How --help writes a value of this kind: N, X, a list of these, or the setting's name in capitals."""
    if not typing.get_args(kind):
        return {int: "N", float: "X"}.get(kind, name.upper())
    inner = placeholder(name, typing.get_args(kind)[0])
    return f"{inner},.." if typing.get_origin(kind) is tuple else inner


def as_text(value) -> str:
    """The text that `read_field` turns back into this value."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def read_field(config: type, name: str, text: str):
    """The value of a config field from text, as its flag reads it; for a bool, empty text means True. Raises
    UserError for an unknown field or an unreadable value."""
    kinds = typing.get_type_hints(config)
    field = name.replace("-", "_")
    if field not in kinds:
        raise UserError(f"unknown setting {name!r}{did_you_mean(field, kinds)}; see --help-all")
    try:
        if kinds[field] is bool:
            return {"": True, "true": True, "false": False}[text.lower()]
        return reader(kinds[field])(text)
    except (ValueError, KeyError):
        raise UserError(f"{name} cannot be {text!r}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word most similar to this one, as a part of a message; empty if none is similar."""
    similar = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


# ---------------------------------------------------------------- the fields of a config


def add_flags(parser: argparse.ArgumentParser, defaults, title: str = "", skip=(), common=None) -> None:
    """Adds a flag --field-name, whose help shows the default, for every field of a config; a flag that is not
    given is absent from the parsed arguments. In --help, flags are in the order of the fields, under the
    title of their group; those without a group are under `title`, or, without one, among the parser's own
    flags. Fields in `skip` get no flag; if `common` is given, all fields that it does not name are rare."""
    kinds = typing.get_type_hints(type(defaults))
    groups = {"": parser.add_argument_group(title) if title else parser}
    for field in dataclasses.fields(defaults):
        if field.name in skip:
            continue
        group, kind, default = field.metadata["group"], kinds[field.name], getattr(defaults, field.name)
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (default: {as_text(default)})".replace("%", "%%")
        how = {"type": reader(kind), "metavar": placeholder(field.name, kind)}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}  # a pair, --name and --no-name
        action = groups[group].add_argument(flag, default=argparse.SUPPRESS, help=text, **how)
        if field.metadata["rare"] or (common is not None and field.name not in common):
            rare(action)


def given(args: argparse.Namespace, config: type) -> dict:
    """The fields of `config` that were given as flags."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}


# ---------------------------------------------------------------- checkpoint, device, dtype, threads


def add_model_flags(parser: argparse.ArgumentParser, checkpoint) -> None:
    """Adds, under a title of their own, the flags that say which model runs, and where."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--checkpoint", default=checkpoint, metavar="FILE", help="default: %(default)s")
    text = "exit heads from train.py --train heads (default: those in the checkpoint)"
    group.add_argument("--heads", metavar="FILE", help=text)
    text = "compare the checkpoint with its checksums first"
    rare(group.add_argument("--check", action="store_true", help=text))
    text = "ids for --shortlist (default: those in the checkpoint, or in model.ids.npy next to model.pt)"
    rare(group.add_argument("--frequent-ids", metavar="FILE", help=text))
    group.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    text = "dtype of the weights (default: the file's own, but float32 instead of float16 on a CPU)"
    group.add_argument("--dtype", choices=DTYPES, help=text)
    text = "how weights are stored on a CPU: plain or packed (default: see decoding/weights.py)"
    rare(group.add_argument("--weights", help=text))
    add_thread_flag(group)


def add_thread_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --threads."""
    cores = "OMP_NUM_THREADS, or else the number of cores that this process may use"
    parser.add_argument("--threads", type=int, metavar="N", help=f"threads for PyTorch (default: {cores})")


def loading(args: argparse.Namespace) -> dict:
    """The model flags as arguments of `load_checkpoint`. Applies --threads and --device. Raises UserError if
    they cannot be applied."""
    use_threads(args.threads)
    use_device(args.device)
    names = "device", "check", "frequent_ids", "heads"
    chosen = {name: getattr(args, name) for name in names}
    return {**chosen, "dtype": DTYPES.get(args.dtype), "form": args.weights}


def use_threads(count: int | None) -> None:
    """Sets the number of PyTorch's threads, from 1 to 1024, unless it is None. Raises UserError."""
    if count is not None:
        check_range("threads", count, least=1, most=1024)
        torch.set_num_threads(count)


def use_device(device: str) -> None:
    """Makes one of several GPUs, such as cuda:1, torch's current device, to which its functions for time and
    memory refer. Raises UserError for a device that is not supported, or not there."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not supported; choose cpu or cuda")
    try:
        torch.zeros(1, device=device).item()
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"device {device!r} is not available ({reason}); use cpu") from None
