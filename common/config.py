"""Settings as dataclasses: each field says what it means, and which values it may have."""

import dataclasses
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterable

from common.errors import UserError


def option(default, text: str, group: str = "", rare: bool = False, choices=None, **limits):
    """A field of a config dataclass that is also a flag. `text` describes it, with its unit or range. `group`
    is the title in --help under which the flag is listed; a flag without one is listed at the top. A `rare`
    flag is shown only by --help-all. For `check_limits`: `choices` are the words allowed, or a function that
    raises UserError for a value that is not allowed; `limits` are those of `check_range`."""
    metadata = {"help": text, "group": group, "rare": rare, "choices": choices, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------- choices with numbers: decaying:64:16


@dataclasses.dataclass(frozen=True)
class Number:
    """One number of a choice: its name, its default (None: it must be given) and the limits of
    `check_range`."""

    name: str
    default: float | None = None
    limits: dict = dataclasses.field(default_factory=dict)
    kind: type = int

    @property
    def form(self) -> str:
        """How the number is written: ":K", or "[:K]" if it may be left out."""
        return f":{self.name}" if self.default is None else f"[:{self.name}]"


def read_choice(name: str, text: str, known: dict[str, tuple[Number, ...]]) -> tuple[str, list]:
    """Parses text such as "decaying:64:16" into a choice and its numbers; numbers that are left out at the
    end have their defaults. `known` maps each choice to its numbers, and `name` is the setting's name. Raises
    UserError for any other text."""
    choice, *parts = text.split(":")
    numbers = known.get(choice)
    given = len(parts)
    if numbers is None or given > len(numbers) or any(number.default is None for number in numbers[given:]):
        raise UserError(f"unknown {name} {text!r}; choose from {', '.join(forms(known))}")
    values = []
    for number, part in zip(numbers, parts):
        try:
            values.append(number.kind(part))
        except ValueError:
            raise UserError(f"{name} is {text}; {number.name} cannot be {part!r}") from None
        check_range(f"{number.name} of {name} {text}", values[-1], **number.limits)
    return choice, values + [number.default for number in numbers[given:]]


def forms(known: dict[str, tuple[Number, ...]]) -> list[str]:
    """How each choice is written: ["none", "mlp:WIDTH", "fixed[:K]"]."""
    return ["".join([choice, *(number.form for number in numbers)]) for choice, numbers in known.items()]


# ---------------------------------------------------------------- limits and kinds


def check_range(name: str, value, least=None, most=None, above=None) -> None:
    """Raises UserError unless the number is at least `least`, at most `most` and above `above`, where these
    are given; NaN satisfies none of them."""
    limits = ("at least", least, operator.ge), ("above", above, operator.gt), ("at most", most, operator.le)
    limits = [limit for limit in limits if limit[1] is not None]
    if not all(holds(value, bound) for _, bound, holds in limits):
        wanted = " and ".join(f"{words} {bound}" for words, bound, _ in limits)
        raise UserError(f"{name} is {value}; it must be {wanted}")


def check_limits(config) -> None:
    """Raises UserError if the value of a config field, or an element of its tuple, is not among the choices
    or not within the limits that its `option` declares. None is always allowed."""
    for field in dataclasses.fields(config):
        value, metadata = getattr(config, field.name), field.metadata
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for each in values:
            check_choice(field.name, each, metadata.get("choices"))
            check_range(field.name, each, **metadata.get("limits", {}))


def check_choice(name: str, value, choices: Iterable[str] | Callable | None) -> None:
    """Raises UserError for a value that is neither None nor among the choices. If `choices` is a function, it
    checks the value."""
    if callable(choices):
        choices(value)
    elif choices is not None and value not in (None, *choices):
        raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def check_fields(config) -> None:
    """Turns lists in the fields of a config into tuples, and a tuple of one value into that value where the
    field may hold either. Raises UserError for a field that is not of the kind that its annotation says, not
    finite, outside its limits, or not among its choices."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(kind, types.UnionType) and isinstance(value, tuple) and len(value) == 1:
            value = value[0] if is_kind(value[0], kind) else value
        if not is_kind(value, kind):
            expected = kind.__name__ if type(kind) is type else kind
            raise UserError(f"{name} is {value!r:.40}; it must be {expected}, and finite")
        object.__setattr__(config, name, value)
    check_limits(config)


def is_kind(value, kind) -> bool:
    """Whether the value is of this kind: a type, tuple[type, ...] or type | None. An int is accepted as a
    float, but a bool is not accepted as an int. A number must be finite and have at most 64 bits."""
    arms = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_kind(part, arms[0]) for part in value)
    if arms:
        return any(is_kind(value, arm) for arm in arms)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN, too
    return type(value) is kind and (kind is not int or abs(value) < 2**63)
