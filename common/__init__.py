"""What every command shares: settings as flags, errors for users, files written whole, threads, several
processes."""

import common.threads  # noqa: F401  before torch
