"""Pruning schedules: pure functions of the step, so that a resumed run needs no saved state."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from distill_lightning.choices import Choice
from distill_lightning.errors import InputError


class Schedule(Choice):
    """The share of all units that is pruned at each step of a pruning phase.

    It changes only at updates and never falls, so pruning is due whenever it has changed.
    """

    @abstractmethod
    def amount(self, final: float, *, step: int, steps: int) -> float:
        """The share that is pruned after ``step`` steps.

        Args:
            final: the share at the end, in ``[0, 1]``.
            step: number of optimiser steps of the phase that are done, from 0; at ``steps`` the phase is over.
            steps: optimiser steps of the whole phase.
        """


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once, before the first step."""

    def amount(self, final: float, *, step: int, steps: int) -> float:
        """``final``."""
        return final


@dataclass(frozen=True)
class Iterative(Schedule):
    """Pruning in rounds of equal length, the first of them before the first step.

    The amount is reached in the last round, whatever the number of rounds: nothing is compounded.

    Args:
        rounds: number of rounds.
        spacing: ``"linear"``: each round prunes the same share of all units; ``"geometric"``: the same share of
            what is left, as for lottery tickets.

    Raises:
        InputError: ``rounds`` is no integer or below 1, or the spacing is unknown.
    """

    rounds: int
    spacing: Literal["linear", "geometric"] = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.rounds < 1:
            raise InputError(f"Iterative: rounds must be at least 1, got {self.rounds}")
        self.check_known(spacing=("linear", "geometric"))

    def amount(self, final: float, *, step: int, steps: int) -> float:
        """The share after the round of ``step``; `final` in the last round."""
        begun = min(self.rounds * step // max(steps, 1) + 1, self.rounds)
        if begun == self.rounds or step >= steps:
            return final  # exactly, without the rounding of a power
        part = begun / self.rounds
        return final * part if self.spacing == "linear" else 1 - (1 - final) ** part


@dataclass(frozen=True)
class Cubic(Schedule):
    r"""Fast pruning at first, when much is redundant, then ever slower.

    .. math:: s(t) = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Zhu, Gupta: *To prune, or not to prune*, https://arxiv.org/abs/1710.01878

    Args:
        start: when pruning begins, as a share of the phase, in ``[0, 1]``; before, only ``initial`` is pruned.
        end: when ``final`` is reached, as a share of the phase; the rest is fine-tuning.
        every: optimiser steps between updates.
        initial: the share that is pruned at the start, :math:`s_i`.

    Raises:
        InputError: not ``0 <= start < end <= 1``, ``every`` no integer or below 1, or ``initial`` outside ``[0, 1]``.
    """

    start: float = 0.0
    end: float = 1.0
    every: int = field(default=1, kw_only=True)
    initial: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        _check_phase("Cubic", self.start, self.end)
        if self.every < 1:
            raise InputError(f"Cubic: every is a number of steps, at least 1, got {self.every}")
        if not 0 <= self.initial <= 1:
            raise InputError(f"Cubic: initial must be between 0 and 1, got {self.initial}")

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


@dataclass(frozen=True)
class Threshold(Choice):
    """A threshold that rises to its value; all weights with lower scores are pruned, however many (`select_below`).

    Args:
        value: the threshold at the end, in the units of the scores.
        start: when it begins to rise from 0, as a share of the phase, in ``[0, 1]``.
        end: when it reaches its value, as a share of the phase; at once if equal to ``start``.

    Raises:
        InputError: not ``0 <= start <= end <= 1``, or a value that is negative or not finite.
    """

    value: float
    start: float = field(default=0.0, kw_only=True)
    end: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.value < 0:
            raise InputError(f"Threshold: value must not be negative, got {self.value}")
        if self.start != self.end or not 0 <= self.start <= 1:
            _check_phase("Threshold", self.start, self.end)

    def threshold(self, *, step: int, steps: int) -> float:
        """The threshold after ``step`` of ``steps`` steps; it rises linearly."""
        first, last = self.start * steps, self.end * steps
        if step >= last:
            return self.value
        return 0.0 if step <= first else self.value * (step - first) / (last - first)


def _check_phase(name: str, start: float, end: float) -> None:
    if not 0 <= start < end <= 1:
        raise InputError(f"{name}: start and end are shares of the phase, 0 <= start < end <= 1, got {start} and {end}")
