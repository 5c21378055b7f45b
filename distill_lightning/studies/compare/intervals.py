"""How far the mean of a few values can be trusted, where they were drawn in sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95
"""The share of intervals that hold what they are about."""


@dataclass(frozen=True)
class Interval:
    """The mean of what was drawn, and between which bounds the mean of all that could be lies.

    Attributes:
        mean: of the sets' means.
        low: the lower bound; NaN where too few values tell.
        high: the upper bound.
        between: standard deviation between sets, of what a set's values have in common; NaN with one set, or where no
            set has two values.
        within: standard deviation of the values of a set around its own mean; NaN where no set has two values.
        deviation: standard deviation of a value from a set of its own; NaN for one value.
    """

    mean: float
    low: float
    high: float
    between: float
    within: float
    deviation: float

    @property
    def is_known(self) -> bool:
        """Whether there are bounds."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def holds(self, value: float) -> bool:
        """Whether a value lies between the bounds, or on one of them."""
        return self.low <= value <= self.high


def interval_of(sets: Sequence[Sequence[float]], *, level: float = LEVEL) -> Interval:
    r"""The interval of a mean, by Student's distribution.

    Of one set of ``n`` values it is :math:`\bar x \pm t_{n-1} s / \sqrt n`. Values of one set are no independent draws
    where there are several: with the means :math:`m_j` of ``J`` sets it is :math:`\bar m \pm t_{J-1} s_m / \sqrt J`,
    exact in a nested design with as many values in each set, whatever the sizes of the two variances.

    The variance within sets is :math:`s_w^2 = \sum_{ij} (x_{ij} - m_j)^2 / \sum_j (n_j - 1)`, the one between them
    :math:`s_m^2 - s_w^2 \, \overline{1 / n_j}`, or 0 where that is negative.

    Args:
        sets: the values of each; none of them is empty.
        level: how probable it is to hold the mean of all that could have been drawn.

    Returns:
        Mean, bounds and the parts of the variance; all NaN where a value is.

    Example:
        >>> from distill_lightning.studies.compare.intervals import interval_of
        >>> found = interval_of([[1.0, 2.0, 3.0]])
        >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2)
        (2.0, -0.48, 4.48)
        >>> found = interval_of([[1.0, 2.0], [5.0, 6.0]])
        >>> round(found.mean, 2), round(found.low, 2), round(found.between, 2), round(found.within, 2)
        (3.5, -21.91, 2.78, 0.71)
    """
    if not all(math.isfinite(value) for values in sets for value in values):
        return Interval(*[math.nan] * 6)
    means = [statistics.fmean(values) for values in sets]
    mean = statistics.fmean(means)
    freedom = sum(len(values) - 1 for values in sets)
    squares = sum((value - own) ** 2 for values, own in zip(sets, means, strict=True) for value in values)
    within = math.sqrt(squares / freedom) if freedom else math.nan
    if len(sets) == 1:
        (values,) = sets
        half = _half(within, len(values), level) if freedom else math.nan
        return Interval(mean, mean - half, mean + half, math.nan, within, within)
    spread = statistics.stdev(means)
    half = _half(spread, len(means), level)
    if not freedom:
        return Interval(mean, mean - half, mean + half, math.nan, math.nan, spread)
    share = statistics.fmean(1 / len(values) for values in sets)
    between = math.sqrt(max(spread**2 - within**2 * share, 0.0))
    return Interval(mean, mean - half, mean + half, between, within, math.hypot(between, within))


def _half(deviation: float, count: int, level: float) -> float:
    return float(stdtrit(count - 1, (1 + level) / 2)) * deviation / math.sqrt(count)
