"""Optimisers and schedules as functions that make them, so that a configuration can hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distill_lightning.errors import refusing

if TYPE_CHECKING:
    from distill_lightning.modules.base import DistillationModule

OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]  # jsonargparse needs the bare Iterable
LRSchedulerCallable = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the settings of the papers' CIFAR experiments."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def check_optimizer(module: DistillationModule) -> LRScheduler | ReduceLROnPlateau | None:
    """Make a module's optimiser and schedule once, to see whether they can be made.

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
        return module.lr_scheduler(optimizer)
