"""The one exception that says: what you gave cannot be used, and this is the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class InputError(ValueError):
    """An argument, key, file or network that cannot be used.

    The message is one line that names the offending thing and the way out. The command line prints it and exits with
    status 2; every other exception is a bug and keeps its traceback.

    Args:
        message: the line.
    """

    latest: ClassVar[str] = ""
    """The last message. jsonargparse makes text of its own from what a constructor raises inside a union of types; this
    is how the command line finds the message in it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        InputError.latest = message


@contextmanager
def refusing(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what another library raises over an argument into an `InputError`.

    Args:
        where: the key or file, which the message begins with.
        kinds: what counts as such; everything else passes.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: {reason}") from error
