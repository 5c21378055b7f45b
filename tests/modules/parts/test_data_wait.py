"""The share of time spent waiting for data."""

from types import SimpleNamespace

import pytest
import torch

from distill_lightning import SupervisedModule
from distill_lightning.modules.parts import data_wait
from distill_lightning.modules.parts.data_wait import DataWait
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

NO_BAR = SimpleNamespace(trainer=SimpleNamespace(progress_bar_callback=None))


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to."""
    now = [100.0]
    monkeypatch.setattr(data_wait, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_nothing_was_waited_for_before_the_beginning():
    assert DataWait().share == 0.0


def test_the_share_is_that_of_the_gaps_between_the_steps(clock):
    wait = DataWait()
    wait.epoch_starts(NO_BAR)
    for gap, step in ((2.0, 1.0), (0.5, 1.5)):
        clock(gap)
        wait.batch_starts(NO_BAR)
        clock(step)
        wait.batch_ends(NO_BAR)
    assert wait.share == pytest.approx(2.5 / 5)


def test_a_pause_counts_as_neither(clock):
    wait = DataWait()
    wait.epoch_starts(NO_BAR)
    clock(1.0)
    wait.batch_starts(NO_BAR)
    clock(1.0)
    wait.batch_ends(NO_BAR)
    wait.validation_starts(NO_BAR)
    clock(50.0)
    wait.batch_starts(NO_BAR)
    clock(2.0)
    wait.batch_ends(NO_BAR)
    assert wait.share == pytest.approx(0.25)


def test_an_epoch_begins_anew(clock):
    wait = DataWait()
    wait.epoch_starts(NO_BAR)
    clock(3.0)
    wait.batch_starts(NO_BAR)
    wait.epoch_starts(NO_BAR)
    clock(1.0)
    wait.batch_starts(NO_BAR)
    clock(3.0)
    wait.batch_ends(NO_BAR)
    assert wait.share == pytest.approx(0.25)


class SlowData(TinyDataModule):
    """Whose batches take three seconds each."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def train_dataloader(self):
        loader = super().train_dataloader()
        collate = loader.collate_fn
        loader.collate_fn = lambda batch: (self.clock(3.0), collate(batch))[1]
        return loader


class SlowModule(SupervisedModule):
    """Whose steps take a second each."""

    def terms(self, batch):
        self.clock(1.0)
        return super().terms(batch)


def fitted(clock, **options):
    torch.manual_seed(0)
    module = SlowModule(TinyNet(), num_classes=3)
    module.clock = clock
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=SlowData(clock))
    return trainer


def test_the_progress_bar_shows_it(clock):
    trainer = fitted(clock, enable_progress_bar=True)
    assert trainer.progress_bar_metrics["data_wait"] == pytest.approx(0.75)
    assert "data_wait" not in trainer.logged_metrics


def test_without_a_bar_it_is_nowhere(clock):
    assert "data_wait" not in fitted(clock).callback_metrics
