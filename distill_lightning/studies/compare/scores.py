"""What the runs of a comparison scored, in plain values that are kept beside the tables made of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_lightning.errors import InputError, refusing
from distill_lightning.storage import write_whole
from distill_lightning.studies.compare.rows import ALONE
from distill_lightning.studies.compare.task import Column

REPORT_FILE = "report.json"

Bins = list[list[float]]
"""Counts, sums of confidences and hits, as `distill_lightning.plots.reliability_diagram` takes them; empty: there are
none."""


@dataclass(frozen=True)
class Score:
    """One run: a line of ``results.csv``, or of ``teachers.csv``.

    Attributes:
        method: the row, or the teacher's name.
        seed: its seed.
        values: by column: the task's (shares are parts of 1, NLL is in nats) and ``gap_closed``, a part of 1.
        parameters: of the network that is used at test time.
        seconds_per_epoch: median over the epochs, training only.
        teacher_set: which set of teachers it is of.
        peak_memory: bytes that its training took at most; 0 where that is not known.
        shared: whether other runs were made beside it, so that its seconds say nothing.
        is_teacher: whether it is one of the teachers.
        failed: what happened if it has no scores, with the epoch where that is known.
        curve: the watched metric after each epoch, on the validation samples.
        bins: of its confidences on the test samples.
    """

    method: str
    seed: int
    values: dict[str, float]
    parameters: int
    seconds_per_epoch: float
    teacher_set: int = 1
    peak_memory: int = 0
    shared: bool = False
    is_teacher: bool = False
    failed: str = ""
    curve: list[float] = field(default_factory=list)
    bins: Bins = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int]:
        """By which it is paired with other rows' runs: the set of its teachers, and its seed."""
        return self.teacher_set, self.seed

    def line(self) -> dict[str, object]:
        """By the CSV's columns."""
        first = {"method": self.method, "seed": self.seed}
        cost = {"parameters": self.parameters, "seconds_per_epoch": self.seconds_per_epoch}
        return {**first, **self.values, **cost, "peak_memory": self.peak_memory or None, "shared": self.shared}


@dataclass(frozen=True)
class Section:
    """A further table of a report.

    Attributes:
        title: what it is about.
        rows: a header and the rows; empty: there is only the text.
        text: what stands below it.
    """

    title: str
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Scores:
    """Everything that the tables and figures of a comparison are made of.

    Attributes:
        columns: that have a value, the headline first.
        quantity: what the headline measures, in words.
        watched: what the curves show, in words.
        watched_scale: the factor by which figures multiply it.
        runs: the teachers, then the students seed by seed.
        ensembles: the values of each set's ensemble of teachers, by the set's number; empty: there are none.
        ensemble_bins: of each set's ensemble.
        failures: a line about each run, of a backbone too, that has ended without scores.
        heading: what stands above the table, in Markdown.
        legend: what the table's titles mean.
        sections: what else there is to tell.
        baseline: the row that the others' differences are taken from.
        confidence: whether columns and figures of confidence are shown.
    """

    columns: list[Column]
    quantity: str
    watched: str
    watched_scale: float
    runs: list[Score]
    ensembles: dict[int, dict[str, float]] = field(default_factory=dict)
    ensemble_bins: dict[int, Bins] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    heading: str = ""
    legend: str = ""
    sections: list[Section] = field(default_factory=list)
    baseline: str = ALONE
    confidence: bool = False

    @property
    def headline(self) -> Column:
        """The first column, which the gap and the figures are about."""
        return self.columns[0]

    def save(self, folder: Path) -> Path:
        """Write ``report.json``, whole or not at all; what is no finite number is ``null`` there."""
        file = folder / REPORT_FILE
        write_whole(file, [json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False).encode()])
        return file

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read ``report.json``.

        Raises:
            InputError: there is none, or it is damaged.
        """
        file = folder / REPORT_FILE
        if not file.is_file():
            raise InputError(f"{folder} has no {REPORT_FILE}: run the comparison to its end first")
        with refusing(f"{file} is damaged, call compare again to write it anew", ValueError, TypeError, KeyError):
            plain = json.loads(file.read_text())
            return cls(
                **{
                    **plain,
                    "columns": [Column(**column) for column in plain["columns"]],
                    "runs": [_score(run) for run in plain["runs"]],
                    "ensembles": {int(key): _known(values) for key, values in plain["ensembles"].items()},
                    "ensemble_bins": {int(key): bins for key, bins in plain["ensemble_bins"].items()},
                    "sections": [Section(**section) for section in plain["sections"]],
                }
            )


def _score(plain: Mapping[str, Any]) -> Score:
    curve = [math.nan if value is None else value for value in plain["curve"]]
    seconds = _known({"seconds": plain["seconds_per_epoch"]})["seconds"]
    return Score(**{**plain, "values": _known(plain["values"]), "curve": curve, "seconds_per_epoch": seconds})


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in values.items()}


def _finite(value: Any) -> Any:
    """The same with ``None`` for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
