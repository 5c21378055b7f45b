"""Files that are written whole or not at all, and disk errors in one line."""

from __future__ import annotations

import errno
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save
from torch import Tensor

from distill_lightning.errors import DiskError, disk_line

CHECKSUM_BYTES = 4


def write_all(file: Any, content: Any) -> None:
    """Write bytes (or an array of single bytes) to an unbuffered file, which may take them in several pieces."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def free_path(path: Path) -> Path:
    """A path, with a number if there is something: without a logger, all runs have one folder."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """`whole_file` in a folder that exists, with errors as they come, for what has a line of its own to say of them.

    Raises:
        OSError: the disk is full or refuses; what was there before is kept.
    """
    # A link stays one.
    place = path.resolve()
    # Processes of several machines may write the same file; their process ids do not tell them apart.
    partial = place.with_name(f"partial.{uuid4().hex}.{place.name}")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        # Some libraries make a file of their own, which nobody else may read.
        partial.chmod(mode)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(place)
    finally:
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and rename it once it is complete and on the disk.

    ::

        with whole_file(path) as partial:
            figure.savefig(partial)

    Its folder is made, and others may read it as the process's umask says. What is large is better written by
    `write_whole`: libraries that write files themselves have errors of their own for a full disk.

    Args:
        path: the file.

    Returns:
        Where to write it; the name ends as the file's own. Nothing is left there if the writing fails.

    Raises:
        DiskError: the disk is full or refuses; what was there before is kept.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as partial:
            yield partial
    except OSError as error:
        raise DiskError(disk_line(error, path)) from error


def write_parts(path: Path, parts: Iterable[Any]) -> None:
    """Write bytes to a file as they come."""
    with path.open("wb", buffering=0) as file:
        for part in parts:
            write_all(file, part)


def write_whole(path: Path, parts: Iterable[Any]) -> None:
    """Write bytes to a file, all of them or none.

    Args:
        path: the file; its folder is made.
        parts: its bytes, one after the other; they need not be in memory at once.

    Raises:
        DiskError: the disk is full or refuses; what was there before is kept.
    """
    with whole_file(path) as partial:
        write_parts(partial, parts)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as ``.safetensors``, whole or not at all.

    Args:
        path: the file; its folder is made.
        tensors: by name; no two share memory.
        metadata: text that stands in the file's header.

    Raises:
        DiskError: the disk is full or refuses; what was there before is kept.
    """
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(path, [save(own, None if metadata is None else dict(metadata))])


def sweep_partial(folder: Path, *patterns: str) -> None:
    """Remove what killed processes left of files that they were writing; called while nobody writes them.

    Args:
        folder: where to look.
        patterns: of the finished files' paths in the folder, as `Path.glob` takes them.
    """
    for pattern in patterns:
        place, slash, name = pattern.rpartition("/")
        for path in list(folder.glob(f"{place}{slash}partial.*.{name}")):
            path.unlink(missing_ok=True)


def with_checksum(parts: Iterable[Any]) -> Iterator[Any]:
    """The same bytes, followed by their CRC-32."""
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
def explaining_disk_errors(
    folder: Path, *, way_out: str = "make room and call again, what is written is kept"
) -> Iterator[None]:
    """Report disk errors in one line.

    Args:
        folder: of the store.
        way_out: what to do about a full disk.

    Raises:
        DiskError: in place of any ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskError(f"the disk of the store {folder} is full: {way_out}") from error
        raise DiskError(f"the store {folder} cannot be written: {error.strerror or error}") from error
