"""Differences of the rows from the student alone, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from distill_lightning.studies.compare.rows import ALONE
from distill_lightning.studies.compare.task import Column

# So many of the means of nothing but noise are marked, whatever the number of seeds.
_LEVEL = 0.95

LEGEND = """\
difference: the row's value minus that of the student alone with the same seed, mean ± standard deviation over the seeds
k/n: better than the student alone in k of n seeds
≈: within the noise of so few seeds: the 95 % interval of the mean difference, Student's t with n-1 degrees of freedom,
holds 0"""


@dataclass(frozen=True)
class Paired:
    """How far a row is from the student alone in one column.

    Attributes:
        method: the row.
        column: what is measured.
        differences: the row's value minus that of the student alone, one per seed.
    """

    method: str
    column: Column
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds; NaN where a run of either has no scores."""
        return statistics.fmean(self.differences)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; NaN where a run of either has no scores."""
        return statistics.stdev(self.differences) if self.is_known else math.nan

    @property
    def is_known(self) -> bool:
        """Whether all runs have scores."""
        return all(map(math.isfinite, self.differences))

    @property
    def better(self) -> int:
        """In how many seeds the row is better."""
        sign = 1 if self.column.mode == "max" else -1
        return sum(sign * difference > 0 for difference in self.differences)

    @property
    def is_noise(self) -> bool:
        r"""Whether the 95 % interval of the mean holds 0, :math:`|m| \le t_{0.975, n-1} s / \sqrt{n}`.

        ``t`` is the quantile of Student's distribution with ``n - 1`` degrees of freedom: 12.7 for two seeds, 4.3 for
        three. Rows that are equal in all seeds are not told apart, either. False where values are not known.
        """
        count = len(self.differences)
        return bool(abs(self.mean) <= stdtrit(count - 1, (1 + _LEVEL) / 2) * self.deviation / math.sqrt(count))

    def line(self) -> dict[str, object]:
        """By the columns of ``paired.csv``; ``None`` leaves a cell empty."""
        return {
            "method": self.method,
            "column": self.column.name,
            "mean": self.mean,
            "sd": self.deviation,
            "seeds": len(self.differences),
            "better": self.better if self.is_known else None,
            "within_noise": self.is_noise if self.is_known else None,
        }

    def cell(self) -> str:
        """As the table shows it."""
        if not self.is_known:
            return "-"
        mark = "≈ " if self.is_noise else ""
        mean, deviation = self.column.text(self.mean, sign="+"), self.column.text(self.deviation)
        return f"{mark}{mean} ± {deviation}, {self.better}/{len(self.differences)}"


def pair(values: Mapping[str, Mapping[int, Mapping[str, float]]], columns: Sequence[Column]) -> list[list[Paired]]:
    """The rows' differences from the student alone.

    Args:
        values: by row, seed and column.
        columns: those that are compared.

    Returns:
        For each row but that of the student alone, its differences column by column; nothing where there are less than
        two seeds.
    """
    alone = values[ALONE]
    if len(alone) < 2:
        return []
    return [
        [
            Paired(name, column, tuple(seeds[seed][column.name] - alone[seed][column.name] for seed in alone))
            for column in columns
        ]
        for name, seeds in values.items()
        if name != ALONE
    ]


def paired_rows(paired: Sequence[Sequence[Paired]]) -> list[list[str]]:
    """The table of differences: a header and the rows."""
    header = ["difference", *(each.column.title for each in paired[0])]
    return [header, *([f"{row[0].method} - {ALONE}", *(each.cell() for each in row)] for row in paired)]
