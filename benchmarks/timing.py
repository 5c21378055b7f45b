"""Times that can be compared: contestants take turns in one process, and a ratio is a median over the rounds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from distill_lightning.pages import machine

Turn = Callable[[], float]
"""Does some of a contestant's work and returns what was measured of it, seconds per step, say."""


class Figure(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        """Of some measurements, at least one."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0])
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high)


def take_turns(contestants: Mapping[str, Turn], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Let contestants work one after the other, in turns, so that what slows the machine slows all of them.

    Args:
        contestants: by name.
        rounds: number of turns that are measured.
        warm_up: number of turns before that.

    Returns:
        What each turn returned, in the order of the rounds.
    """
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        # Forth and back: nobody always comes after the same neighbour.
        names = list(contestants) if number % 2 == 0 else list(reversed(contestants))
        for name in names:
            seconds = contestants[name]()
            if number >= 0:
                measured[name].append(seconds)
    return measured


def ratio(over: Iterable[float], under: Iterable[float]) -> Figure:
    """Of two contestants' turns, round by round."""
    return Figure.of(first / second for first, second in zip(over, under, strict=True))


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Gives a function that tells the seconds since the beginning, and after the end how long it took."""
    begin = time.perf_counter()
    end: list[float] = []
    yield lambda: (end[0] if end else time.perf_counter()) - begin
    end.append(time.perf_counter())


def circumstances() -> dict[str, str | int]:
    """What the figures were measured on and with."""
    packages = ("torchvision", "pytorch-lightning", "torchmetrics", "pytorchcv", "torchdistill", "numpy")
    return {
        **machine(*packages),
        # By default glibc gives freed memory back to the system, and pays for every page when it asks for it again:
        # what that costs depends on the order of frees more than on what is measured.
        "malloc": os.environ.get("MALLOC_TRIM_THRESHOLD_", "gives memory back"),
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024
