"""Means over an epoch, against Lightning's own and against plain arithmetic."""

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import SupervisedModule
from distill_lightning.modules.parts.means import RunningMeans
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def means_of(*batches):
    running = RunningMeans()
    for values, samples in batches:
        running.add({name: torch.tensor(value) for name, value in values.items()}, samples)
    return {name: (float(mean), samples) for name, mean, samples in running.means()}


def test_a_batch_counts_by_its_samples():
    found = means_of(({"a": 1.0, "b": -2.0}, 3), ({"a": 5.0, "b": 0.5}, 1))
    assert found == {"a": (2.0, 4), "b": (-1.375, 4)}


def test_a_scalar_that_comes_and_goes_is_averaged_over_the_batches_that_had_it():
    found = means_of(({"a": 1.0}, 2), ({"a": 2.0, "b": 7.0}, 2), ({"a": 6.0}, 4), ({"b": 1.0}, 1))
    assert found == {"a": (pytest.approx((2 + 4 + 24) / 8), 8), "b": (pytest.approx((14 + 1) / 3), 3)}


def test_what_is_added_later_changes_nothing_that_was_given():
    running = RunningMeans()
    value = torch.tensor(1.0, requires_grad=True)
    running.add({"a": value * 2}, 1)
    (_, mean, _), *_ = running.means()
    running.add({"a": value * 4}, 1)
    assert float(mean) == 2.0
    assert not mean.requires_grad
    assert [float(mean) for _, mean, _ in running.means()] == [3.0]
    running.forget()
    assert not list(running.means())


def test_half_precision_and_what_is_not_finite_pass():
    running = RunningMeans()
    running.add({"a": torch.tensor(1.0, dtype=torch.bfloat16), "b": torch.tensor(float("nan"))}, 2)
    running.add({"a": torch.tensor(2.0, dtype=torch.float64), "b": torch.tensor(1.0)}, 2)
    found = {name: mean for name, mean, _ in running.means()}
    assert found["a"] == 1.5
    assert found["a"].dtype == torch.float32
    assert torch.isnan(found["b"])


class AlsoLogged(SupervisedModule):
    """Logs its term in Lightning's way, too."""

    def terms(self, batch):
        terms = super().terms(batch)
        self.log("lightning", terms["ce"].detach(), on_step=False, on_epoch=True, batch_size=batch.size)
        return terms


class Seen(pl.Callback):
    """What can be read at the end of each epoch."""

    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append(dict(trainer.callback_metrics))


@pytest.mark.slow
def test_the_module_logs_what_lightning_would_have_logged():
    torch.manual_seed(0)
    module = AlsoLogged(TinyNet(), num_classes=3)
    seen = Seen()
    # 21 samples in batches of 8: the last one has 5.
    tiny_trainer(max_epochs=3, callbacks=[seen]).fit(module, datamodule=TinyDataModule(samples=21))
    assert len(seen.values) == 3
    for metrics in seen.values:
        assert float(metrics["train/loss"]) == pytest.approx(float(metrics["lightning"]), rel=1e-6)
        assert float(metrics["train/ce"]) == float(metrics["train/loss"])


@pytest.mark.slow
def test_a_checkpoint_can_be_chosen_by_a_training_mean(tmp_path):
    torch.manual_seed(0)
    best = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, monitor="train/loss", save_top_k=1)
    trainer = tiny_trainer(max_epochs=3, callbacks=[best], enable_checkpointing=True)
    trainer.fit(SupervisedModule(TinyNet(), num_classes=3), datamodule=TinyDataModule())
    assert float(best.best_model_score) <= float(trainer.callback_metrics["train/loss"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.7},
        {"max_steps": 5, "max_epochs": -1},
        {"val_check_interval": 1},
        {"min_epochs": 2},
    ],
    ids=str,
)
def test_whatever_the_trainers_options_the_means_are_lightnings(options):
    torch.manual_seed(0)
    seen = Seen()
    trainer = tiny_trainer(**({"max_epochs": 2, "callbacks": [seen]} | options))
    trainer.fit(AlsoLogged(TinyNet(), num_classes=3), datamodule=TinyDataModule(samples=21))
    assert seen.values
    for metrics in seen.values:
        assert float(metrics["train/loss"]) == pytest.approx(float(metrics["lightning"]), rel=1e-6)


class StopInside(pl.Callback):
    """Ends the training in the middle of its second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.should_stop = True


def test_an_epoch_that_is_cut_short_has_the_means_of_its_batches():
    torch.manual_seed(0)
    seen = Seen()
    trainer = tiny_trainer(max_epochs=4, callbacks=[StopInside(), seen])
    trainer.fit(AlsoLogged(TinyNet(), num_classes=3), datamodule=TinyDataModule(samples=21))
    (_, last) = seen.values
    assert float(last["train/loss"]) == pytest.approx(float(last["lightning"]), rel=1e-6)
