"""Going on from a checkpoint, wherever in its epoch it was made."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import (
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from distill_lightning.data.columns import length_of
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals.batches import drawing_parts
from distill_lightning.lightning_internals.place import has_trainer
from distill_lightning.lightning_internals.versions import VERSION

# Their orders are not those of a run before.
_DRAWING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _begin_after_finder(trainer: Any) -> None:
    """Have a training begin with its first batch, where `LearningRateFinder` has read some before.

    Lightning 2.5.0 goes on behind the last that it read, and leaves the others of the first epoch out.
    """
    finders = any(isinstance(callback, pl.callbacks.LearningRateFinder) for callback in trainer.callbacks)
    if finders and hasattr(trainer.fit_loop, "_combined_loader"):
        trainer.fit_loop._combined_loader = None


def noted_place(module: Any) -> dict[str, Any]:
    """What a checkpoint says, besides Lightning's own progress, of the place in a training at which it was made.

    Returns:
        ``batches``, how the training data come, ``seeds``, by which they are split and ordered, and ``metrics``, what
        callbacks and schedules can read; nothing where Lightning cannot go on from inside an epoch, or no Trainer is at
        work.
    """
    if VERSION < (2, 5) or not has_trainer(module):
        return {}
    trainer = module.trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    return {"batches": _ways_of_batches(trainer), "seeds": _seeds_of(trainer), "metrics": metrics}


def settle_progress(module: Any, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Bring the progress in a checkpoint to one of two forms, between epochs or after a batch, before it is loaded.

    Lightning tells some ten states apart by the differences of its counters, loses a validation or the end of an epoch
    in some, and leaves counters behind in others from which a second resumption goes astray.

    Args:
        module: that is resumed.
        checkpoint: which is changed.

    Returns:
        What `go_on` needs to know; ``None``: no training is resumed.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    fits = has_trainer(module) and module.trainer.state.fn == "fit"
    if not fits or loops is None or not hasattr(module.trainer.fit_loop, "restarted_mid_epoch"):
        return None
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    validated = loops["epoch_loop.val_loop.batch_progress"]
    # A checkpoint is made before a batch that is done, and an epoch, count as completed.
    done, is_ending = batches["current"]["processed"], epochs["current"]["completed"] < epochs["current"]["processed"]
    is_inside = epochs["current"]["started"] > epochs["current"]["processed"] and done > 0
    is_validation_open = batches["current"]["completed"] < done or validated["total"]["completed"] < max(
        validated["total"].values()
    )
    batches["is_last_batch"] &= is_inside and batches["current"]["ready"] == done
    for kind in ("total", "current"):
        batches[kind] = dict.fromkeys(batches[kind], batches[kind]["processed"] if is_inside or kind == "total" else 0)
        before = epochs[kind]["processed"]
        epochs[kind] = dict.fromkeys(epochs[kind], before) | dict.fromkeys(("ready", "started"), before + is_inside)
        # Begun but not done: so Lightning knows that it has to validate.
        begun = int(is_inside and is_validation_open)
        validated[kind] = dict.fromkeys(validated[kind], 0) | dict.fromkeys(("ready", "started"), begun)
    return {"is_ending": is_ending, **checkpoint.get("place", {})}


def go_on(module: Any) -> None:
    """Let a resumed training go on where its checkpoint was made, as if it had not been interrupted.

    After an epoch's last batch what is left of the epoch comes next: its validation, and what happens at its end. In
    the middle of an epoch, loaders without a state give the batches again that were read before, and they are passed
    over, unless their order was drawn.

    Args:
        module: whose training starts; its ``resumed_at``, from `settle_progress`, is used up.

    Raises:
        InputError: in the middle of an epoch, and the training data now come in other batches.
    """
    trainer, place = module.trainer, module.resumed_at
    module.resumed_at = None
    if place is None:
        return
    epoch, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.batch_progress
    metrics = {name: torch.tensor(value) for name, value in place.get("metrics", {}).items()}
    trainer._logger_connector._callback_metrics.update(metrics)
    if progress.current.ready and not progress.is_last_batch:
        _refuse_other_batches(trainer, place, progress.current.ready)
    if progress.current.ready == 0:
        epoch.restarting = False
    elif progress.is_last_batch or progress.current.ready >= trainer.num_training_batches:
        _stand_at_the_end(trainer)
    else:
        _warn_of_gradients(trainer, progress.current.ready)
        _pass_over(trainer, progress.current.ready)
    # By now Lightning knows whether it has to validate; counts that stayed behind would say so once more.
    epoch.val_loop.batch_progress.reset()
    if module.automatic_optimization:
        is_due = progress.current.ready > 0 and epoch._should_check_val_fx(trainer.fit_loop._data_fetcher)
        # A batch that has its validation before it is counted a second time.
        epoch._batches_that_stepped = trainer.global_step - int(is_due and not epoch._should_accumulate())
    _let_schedules_follow(trainer, place)


def _stand_at_the_end(trainer: Any) -> None:
    """An epoch's last batch is done, and no other follows, whatever the loaders say now."""
    progress, batches = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    progress.is_last_batch = True
    if not math.isinf(batches):
        progress.current.__dict__.update(dict.fromkeys(vars(progress.current), batches))
    fetcher = trainer.fit_loop._data_fetcher
    fetcher.iterator, fetcher.batches = iter(()), []


def _warn_of_gradients(trainer: Any, begun: int) -> None:
    if begun % trainer.accumulate_grad_batches:
        rank_zero_warn(
            "the checkpoint was made between two optimiser steps, and the gradients that were accumulated for the next "
            "one are not in it: resume from a checkpoint that was made after a step"
        )


def _let_schedules_follow(trainer: Any, place: dict[str, Any]) -> None:
    """Have schedules that follow a metric asked at the end of the epoch; Lightning has no metrics left and does not."""
    fit = trainer.fit_loop
    if "metrics" in place or fit.epoch_loop.batch_progress.current.ready == 0:
        fit._restarting = False
    if "metrics" in place and place["is_ending"]:
        # They come after the callbacks that make checkpoints.
        fit.epoch_progress.current.completed -= 1
        fit.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        fit.epoch_progress.current.completed += 1


def _ways_of_batches(trainer: Any) -> list[dict[str, int | None]]:
    """How each loader's batches come: samples in one, batches in an epoch, and the processes that share the data.

    Of a loader whose batches are the same in any number of processes, what it says of itself in the place of the first
    and the last.
    """
    loader = trainer.fit_loop._combined_loader
    return [_way_of(part, trainer.world_size) for part in ([] if loader is None else loader.flattened)]


def _way_of(loader: Any, processes: int) -> dict[str, int | None]:
    own, number = getattr(loader, "way", None), length_of(loader)
    if isinstance(own, dict) and "processes" not in own:
        return {**own, "number": number}
    return {"size": _batch_size_of(loader), "number": number, "processes": processes}


def _seeds_of(trainer: Any) -> dict[str, int]:
    """By which seeds a data module splits its samples and orders them, as far as it has such."""
    data = getattr(trainer, "datamodule", None)
    # The data module within an IndexedDataModule.
    data = vars(data).get("datamodule", data) if data is not None else None
    seed, order = getattr(data, "seed", None), getattr(data, "order_seed", None)
    found = {"seed": seed, "order_seed": seed if order is None else order}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _batch_size_of(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _refuse_other_batches(trainer: Any, place: dict[str, Any], begun: int) -> None:
    now, before = _ways_of_batches(trainer), place.get("batches", [])
    if before and before != now:
        raise InputError(
            f"the checkpoint was made after {begun} batches of an epoch, where the training data came in "
            f"{_described(before)}, and now they come in {_described(now)}: samples would be read twice or never; "
            "resume with the same, or from a checkpoint of an epoch's end"
        )
    seeds = _seeds_of(trainer)
    seeds_before = place.get("seeds", seeds)
    if seeds_before != seeds:
        was, is_now = (", ".join(f"{name}={value}" for name, value in of.items()) for of in (seeds_before, seeds))
        raise InputError(
            f"the checkpoint was made after {begun} batches of an epoch, of data with {was or 'no seed'}, and now they "
            f"have {is_now or 'none'}: samples would be read twice or never; resume with the same, or from a "
            "checkpoint of an epoch's end"
        )


def _described(ways: list[dict[str, int | None]]) -> str:
    return " and ".join(
        f"{'an unknown number of' if way['number'] is None else way['number']} batches of {_size_described(way)}"
        for way in ways
    )


def _size_described(way: dict[str, int | None]) -> str:
    if "processes" not in way:
        told = ", ".join(f"{name}={value}" for name, value in way.items() if name != "number")
        return f"{told} of all processes together"
    size = f"{way['size'] or 'an unknown number of'} samples"
    return f"{size} in {way['processes']} process{'es' if way['processes'] != 1 else ''}"


def _pass_over(trainer: Any, batches: int) -> None:
    """Have the loaders begin behind some batches of the epoch."""
    fetcher, loaders = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader.flattened
    for loader in loaders:
        if hasattr(loader, "begin_after"):
            # It counts those that were fetched; the last of them may not have been trained on.
            loader.begin_after(batches, epoch=trainer.current_epoch)
    if any(
        isinstance(part, _DRAWING) or hasattr(part, "load_state_dict") for one in loaders for part in drawing_parts(one)
    ):
        return
    for part in (part for loader in loaders for part in drawing_parts(loader)):
        if hasattr(part, "set_epoch"):
            part.set_epoch(trainer.current_epoch)
    # Once more, because workers have begun with the order of another epoch.
    iter(fetcher)
    for _ in range(batches):
        next(fetcher)
    # Lightning adds them.
    fetcher.fetched -= batches
