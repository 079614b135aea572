"""Mistakes of a user: one line, and exit status 2."""

import os
import sys
from collections.abc import Callable

import torch


class UserError(ValueError):
    """What a user did wrong: names the value, the limit and the remedy, in one line."""


def run(main: Callable[[], None]) -> None:
    """Runs a command; a mistake of the user ends it with one line and status 2, Ctrl-C with status 130."""
    sys.path.append(os.getcwd())  # where a user's own confidence function may lie
    try:
        main()
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        full = "the GPU's memory is full; take fewer rows or positions, --recompute (train.py), or a smaller dtype"
        print(f"error: {full if isinstance(error, torch.OutOfMemoryError) else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
