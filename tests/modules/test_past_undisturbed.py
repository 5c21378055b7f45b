"""Translation and detection with the past network in place: killed, resumed, in one process and in two."""

import re

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from distill_lightning import MovingAverage, PastModel, SelfKDDetectionModule, SelfKDTranslationModule
from distill_lightning.testing import DetectionKit, TranslationKit, tiny_trainer
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
# Three steps an epoch: in the middle of the second one, whose targets are of the past.
KILLED_AFTER = 5
PASTS = {"model": PastModel(), "average": MovingAverage(decay=0.9)}
KITS = {"translation": TranslationKit(), "detection": DetectionKit()}


def module_of(task, past, *, weights=0, alpha_T=0.8):  # noqa: N803
    torch.manual_seed(weights)
    student = KITS[task].network(KITS[task].num_classes, norm="group")
    options = {"num_classes": KITS[task].num_classes, "alpha_T": alpha_T, "past": PASTS[past]}
    if task == "translation":
        return SelfKDTranslationModule(student, pad_id=0, bleu_every=0, **options)
    return SelfKDDetectionModule(student, objectness=True, **options)


class Stop(Callback):
    """Ends a training after a step, as if it were killed; the checkpoint of the step is there by then."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == KILLED_AFTER


def fitted(module, task, *, processes=1, ckpt_path=None, callbacks=(), **options):
    if processes > 1:
        options |= {"devices": processes, "strategy": process_strategy()}
    trainer = tiny_trainer(
        max_epochs=3, limit_val_batches=0, callbacks=[*callbacks, LeaveTheGroup()], min_epochs=0, **options
    )
    trainer.fit(module, datamodule=KITS[task].data(batch_size=8 // processes), ckpt_path=ckpt_path)
    return module


def killed(folder, module, task, **options):
    """The checkpoint that a training left which was stopped within an epoch."""
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=KILLED_AFTER, save_top_k=-1)
    fitted(module, task, callbacks=[Stop(), keep], enable_checkpointing=True, **options)
    (path,) = folder.glob("*.ckpt")
    assert re.search(r"step=5$", path.stem)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("task", KITS)
def test_a_run_killed_within_an_epoch_ends_like_the_undisturbed_one(task, past, tmp_path):
    whole = fitted(module_of(task, past), task)
    path = killed(tmp_path, module_of(task, past), task)
    # Other weights: all that matters comes from the checkpoint.
    resumed = fitted(module_of(task, past, weights=7), task, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    kept, again = (module.past.network.state_dict() for module in (whole, resumed))
    assert kept["ready"]
    assert again["ready"]
    assert all(torch.equal(value, again["network"][name]) for name, value in kept["network"].items())
    # The past has a say in the result.
    plain = fitted(module_of(task, past, alpha_T=0.0), task)
    assert any(not torch.equal(value, plain.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("task", KITS)
def test_two_processes_killed_within_an_epoch_end_like_one_undisturbed(task, past, tmp_path):
    alone = fitted(module_of(task, past), task)
    path = killed(tmp_path, module_of(task, past), task, processes=2)
    together = fitted(module_of(task, past, weights=7), task, processes=2, ckpt_path=path)
    for name, value in alone.state_dict().items():
        other = together.state_dict()[name]
        assert torch.allclose(value.double(), other.double(), rtol=1e-4, atol=1e-5), name
