"""How many views a store needs, and how soon a student that reads one is as good as its online twin.

    python -m benchmarks.views

does on Fashion-MNIST (4,000 images, 24 epochs, 3 seeds; half an hour) what ``make bench`` does on digits in two
minutes, and writes ``benchmarks/results/views.json``.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks.contestants import quiet_trainer
from benchmarks.timing import circumstances
from distill_lightning import (
    DigitsDataModule,
    FashionMNISTDataModule,
    InMemoryImageDataModule,
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


def _digits(**options: Any) -> InMemoryImageDataModule:
    return DigitsDataModule(subset=200, batch_size=32, **options)


def _fashion_mnist(**options: Any) -> InMemoryImageDataModule:
    return FashionMNISTDataModule(subset=4000, **options)


def _fit(module: pl.LightningModule, data: InMemoryImageDataModule, epochs: int) -> tuple[list[Any], float]:
    """The validation curve, and the test accuracy in percent."""
    clock = _Clock()
    trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=1.0, callbacks=[clock], num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    return clock.curve, 100 * tested["test/accuracy"]


def compare(
    folder: Path,
    *,
    views: Sequence[int | None],
    seeds: Sequence[int],
    epochs: int,
    data_of: Callable[..., InMemoryImageDataModule] = _digits,
) -> dict[str, Any]:
    """KD from three teachers, with stores of so many views (``None``: unlimited, the teachers run in every step).

    Args:
        folder: for the stores.
        views: numbers of views.
        seeds: of students and orders.
        epochs: of every training.
        data_of: makes the data module from its ``views`` and ``order_seed``.

    Returns:
        ``rows`` by number of views: test accuracy after the last epoch, and the median seconds of training until the
        validation accuracy that the student alone ends with is reached, the first epochs included, in which the
        teachers run and the store is filled (infinite: never), and of the whole training.
    """
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    options: dict[str, Any] = {"num_classes": 10, "optimizer": optimizer, "lr_scheduler": OneCycle}
    name = type(data_of()).__name__
    teachers: list[nn.Module] = []
    for number in range(_TEACHERS):
        torch.manual_seed(1001 + number)
        teachers.append(SmallResNet(10, width=16))
        _fit(SupervisedModule(teachers[-1], **options), data_of(order_seed=1001 + number), epochs)
    runs = {
        "student alone": [
            _fit(SupervisedModule(_student(seed), **options), data_of(order_seed=seed), epochs) for seed in seeds
        ]
    }
    goal = statistics.fmean(curve[-1][1] for curve, _ in runs["student alone"])
    for count in views:
        row = "unlimited" if count is None else str(count)
        runs[row] = []
        for seed in seeds:
            # Every seed fills a store of its own: filling is part of what is measured.
            given = teachers if count is None else TeacherStore(folder / f"views_{count}_{seed}", teachers)
            module = KDModule(_student(seed), given, **options)
            runs[row].append(_fit(module, data_of(order_seed=seed, views=count), epochs))
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


def main() -> None:
    """The longer run."""
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), views=(1, 4, 16, None), seeds=(0, 1, 2), epochs=24, data_of=_fashion_mnist)
    for row in found["rows"]:
        print(
            "  ".join(f"{name} {value if isinstance(value, str) else round(value, 2)}" for name, value in row.items())
        )
    path = Path(__file__).parent / "results/views.json"
    path.write_text(json.dumps({"machine": circumstances(), **found}, indent=1) + "\n")
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
