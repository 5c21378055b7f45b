"""Optimisers and schedules of a module, and compiled networks."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from distill_lightning.errors import InputError, refusing
from distill_lightning.lightning_internals import (
    begins_anew,
    new_optimizer,
    planned_steps,
    steps_left,
    total_steps,
    validation_interval,
    watch_first_loader,
)
from distill_lightning.modules.options import LRSchedulerCallable, OptimizerCallable
from distill_lightning.schedules import STEPPED_BY_BATCH, GroupSchedules, OneCycle


def with_rate(optimizer: OptimizerCallable, groups: list[dict[str, Any]], lr: float | None) -> Optimizer:
    """An optimiser over groups of parameters, with another learning rate than its own.

    Args:
        optimizer: makes it.
        groups: of parameters; those with an ``lr`` keep it.
        lr: of all others; ``None``: the optimiser's own.
    """
    # Optimisers write their own options into the groups.
    without = [number for number, group in enumerate(groups) if "lr" not in group]
    made = optimizer(groups)
    if lr is not None:
        for number in without:
            made.param_groups[number]["lr"] = lr
    return made


def with_schedule(
    module: pl.LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None, *, monitor: str
) -> Any:
    """What ``configure_optimizers`` returns: the optimiser and, if there is one, its schedule.

    Args:
        module: that a Trainer trains; `OneCycle` is given the length of its training and stepped after every batch.
        optimizer: the only one.
        lr_scheduler: makes the schedule; it is stepped after every epoch, or after every batch if it is one of
            `STEPPED_BY_BATCH`.
        monitor: the metric that `ReduceLROnPlateau` watches after every validation, unless it names one; of several
            validation loaders the first one's.

    Raises:
        InputError: `OneCycle`, and a training without an end; PyTorch's `OneCycleLR`, and one with more steps; or
            `ReduceLROnPlateau` beside schedules of another kind, and epochs without a validation.
    """
    if lr_scheduler is None:
        return optimizer
    scheduler = lr_scheduler(optimizer)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
    grouped = isinstance(scheduler, GroupSchedules)
    schedules = scheduler.schedules if isinstance(scheduler, GroupSchedules) else [scheduler]
    for schedule in schedules:
        if isinstance(schedule, STEPPED_BY_BATCH):
            config["interval"] = "step"
        if isinstance(schedule, OneCycle):
            schedule.total_steps = schedule.total_steps or total_steps(module)
        if isinstance(schedule, OneCycleLR):
            _check_length(schedule, planned_steps(module))
        if isinstance(schedule, ReduceLROnPlateau):
            # Lightning's own has the name of its metric.
            config["monitor"] = getattr(schedule, "monitor", monitor)
            # In other epochs there is no validation.
            config["frequency"] = validation_interval(module)
            if grouped:
                config["reduce_on_plateau"] = True
    others = [schedule for schedule in schedules if schedule and not isinstance(schedule, ReduceLROnPlateau)]
    if others and config.get("frequency", 1) > 1:
        raise InputError(
            "lr_scheduler: ReduceLROnPlateau needs a validation, and the schedules beside it every epoch: give the "
            "Trainer check_val_every_n_epoch=1"
        )
    return {"optimizer": optimizer, "lr_scheduler": config}


def _check_length(schedule: OneCycleLR, steps: float) -> None:
    if schedule.total_steps < steps < math.inf:
        raise InputError(
            f"lr_scheduler: OneCycleLR has {schedule.total_steps} steps, and the training has {int(steps)}: give it "
            "these, or take OneCycle, which finds them"
        )


def plan_anew(module: pl.LightningModule) -> None:
    """Let optimiser and schedule be those of the training that now starts.

    A learning rate that a callback has found reaches the schedule, too, and what is watched is that of the first of
    several validation loaders. Every `OneCycle` of a resumed training reaches its end where the training now has it: a
    checkpoint keeps the number of steps that its own training was to have. `OneCycle` that was given ``total_steps``
    keeps to it.

    Args:
        module: a `DistillationModule` whose training starts.
    """
    trainer = cast("Any", module.trainer)
    if begins_anew(trainer) and getattr(module, "lr", None) is not None:
        new_optimizer(trainer, trainer.optimizers[0], restart=True)
    watch_first_loader(module.trainer)
    left = steps_left(module)
    if left is None:
        return
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        for schedule in scheduler.schedules if isinstance(scheduler, GroupSchedules) else [scheduler]:
            if not isinstance(schedule, OneCycle) or schedule.is_fixed:
                continue
            steps = schedule.last_epoch + left
            if steps != schedule.total_steps:
                warnings.warn(
                    f"the checkpoint's OneCycle was planned for {schedule.total_steps} steps, and this training has "
                    f"{steps}: it is planned anew and ends with the training; give OneCycle total_steps to keep a plan",
                    stacklevel=2,
                )
                schedule.plan(steps)


def compile_networks(module: Any) -> None:
    """Compile a module's student and teachers in place; those that are compiled stay as they are.

    Args:
        module: a `DistillationModule`.
    """
    # Here and not in the constructor, whose dry forwards would be compiled, too.
    for network in (module.student, *(getattr(module, "teachers", None) or ())):
        if getattr(network, "_compiled_call_impl", None) is None:
            network.compile()


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
