"""What every command shares: settings as flags, errors for users, files written whole, the user's own
functions, threads."""

import common.threads  # noqa: F401  sets variables that torch reads
