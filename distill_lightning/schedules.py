"""Learning rates as functions of progress, so that a configuration does not need the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from distill_lightning.errors import InputError, check_finite


class OneCycle(LRScheduler):
    """One cycle of the learning rate over the whole training, stepped after every batch.

    The rate rises along a half cosine from ``start`` times the optimiser's own rate to that rate during the first
    ``warmup`` of the training, then falls along a half cosine to ``end`` times that rate. Of ``N`` steps, counted from
    0, the peak is at step ``warmup * (N - 1)``. PyTorch's `OneCycleLR` joins two half cosines, too, but its peak is at
    step ``pct_start * N - 1``, up to one step before, and it needs the number of steps in advance; here
    `distill_lightning.DistillationModule` sets it when training begins. A training that is resumed with another length
    or another number of batches is planned anew, with a warning, so that the cycle ends where the training does.

    Smith, Topin: *Super-Convergence*, https://arxiv.org/abs/1708.07120

    Args:
        optimizer: the optimiser, whose groups' ``lr`` are the peaks.
        warmup: share of the training spent rising, in ``[0, 1]``.
        start: the first rate, as a multiple of the peak.
        end: the last rate, as a multiple of the peak.
        total_steps: number of optimiser steps of the whole training, which a resumed training keeps to; ``None``: it
            must be set before the first step, as modules do.

    Raises:
        InputError: ``warmup`` outside ``[0, 1]``, a rate that is negative or not finite, no steps, or stepping before
            their number is known.

    Example:
        >>> from torch import nn
        >>> from torch.optim import SGD
        >>> from distill_lightning.schedules import OneCycle
        >>> optimizer = SGD(nn.Linear(2, 2).parameters(), lr=1.0)
        >>> schedule = OneCycle(optimizer, warmup=0.5, start=0.0, end=0.0, total_steps=5)
        >>> [round(schedule.factor(progress), 4) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: float = 0.3,
        start: float = 0.04,
        end: float = 1e-4,
        total_steps: int | None = None,
    ) -> None:
        for name, value in (("start", start), ("end", end)):
            check_finite(f"OneCycle: {name}", value)
        if min(start, end) < 0:
            raise InputError(f"OneCycle: start and end are shares of the peak, not negative, got {start} and {end}")
        if total_steps is not None and total_steps < 1:
            raise InputError(f"OneCycle: total_steps must be at least 1, got {total_steps}")
        if not 0 <= warmup <= 1:
            raise InputError(f"warmup is a share of the training, between 0 and 1, got {warmup}")
        self.warmup, self.start, self.end, self.total_steps = warmup, start, end, total_steps
        # Whether the number of steps was given, and not found by whoever trains.
        self.is_fixed = total_steps is not None
        super().__init__(optimizer)

    def factor(self, progress: float) -> float:
        """The factor of the peak rate at ``progress`` in ``[0, 1]``."""
        progress = min(progress, 1.0)
        if progress < self.warmup or self.warmup == 1:
            return self.start + (1 - self.start) * (1 - math.cos(math.pi * progress / self.warmup)) / 2
        falling = (progress - self.warmup) / (1 - self.warmup)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * falling)) / 2

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one stopped, over its number of steps unless this one was given its own."""
        own = {"total_steps": self.total_steps, "is_fixed": True} if self.is_fixed else {}
        super().load_state_dict({**state_dict, **own})

    def plan(self, total_steps: int) -> None:
        """Have the cycle end after another number of steps, those that were made among them."""
        self.total_steps = total_steps
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """The groups' rates for the next step."""
        if self.total_steps is None and self.last_epoch > 0:
            raise InputError("OneCycle.total_steps is not set: give it, or train a DistillationModule, which sets it")
        progress = self.last_epoch / max((self.total_steps or 1) - 1, 1)
        return [rate * self.factor(progress) for rate in self.base_lrs]


class InverseSquareRoot(LRScheduler):
    r"""The schedule of the first Transformers, stepped after every batch: a linear rise, then a slow decline.

    .. math:: \eta_s = \eta \, \min\!\left(\frac{s}{w}, \sqrt{\frac{w}{s}}\right)

    at step ``s``, counted from 1, with the optimiser's own rate :math:`\eta` as the peak, at step ``w``. It does not
    know where the training ends.

    Vaswani et al.: *Attention Is All You Need*, https://arxiv.org/abs/1706.03762

    Args:
        optimizer: the optimiser, whose groups' ``lr`` are the peaks.
        warmup_steps: ``w``, optimiser steps spent rising.

    Raises:
        InputError: ``warmup_steps`` is below 1.

    Example:
        >>> from torch import nn
        >>> from torch.optim import Adam
        >>> from distill_lightning.schedules import InverseSquareRoot
        >>> schedule = InverseSquareRoot(Adam(nn.Linear(2, 2).parameters(), lr=1.0), warmup_steps=4)
        >>> [schedule.factor(step) for step in (1, 2, 4, 16)]
        [0.25, 0.5, 1.0, 0.5]
    """

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int = 4000) -> None:
        check_finite("InverseSquareRoot: warmup_steps", warmup_steps)
        if warmup_steps < 1:
            raise InputError(f"InverseSquareRoot: warmup_steps must be at least 1, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The factor of the peak rate at a step, counted from 1."""
        return min(step / self.warmup_steps, math.sqrt(self.warmup_steps / step))

    def get_lr(self) -> list[Any]:
        """The groups' rates for the next step."""
        return [rate * self.factor(self.last_epoch + 1) for rate in self.base_lrs]


STEPPED_BY_BATCH = (OneCycle, InverseSquareRoot, OneCycleLR, CyclicLR)
"""Schedules that are stepped after every batch; all others are stepped after every epoch."""


class GroupSchedules(LRScheduler):
    """One schedule per parameter group of an optimiser, each independent of the other groups.

    All are stepped together, after every epoch or, where they are cycles over the steps, after every batch.

    Args:
        optimizer: the optimiser.
        factories: for each of its groups in order, a function that makes a schedule from an optimiser, or ``None`` for
            a constant rate.

    Raises:
        InputError: the numbers of factories and groups differ, or a cycle over the steps is combined with a schedule
            over the epochs.

    Example:
        >>> from torch import nn
        >>> from torch.optim import SGD
        >>> from torch.optim.lr_scheduler import StepLR
        >>> from distill_lightning.schedules import GroupSchedules
        >>> student, discriminator = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> groups = [{"params": student.parameters()}, {"params": discriminator.parameters(), "lr": 0.01}]
        >>> optimizer = SGD(groups, lr=0.1)
        >>> schedule = GroupSchedules(optimizer, [lambda group: StepLR(group, step_size=1, gamma=0.5), None])
        >>> optimizer.step()
        >>> schedule.step()
        >>> schedule.get_last_lr()
        [0.05, 0.01]
    """

    def __init__(
        self, optimizer: Optimizer, factories: Sequence[Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None]
    ) -> None:
        if len(factories) != len(optimizer.param_groups):
            raise InputError(
                f"GroupSchedules: {len(factories)} schedules for {len(optimizer.param_groups)} parameter groups: give "
                "one each, None for a constant rate"
            )
        self.schedules: list[LRScheduler | ReduceLROnPlateau | None] = []
        # LRScheduler's constructor ends with a first step; the schedules, made afterwards, take theirs on their own.
        super().__init__(optimizer)
        for number, factory in enumerate(factories):
            self.schedules.append(None if factory is None else factory(_OneGroup(optimizer, number)))
        given = [schedule for schedule in self.schedules if schedule is not None]
        kinds = {type(schedule).__name__: isinstance(schedule, STEPPED_BY_BATCH) for schedule in given}
        if len(set(kinds.values())) > 1:
            by_batch = next(name for name, is_stepped_by_batch in kinds.items() if is_stepped_by_batch)
            raise InputError(
                f"{' and '.join(kinds)} cannot be stepped together, {by_batch} after every batch and others after "
                f"every epoch: make both {by_batch}, or none"
            )

    def get_lr(self) -> list[Any]:
        """The groups' rates, as the schedules have set them."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[Any]:
        """The groups' rates of the current step."""
        return self.get_lr()

    def step(self, metrics: Any = None) -> None:
        """Step every schedule; ``metrics`` is what `ReduceLROnPlateau` watches."""
        for schedule in self.schedules:
            if isinstance(schedule, ReduceLROnPlateau):
                schedule.step(metrics)
            elif schedule is not None:
                schedule.step()
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the state of every schedule."""
        states = [None if schedule is None else schedule.state_dict() for schedule in self.schedules]
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "schedules": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of schedules that were made with the same arguments.

        Raises:
            InputError: the state belongs to schedules of other groups.
        """
        states = state_dict["schedules"]
        if [state is None for state in states] != [schedule is None for schedule in self.schedules]:
            raise InputError(
                "GroupSchedules: the saved state belongs to schedules of other parameter groups: give the schedules "
                "that the run began with"
            )
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        for schedule, state in zip(self.schedules, states, strict=True):
            if schedule is not None:
                schedule.load_state_dict(state)


class _OneGroup(Optimizer):
    """An optimiser as the schedule of one of its groups sees it."""

    # Steps out of order are noticed by GroupSchedules, which sees the optimiser itself.
    _opt_called = True

    def __init__(self, optimizer: Optimizer, number: int) -> None:
        # Optimizer's own __init__ would make groups of its own.
        self.optimizer, self.number = optimizer, number
        self.defaults = optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # load_state_dict makes new groups
        return [self.optimizer.param_groups[self.number]]
