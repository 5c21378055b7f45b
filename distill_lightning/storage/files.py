"""Files that are written whole or not at all, and one line for what the disk refuses."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from distill_lightning.errors import InputError

CHECKSUM_BYTES = 4


def write_all(file: Any, content: Any) -> None:
    """Write bytes (numbers of one byte) to a file without a buffer, which would hide how far it came."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def write_whole(path: Path, parts: Iterable[Any]) -> None:
    """Write a file beside its place and move it there when it is on the disk.

    Args:
        path: the file.
        parts: its bytes, one after the other; they need not be in memory at once.
    """
    # Processes of several machines may write the same file; their numbers do not tell them apart.
    partial = path.with_name(f"partial.{uuid4().hex}.{path.name}")
    try:
        with partial.open("wb", buffering=0) as file:
            for part in parts:
                write_all(file, part)
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def with_checksum(parts: Iterable[Any]) -> Iterator[Any]:
    """The same bytes, and behind them their CRC-32."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
        yield part
    yield crc.to_bytes(CHECKSUM_BYTES, "little")


def checksum_fits(content: Any) -> bool:
    """Whether bytes end with the CRC-32 of those before."""
    view = memoryview(content)
    return zlib.crc32(view[:-CHECKSUM_BYTES]) == int.from_bytes(view[-CHECKSUM_BYTES:], "little")


@contextmanager
def telling(folder: Path, *, way_out: str = "make room and call again, what is written is kept") -> Iterator[None]:
    """Say in one line what the disk refuses.

    Args:
        folder: of the store.
        way_out: what to do about a full disk.

    Raises:
        InputError: in place of any ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"the disk of the store {folder} is full: {way_out}") from error
        raise InputError(f"the store {folder} cannot be written: {error.strerror or error}") from error
