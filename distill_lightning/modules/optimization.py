"""Optimisers and schedules as functions that make them, so that a configuration can hold them; compiled networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytorch_lightning as pl
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distill_lightning.errors import InputError, refusing
from distill_lightning.schedules import OneCycle

OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]  # jsonargparse needs the bare Iterable
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the settings of the papers' CIFAR experiments."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def with_schedule(
    module: pl.LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None, *, monitor: str
) -> Any:
    """What ``configure_optimizers`` returns: the optimiser and, if there is one, its schedule.

    Args:
        module: that a Trainer trains; `OneCycle` is told the length of its training and stepped after every batch.
        optimizer: the only one.
        lr_scheduler: makes the schedule; it is stepped after every epoch.
        monitor: the metric that `ReduceLROnPlateau` watches.

    Raises:
        InputError: `OneCycle`, and a training without an end.
    """
    if lr_scheduler is None:
        return optimizer
    scheduler = lr_scheduler(optimizer)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
    if isinstance(scheduler, OneCycle):
        config["interval"] = "step"
        scheduler.total_steps = scheduler.total_steps or total_steps(module)
    if isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = monitor
    return {"optimizer": optimizer, "lr_scheduler": config}


def compile_networks(module: Any) -> None:
    """Compile a module's student and teachers in place; those that are compiled stay as they are.

    Args:
        module: a `DistillationModule`.
    """
    # Here and not in the constructor, whose dry forwards would be compiled, too.
    for network in (module.student, *(getattr(module, "teachers", None) or ())):
        if getattr(network, "_compiled_call_impl", None) is None:
            network.compile()


def total_steps(module: pl.LightningModule) -> int:
    """Number of optimiser steps of the whole training, or of the phase of it that a schedule is made for.

    Raises:
        InputError: it has no end.
    """
    # Not an attribute of the module, which would take the Trainer along wherever it is copied to.
    asked = [getattr(callback, "phase_length", None) for callback in cast("Any", module.trainer).callbacks]
    lengths = [length for ask in asked if ask is not None and (length := ask()) is not None]
    steps = lengths[0] if lengths else module.trainer.estimated_stepping_batches
    if module.trainer._checkpoint_connector._loaded_checkpoint:  # noqa: SLF001
        # To count the batches, Lightning has begun to read them, before it knows where in its epoch the checkpoint was
        # made: it has to begin once more.
        module.trainer.fit_loop._combined_loader = None  # noqa: SLF001
    if steps == float("inf"):
        raise InputError("OneCycle needs the length of the training: give the Trainer max_epochs or max_steps")
    return int(steps)


def check_optimizer(module: Any) -> LRScheduler | ReduceLROnPlateau | None:
    """Make a module's optimiser and schedule once, to see whether they can be made.

    Args:
        module: a `DistillationModule`.

    Returns:
        The schedule, if there is one.

    Raises:
        InputError: one of them refuses its arguments.
    """
    kinds = (ValueError, TypeError, AssertionError)
    with refusing("optimizer", *kinds):
        optimizer = module.optimizer(module.parameter_groups())
    if module.lr_scheduler is None:
        return None
    with refusing("lr_scheduler", *kinds):
        schedule: LRScheduler | ReduceLROnPlateau = module.lr_scheduler(optimizer)
        return schedule
