"""Learning rates as functions of progress, so that a configuration need not know the number of steps."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill_lightning.errors import InputError


class OneCycle(LRScheduler):
    """One cycle of the learning rate over the whole training, stepped after every batch.

    The rate rises by a half cosine from ``start`` times to once the optimiser's own rate during the first ``warmup``
    of the training, then falls by a half cosine to ``end`` times that rate. PyTorch's `OneCycleLR` has the same shape
    but must be told the number of steps; `distill_lightning.DistillationModule` sets it here when training begins.

    Smith, Topin: *Super-Convergence*, https://arxiv.org/abs/1708.07120

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        warmup: share of the training spent rising, in ``[0, 1]``.
        start: the first rate, as a multiple of the peak.
        end: the last rate, as a multiple of the peak.
        total_steps: number of optimiser steps of the whole training; must be set before the first step.

    Raises:
        InputError: ``warmup`` outside ``[0, 1]``, or stepping before the number of steps is known.
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
        if not 0 <= warmup <= 1:
            raise InputError(f"warmup is a share of the training, between 0 and 1, got {warmup}")
        self.warmup, self.start, self.end, self.total_steps = warmup, start, end, total_steps
        super().__init__(optimizer)

    def factor(self, progress: float) -> float:
        """What the peak rate is multiplied with at ``progress`` in ``[0, 1]``."""
        progress = min(progress, 1.0)
        if progress < self.warmup or self.warmup == 1:
            return self.start + (1 - self.start) * (1 - math.cos(math.pi * progress / self.warmup)) / 2
        falling = (progress - self.warmup) / (1 - self.warmup)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * falling)) / 2

    def get_lr(self) -> list[Any]:
        """The groups' rates for the coming step."""
        if self.total_steps is None and self.last_epoch > 0:
            raise InputError("OneCycle.total_steps is not set: give it, or train a DistillationModule, which sets it")
        progress = self.last_epoch / max((self.total_steps or 1) - 1, 1)
        return [rate * self.factor(progress) for rate in self.base_lrs]
