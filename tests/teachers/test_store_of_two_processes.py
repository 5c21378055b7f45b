"""A `TeacherStore` that two processes fill or read together is the one that a single process fills or reads."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import FEEDModule, KDModule, TeacherStore
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

pytestmark = pytest.mark.slow

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Losses(pl.Callback):
    """Appends the loss of every step to a file for each process."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.folder / str(trainer.global_rank)).open("a") as file:
            file.write(f"{float(outputs['loss'])!r}\n")

    def read(self):
        """The mean over the processes, for each step."""
        each = [[float(line) for line in path.read_text().split()] for path in sorted(self.folder.iterdir())]
        return [sum(losses) / len(losses) for losses in zip(*each, strict=True)]


def teachers_of():
    torch.manual_seed(5)
    # Each sample alone: the halves of a batch are told what the whole is.
    return [TinyNet(width=8, norm="group") for _ in range(2)]


def module_of(method, store):
    torch.manual_seed(0)
    common = {"num_classes": 3, "optimizer": sgd}
    if method == "kd":
        return KDModule(TinyNet(norm="group"), store, temperature=2.0, **common)
    layers = {"student_layer": "features", "input_shape": (1, 8, 8), "beta": 10.0}
    return FEEDModule(TinyNet(norm="group"), store, **layers, **common)


def trainer_of(processes, **options):
    return tiny_trainer(**({"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}), **options)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def fitted(folder, processes, module, *, samples=24, epochs=2):
    losses = Losses(folder)
    data = TinyDataModule(samples=samples, batch_size=8 // processes, views=2)
    trainer = trainer_of(processes, max_epochs=epochs, limit_val_batches=0, callbacks=[losses])
    trainer.fit(module, datamodule=data)
    return losses.read()


# Of 23 samples one is read by both processes.
@pytest.mark.parametrize(("method", "samples"), [("kd", 24), ("kd", 23), ("feed", 24)])
def test_two_processes_fill_the_store_of_one(tmp_path, method, samples):
    for processes in (1, 2):
        store = TeacherStore(tmp_path / f"store_{processes}", teachers_of(), shard_size=7)
        fitted(tmp_path / f"losses_{processes}", processes, module_of(method, store), samples=samples)
    one, two = (files_of(tmp_path / f"store_{processes}") for processes in (1, 2))
    assert len(one) == 1 + 2 * 4
    assert two == one


def test_two_processes_that_read_have_the_losses_of_one(tmp_path):
    data = TinyDataModule(views=2)
    for method in ("kd", "feed"):
        path, losses = tmp_path / method, {}
        record(tiny_trainer(), module_of(method, TeacherStore(path, teachers_of(), shard_size=7)), data)
        for processes in (1, 2):
            module = module_of(method, TeacherStore(path, shard_size=7, fill="never"))
            losses[processes] = fitted(tmp_path / f"{method}_{processes}", processes, module, epochs=4)
        assert len(losses[1]) == 12
        assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_a_module_goes_to_other_processes_with_its_store_open(tmp_path):
    module = module_of("kd", TeacherStore(tmp_path / "store", teachers_of(), shard_size=7))
    first = fitted(tmp_path / "first", 1, module, epochs=4)
    assert module.teachers.store.is_complete
    assert module.teachers.store._records._open
    second = fitted(tmp_path / "second", 2, module, epochs=2)
    # It goes on where the first has ended.
    assert second[-1] < first[0]
    assert module.teachers.store._records._open
