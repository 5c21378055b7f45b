"""How much of a training is spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import torch

from distill_lightning.part import Part


class DataWait(Part):
    """The share of an epoch's time that passes between a step and the arrival of the next batch; in the progress bar.

    Measured on the host, without waiting for the device: where a device is busy with steps that were queued, some of
    its time passes here, too, and the share says less than it seems.

    Example:
        >>> from distill_lightning.modules.parts.data_wait import DataWait
        >>> wait = DataWait()
        >>> wait.epoch_starts(module=None)
        >>> wait.batch_starts(module=None)  # no step is done yet
        >>> wait.share
        1.0
    """

    def __init__(self) -> None:
        self._waited = self._worked = 0.0
        self._since: float | None = None
        self._arrived: float | None = None

    def epoch_starts(self, module: Any) -> None:
        """Wait for the epoch's first batch."""
        self._waited = self._worked = 0.0
        self._arrived = None
        self._since = time.perf_counter()

    def batch_starts(self, module: Any) -> None:
        """The wait is over."""
        self._arrived = time.perf_counter()
        if self._since is not None:
            self._waited += self._arrived - self._since
        self._since = None

    def batch_ends(self, module: Any) -> None:
        """Wait for the next batch, and show the share so far."""
        self._since = time.perf_counter()
        if self._arrived is not None:
            self._worked += self._since - self._arrived
        bar = module.trainer.progress_bar_callback
        if bar is not None and getattr(bar, "is_enabled", True):
            # A number would be copied to the device, and read back from it for the bar.
            share = torch.tensor(self.share)
            module.log("data_wait", share, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def validation_starts(self, module: Any) -> None:
        """Waiting for the data of a validation does not count."""
        self._since = None

    @property
    def share(self) -> float:
        """In ``[0, 1]``; 0 before anything was measured."""
        total = self._waited + self._worked
        return self._waited / total if total else 0.0
