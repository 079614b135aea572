"""Functions of the user's own, named on the command line as module:function."""

import importlib
import inspect
from collections.abc import Callable

from common.errors import UserError


def find_function(kind: str, name: str, known: dict[str, Callable], arguments: tuple[str, ...]) -> Callable:
    """The function that is `known` under `name`, or that "package.module:function" imports; `kind` says in
    messages what it is. Raises UserError if there is none, or if it does not take the arguments; an exception
    of the module itself passes through, with its traceback."""
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"unknown {kind} {name!r}; choose from {', '.join(known)}, or package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{kind} {name!r} cannot be loaded: {error}") from None
    wanted = f"a function of {' and '.join(arguments)}"
    if inspect.isbuiltin(function) or inspect.isclass(function):
        raise UserError(
            f"{kind} {name!r} is not {wanted}: it is a part of Python or a class; write a function"
        )
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        raise UserError(f"{kind} {name!r} is not {wanted}") from None
    return function


def name_and_file(kind: str, name: str, function: Callable) -> str:
    """What a message calls a function: "loss my_file:smooth (/home/me/my_file.py)"."""
    try:
        return f"{kind} {name} ({inspect.getsourcefile(inspect.unwrap(function))})"
    except TypeError:  # one that is built into Python has no file
        return f"{kind} {name}"
