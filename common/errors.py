"""User errors are reported in one line, with exit status 2. Every other exception is a mistake of ours, or of
a user's own function, and shows its traceback."""

import errno
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A user's mistake. The message names the value, the limit and the remedy, in one line."""


def run(main: Callable[[], None]) -> None:
    """Runs a command. An error that the user can fix (a UserError, a file that cannot be used, a full disk or
    GPU) ends it with one line and status 2; Ctrl-C ends it with status 130."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        by_file = isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC)
        torch = sys.modules.get("torch")  # not imported here: most mistakes are found before it is needed
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            error = "the GPU's memory is full; use fewer rows or positions, --recompute or a smaller dtype"
        elif not isinstance(error, UserError) and not by_file:
            raise
        elif by_file and error.filename is not None:
            name = str(error.filename).removesuffix(".part")  # of the file that `whole_file` was to write
            error = f"{name}: {error.strerror}"
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
