"""Everything that depends on Lightning's insides, in one place.

What is public in Lightning stands where it is used; what it may change without notice stands here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError

AVERAGING: tuple[Any, ...] = (
    pl.callbacks.StochasticWeightAveraging,
    # Since Lightning 2.6.
    *([pl.callbacks.WeightAveraging] if hasattr(pl.callbacks, "WeightAveraging") else []),
)
"""Callbacks that keep an average of the parameters that there were at first."""

_NEVER_REACHED = 10**9


# Where a training is


def place_of(module: Any, batch_idx: int) -> tuple[int, int]:
    """Epoch, and the batch's place among those of all processes in it; both 0 without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return 0, 0
    return trainer.current_epoch, batch_idx * trainer.world_size + trainer.global_rank


def has_trainer(module: Any) -> bool:
    """Whether a Trainer runs the module."""
    return getattr(module, "_trainer", None) is not None


def begins_anew(trainer: Any) -> bool:
    """Whether the training starts from its beginning, not from a checkpoint."""
    return bool(trainer.fit_loop.total_batch_idx < 0)


def validation_interval(module: Any) -> int:
    """Number of epochs from one validation to the next; 1 where the steps are counted, or without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    return 1 if trainer is None else trainer.check_val_every_n_epoch or 1


def planned_steps(module: pl.LightningModule) -> float:
    """Number of optimiser steps of the whole training, or of the phase of it that a schedule is made for.

    Returns:
        Infinity if it has no end, less than 1 if its data have no length.
    """
    # Not an attribute of the module, which would take the Trainer along wherever it is copied to.
    asked = [getattr(callback, "phase_length", None) for callback in cast("Any", module.trainer).callbacks]
    lengths = [length for ask in asked if ask is not None and (length := ask()) is not None]
    steps = lengths[0] if lengths else module.trainer.estimated_stepping_batches
    if module.trainer._checkpoint_connector._loaded_checkpoint:
        # To count the batches, Lightning has begun to read them, before it knows where in its epoch the checkpoint was
        # made: it has to begin once more.
        module.trainer.fit_loop._combined_loader = None
    return steps


def total_steps(module: pl.LightningModule) -> int:
    """As `planned_steps`.

    Raises:
        InputError: the training has no end, or its data have no length.
    """
    steps = planned_steps(module)
    if steps == float("inf"):
        raise InputError("OneCycle needs the length of the training: give the Trainer max_epochs or max_steps")
    if steps < 1:
        raise InputError(
            f"OneCycle needs the length of the training, which comes to {steps} steps: give the Trainer max_steps, or "
            "limit_train_batches where the training data have no length, or OneCycle total_steps"
        )
    return int(steps)


def steps_left(module: pl.LightningModule) -> int | None:
    """Number of optimiser steps to the end of a resumed training, asked when it starts.

    Returns:
        ``None``: it is not resumed, has no length, or a callback divides it into phases.
    """
    trainer = cast("Any", module.trainer)
    phases = [ask for callback in trainer.callbacks if (ask := getattr(callback, "phase_length", None)) is not None]
    batches = trainer.num_training_batches
    if begins_anew(trainer) or any(ask() is not None for ask in phases):
        return None
    left = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(batches):
        progress = trainer.fit_loop.epoch_loop.batch_progress
        begun = 0 if progress.is_last_batch else progress.current.ready
        accumulated = trainer.accumulate_grad_batches
        left = (trainer.max_epochs - trainer.current_epoch) * math.ceil(batches / accumulated) - begun // accumulated
    if trainer.max_steps >= 0:
        left = min(left, trainer.max_steps - trainer.global_step)
    return None if math.isinf(left) else int(left)


def epochs_in(checkpoint: Mapping[str, Any]) -> int | None:
    """The whole epochs of training that a checkpoint was written after; ``None``: a Trainer did not write it.

    Its ``"epoch"`` alone does not tell: in the last batch of the first epoch it is 0, and 1 once the training is over.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return None
    begun, whole = (int(loop["epoch_progress"]["current"][count]) for count in ("ready", "completed"))
    return begun if loop["epoch_loop.batch_progress"]["is_last_batch"] else whole


def forget_known_metrics(module: Any) -> None:
    """Have a module look again for the metrics among its attributes, of which it logs no others."""
    module._metric_attributes = None


def summarise_frozen(module: Any, lines: Iterable[str]) -> None:
    """Tell of networks beside the module where Lightning has printed its model summary."""
    if any(isinstance(callback, pl.callbacks.ModelSummary) for callback in module.trainer.callbacks):
        for line in lines:
            rank_zero_info(line)


# The Trainer's own batches, for callbacks that look at the data before or after the training


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
                prepared = self.pl_module._on_before_batch_transfer(converted, dataloader_idx=self.number)
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


def validation_loaders(trainer: Any) -> Any:
    """What the data gave a training for its validation: a loader, a collection of them, or ``None``."""
    if trainer.val_dataloaders is None:
        # Without a sanity check, the Trainer asks for them only when it first validates.
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders


def step_precision(trainer: Any) -> AbstractContextManager[Any]:
    """The precision in which a Trainer's validation steps compute."""
    context: AbstractContextManager[Any] = trainer.precision_plugin.val_step_context()
    return context


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


# How a Trainer is told that the network it trains has changed


def refuse_reshaping(trainer: Any, name: str) -> None:
    """Refuse a training in which something holds on to the parameters that there were.

    Raises:
        InputError: several processes, or a callback that averages.
    """
    if trainer.world_size > 1:
        raise InputError(
            f"step {name} gives the network other parameters, which several processes cannot agree on: train it in "
            "one (devices=1), or give it at='end'"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGING):
            raise InputError(
                f"step {name} gives the network other parameters, of which {type(callback).__name__} keeps no "
                "average: leave one of them out, or give the step at='end'"
            )


def keep_patience(trainer: Any) -> None:
    """Have no `EarlyStopping` lose its patience as long as there are phases to come; each of them begins at zero."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.EarlyStopping):
            # Lightning asks it after all other callbacks: what it counts then must be too little.
            callback.wait_count = -_NEVER_REACHED


def stand_last(trainer: Any, callback: pl.Callback) -> None:
    """Come after the callbacks that write weights, and before those that save them."""
    others = [other for other in trainer.callbacks if other is not callback]
    place = next((n for n, other in enumerate(others) if isinstance(other, pl.callbacks.Checkpoint)), len(others))
    # A new list, because Lightning is walking through the old one.
    trainer.callbacks = [*others[:place], callback, *others[place:]]


def new_optimizer(trainer: pl.Trainer, old: Optimizer, *, restart: bool) -> None:
    """Have the module make its optimiser and schedule for the parameters that there are now."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    trainer.strategy.setup_optimizers(trainer)
    if restart:
        return
    for group, before in zip(trainer.optimizers[0].param_groups, old.param_groups, strict=True):
        group.update({name: value for name, value in before.items() if name != "params"})
    for config, schedule in zip(trainer.lr_scheduler_configs, schedules, strict=True):
        config.scheduler.load_state_dict(schedule.state_dict())


def forget_best(trainer: Any) -> None:
    """What was the best so far was another network: whatever comes now is better."""
    for callback in trainer.callbacks:
        if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.monitor is not None:
            worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback.best_k_models = {path: worst.to(score.device) for path, score in callback.best_k_models.items()}
            callback.kth_value = worst
            callback.best_model_score = worst if callback.best_k_models else None
        elif isinstance(callback, pl.callbacks.EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
