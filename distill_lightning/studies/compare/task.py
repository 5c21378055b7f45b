"""What every comparison measures, whatever its runs predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distill_lightning.pages import fixed

_TIMES = """\
params: parameters of the network that is used at test time; s/epoch: median over the epochs, training only"""


@dataclass(frozen=True)
class Column:
    """A measured value: its name in the CSV, its title in the table and how it is written there.

    A column without a title stands in the CSV alone.

    Args:
        name: in the CSV.
        title: in the table.
        scale: the factor by which the table multiplies it.
        digits: its decimals there.
        mode: whether more of it is better, or less.
        of_ensemble: whether it compares with the teachers' ensemble, and is not there without one.
        of_confidence: whether it tells how far confidences can be trusted; the table shows it only where that is asked
            for.
    """

    name: str
    title: str = ""
    scale: float = 1
    digits: int = 3
    mode: Literal["max", "min"] = "max"
    of_ensemble: bool = False
    of_confidence: bool = False

    def text(self, mean: float, *, sign: str = "") -> str:
        """The mean as the table shows it; ``sign="+"`` for one before positive numbers, too."""
        return fixed(self.scale * mean, self.digits, sign=sign)


class Task(ABC):
    """What the runs of a comparison are measured by.

    Attributes:
        headline: the first column, which the gap and the figures are about.
        quantity: what the headline measures, in words.
        columns: the others.
        monitor: the validation metric that an epoch is selected by.
        mode: whether more of it is better, or less.
        watched: what the monitor measures, in words.
        watched_scale: the factor by which figures multiply it.
        samples: what the test is made on, in words.
        module: name of what trains teachers and the student alone.
    """

    headline: Column
    quantity: str
    columns: tuple[Column, ...]
    monitor: str
    mode: Literal["max", "min"]
    watched: str
    watched_scale: float = 1
    samples: str = "test images"
    module: str
    # What the table's titles mean, and those that are there with teachers alone.
    _legend: str
    _ensemble_legend: str = ""

    @abstractmethod
    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """What an epoch reached on the validation samples, for a line about its run."""

    def legend(self, *, with_ensemble: bool) -> str:
        """What the table's titles mean.

        Args:
            with_ensemble: whether there are teachers.
        """
        return "\n".join([self._legend, *([self._ensemble_legend] if with_ensemble else []), _TIMES])

    def measured(self, *, with_ensemble: bool) -> list[Column]:
        """The headline and the other columns.

        Args:
            with_ensemble: whether there are teachers.
        """
        columns = (self.headline, *self.columns)
        return [column for column in columns if with_ensemble or not column.of_ensemble]
