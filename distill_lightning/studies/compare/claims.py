"""Who is at work in a comparison's folder, so that several processes, and several machines, share its runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from distill_lightning.errors import refusing_to_write
from distill_lightning.storage.lock import NO_LOCKS, FillingLock

AT_WORK = "at_work.lock"
_CLAIM = "claim.json"
_PAUSE = 0.5
_BEAT = 5.0
# Some file systems show a machine another one's times a minute late.
_DEAD_AFTER = 120.0
# What file systems say that know no second name of a file.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


class ClaimLostError(Exception):
    """Somebody else has taken over a run whose process seemed to be dead: it was stopped for minutes, perhaps."""


class Claim:
    """Held by the process that makes something in a folder; one process at a time holds it.

    Within a machine the operating system keeps it (see `FillingLock`), and it ends with the process. Not every file
    system tells other machines of that: for these there is a file that the holder touches every few seconds. Whoever
    finds that it has not been touched for two minutes takes the claim over.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / _CLAIM
        self._token = uuid4().hex
        self._lock = FillingLock(folder)
        self._ends = threading.Event()

    def take(self) -> str | None:
        """Take the claim if nobody holds it.

        Returns:
            Who holds it, if somebody does.

        Raises:
            DiskError: the folder cannot be written to.
        """
        holder = self._lock.take(warns=False)
        if holder is None:
            with refusing_to_write(str(self.folder)):
                holder = self._note()
            if holder is not None:
                self._lock.release()
        return holder

    def check(self) -> None:
        """See whether it is still held.

        Raises:
            ClaimLostError: it is another's by now.
        """
        known = _read(self.file)
        if known is None or known.get("token") != self._token:
            raise ClaimLostError(f"{self.folder} is another's by now")

    def release(self) -> None:
        """Let others take it."""
        self._ends.set()
        known = _read(self.file)
        if known is not None and known.get("token") == self._token:
            self.file.unlink(missing_ok=True)
        self._lock.release()

    def _note(self) -> str | None:
        """Write the file that other machines see; who holds the claim, if one of them does."""
        known = _read(self.file)
        if known is not None:
            # The lock of a holder on this machine would not have been free.
            is_dead = known.get("machine") == _machine() and self._lock.is_kept
            if not is_dead and _is_fresh(self.file):
                return _name_of(known)
            self._move_away(known)
        told = {"token": self._token, "machine": _machine(), "process": os.getpid(), "host": socket.gethostname()}
        try:
            self._publish(json.dumps(told))
        except (FileExistsError, FileNotFoundError):
            # Somebody was quicker, and may have swept away what was half-written here.
            return _name_of(_read(self.file) or {})
        threading.Thread(target=_beat, args=(self.file, self._ends), daemon=True).start()
        return None

    def _publish(self, content: str) -> None:
        """Have the file appear with its content, so that nobody who is killed meanwhile leaves an empty one."""
        partial = self.file.with_name(f"partial.{self._token}.{_CLAIM}")
        partial.write_text(content)
        try:
            # The one call that at most one of several machines succeeds with.
            os.link(partial, self.file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self.file.open("x") as file:
                file.write(content)
        finally:
            partial.unlink(missing_ok=True)

    def _move_away(self, dead: Mapping[str, Any]) -> None:
        """Remove a dead claim, and not that of somebody who has found it dead at the same time and was quicker."""
        away = self.file.with_name(f"partial.{self._token}.{_CLAIM}")
        with suppress(FileNotFoundError):
            self.file.rename(away)
            if (_read(away) or {}).get("token") != dead.get("token"):
                with suppress(FileExistsError):
                    os.link(away, self.file)
            away.unlink()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the claim of a folder during the block, and wait for it before."""
    claim = Claim(folder)
    while claim.take() is not None:
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        claim.release()


def _beat(file: Path, ends: threading.Event) -> None:
    while not ends.wait(_BEAT):
        # It has been taken over; whoever makes the run finds out by `check`.
        with suppress(OSError):
            os.utime(file)


class Neighbours:
    """Looks whether other runs are made on this machine.

    Args:
        folder: of the comparison.
        own: the claim of the run that is asked for.
    """

    def __init__(self, folder: Path, own: Claim) -> None:
        self.folder, self.own = folder, own
        self._before = self._are_there()

    def were_there(self) -> bool:
        """Whether there is one now, or was when this was asked last."""
        before, self._before = self._before, self._are_there()
        return before or self._before

    def _are_there(self) -> bool:
        found = (_read(file) or {} for file in _claims(self.folder) if file != self.own.file)
        return any(known.get("machine") == _machine() and _is_alive(known["process"]) for known in found)


class Presence:
    """A call's note that it works in a comparison's folder, which ends with its process.

    Args:
        folder: is made if it is not there.

    Attributes:
        is_alone: whether nobody else worked in it when it came.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with refusing_to_write("output"):
            folder.mkdir(parents=True, exist_ok=True)
            # Read, too: the file is locked with others.
            self._file = (folder / AT_WORK).open("a+b")
        self.is_alone = self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) and not _others_are_fresh(folder)
        if not self.is_alone:
            self.admit()

    def admit(self) -> None:
        """Let others in, who have waited: whoever is alone has the folder to himself until then."""
        self._lock(fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.lockf(self._file, kind)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
        return True


def _others_are_fresh(folder: Path) -> bool:
    """Whether a claim is touched by another machine, which the file system may not tell of its locks."""
    return any((_read(file) or {}).get("machine") != _machine() and _is_fresh(file) for file in _claims(folder))


def _claims(folder: Path) -> list[Path]:
    return list(folder.glob(f"runs/**/{_CLAIM}"))


def _read(file: Path) -> dict[str, Any] | None:
    """What a claim says, nothing as long as it is not written; ``None``: there is none."""
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _name_of(known: Mapping[str, Any]) -> str:
    return f"process {known.get('process', '?')} on {known.get('host', 'another machine')}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is another user's.
        return True
    return True


def _is_fresh(file: Path) -> bool:
    """Whether a claim was touched of late, by the clock of the file system."""
    with suppress(FileNotFoundError), tempfile.NamedTemporaryFile(dir=file.parent, prefix="partial.") as now:
        return os.fstat(now.fileno()).st_mtime - file.stat().st_mtime < _DEAD_AFTER
    return False


def _machine() -> str:
    """By what a machine is known, whatever its containers are called."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
