"""How much is pruned when: pure functions of the step, so that a resumed run needs nothing remembered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from distill_lightning.errors import InputError


class Schedule(ABC):
    """The share of all units that is pruned at each step of a pruning phase.

    It changes only at updates and never falls, so whoever prunes does so whenever it has changed.
    """

    @abstractmethod
    def amount(self, final: float, *, step: int, steps: int) -> float:
        """The share that is pruned from ``step`` on.

        Args:
            final: the share in the end, in ``[0, 1]``.
            step: optimiser steps of the phase that are done, from 0; ``steps`` and later: the phase is over.
            steps: optimiser steps of the whole phase.
        """


class OneShot(Schedule):
    """Everything at once, before the first step."""

    def amount(self, final: float, *, step: int, steps: int) -> float:
        """``final``."""
        return final


class Iterative(Schedule):
    """In rounds of equal length, the first before the first step.

    The amount is that of the last round, whatever the number of rounds: nothing is compounded.

    Args:
        rounds: how many.
        spacing: ``"linear"``: each round prunes the same share of all units; ``"geometric"``: each the same share of
            what is left, as lottery tickets are drawn.

    Raises:
        InputError: no round, or another spacing.
    """

    def __init__(self, rounds: int, *, spacing: Literal["linear", "geometric"] = "linear") -> None:
        if rounds < 1:
            raise InputError(f"Iterative: rounds must be at least 1, got {rounds}")
        if spacing not in ("linear", "geometric"):
            raise InputError(f"Iterative: spacing must be 'linear' or 'geometric', got {spacing!r}")
        self.rounds, self.spacing = rounds, spacing

    def amount(self, final: float, *, step: int, steps: int) -> float:
        """The share after the round that ``step`` is in; `final` in the last one."""
        begun = min(self.rounds * step // max(steps, 1) + 1, self.rounds)
        if begun == self.rounds or step >= steps:
            return final  # exactly, without the rounding of a power
        part = begun / self.rounds
        return final * part if self.spacing == "linear" else 1 - (1 - final) ** part


class Cubic(Schedule):
    r"""Fast at first, when much is redundant, then ever slower.

    .. math:: s(t) = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Zhu, Gupta: *To prune, or not to prune*, https://arxiv.org/abs/1710.01878

    Args:
        start: when it begins, as a share of the phase, in ``[0, 1]``; nothing but ``initial`` is pruned before.
        end: when ``final`` is reached, as a share of the phase; what remains is fine-tuning.
        every: optimiser steps between updates.
        initial: the share that is pruned at the start, :math:`s_i`.

    Raises:
        InputError: not ``0 <= start < end <= 1``, ``every`` below 1, or ``initial`` outside ``[0, 1]``.
    """

    def __init__(self, start: float = 0.0, end: float = 1.0, *, every: int = 1, initial: float = 0.0) -> None:
        _check_phase("Cubic", start, end)
        if every < 1:
            raise InputError(f"Cubic: every is a number of steps, at least 1, got {every}")
        if not 0 <= initial <= 1:
            raise InputError(f"Cubic: initial must be between 0 and 1, got {initial}")
        self.start, self.end, self.every, self.initial = start, end, every, initial

    def amount(self, final: float, *, step: int, steps: int) -> float:
        """The formula's share at the last update.

        Raises:
            InputError: ``final`` is below ``initial``.
        """
        if final < self.initial:
            raise InputError(
                f"Cubic: the amount {final} is below initial, {self.initial}: pruned weights do not return"
            )
        first, last = self.start * steps, self.end * steps
        if step >= last:
            return final
        passed = max(step - first, 0) // self.every * self.every
        return final + (self.initial - final) * (1 - passed / (last - first)) ** 3


class Threshold:
    """A threshold that rises to its value; what scores less is pruned, however much that is (`select_below`).

    Args:
        value: the threshold in the end, in the scores' units.
        start: when it begins to rise from 0, as a share of the phase, in ``[0, 1]``.
        end: when it has risen, as a share of the phase; equal to ``start``: at once.

    Raises:
        InputError: not ``0 <= start <= end <= 1``, or a negative value.
    """

    def __init__(self, value: float, *, start: float = 0.0, end: float = 0.0) -> None:
        if value < 0:
            raise InputError(f"Threshold: value must not be negative, got {value}")
        if start != end or not 0 <= start <= 1:
            _check_phase("Threshold", start, end)
        self.value, self.start, self.end = value, start, end

    def threshold(self, *, step: int, steps: int) -> float:
        """The threshold from ``step`` of ``steps`` on; it rises linearly."""
        first, last = self.start * steps, self.end * steps
        if step >= last:
            return self.value
        return 0.0 if step <= first else self.value * (step - first) / (last - first)


def _check_phase(name: str, start: float, end: float) -> None:
    if not 0 <= start < end <= 1:
        raise InputError(f"{name}: start and end are shares of the phase, 0 <= start < end <= 1, got {start} and {end}")
