"""The Trainer's own batches, for callbacks that look at the data before or after the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch

from distill_lightning.data.batch import Batch


class TrainersBatches:
    """A loader whose batches go the way that the Trainer's own go, through the module's and the data's hooks.

    Args:
        trainer: at work.
        pl_module: whose batches they are.
        loader: one of the Trainer's.
        number: of the loader among those of its kind.
        training: whether the hooks are to see a training or a validation, which is not augmented.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Iterable[Any], *, number: int, training: bool
    ) -> None:
        self.trainer, self.pl_module, self.loader = trainer, pl_module, loader
        self.number, self.training = number, training

    def __iter__(self) -> Iterator[Batch]:
        with self._stage():
            batches = iter(self.loader)
        while True:
            with self._stage():
                batch = next(batches, None)
                if batch is None:
                    return
                converted = self.trainer.precision_plugin.convert_input(batch)
                prepared = self.pl_module._on_before_batch_transfer(converted, dataloader_idx=self.number)  # noqa: SLF001
                moved = self.trainer.strategy.batch_to_device(prepared, dataloader_idx=self.number)
            yield Batch.of(moved)

    @contextmanager
    def _stage(self) -> Iterator[None]:
        before = self.trainer.state.stage
        self.trainer.state.stage = (
            type(before).TRAINING if self.training else type(before).VALIDATING  # type: ignore[union-attr]
        )
        try:
            yield
        finally:
            self.trainer.state.stage = before


def drawing_parts(loader: Any) -> Iterator[Any]:
    """A loader and its samplers: what may have an epoch, or a generator of its own."""
    loader = loader.loader if isinstance(loader, TrainersBatches) else loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    for part in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if part is not None:
            yield part


@contextmanager
def undrawn(loader: Any) -> Iterator[None]:
    """Put a loader's epoch and its own generators back to what they were."""
    parts = list(drawing_parts(loader))
    epochs = [(part, part.epoch) for part in parts if hasattr(part, "set_epoch") and hasattr(part, "epoch")]
    generators = [part.generator for part in parts if isinstance(getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for part, epoch in epochs:
            part.set_epoch(epoch)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
