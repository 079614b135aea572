"""Functions of the user's own, named on the command line as module:function."""

import importlib
import inspect
from collections.abc import Callable

from common.errors import UserError


def find_function(kind: str, name: str, known: dict[str, Callable]) -> Callable:
    """The function that is `known` under `name`, or that "package.module:function" imports; `kind` says in messages
    what it is. Raises UserError if there is none; an exception of the module itself passes through, with its
    traceback."""
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"unknown {kind} {name!r}; choose from {', '.join(known)}, or package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{kind} {name!r} cannot be loaded: {error}") from None
    if not callable(function):
        raise UserError(f"{kind} {name!r} is not a function")
    return function


def name_and_file(kind: str, name: str, function: Callable) -> str:
    """What a message calls a function: "loss my_file:smooth (/home/me/my_file.py)"."""
    try:
        return f"{kind} {name} ({inspect.getsourcefile(inspect.unwrap(function))})"
    except TypeError:  # one that is built into Python has no file
        return f"{kind} {name}"
