"""Mistakes of a user: one line, and exit status 2. Every other exception is a mistake of ours, or of a user's
own function: a traceback."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """What a user did wrong: names the value, the limit and the remedy, in one line."""


PLATFORMS = ("linux", "darwin")  # as sys.platform says it
FULL_GPU = (
    "the GPU's memory is full; take fewer rows or positions, --recompute (train.py), or a smaller dtype"
)


def run(main: Callable[[], None]) -> None:
    """Runs a command; a mistake of the user ends it with one line and status 2, Ctrl-C with status 130."""
    sys.path.append(os.getcwd())  # where a user's own confidence function may lie
    try:
        if sys.platform not in PLATFORMS:
            raise UserError(f"the system {sys.platform} is not supported; Linux and macOS are")
        main()
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = in_one_line(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def in_one_line(error: Exception) -> str | None:
    """What to tell a user who can mend this: our own errors, a file that cannot be used, a full disk or GPU.
    None for all else."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        return str(error)
    torch = sys.modules.get("torch")  # not imported here: most mistakes are found before it is needed
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return FULL_GPU
    return None
