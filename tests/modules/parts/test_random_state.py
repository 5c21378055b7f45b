"""The state of the random numbers in a checkpoint: when it is taken, and when it is left alone."""

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import SupervisedModule
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


class Note(pl.Callback):
    """The generator when the first epoch starts."""

    state = None

    def on_train_epoch_start(self, trainer, pl_module):
        self.state = torch.get_rng_state() if self.state is None else self.state


def fitted(module, **options):
    note = Note()
    trainer = tiny_trainer(callbacks=[note], limit_val_batches=0, max_epochs=options.pop("max_epochs", 2))
    torch.manual_seed(7)
    trainer.fit(module, datamodule=TinyDataModule(), **options)
    return trainer, note.state


def module_of():
    return SupervisedModule(TinyNet(), num_classes=3)


@pytest.fixture
def checkpoint(tmp_path):
    trainer, _ = fitted(module_of(), max_epochs=1)
    torch.manual_seed(3)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    return tmp_path / "module.ckpt"


def changed(path, change):
    content = torch.load(path, weights_only=True)
    change(content["parts"]["random_state"]["processes"], content["parts"])
    torch.save(content, path)


def seeded(seed):
    return torch.Generator().manual_seed(seed).get_state()


def test_it_is_taken_where_a_training_goes_on(checkpoint):
    assert torch.equal(fitted(module_of(), ckpt_path=checkpoint)[1], seeded(3))


def test_a_training_that_begins_draws_its_own(checkpoint):
    assert torch.equal(fitted(SupervisedModule.load_from_checkpoint(checkpoint, student=TinyNet()))[1], seeded(7))


@pytest.mark.parametrize(
    "change",
    [lambda states, parts: states.append(states[0]), lambda states, parts: parts.pop("random_state")],
    ids=["two processes", "older"],
)
def test_other_checkpoints_leave_the_generators_alone(checkpoint, change):
    changed(checkpoint, change)
    trainer, state = fitted(module_of(), ckpt_path=checkpoint)
    assert trainer.current_epoch == 2
    assert torch.equal(state, seeded(7))


def test_a_state_of_another_kind_of_device_is_passed_over(checkpoint):
    changed(checkpoint, lambda states, parts: states[0].update(cuda=torch.zeros(16, dtype=torch.uint8)))
    assert torch.equal(fitted(module_of(), ckpt_path=checkpoint)[1], seeded(3))
