"""Optimisers and schedules of a module, and compiled networks."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distill_lightning.errors import refusing
from distill_lightning.lightning_internals import steps_left, total_steps, watch_first_loader
from distill_lightning.modules.options import LRSchedulerCallable
from distill_lightning.schedules import GroupSchedules, OneCycle


def with_schedule(
    module: pl.LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerCallable | None, *, monitor: str
) -> Any:
    """What ``configure_optimizers`` returns: the optimiser and, if there is one, its schedule.

    Args:
        module: that a Trainer trains; `OneCycle` is given the length of its training and stepped after every batch.
        optimizer: the only one.
        lr_scheduler: makes the schedule; it is stepped after every epoch.
        monitor: the metric that `ReduceLROnPlateau` watches; of several validation loaders the first one's.

    Raises:
        InputError: `OneCycle`, and a training without an end.
    """
    if lr_scheduler is None:
        return optimizer
    scheduler = lr_scheduler(optimizer)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
    grouped = isinstance(scheduler, GroupSchedules)
    schedules = scheduler.schedules if isinstance(scheduler, GroupSchedules) else [scheduler]
    for schedule in schedules:
        if isinstance(schedule, OneCycle):
            config["interval"] = "step"
            schedule.total_steps = schedule.total_steps or total_steps(module)
        if isinstance(schedule, ReduceLROnPlateau):
            config["monitor"] = monitor
            if grouped:
                config["reduce_on_plateau"] = True
    return {"optimizer": optimizer, "lr_scheduler": config}


def plan_anew(module: pl.LightningModule) -> None:
    """Let schedules fit the training that starts: what is watched of several loaders, and where the training ends.

    Every `OneCycle` of a resumed training reaches its end where the training now has it: a checkpoint keeps the number
    of steps that its own training was to have. `OneCycle` that was given ``total_steps`` keeps to it.

    Args:
        module: whose training starts.
    """
    watch_first_loader(module.trainer)
    left = steps_left(module)
    if left is None:
        return
    for config in cast("Any", module.trainer).lr_scheduler_configs:
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
