"""How much of a training is spent waiting for data."""

from __future__ import annotations

import time


class DataWait:
    """The share of an epoch's time that passes between a step and the arrival of the next batch.

    Measured on the host, without waiting for the device: where a device is busy with steps that were queued, some of
    its time passes here, too, and the share says less than it seems.
    """

    def __init__(self) -> None:
        self._waited = self._worked = 0.0
        self._since: float | None = None
        self._arrived: float | None = None

    def begin(self) -> None:
        """An epoch begins, and waits for its first batch."""
        self._waited = self._worked = 0.0
        self._arrived = None
        self._since = time.perf_counter()

    def arrived(self) -> None:
        """A batch is there."""
        self._arrived = time.perf_counter()
        if self._since is not None:
            self._waited += self._arrived - self._since
        self._since = None

    def done(self) -> None:
        """The step is done; from now on the next batch is waited for."""
        self._since = time.perf_counter()
        if self._arrived is not None:
            self._worked += self._since - self._arrived

    def pause(self) -> None:
        """Something else goes on until the next batch, a validation say."""
        self._since = None

    @property
    def share(self) -> float:
        """In ``[0, 1]``; 0 before anything was measured."""
        total = self._waited + self._worked
        return self._waited / total if total else 0.0
