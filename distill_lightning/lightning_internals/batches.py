"""The Trainer's own batches, their loaders, and the precision that they are computed in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
)

from distill_lightning.data.batch import Batch
from distill_lightning.lightning_internals.versions import VERSION


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
                prepared = self.pl_module._on_before_batch_transfer(self._converted(batch), dataloader_idx=self.number)
                moved = self.trainer.strategy.batch_to_device(prepared, dataloader_idx=self.number)
            yield Batch.of(moved)

    def _converted(self, batch: Any) -> Any:
        plugin: Any = self.trainer.precision_plugin
        if VERSION >= (2, 0):
            return plugin.convert_input(batch)
        return apply_to_collection(batch, torch.Tensor, plugin.convert_input) if plugin.precision == "64" else batch

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


def repeated_rows(module: Any, batch_idx: int, dataloader_idx: int, rows: int) -> Tensor | None:
    """Which rows of an evaluation's batch a distributed sampler has added, so that all processes have equally many.

    Args:
        module: that is evaluated.
        batch_idx: number of the batch in this process.
        dataloader_idx: number of the loader.
        rows: of the batch.

    Returns:
        bool ``(N,)`` on the host; ``None``: none of them.
    """
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.world_size == 1:
        return None
    evaluation = trainer._evaluation_loop
    loaders = evaluation._combined_loader.flattened if VERSION >= (2, 0) else evaluation.dataloaders
    loader = loaders[dataloader_idx]
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batches is None else batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
        return None
    if type(batches) is not BatchSampler:
        rank_zero_warn(
            f"{sampler.total_size - len(sampler.dataset)} samples are evaluated twice, so that all processes have "  # type: ignore[arg-type]
            "equally many, and with a batch sampler of its own a data set does not tell which: validate and test in "
            "one process (devices=1) for exact metrics"
        )
        return None
    places = sampler.rank + sampler.num_replicas * (batch_idx * batches.batch_size + torch.arange(rows))
    repeated = places >= len(sampler.dataset)  # type: ignore[arg-type]
    return repeated if bool(repeated.any()) else None


def suffix_of_loader(number: int) -> str:
    """What stands behind the name of a value that is logged for one of several loaders when all are done.

    Lightning's own, which versions before 2.6 keep for what is logged in a step.
    """
    return f"/dataloader_idx_{number}" if VERSION >= (2, 6) else f"/loader_{number}"


def training_loaders(trainer: Any) -> Any:
    """What the data gave a training: a loader, a collection of them, or ``None``."""
    if VERSION >= (2, 0):
        return trainer.train_dataloader
    # Lightning 1.9 puts them together, and asks for none where no epoch is left.
    if trainer.train_dataloader is None and trainer._data_connector._train_dataloader_source.instance is not None:
        trainer.reset_train_dataloader()
    return getattr(trainer.train_dataloader, "loaders", None)


def validation_loaders(trainer: Any) -> Any:
    """What the data gave a training for its validation: a loader, a collection of them, or ``None``."""
    if trainer.val_dataloaders is None:
        # Without a sanity check, the Trainer asks for them only when it first validates.
        if VERSION >= (2, 0):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        else:
            trainer.reset_val_dataloader()
    return trainer.val_dataloaders


def watch_first_loader(trainer: Any) -> None:
    """Have schedules that watch a validation metric watch that of the first of several loaders, which have one each."""
    watching = [config for config in getattr(trainer, "lr_scheduler_configs", ()) if config.monitor is not None]
    if not watching:
        return
    validation_loaders(trainer)
    if len(trainer.num_val_batches) > 1:
        for config in watching:
            first = "/dataloader_idx_0"
            if config.monitor.startswith("val/") and not config.monitor.endswith(first):
                config.monitor += first


def step_precision(trainer: Any) -> AbstractContextManager[Any]:
    """The precision in which a Trainer's validation steps compute."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.val_step_context()
    return context


def convert_early(module: Any, networks: Iterable[Any]) -> None:
    """Give networks the precision that a module is about to get, with ``"bf16-true"`` say.

    A Trainer loads a checkpoint before it converts the module.
    """
    plugin = getattr(getattr(module, "_trainer", None), "precision_plugin", None)
    if type(plugin).__name__ in ("HalfPrecision", "DoublePrecision"):
        for network in networks:
            cast("Any", plugin).convert_module(network)


def trains(trainer: Any) -> bool:
    """Whether the batches are trained on.

    In the epoch that `StochasticWeightAveraging` adds, Lightning computes no gradients, but makes a step by those that
    are left of the last batch.
    """
    return not trainer.fit_loop._skip_backward


def scales_gradients(trainer: Any) -> bool:
    """Whether a gradient scaler skips the steps whose gradients are not finite, as with ``precision="16-mixed"``."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def spawns(trainer: Any) -> bool:
    """Whether the Trainer spawns processes, whose changes to the module are lost."""
    return getattr(trainer.strategy, "_start_method", "popen") != "popen"


def drawing_parts(loader: Any) -> Iterator[Any]:
    """A loader and its samplers: what may have an epoch, or a generator of its own."""
    loader = loader.loader if isinstance(loader, TrainersBatches) else loader
    batch_sampler = getattr(loader, "batch_sampler", None)
    for part in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        if part is not None:
            yield part


@contextmanager
def undrawn(loader: Any) -> Iterator[None]:
    """Afterwards, put a loader's epoch and generators back to what they were."""
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
