"""Time, measured in turns: what makes the machine slow makes both contestants slow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from distill_lightning.errors import InputError, check_one_of

MIN_ROUNDS = 50
"""The smallest number of turns for an interval of a ratio of times."""

NO_SPEED_UP = "no measured speed-up"


class Ratio(NamedTuple):
    """A ratio of medians, with its 95 % confidence interval by bootstrap."""

    value: float
    low: float
    high: float


class Latency(NamedTuple):
    """Two callables that took turns.

    Attributes:
        dense: seconds of processor time of each round of the dense network.
        compressed: seconds of processor time of each round of the compressed network.
        dense_wall: seconds on the clock of each round of the dense network.
        compressed_wall: seconds on the clock of each round of the compressed network.
        ratio: compressed to dense, processor time; below 1 is faster.
        wall_ratio: the same, on the clock.
        by: the time on which ``claim`` is based.
    """

    dense: tuple[float, ...]
    compressed: tuple[float, ...]
    dense_wall: tuple[float, ...]
    compressed_wall: tuple[float, ...]
    ratio: Ratio
    wall_ratio: Ratio
    by: Literal["thread", "wall"]

    @property
    def claim(self) -> str:
        """What may be said about the time, in one sentence."""
        ratio = self.ratio if self.by == "thread" else self.wall_ratio
        interval = f"{ratio.value:.2f} of the dense time, 95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
        if ratio.low <= 1 <= ratio.high:
            return f"{NO_SPEED_UP} ({interval})"
        return f"{'faster' if ratio.high < 1 else 'slower'}: {interval}"


class Clocks(NamedTuple):
    """Two clocks, in seconds: the calling thread's processor time, and wall time."""

    thread: Callable[[], float] = time.thread_time
    wall: Callable[[], float] = time.perf_counter


def compare_latency(
    dense: Callable[[], object],
    compressed: Callable[[], object],
    *,
    rounds: int = 50,
    warm_up: int = 10,
    by: Literal["thread", "wall"] = "thread",
    resamples: int = 2000,
    seed: int = 0,
    clocks: Clocks | None = None,
) -> Latency:
    """Time two callables in turns, dense, compressed, dense, compressed, so that what slows the machine slows both.

    Meanwhile PyTorch uses one thread and inference mode. A callable that uses another device has to wait for it.

    Args:
        dense: runs one forward pass of the network before compression.
        compressed: runs one forward pass of the network after compression.
        rounds: measured turns, at least 50.
        warm_up: turns before those.
        by: the time on which the claim is based: ``"thread"`` leaves out what other programs take of the processor;
            ``"wall"`` is for callables that compute in threads of their own or on another device.
        resamples: bootstrap samples; the rounds are drawn with replacement.
        seed: seed of the bootstrap.
        clocks: the clocks; ``None`` for the system's.

    Raises:
        InputError: fewer than 50 rounds, or a median of zero.
    """
    if rounds < MIN_ROUNDS or warm_up < 0 or resamples < 1:
        raise InputError(
            f"compare_latency needs rounds >= {MIN_ROUNDS}, warm_up >= 0 and resamples >= 1, "
            f"got {rounds}, {warm_up} and {resamples}"
        )
    check_one_of("compare_latency: by", by, ("thread", "wall"))
    clocks = clocks or Clocks()
    turns: list[tuple[float, ...]] = []
    with _one_thread(), torch.inference_mode():
        for number in range(-warm_up, rounds):
            turn = (*_timed(dense, clocks), *_timed(compressed, clocks))
            if number >= 0:
                turns.append(turn)
    first, first_wall, second, second_wall = zip(*turns, strict=True)
    return Latency(
        first,
        second,
        first_wall,
        second_wall,
        bootstrap_ratio(second, first, resamples=resamples, seed=seed),
        bootstrap_ratio(second_wall, first_wall, resamples=resamples, seed=seed),
        by,
    )


def bootstrap_ratio(over: Sequence[float], under: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """The ratio of two medians, with the 2.5 % and 97.5 % quantiles of the ratios of resampled rounds.

    Args:
        over: a time of each round, for the numerator.
        under: the times of the same rounds, which are resampled together.
        resamples: number of bootstrap samples.
        seed: seed of the draws; the global random state stays as it is.

    Raises:
        InputError: the median of ``under`` is zero.
    """
    if statistics.median(under) <= 0:
        raise InputError(
            "the timed call takes no measurable time: raise the batch size, or time several forward passes at once"
        )
    pairs = torch.tensor([list(over), list(under)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(over), (resamples, len(over)), generator=generator)
    # For an even number quantile() averages the middle two values, and median() takes the lower one.
    medians = pairs[:, drawn].quantile(0.5, dim=2)
    low, high = (medians[0] / medians[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(statistics.median(over) / statistics.median(under), low, high)


def _timed(call: Callable[[], object], clocks: Clocks) -> tuple[float, float]:
    wall, thread = clocks.wall(), clocks.thread()
    call()
    return clocks.thread() - thread, clocks.wall() - wall


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
