"""The networks and data of the throughput benchmark, and a turn of each contestant."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.peers import LAYER
from distill_lightning import (
    DistillationModule,
    ExtracurricularModule,
    FEEDModule,
    InMemoryImageDataModule,
    KDModule,
    MEALV2Module,
    OfficialDiscriminator,
    TeacherStore,
    pytorchcv_network,
)
from distill_lightning.data.datamodules import Images
from distill_lightning.teachers.recorder import record

CLASSES, BATCH_SIZE = 100, 64
# Small, so that random labels leave the weights in the range where arithmetic has its usual speed.
LEARNING_RATE = 0.01
_WARM_UP_STEPS = 2
Options = dict[str, Any]


def student() -> nn.Module:
    """ResNet-20 for 32x32 images of 100 classes, 0.28 million parameters."""
    torch.manual_seed(0)
    return pytorchcv_network("resnet20_cifar100", num_classes=CLASSES)


def teachers(count: int) -> list[nn.Module]:
    """ResNet-56 for the same; untrained, which costs as much."""
    networks = []
    for number in range(count):
        torch.manual_seed(1 + number)
        networks.append(pytorchcv_network("resnet56_cifar100", num_classes=CLASSES).eval())
    return networks


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """As in the plain loop."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


class RandomImages(InMemoryImageDataModule):
    """CIFAR's shapes, crops and flips, and nothing to be seen.

    Args:
        count: number of training images.
        size: rows and columns.
        channels: of an image.
        classes: number of them.
        views: number of different views of an image.
        batch_size: images per batch.
        partners: whether each view comes with another image.
    """

    mean, std = 0.5, 0.25

    def __init__(
        self,
        count: int,
        *,
        size: int = 32,
        channels: int = 3,
        classes: int = CLASSES,
        views: int = 1,
        batch_size: int = BATCH_SIZE,
        partners: bool = False,
    ) -> None:
        super().__init__(val_size=1, batch_size=batch_size, padding=4, flip=True, views=views, partners=partners)
        self.count, self.num_classes = count, classes
        self.input_shape = (channels, size, size)
        self.class_names = tuple(str(number) for number in range(classes))

    def read(self) -> tuple[Images, Images]:
        """Seeded noise."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (self.count + 1, *self.input_shape), generator=generator, dtype=torch.uint8)
        targets = torch.randint(cast("int", self.num_classes), (self.count + 1,), generator=generator)
        every = Images(pixels, targets)
        return every, every.take(torch.arange(1))


class StepTimes(pl.Callback):
    """Seconds of a step in a fit, without its first steps, with all that happens at the end of its epoch.

    Args:
        warm_up: number of first steps that are left out.
    """

    def __init__(self, warm_up: int = _WARM_UP_STEPS) -> None:
        self.warm_up = warm_up
        self.begin = self.seconds = 0.0
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        """The clock starts when the first steps are done."""
        number = args[-1]
        if number == self.warm_up - 1:
            self.begin, self.steps = time.perf_counter(), 0
        else:
            self.steps += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """And stops here."""
        self.seconds = (time.perf_counter() - self.begin) / self.steps


def quiet_trainer(**options: Any) -> pl.Trainer:
    """One epoch on the CPU, without logger, checkpoints, bar, summary and validation."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 1, "limit_val_batches": 0} | options),
    )


def trained(module: pl.LightningModule, data: pl.LightningDataModule, *, epochs: int = 1) -> Callable[[], float]:
    """A turn is a fit: seconds of a step."""

    def turn() -> float:
        times = StepTimes()
        quiet_trainer(max_epochs=epochs, callbacks=[times]).fit(module, datamodule=data)
        return times.seconds

    return turn


def looped(step: Callable[[Tensor, Tensor], None], data: RandomImages) -> Callable[[], float]:
    """A turn is a plain loop over the same batches, which lie in memory: seconds of a step."""
    batches = [(batch.input, batch.target) for batch in data.train_dataloader()]

    def turn() -> float:
        for images, labels in batches[:_WARM_UP_STEPS]:
            step(images, labels)
        begin = time.perf_counter()
        for images, labels in batches[_WARM_UP_STEPS:]:
            step(images, labels)
        return (time.perf_counter() - begin) / (len(batches) - _WARM_UP_STEPS)

    return turn


METHODS: dict[str, Callable[..., DistillationModule]] = {
    "kd": lambda network, frozen, **options: KDModule(
        network, frozen, num_classes=CLASSES, optimizer=sgd, temperature=4.0, hard_label_weight=0.1, **options
    ),
    "meal_v2": lambda network, frozen, **options: MEALV2Module(
        network, frozen, num_classes=CLASSES, optimizer=sgd, discriminator=OfficialDiscriminator(), **options
    ),
    "feed": lambda network, frozen, **options: FEEDModule(
        network, frozen, num_classes=CLASSES, optimizer=sgd, student_layer=LAYER, input_shape=(3, 32, 32), **options
    ),
    # As many mixed inputs as others; its data have partners.
    "extracurricular": lambda network, frozen, **options: ExtracurricularModule(
        network, frozen, num_classes=CLASSES, optimizer=sgd, **options
    ),
}


class Stores:
    """Complete stores of what the teachers say about some data, in a folder that goes with the process.

    Args:
        data: whose training images they are about.
    """

    def __init__(self, data: RandomImages) -> None:
        self.data = data
        self.folder = Path(tempfile.mkdtemp(prefix="distill_benchmark_"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._numbers: Iterator[int] = itertools.count()

    def filled(self, method: str, count: int) -> TeacherStore:
        """The answers of so many teachers to a method's question."""
        path = self.folder / f"{method}_{count}"
        if not path.exists():
            module = METHODS[method](student(), TeacherStore(path, teachers(count)))
            record(quiet_trainer(), module, self.data)
        return TeacherStore(path, fill="never")

    def fresh(self, networks: list[nn.Module]) -> TeacherStore:
        """One that is empty, and the networks that fill it."""
        return TeacherStore(self.folder / f"fresh_{next(self._numbers)}", networks)

    def reading(self, method: str, count: int, **options: Any) -> DistillationModule:
        """A method that reads the answers of so many teachers, and has none itself."""
        return METHODS[method](student(), self.filled(method, count), **options)
