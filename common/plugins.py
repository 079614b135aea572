"""The user's own functions, named on the command line as module:function."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from common.errors import UserError


def find_function(kind: str, name: str, known: dict[str, Callable], arguments: tuple[str, ...]) -> Callable:
    """The function that is `known` under `name`, or that is imported from "package.module:function"; `kind`
    says in messages what it is. Raises UserError if there is none, or if it does not accept the arguments;
    other exceptions of the module itself pass through, with their traceback."""
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        choices = ", ".join([*known, "package.module:function"])
        raise UserError(f"unknown {kind} {name!r}; choose from {choices}")
    # Python searches the current folder only here: it may have been downloaded, and its files must not
    # replace optional packages.
    sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{kind} {name!r} cannot be loaded: {error}") from None
    finally:
        sys.path.pop()
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        raise UserError(f"{kind} {name!r} is not a function of {' and '.join(arguments)}") from None
    return function
