"""Settings as dataclasses: each field says what it means, and is read from text as a flag or a file gives
it."""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable

from common.errors import UserError


def option(default, text: str, group: str = "", **limits):
    """A field of a config dataclass that is also a flag; `text` describes it, with unit or range. `group`:
    the title in --help under which the flag stands; none for those that a beginner needs first. `limits`:
    those of `check_range`, for `check_limits` to check."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group, "limits": limits})


def reader(kind) -> Callable[[str], object]:
    """Text -> a value of `kind`: int, float, str, a tuple of these (comma-separated; the word none: an empty
    one), or one of them or None (the word none)."""
    if isinstance(kind, types.UnionType):
        inner = reader(next(arm for arm in typing.get_args(kind) if arm is not types.NoneType))
        read = lambda text: None if text.lower() == "none" else inner(text)  # noqa: E731
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]

        def read(text: str) -> tuple:
            parts = [] if text.lower() == "none" else text.split(",")
            if not all(parts):
                raise ValueError("one of the list is empty")
            return tuple(item(part) for part in parts)

        read.__name__ = f"list of {item.__name__}, separated by commas,"
        return read
    else:
        return kind
    read.__name__ = inner.__name__  # what argparse calls it in its message
    return read


def read_field(config: type, name: str, text: str):
    """The value of a field of a config from text, as its flag reads it; of a bool, without text, True. Raises
    UserError."""
    kinds = typing.get_type_hints(config)
    field = name.replace("-", "_")
    if field not in kinds:
        raise UserError(f"unknown setting {name!r}; choose from {', '.join(kinds)}")
    try:
        if kinds[field] is bool:
            return {"": True, "true": True, "false": False}[text.lower()]
        return reader(kinds[field])(text)
    except (ValueError, KeyError):
        raise UserError(f"{name} cannot be {text!r}") from None


def check_range(name: str, value, least=None, most=None, above=None) -> None:
    """Raises UserError unless the number is at least `least`, at most `most` and above `above`, where these
    are given; NaN is not."""
    inside, asked = True, []
    if least is not None:
        inside, asked = inside and value >= least, [*asked, f"at least {least}"]
    if above is not None:
        inside, asked = inside and value > above, [*asked, f"above {above}"]
    if most is not None:
        inside, asked = inside and value <= most, [*asked, f"at most {most}"]
    if not inside:
        raise UserError(f"{name} is {value}; it must be {' and '.join(asked)}")


def check_limits(config) -> None:
    """Raises UserError for a field of a config that is outside the limits that its `option` gives; None is
    not."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata.get("limits")
        if value is not None and limits:
            check_range(field.name, value, **limits)


def check_kinds(config) -> None:
    """Raises UserError unless every field of a config is of the kind that its annotation says, and finite; an
    int may stand for a float, but no bool for an int."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not is_kind(value, kind):
            expected = kind.__name__ if type(kind) is type else kind
            raise UserError(f"{name} is {value!r:.40}; it must be {expected}, and finite")


def is_kind(value, kind) -> bool:
    """Whether the value is of this kind (a type, a tuple of one, or one of several), and a number within 64
    bits."""
    if isinstance(kind, types.UnionType):
        return any(is_kind(value, arm) for arm in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(is_kind(part, item) for part in value)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which NaN is not, either
    return type(value) is kind
