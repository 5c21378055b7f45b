"""The exception for what a user gave and the package cannot use."""

from __future__ import annotations

import errno
import math
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar


class InputError(ValueError):
    """An argument, key, file or network that cannot be used.

    The message is one line that names the offending thing and the way out. The command line prints it and exits with
    status 2; every other exception is a bug and keeps its traceback.

    Args:
        message: the line.
    """

    latest: ClassVar[str] = ""
    """The latest message. jsonargparse turns what a constructor raises inside a union of types into a text of its own;
    with this the command line finds the message in that text."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        InputError.latest = message


class DiskError(InputError):
    """A file that cannot be written, because the disk is full or refuses it.

    Args:
        message: the line, which names the file and the way out.
    """


class NonFiniteError(InputError):
    """A loss or an output of a network that is nan or infinite.

    Args:
        message: the line, which names the term or network and the samples.
    """


def check_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        InputError: it is none of them.
    """
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_finite(name: str, *values: Any) -> None:
    """Refuse infinity, NaN, and what is no number; a comparison is false for NaN, and lets it through.

    Args:
        name: of the option, with which the message begins.
        values: of it.

    Raises:
        InputError: one is not a finite number.

    Example:
        >>> from distill_lightning.errors import check_finite
        >>> check_finite("temperature", 4.0)
        >>> check_finite("temperature", float("inf"))
        Traceback (most recent call last):
        distill_lightning.errors.InputError: temperature must be a finite number, got inf
    """
    for value in values:
        try:
            is_finite = math.isfinite(value)
        except (TypeError, OverflowError):
            is_finite = False
        if not is_finite:
            raise InputError(f"{name} must be a finite number, got {value!r}")


def check_count(name: str, value: object, *, at_least: int, because: str = "") -> None:
    """Refuse what is no integer, and one that is too small.

    Args:
        name: of the option, with which the message begins.
        value: of it.
        at_least: the smallest one.
        because: what that many are, for the message.

    Raises:
        InputError: it is no integer, or smaller.

    Example:
        >>> from distill_lightning.errors import check_count
        >>> check_count("max_tokens", 2.5, at_least=2)
        Traceback (most recent call last):
        distill_lightning.errors.InputError: max_tokens must be an integer, got 2.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise InputError(f"{name} must be at least {at_least}{because and f', {because}'}, got {value}")


def in_a_line(error: object, *, at_most: int | None = None) -> str:
    """What an exception says, without its line breaks.

    Args:
        error: the exception, or its text.
        at_most: the number of characters after which it is cut off; ``None``: nowhere.
    """
    return " ".join(str(error).split())[:at_most]


_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EFBIG, errno.EIO}


def is_of_the_disk(error: OSError) -> bool:
    """Whether a file could not be written because the disk is full or refuses it, which no program can help."""
    return error.errno in _FULL | _REFUSED or _is_unmakeable(error)


def is_full(error: OSError) -> bool:
    """Whether there was no room left for a file."""
    return error.errno in _FULL


def _is_unmakeable(error: OSError) -> bool:
    """Whether a file system takes no folder, as /proc does: one is missing to what makes all that are missing."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return error.errno == errno.ENOENT and any(frame.name in ("makedirs", "mkdir") for frame in last)


def disk_line(error: OSError, path: Path | None = None) -> str:
    """Why a file could not be written, and what to do about it, in one line.

    Args:
        error: what writing it raised.
        path: the file; ``None``: the error's own, if it names one.
    """
    path = path or (Path(str(error.filename)) if error.filename else None)
    # Path.is_file raises where the folder may not be read.
    is_there = path is not None and os.path.isfile(path)  # noqa: PTH113
    kept = "; what was there before is kept" if is_there else ""
    if error.errno in _FULL:
        return f"the disk is full{f', {path} is not written' if path else ''}: make room and call again{kept}"
    reason = error.strerror or str(error)
    return f"{path or 'a file'} cannot be written ({reason}): give a path in a folder that you may write to{kept}"


@contextmanager
def refusing_to_write(where: str) -> Iterator[None]:
    """Turn what a full disk or a refused folder raises into a `DiskError` that says what to do.

    Args:
        where: the key or folder with which the message begins.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(f"{where}: {disk_line(error)}") from error


@contextmanager
def refused_at(where: str) -> Iterator[None]:
    """Let every `InputError` begin with the key of the configuration that it is about.

    Args:
        where: the key; a message that names it already stays as it is.

    Example:
        >>> from distill_lightning.errors import InputError, refused_at
        >>> with refused_at("methods.kd"):
        ...     raise InputError("temperature must be positive, got -1.0")
        Traceback (most recent call last):
        distill_lightning.errors.InputError: methods.kd: temperature must be positive, got -1.0
    """
    try:
        yield
    except InputError as error:
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


@contextmanager
def refusing(where: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an exception that another library raises because of an argument into an `InputError`.

    Args:
        where: the key or file with which the message begins.
        kinds: the exceptions to convert; all others pass through.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = in_a_line(error) or type(error).__name__
        raise InputError(f"{where}: {reason}") from error
