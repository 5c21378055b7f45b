"""How many views a store needs, and how soon a student that reads one is as good as its online twin."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks.contestants import quiet_trainer
from distill_lightning import (
    DigitsDataModule,
    FashionMNISTDataModule,
    InMemoryImageDataModule,
    InputError,
    KDModule,
    OneCycle,
    SmallResNet,
    SupervisedModule,
    TeacherStore,
)

_TEACHERS = 3


class _Clock(pl.Callback):
    """Validation accuracy after each epoch, with the training seconds until then."""

    def __init__(self) -> None:
        self.curve: list[tuple[float, float]] = []
        self.seconds = self.begin = 0.0

    def on_train_start(self, *args: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_start(self, *args: Any) -> None:
        self.begin = self.begin or time.perf_counter()

    def on_validation_start(self, *args: Any) -> None:
        self.seconds += time.perf_counter() - self.begin

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.curve.append((self.seconds, float(trainer.callback_metrics["val/accuracy"])))
        self.begin = time.perf_counter()


def _data(*, small: bool, **options: Any) -> InMemoryImageDataModule:
    """Fashion-MNIST where its files are, else digits, of which every wheel of scikit-learn holds some."""
    try:
        if not small:
            found = FashionMNISTDataModule(subset=1000, test_size=5000, **options)
            found.prepare_data()
            return found
    except (InputError, OSError):
        print("Fashion-MNIST is not here: scikit-learn's digits in its place")
    return DigitsDataModule(subset=200, **options)


def _fit(module: pl.LightningModule, data: InMemoryImageDataModule, epochs: int) -> tuple[list[Any], float]:
    """The validation curve, and the test accuracy in percent."""
    clock = _Clock()
    trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=1.0, callbacks=[clock], num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    return clock.curve, 100 * tested["test/accuracy"]


def compare(
    folder: Path, *, views: Sequence[int | None], seeds: Sequence[int], epochs: int, small: bool = False
) -> dict[str, Any]:
    """KD from three teachers, with stores of so many views (``None``: unlimited, the teachers run in every step).

    Args:
        folder: for the stores.
        views: numbers of views.
        seeds: of students and orders.
        epochs: of every training.
        small: whether to take digits in any case.

    Returns:
        ``rows`` by number of views: test accuracy after the last epoch, and the median seconds of training until the
        validation accuracy that the student alone ends with is reached, the first epochs included, in which the
        teachers run and the store is filled (infinite: never), and of the whole training.
    """
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    options: dict[str, Any] = {"num_classes": 10, "optimizer": optimizer, "lr_scheduler": OneCycle}
    name = type(_data(small=small)).__name__
    teachers: list[nn.Module] = []
    for number in range(_TEACHERS):
        torch.manual_seed(1001 + number)
        teachers.append(SmallResNet(10, width=16))
        _fit(SupervisedModule(teachers[-1], **options), _data(small=small, order_seed=1001 + number), epochs)
    runs = {
        "student alone": [
            _fit(SupervisedModule(_student(seed), **options), _data(small=small, order_seed=seed), epochs)
            for seed in seeds
        ]
    }
    goal = statistics.fmean(curve[-1][1] for curve, _ in runs["student alone"])
    for count in views:
        row = "unlimited" if count is None else str(count)
        runs[row] = []
        for seed in seeds:
            # Every seed fills a store of its own: filling is part of what is measured.
            store = None if count is None else TeacherStore(folder / f"views_{count}_{seed}")
            module = KDModule(_student(seed), teachers, store=store, **options)
            runs[row].append(_fit(module, _data(small=small, order_seed=seed, views=count), epochs))
    rows = [{"views": row, **_row(goal, some)} for row, some in runs.items()]
    return {
        "data": name,
        "teachers": _TEACHERS,
        "epochs": epochs,
        "seeds": len(seeds),
        "goal": 100 * goal,
        "rows": rows,
    }


def _student(seed: int) -> SmallResNet:
    torch.manual_seed(seed)
    return SmallResNet(10, width=8)


def _seconds_until(goal: float, curve: Sequence[tuple[float, float]]) -> float:
    return next((seconds for seconds, accuracy in curve if accuracy >= goal), float("inf"))


def _row(goal: float, runs: Sequence[tuple[Sequence[tuple[float, float]], float]]) -> dict[str, Any]:
    accuracies = [test for _, test in runs]
    return {
        "test_accuracy": statistics.fmean(accuracies),
        "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "seconds_to_goal": statistics.median(_seconds_until(goal, curve) for curve, _ in runs),
        "seconds": statistics.median(curve[-1][0] for curve, _ in runs),
    }
