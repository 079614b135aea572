"""What every command shares: settings as flags, errors for users, files written whole, functions of the
user's own, threads."""

import common.threads  # noqa: F401  sets variables that torch reads
