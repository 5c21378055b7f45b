"""The one exception that says: what you gave cannot be used, and this is the way out."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, key, file or network that cannot be used.

    The message is one line that names the offending thing and the way out. The command line prints it and exits with
    status 2; every other exception is a bug and keeps its traceback.
    """
