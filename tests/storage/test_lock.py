"""The lock of a folder that is filled."""

import errno
import gc
import socket

import pytest

from distill_lightning.errors import DiskError
from distill_lightning.storage.lock import FillingLock


def test_a_disk_that_is_full_leaves_neither_a_lock_nor_an_open_file(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = FillingLock(tmp_path)
    with monkeypatch.context() as patch:
        # Whatever is written into the file has this in it.
        patch.setattr(socket, "gethostname", full)
        with pytest.raises(DiskError, match=f"^the disk of the store {tmp_path} is full: make room and call again"):
            lock.take()
    # A file that is open would be a warning, and an error here.
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert lock.take() is None
    lock.release()
