"""A folder that one process at a time fills."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from distill_lightning.storage.files import explaining_disk_errors

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that know no locks."""

_NAME = "filling.lock"

# The open file and the number of who took it last; by process, because a forked one does not hold what its parent does.
_held: dict[tuple[int, Path], tuple[BinaryIO, int]] = {}
_numbers = itertools.count()


class FillingLock:
    """Held by the process that fills a folder; it ends with the process at the latest, however that ends.

    Reading needs no lock. The operating system keeps it, on the file ``filling.lock``, in which the holder writes who
    it is; what a killed process has left of the file holds nobody up. Within a process the last one takes it over: a
    training that has failed, and whose objects are still there, does not hold up the next one.

    Args:
        folder: is made if it is not there.

    Attributes:
        is_kept: whether the file system keeps what was taken last; some know no locks.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from distill_lightning.storage.lock import FillingLock
        >>> lock = FillingLock(Path(mkdtemp()))
        >>> lock.take() is None
        True
        >>> lock.release()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_kept = True
        self._end: Callable[[], Any] | None = None

    def take(self, *, warns: bool = True) -> str | None:
        """Take the lock if it is free.

        Args:
            warns: whether to warn of a file system that knows no locks.

        Returns:
            Who holds it, if it is not.

        Raises:
            InputError: the folder cannot be written to.
        """
        self.release()
        with explaining_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder.resolve() / _NAME
            file, number = _held.get((os.getpid(), path), (None, 0))[0], next(_numbers)
            if file is None:
                locked = _locked(path)
                if locked is None:
                    return _holder(path)
                file, self.is_kept = locked
                if warns and not self.is_kept:
                    warnings.warn(
                        f"the file system of {path.parent} knows no locks: let no other training fill the same folder",
                        stacklevel=2,
                    )
                try:
                    file.truncate()
                    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                except OSError:
                    path.unlink(missing_ok=True)
                    file.close()
                    raise
            _held[os.getpid(), path] = (file, number)
        self._end = weakref.finalize(self, _let_go, os.getpid(), path, number)
        return None

    def release(self) -> None:
        """Let others fill the folder."""
        if self._end is not None:
            self._end()
            self._end = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process, or a copy, does not hold the lock."""
        return {**vars(self), "_end": None}


def _holder(path: Path) -> str:
    """Who has written in the file that he holds it; he may have let go of it meanwhile."""
    with suppress(FileNotFoundError):
        return path.read_text(errors="replace").strip() or "another process"
    return "another process"


def _locked(path: Path) -> tuple[BinaryIO, bool] | None:
    """The locked file, and whether the file system keeps the lock; ``None``: another process has locked it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            # Not flock: the workers of a data loader would inherit that, and outlive a killed process for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            return file, False
        # Whoever held it has removed it meanwhile, and a third process may have made another.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        file.close()


def _let_go(process: int, path: Path, number: int) -> None:
    file, taken = _held.get((process, path), (None, -1))
    if file is not None and taken == number and process == os.getpid():
        del _held[process, path]
        path.unlink(missing_ok=True)
        file.close()
