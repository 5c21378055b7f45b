"""One training at a time fills a `TeacherStore`: the others are refused, or read; with real processes."""

import multiprocessing
import os
import signal
import warnings

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import InputError, KDModule, TeacherStore
from distill_lightning.storage import FillingLock
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


class Pause(pl.Callback):
    """Says that a batch has come, and waits for a word."""

    def __init__(self, connection, *, after=0):
        self.connection, self.after = connection, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after + 1:
            self.connection.send("paused")
            self.connection.recv()


def teacher_of():
    torch.manual_seed(5)
    return TinyNet()


def fit(folder, *callbacks, networks=True, epochs=2):
    torch.manual_seed(0)
    store = TeacherStore(folder, teacher_of() if networks else None)
    module = KDModule(TinyNet(), store, num_classes=3)
    trainer = tiny_trainer(max_epochs=epochs, callbacks=list(callbacks))
    trainer.fit(module, datamodule=TinyDataModule(views=2))
    return module


def child(connection, folder, after, epochs):
    try:
        fit(folder, Pause(connection, after=after), epochs=epochs)
        connection.send("ended")
    except InputError as error:
        connection.send(str(error))


@pytest.fixture
def other(tmp_path, start_method):
    """Another process that fits with the same store, stopped after some batch."""
    started = []

    def start(after=0, epochs=2):
        context = multiprocessing.get_context(start_method)
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there, tmp_path / "store", after, epochs), daemon=True)
        process.start()
        started.append(process)
        assert here.poll(120)
        return process, here, here.recv()

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_training_is_refused_in_one_line_and_the_first_loses_nothing(tmp_path, other):
    process, connection, said = other(after=1)
    assert said == "paused"
    with pytest.raises(InputError, match=f"is being filled by process {process.pid} on .*: wait until") as caught:
        fit(tmp_path / "store")
    assert "\n" not in str(caught.value)
    module = KDModule(TinyNet(), TeacherStore(tmp_path / "store", teacher_of()), num_classes=3)
    with pytest.raises(InputError, match=f"filled by process {process.pid} "):
        record(tiny_trainer(), module, TinyDataModule(views=2))
    connection.send("go on")
    assert connection.recv() == "ended"
    process.join()
    fit(tmp_path / "whole")
    files = [
        {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        for root in (tmp_path / "store", tmp_path / "whole")
    ]
    assert files[0] == files[1]
    # The other has ended.
    fit(tmp_path / "store")


def test_what_a_killed_training_has_locked_is_free(tmp_path, other):
    process, _, _ = other()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "store/filling.lock").read_text().startswith(f"process {process.pid} on ")
    assert fit(tmp_path / "store").teachers.store.is_complete
    assert not (tmp_path / "store/filling.lock").exists()


def test_readers_are_not_held_up(tmp_path, other):
    fit(tmp_path / "store")
    _, connection, said = other(after=1)
    assert said == "paused"
    # A training with teachers finds everything there, and so has nothing to fill.
    fit(tmp_path / "store")
    fit(tmp_path / "store", networks=False)
    connection.send("go on")
    assert connection.recv() == "ended"


def test_a_training_that_failed_holds_up_nobody_in_its_own_process(tmp_path, other):
    class Failing(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("failing")

    with pytest.raises(RuntimeError, match="failing"):
        fit(tmp_path / "store", Failing())
    fit(tmp_path / "store", epochs=1)
    _, _, said = other(after=3)
    assert said == "paused"


def test_within_a_process_the_last_one_takes_it_over(tmp_path):
    first, second = FillingLock(tmp_path / "new"), FillingLock(tmp_path / "new")
    assert first.take() is first.take() is second.take() is None
    first.release()
    assert (tmp_path / "new/filling.lock").exists()
    second.release()
    assert not list((tmp_path / "new").iterdir())
    assert second.take() is None
    del second
    assert not list((tmp_path / "new").iterdir())


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("distill_lightning.storage.lock.fcntl.lockf", lockf)
    lock = FillingLock(tmp_path)
    with pytest.warns(UserWarning, match="knows no locks: let no other training fill the same folder"):
        assert lock.take() is None
    lock.release()


def test_a_complete_store_that_cannot_be_written_to_is_read(tmp_path, monkeypatch):
    fit(tmp_path / "store")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(FillingLock, "take", lambda lock: pytest.fail("locked"))
    with warnings.catch_warnings():
        fit(tmp_path / "store")
