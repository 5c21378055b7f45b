"""Where a training is, how long it is, and under what circumstances it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch

import distill_lightning
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals.versions import VERSION

_OF_LIGHTNING = vars(pl.LightningDataModule()).keys()


def place_of(module: Any, batch_idx: int) -> tuple[int, int]:
    """Epoch, and the batch's place among those of all processes in it; both 0 without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return 0, 0
    return trainer.current_epoch, batch_idx * trainer.world_size + trainer.global_rank


def has_trainer(module: Any) -> bool:
    """Whether a Trainer runs the module."""
    return getattr(module, "_trainer", None) is not None


def data_module_of(module: Any) -> Any:
    """The data module of a module's Trainer, that within an `IndexedDataModule`; ``None``: there is none."""
    try:
        data = getattr(getattr(module, "_trainer", None), "datamodule", None)
    except ReferenceError:
        # Lightning 1.9 refers to the Trainer weakly, and it is gone.
        return None
    return None if data is None else vars(data).get("datamodule", data)


def circumstances(module: Any) -> dict[str, Any]:
    """With what and on which data a module is trained, and how good it is now, for whoever gets the checkpoint.

    Returns:
        Plain values: ``"versions"`` by package; with a Trainer ``"training"``, its length, precision and optimiser;
        ``"metrics"``, those of the last validation and test by name; and ``"data"``, the data module's class, its
        plain options without paths, which are the machine's own, and what its inputs and classes mean.
    """
    versions = {"distill_lightning": distill_lightning.__version__, "torch": str(torch.__version__)}
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return {"versions": versions}
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(("val/", "test/")) and value.numel() == 1
    }
    # Indices are for the training alone.
    data = vars(trainer.datamodule or object).get("datamodule", trainer.datamodule)
    options = {} if data is None else {name: vars(data)[name] for name in vars(data).keys() - _OF_LIGHTNING}
    name = f"{type(data).__module__}.{type(data).__qualname__}"
    told = None if data is None else {"class": name, **_plain(options), **_meaning(data)}
    optimizers = [{"class": type(one).__name__, **_plain(one.defaults)} for one in trainer.optimizers]
    training = {"max_epochs": trainer.max_epochs, "precision": str(trainer.precision), "optimizers": optimizers}
    return {"versions": versions, "training": training, "metrics": metrics, "data": told}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and words of some options, in the order of their names."""
    return {
        name: value
        for name, value in sorted(options.items())
        if type(value) in (int, float, bool, str) and not name.startswith("_") and "/" not in str(value)
    }


def _meaning(data: Any) -> dict[str, Any]:
    """Names of the classes, and mean and standard deviation by channel, where a data module has them as attributes."""
    found = {name: getattr(data, name, None) for name in ("class_names", "mean", "std")}
    rows = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in found.items()}
    return {name: row for name, row in rows.items() if row and all(type(one) in (int, float, str) for one in row)}


def begins_anew(trainer: Any) -> bool:
    """Whether the training starts from its beginning, not from a checkpoint."""
    return bool(trainer.fit_loop.total_batch_idx < 0)


def is_last_batch(trainer: Any) -> bool:
    """Whether the training batch that is done is the last of its epoch."""
    # Lightning 1.9 tells only where no limit ends the epoch.
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(trainer.is_last_batch or ready >= trainer.num_training_batches)


def validation_interval(module: Any) -> int:
    """Number of epochs from one validation to the next; 1 where the steps are counted, or without a Trainer."""
    trainer = getattr(module, "_trainer", None)
    return 1 if trainer is None else trainer.check_val_every_n_epoch or 1


def planned_epochs(trainer: Any) -> int | None:
    """``max_epochs`` as the user gave it.

    Where there is BatchNorm, `StochasticWeightAveraging` adds an epoch to it that trains nothing and only measures the
    statistics of the averaged weights.
    """
    epochs: int | None = trainer.max_epochs
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, pl.callbacks.StochasticWeightAveraging):
            # Set when the fit starts, before the module hears of it.
            epochs = getattr(callback, "_max_epochs", epochs)
    return epochs


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
    left, epochs = math.inf, planned_epochs(trainer)
    if epochs is not None and epochs >= 0 and not math.isinf(batches):
        # Older versions do not go on from inside an epoch.
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready if VERSION >= (2, 5) else 0
        accumulated = trainer.accumulate_grad_batches
        stepped = math.ceil(begun / accumulated) if begun == batches else begun // accumulated
        left = (epochs - trainer.current_epoch) * math.ceil(batches / accumulated) - stepped
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
