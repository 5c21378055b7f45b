"""Processes that are killed while they fill a `TeacherStore`: what the next ones make of it is the undisturbed store.

A run is killed where it changes a file, counted, which hits whatever the machine's speed; and at moments drawn from
its duration, which hit where they may.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import distributed as dist

from distill_lightning import FEEDModule, KDModule, TeacherStore
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

pytestmark = [
    pytest.mark.slow,
    # Whoever goes on after a kill finds checkpoints.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


# See conftest.py; children may fork, too.
processes = multiprocessing.get_context("forkserver")

CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.truncate")
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class SlowNet(TinyNet):
    """A teacher whose every answer takes a while, so that a run's duration is spent among its files."""

    def forward(self, images):
        time.sleep(0.005)
        return super().forward(images)


class StoppingNet(TinyNet):
    """A teacher that leaves a note and waits for its end instead of giving its ``last`` answer.

    It does so in the processes of some ranks. Its answers are counts, the same in a batch of any size.
    """

    def __init__(self, last, ranks, notes):
        super().__init__()
        self.left, self.ranks, self.notes = last, ranks, notes

    def forward(self, images):
        self.left -= 1
        if self.left == 0 and dist.get_rank() in self.ranks:
            self.notes.mkdir(exist_ok=True)
            (self.notes / str(os.getpid())).touch()
            signal.pause()
        return torch.stack([(images[:, 0, :4, 4 * column :] > 0).sum(dim=(1, 2)) for column in (0, 1, 0)], dim=1) / 8


def teachers_of(kind):
    torch.manual_seed(5)
    networks = [kind(width=8) for _ in range(2)]
    for network in networks:
        torch.nn.init.normal_(network.head.weight)
    return networks


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def newest(folder):
    return max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


# What is killed


def recording(folder):
    torch.manual_seed(0)
    store = TeacherStore(folder / "store", teachers_of(SlowNet), shard_size=7)
    module = KDModule(TinyNet(), store, num_classes=3, temperature=2.0)
    record(tiny_trainer(), module, TinyDataModule(batch_size=4, views=3))


def fitting(folder, *, method="kd", dtype="float16", **options):
    """Four epochs of two views, with a checkpoint after every epoch and in its middle; goes on from the newest."""
    store = TeacherStore(folder / "store", teachers_of(SlowNet), shard_size=5, dtype=dtype)
    common = {"num_classes": 3, "optimizer": sgd}
    torch.manual_seed(0)
    if method == "kd":
        module = KDModule(TinyNet(), store, **common)
    else:
        layers = {"student_layer": "features", "input_shape": (1, 8, 8), "beta": 10.0}
        module = FEEDModule(TinyNet(), store, **layers, **common)
    # 8 batches an epoch, 4 shards a view, and one batch to validate.
    data = TinyDataModule(samples=16, val_size=2, batch_size=2, views=2)
    fit(folder, module, data, max_epochs=4, **options)


def fitting_together(folder, *, last=0, ranks=(), devices=2):
    """Three epochs of as many views, on processes that share every batch of 4; a teacher stops at its last answer."""
    torch.manual_seed(0)
    store = TeacherStore(folder / "store", StoppingNet(last, ranks, folder / "notes"), shard_size=7)
    module = KDModule(TinyNet(norm="group"), store, num_classes=3, optimizer=sgd)
    options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    data = TinyDataModule(batch_size=4 // devices, views=3)
    fit(folder, module, data, max_epochs=3, limit_val_batches=0, **options)


def fit(folder, module, data, **options):
    kept = {"dirpath": folder / "checkpoints", "save_top_k": -1}
    # Never on an epoch's last batch: going on from there, Lightning 2.6 writes checkpoints that miscount the epochs.
    callbacks = [ModelCheckpoint(**kept, every_n_train_steps=5), ModelCheckpoint(**kept, filename="end-{epoch}")]
    trainer = tiny_trainer(callbacks=callbacks, enable_checkpointing=True, **options)
    trainer.fit(module, datamodule=data, ckpt_path=newest(folder))
    torch.save(module.student.state_dict(), folder / "student.pt")


# How it is killed


class Stop:
    """Counts what a process changes among the files of a folder, and stops it before the ``last`` such change."""

    def __init__(self, folder, last, tell):
        self.folder, self.last, self.tell = str(folder), last, tell
        self.count = 0

    def __call__(self, event, args):
        changes = event in CHANGES or (event == "open" and isinstance(args[1], str) and args[1][0] in "wa")
        if changes and any(str(arg).startswith(self.folder) for arg in args):
            self.count += 1
            if self.count == self.last:
                self.tell("stopped")
                signal.pause()


def child(job, folder, last, connection):
    # A group of its own, to be killed with what it starts.
    os.setsid()
    torch.set_num_threads(1)
    # As in conftest.py: what is killed here is no power.
    os.fsync = os.fstat
    # Files on their way into the folder must be moved there, not copied.
    tempfile.tempdir = str(folder.parent)
    stop = Stop(folder, last, connection.send)
    sys.addaudithook(stop)
    connection.send("begun")
    job(folder)
    stop.last = 0
    connection.send(stop.count)


class Child:
    """A process that does a job, to be killed."""

    def __init__(self, job, folder, *, last=0):
        folder.mkdir(exist_ok=True)
        self.connection, theirs = processes.Pipe()
        self.process = processes.Process(target=child, args=(job, folder, last, theirs))
        self.process.start()
        theirs.close()
        assert self.connection.recv() == "begun"

    def told(self):
        """What it says next; ``None`` if it is dead."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def end(self):
        """Let it end; how many changes it has made."""
        said = self.told()
        self.process.join()
        assert self.process.exitcode == 0
        return said

    def kill(self):
        """Kill it and all that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL


def killed_ten_times(job, folder, *, seed):
    """Do a job in spite of ten kills; an undisturbed run is left in ``whole``, the other in ``killed``.

    Five kills are before counted changes, of which none has more than a fifth behind it, so all come before the end.
    The other five are at drawn moments; what is drawn comes on average to about half a run, beside five beginnings.
    """
    generator = np.random.default_rng(seed)
    undisturbed, start = Child(job, folder / "whole"), time.monotonic()
    count = undisturbed.end()
    duration = time.monotonic() - start
    for last in generator.integers(1, count // 5 + 1, size=5):
        stopped = Child(job, folder / "killed", last=int(last))
        assert stopped.told() == "stopped"
        assert stopped.kill()
    for delay in generator.uniform(0, duration / 3, size=5):
        disturbed = Child(job, folder / "killed")
        disturbed.connection.poll(delay)
        disturbed.kill()
    Child(job, folder / "killed").end()


# Tests


@pytest.mark.parametrize("seed", range(2))
def test_a_recording_that_is_killed_leaves_the_undisturbed_store(tmp_path, seed):
    killed_ten_times(recording, tmp_path, seed=seed)
    whole = files_of(tmp_path / "whole")
    assert len(whole) == 1 + 3 * 4
    assert files_of(tmp_path / "killed") == whole


@pytest.mark.lightning(since=(2, 5))
@pytest.mark.parametrize(
    ("seed", "options"),
    [(0, {}), (1, {"dtype": "float32"}), (2, {"method": "feed"}), (3, {"val_check_interval": 5})],
)
def test_a_training_that_is_killed_leaves_the_undisturbed_store_and_student(tmp_path, seed, options):
    killed_ten_times(partial(fitting, **options), tmp_path, seed=seed)
    whole = files_of(tmp_path / "whole/store")
    assert len(whole) == 1 + 2 * 4
    assert files_of(tmp_path / "killed/store") == whole
    first, second = (torch.load(tmp_path / name / "student.pt") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.lightning(since=(2, 5))
def test_two_processes_that_are_killed_leave_the_undisturbed_store_and_student(tmp_path):
    Child(partial(fitting_together, devices=1), tmp_path / "whole").end()
    # Each of the 18 batches is asked about once, or again where no checkpoint was made after it.
    notes = tmp_path / "killed/notes"
    for last, ranks in ((2, (0, 1)), (5, (1,)), (6, (0, 1))):
        disturbed = Child(partial(fitting_together, last=last, ranks=ranks), tmp_path / "killed")
        while not list(notes.glob("*")):
            assert not disturbed.connection.poll(0.05)
        # The other process stops there, too, or waits for this one with a batch more in its log.
        assert disturbed.kill()
        shutil.rmtree(notes)
    assert newest(tmp_path / "killed") is not None
    assert len(files_of(tmp_path / "killed/store")) < 1 + 3 * 4
    Child(fitting_together, tmp_path / "killed").end()
    assert files_of(tmp_path / "killed/store") == files_of(tmp_path / "whole/store")
    first, second = (torch.load(tmp_path / name / "student.pt") for name in ("whole", "killed"))
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)
