"""Differences of the rows from one of them, under the same teachers and with the same seed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from distill_lightning.studies.compare.intervals import Interval, interval_of
from distill_lightning.studies.compare.task import Column

_WIDTH = 118
Values = Mapping[tuple[int, int], Mapping[str, float]]
"""A row's values by set of teachers and seed, and by column."""


@dataclass(frozen=True)
class Paired:
    """How far a row is from the baseline in one column.

    Attributes:
        method: the row.
        column: what is measured.
        differences: the row's value minus that of the baseline, by set of teachers one per seed; NaN where a run of
            either has no scores.
        baseline: the row that it is compared with.
    """

    method: str
    column: Column
    differences: tuple[tuple[float, ...], ...]
    baseline: str = "alone"

    @cached_property
    def interval(self) -> Interval:
        """Of the mean difference; see `interval_of`."""
        return interval_of(self.differences)

    @property
    def is_known(self) -> bool:
        """Whether all runs have scores."""
        return all(math.isfinite(difference) for own in self.differences for difference in own)

    @property
    def pairs(self) -> int:
        """How many there are."""
        return sum(map(len, self.differences))

    @property
    def better(self) -> int:
        """In how many pairs the row is better."""
        return sum(self._sign * difference > 0 for own in self.differences for difference in own)

    @property
    def _sign(self) -> int:
        return 1 if self.column.mode == "max" else -1

    @property
    def is_noise(self) -> bool:
        """Whether the 95 % interval of the mean difference holds 0; false where values are not known.

        Rows that are equal in all pairs are not told apart, either.
        """
        return self.interval.holds(0)

    def line(self) -> dict[str, object]:
        """By the columns of ``paired.csv``; ``None`` leaves a cell empty."""
        found, several = self.interval, len(self.differences) > 1
        return {
            "method": self.method,
            "baseline": self.baseline,
            "column": self.column.name,
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "sd": found.deviation,
            **({"sd_between_sets": found.between, "sd_between_seeds": found.within} if several else {}),
            "sets": len(self.differences),
            "pairs": self.pairs,
            "better": self.better if self.is_known else None,
            "within_noise": self.is_noise if self.is_known else None,
        }

    def cell(self) -> str:
        """As the table shows it: ``+0.84 [+0.50, +1.18]``."""
        if not self.is_known:
            return "-"
        mean, low, high = (
            self.column.text(value, sign="+") for value in (self.interval.mean, self.interval.low, self.interval.high)
        )
        return f"{'≈ ' if self.is_noise else ''}{mean} [{low}, {high}]"

    def verdict(self) -> str:
        """What the difference comes to, in words."""
        if not self.is_known:
            lost = sum(not math.isfinite(difference) for own in self.differences for difference in own)
            have = "has" if lost == 1 else "have"
            return f"cannot be compared with {self.baseline}: {lost} of {self.pairs} pairs {have} no scores"
        found = self.interval
        if self.is_noise:
            told = f"not told apart from {self.baseline}: {self.cell().removeprefix('≈ ')}"
        else:
            is_better = self._sign * found.mean > 0
            bounds = sorted((abs(found.low), abs(found.high)))
            mean, low, high = (self.column.text(value) for value in (abs(found.mean), *bounds))
            told = f"{'better' if is_better else 'worse'} than {self.baseline} by {mean} [{low}, {high}]"
        return told + self._parts()

    def _parts(self) -> str:
        """Whose the variance is, where there are several sets of teachers with several seeds each."""
        found = self.interval
        if math.isnan(found.between):
            return ""
        between, within = self.column.text(found.between), self.column.text(found.within)
        return f"; of that, sd {between} between sets of teachers, {within} between seeds"


def pair(values: Mapping[str, Values], columns: Sequence[Column], baseline: str) -> list[list[Paired]]:
    """The rows' differences from the baseline.

    Args:
        values: by row.
        columns: those that are compared.
        baseline: the row that the others are compared with.

    Returns:
        For each other row, its differences column by column; nothing where there is but one pair.
    """
    base = values[baseline]
    if len(base) < 2:
        return []
    sets = list(dict.fromkeys(number for number, _ in base))

    def differences(own: Values, name: str) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(own[key][name] - base[key][name] for key in base if key[0] == number) for number in sets)

    return [
        [Paired(method, column, differences(own, column.name), baseline) for column in columns]
        for method, own in values.items()
        if method != baseline
    ]


def paired_rows(paired: Sequence[Sequence[Paired]], columns: Sequence[Column]) -> list[list[str]]:
    """The table of differences: a header that says from what and over how many pairs, and the rows.

    Args:
        paired: of each row, column by column.
        columns: those that are shown.
    """
    first = paired[0][0]
    shown = [[each for each in row if each.column in columns] for row in paired]
    header = [f"minus {first.baseline}, {pairs_of(first.differences)}", *(each.column.title for each in shown[0])]
    return [header, *([row[0].method, *(each.cell() for each in row)] for row in shown)]


def pairs_of(sets: Sequence[Sequence[object]]) -> str:
    """Over how many sets and seeds something is, in words."""
    seeds = "1 seed" if len(sets[0]) == 1 else f"{len(sets[0])} seeds"
    return seeds if len(sets) == 1 else f"{len(sets)} sets of teachers, {seeds} each"


def legend(paired: Sequence[Sequence[Paired]]) -> str:
    """What the table of differences shows."""
    first = paired[0][0]
    several = len(first.differences) > 1
    pairs = "under the same teachers and with the same seed" if several else "with the same seed"
    over = f"the {len(first.differences)} sets' means" if several else "the differences"
    freedom = (len(first.differences) if several else first.pairs) - 1
    degrees = "1 degree" if freedom == 1 else f"{freedom} degrees"
    difference = (
        f"difference: a row's value minus that of {first.baseline} {pairs}; its mean, and in brackets the 95 % "
        f"interval of that mean, by Student's t on {over} with {degrees} of freedom"
    )
    return f"""\
{textwrap.fill(difference, _WIDTH)}
≈: the interval holds 0, so that the rows are not told apart; of twenty that are alike, about one is told apart by
chance"""
