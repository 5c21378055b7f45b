"""From finished runs to the table, the files and the figures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.pages import csv_text, markdown_table, write_pages
from distill_lightning.plots import learning_curves, score_bars
from distill_lightning.studies.compare.measures import GAP, Measures, selected_name
from distill_lightning.studies.compare.paired import LEGEND, pair, paired_rows
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.task import Column, Task

# Up to three words and a colon, at the beginning of a line.
_EXPLAINED = r"[^\s:]+( [^\s:]+){0,2}:"
_SECONDS = Column("seconds_per_epoch", "s/epoch", 1, 2)


@dataclass(frozen=True)
class Score:
    """One run's line of ``results.csv``.

    Attributes:
        method: the row.
        seed: its seed.
        values: by column: the task's (shares are parts of 1, NLL is in nats) and ``gap_closed``, a part of 1.
        parameters: of the network that is used at test time.
        seconds_per_epoch: median over the epochs, training only.
    """

    method: str
    seed: int
    values: dict[str, float]
    parameters: int
    seconds_per_epoch: float

    def line(self) -> dict[str, object]:
        """By the CSV's columns."""
        rest = {"parameters": self.parameters, "seconds_per_epoch": self.seconds_per_epoch}
        return {"method": self.method, "seed": self.seed, **self.values, **rest}


class Report:
    """Scores of a finished comparison.

    The gap that a run closes is its distance from the mean score of the student alone, as a part of the distance from
    there to the ensemble; 0 for the student alone on average, 1 at the ensemble's score.

    Beside the table stand each row's differences from the student alone, paired by seed, where there are several seeds.

    Args:
        runs: the finished runs, teachers first.
        task: how they are measured.
        measures: what they scored.
    """

    def __init__(self, runs: Sequence[Run], task: Task, measures: Measures) -> None:
        self.runs = [run for run in runs if not run.makes_backbone]
        self.task = task
        self.measures = measures
        self._diverged = {run.folder: run.result().diverged for run in runs if run.result().diverged}
        self._backbones = [run for run in runs if run.makes_backbone]
        self.teachers = [self._score(run) for run in self.runs if run.is_teacher]
        self.students = [self._score(run) for run in self.runs if run.is_student]
        self.methods = list(dict.fromkeys(score.method for score in self.students))
        by_row = {name: {s.seed: s.values for s in self.students if s.method == name} for name in self.methods}
        self.paired = pair(by_row, [column for column in self._columns() if column is not GAP])

    def _score(self, run: Run) -> Score:
        result = run.result()
        if run.folder in self._diverged:
            first, *others = (column.name for column in self.measures.columns)
            names = [first, selected_name(self.task.headline), *others]
            return Score(run.name, run.seed, dict.fromkeys(names, math.nan), result.parameters, math.nan)
        # A teacher that is given has no epochs.
        seconds = statistics.median([line["seconds"] for line in result.history] or [math.nan])
        return Score(run.name, run.seed, self.measures.values[run.folder], result.parameters, seconds)

    def header(self) -> list[str]:
        """The table's titles."""
        shown = [column.title for column in self._columns()]
        selected = "sel. %" if self.task.headline.scale == 100 else "sel."
        return ["row", shown[0], selected, *shown[1:], "params", _SECONDS.title]

    def _columns(self) -> list[Column]:
        return [column for column in self.measures.columns if column.title]

    def rows(self) -> list[list[str]]:
        """The table: a header, then teachers, ensemble, student alone and methods, ``mean ± sd`` over the seeds."""
        rows = [self.header(), *(self._row(score.method, [score]) for score in self.teachers)]
        if self.measures.ensemble is not None:
            ensemble = self.measures.ensemble
            first, *others = (_cell(column, [ensemble[column.name]]) for column in self._columns())
            # The ensemble runs every teacher: it has all their parameters, and no training or selection of its own.
            parameters = f"{sum(score.parameters for score in self.teachers):,}"
            rows.append(["ensemble", first, "", *others, parameters, ""])
        return rows + [self._row(name, [s for s in self.students if s.method == name]) for name in self.methods]

    def _row(self, name: str, scores: Sequence[Score]) -> list[str]:
        first, *others = (_cell(column, [score.values[column.name] for score in scores]) for column in self._columns())
        headline = self.task.headline
        selected = _cell(headline, [score.values[selected_name(headline)] for score in scores])
        seconds = _cell(_SECONDS, [score.seconds_per_epoch for score in scores])
        return [name, first, selected, *others, f"{scores[0].parameters:,}", seconds]

    def figures(self) -> dict[str, Figure]:
        """The figures by file name."""
        headline, scale = self.task.headline.name, self.task.headline.scale
        kind = headline.removeprefix("test_")
        suffix = " (%)" if scale == 100 else ""
        # A row with a run that has no scores has no mean.
        broken = {run.name for run in self.runs if run.folder in self._diverged}
        drawn = [name for name in self.methods if name not in broken]
        if not drawn:
            return {}
        references = {}
        if self.measures.ensemble is not None:
            references = {
                "ensemble": self.measures.ensemble[headline],
                "teachers' mean": statistics.fmean(score.values[headline] for score in self.teachers),
            }
        figures = {
            f"{kind}.png": score_bars(
                {name: [s.values[headline] for s in self.students if s.method == name] for name in drawn},
                references,
                label=f"test {self.task.quantity}, last epoch{suffix}",
                scale=scale,
            ),
            "learning_curves.png": learning_curves(
                {name: np.array([self._curve(run) for run in self._of(name)]) for name in drawn},
                label=f"validation {self.task.watched}{' (%)' if self.task.watched_scale == 100 else ''}",
                scale=self.task.watched_scale,
            ),
        }
        return figures | self.measures.figures(drawn)

    def _of(self, name: str) -> list[Run]:
        """A row's runs, one per seed, without those whose numbers were not finite."""
        return [run for run in self.runs if run.name == name and run.folder not in self._diverged]

    def notes(self) -> list[str]:
        """A line about each run that has no scores because its numbers were not finite."""
        runs = [*self._backbones, *self.runs]
        return [f"{run.title}: {self._diverged[run.folder]}" for run in runs if run.folder in self._diverged]

    def _curve(self, run: Run) -> list[float]:
        return [line[self.task.monitor] for line in run.result().history]

    def write(self, folder: Path, *, heading: str) -> list[Path]:
        """Write ``results.csv``, ``results.md`` and figures; ``paired.csv``, ``teachers.csv`` unless empty.

        Args:
            folder: where.
            heading: what stands above the table in ``results.md``.

        Returns:
            The paths.
        """
        footnotes = "".join(f"\n{note}\n" for note in self.notes())
        text = f"{heading}\n\n{markdown_table(self.rows())}{footnotes}"
        pages = {"results.csv": csv_text([score.line() for score in self.students])}
        if self.paired:
            pages["paired.csv"] = csv_text([each.line() for row in self.paired for each in row])
            text += f"\n{markdown_table(self.paired_rows())}\n{as_list(LEGEND)}\n"
        if self.teachers:
            pages["teachers.csv"] = csv_text([score.line() for score in self.teachers])
        return write_pages(folder, {**pages, "results.md": text}, self.figures())

    def paired_rows(self) -> list[list[str]]:
        """The table of differences from the student alone; there are several seeds, and other rows."""
        return paired_rows(self.paired)


def as_list(legend: str) -> str:
    """A legend as a Markdown list: an item begins with what it explains and a colon, other lines go on with it."""
    joined = re.sub(rf"\n(?!{_EXPLAINED})", " ", legend)
    return re.sub(rf"^(?={_EXPLAINED})", "- ", joined, flags=re.MULTILINE)


def _cell(column: Column, values: Sequence[float]) -> str:
    if not np.isfinite(values).all():
        return "-"
    mean = column.text(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {column.text(statistics.stdev(values))}"
