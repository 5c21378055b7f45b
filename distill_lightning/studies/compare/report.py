"""From finished runs to the table, the files and the figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from distill_lightning.pages import csv_text, markdown_table, write_pages
from distill_lightning.plots import learning_curves, score_bars
from distill_lightning.studies.compare.config import ALONE
from distill_lightning.studies.compare.runner import Run
from distill_lightning.studies.compare.tasks import Column, Task

_GAP = Column("gap_closed", "gap %", 100, 0)
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

    Args:
        runs: the finished runs, teachers first.
        targets: the test images' targets.
        task: how they are measured.
        counted: which of the runs' outputs, and of the targets, count, bool ``(R,)``.
    """

    def __init__(self, runs: Sequence[Run], targets: Tensor, task: Task, *, counted: Tensor) -> None:
        self.runs = list(runs)
        self.targets = targets = targets[counted]
        self.task = task
        results = {run.folder: run.result() for run in runs}
        self._diverged = {folder: result.diverged for folder, result in results.items() if result.diverged}
        self._outputs = {
            run.folder: {name: output[counted] for name, output in run.outputs().items()}
            for run in runs
            if run.folder not in self._diverged
        }
        teachers = [run for run in self.runs if run.is_teacher]
        self.ensemble = task.combine([self._outputs[run.folder]["last"] for run in teachers])
        self.ensemble_score = task.score(self.ensemble, targets)
        alone = [task.score(self._outputs[run.folder]["last"], targets) for run in self._of(ALONE)]
        self._alone = statistics.fmean(alone) if alone else math.nan
        self.teachers = [self._score(run) for run in teachers]
        self.students = [self._score(run) for run in self.runs if not run.is_teacher]
        self.methods = list(dict.fromkeys(score.method for score in self.students))

    def _score(self, run: Run) -> Score:
        result, headline = run.result(), self.task.headline.name
        if run.folder in self._diverged:
            names = [headline, f"{headline}_selected", *(column.name for column in self.task.columns), _GAP.name]
            return Score(run.name, run.seed, dict.fromkeys(names, math.nan), result.parameters, math.nan)
        outputs = self._outputs[run.folder]
        quality = self._quality(outputs["last"])
        selected = self.task.score(outputs["selected"], self.targets)
        values = {headline: quality.pop(headline), f"{headline}_selected": selected}
        seconds = statistics.median(line["seconds"] for line in result.history)
        return Score(run.name, run.seed, {**values, **quality}, result.parameters, seconds)

    def _quality(self, output: Tensor) -> dict[str, float]:
        values = self.task.measure(output, self.targets, self.ensemble)
        gap = self.task.gap_closed(values[self.task.headline.name], self._alone, self.ensemble_score)
        return {**values, _GAP.name: gap}

    def header(self) -> list[str]:
        """The table's titles."""
        shown = [column.title for column in self._columns()]
        selected = "sel. %" if self.task.headline.scale == 100 else "sel."
        return ["row", shown[0], selected, *shown[1:], "params", _SECONDS.title]

    def _columns(self) -> list[Column]:
        return [column for column in (self.task.headline, *self.task.columns, _GAP) if column.title]

    def rows(self) -> list[list[str]]:
        """The table: a header, then teachers, ensemble, student alone and methods, ``mean ± sd`` over the seeds."""
        rows = [self.header(), *(self._row(score.method, [score]) for score in self.teachers)]
        quality = self._quality(self.ensemble)
        first, *others = (_cell(column, [quality[column.name]]) for column in self._columns())
        # The ensemble runs every teacher: it has all their parameters, and no training or selection of its own.
        parameters = f"{sum(score.parameters for score in self.teachers):,}"
        rows.append(["ensemble", first, "", *others, parameters, ""])
        return rows + [self._row(name, [s for s in self.students if s.method == name]) for name in self.methods]

    def _row(self, name: str, scores: Sequence[Score]) -> list[str]:
        first, *others = (_cell(column, [score.values[column.name] for score in scores]) for column in self._columns())
        headline = self.task.headline
        selected = _cell(headline, [score.values[f"{headline.name}_selected"] for score in scores])
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
        figures = {
            f"{kind}.png": score_bars(
                {name: [s.values[headline] for s in self.students if s.method == name] for name in drawn},
                {
                    "ensemble": self.ensemble_score,
                    "teachers' mean": statistics.fmean(score.values[headline] for score in self.teachers),
                },
                label=f"test {self.task.quantity}, last epoch{suffix}",
                scale=scale,
            ),
            "learning_curves.png": learning_curves(
                {name: np.array([self._curve(run) for run in self._of(name)]) for name in drawn},
                label=f"validation {self.task.quantity}{suffix}",
                scale=scale,
            ),
        }
        outputs = {name: [self._outputs[run.folder]["last"] for run in self._of(name)] for name in drawn}
        return figures | self.task.figures(outputs, self.ensemble, self.targets)

    def _of(self, name: str) -> list[Run]:
        """A row's runs, one per seed, without those whose numbers were not finite."""
        return [run for run in self.runs if run.name == name and run.folder not in self._diverged]

    def notes(self) -> list[str]:
        """A line about each run that has no scores because its numbers were not finite."""
        return [f"{run.title}: {self._diverged[run.folder]}" for run in self.runs if run.folder in self._diverged]

    def _curve(self, run: Run) -> list[float]:
        return [line[self.task.monitor] for line in run.result().history]

    def write(self, folder: Path, *, heading: str) -> list[Path]:
        """Write ``results.csv``, ``teachers.csv``, ``results.md`` and the figures.

        Args:
            folder: where.
            heading: what stands above the table in ``results.md``.

        Returns:
            The paths.
        """
        footnotes = "".join(f"\n{note}\n" for note in self.notes())
        pages = {
            "results.csv": csv_text([score.line() for score in self.students]),
            "teachers.csv": csv_text([score.line() for score in self.teachers]),
            "results.md": f"{heading}\n\n{markdown_table(self.rows())}{footnotes}",
        }
        return write_pages(folder, pages, self.figures())


def _cell(column: Column, values: Sequence[float]) -> str:
    if not np.isfinite(values).all():
        return "-"
    mean = column.text(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {column.text(statistics.stdev(values))}"
