"""From the scores of a comparison to its table, files and figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.pages import csv_text, markdown_table, write_pages
from distill_lightning.plots import learning_curves, reliability_diagram, score_bars
from distill_lightning.studies.compare.paired import LEGEND, pair, paired_rows
from distill_lightning.studies.compare.scores import Score, Scores
from distill_lightning.studies.compare.task import Column

# Up to three words and a colon, at the beginning of a line.
_EXPLAINED = r"[^\s:]+( [^\s:]+){0,2}:"
_SECONDS = Column("seconds_per_epoch", "s/epoch", 1, 2)


class Report:
    """The tables and figures of a finished comparison.

    Beside the table stand each row's differences from the student alone, paired by seed, where there are several seeds.

    Args:
        scores: what its runs scored.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.teachers = [run for run in scores.runs if run.is_teacher]
        self.students = [run for run in scores.runs if not run.is_teacher]
        self.methods = list(dict.fromkeys(score.method for score in self.students))
        by_row = {name: {s.seed: s.values for s in self.students if s.method == name} for name in self.methods}
        self.paired = pair(by_row, [column for column in self._columns() if column.name != "gap_closed"])

    @classmethod
    def load(cls, folder: Path) -> Report:
        """The report of a comparison that was made elsewhere, from its output folder alone.

        Raises:
            InputError: there is no ``report.json``, or it is damaged.
        """
        return cls(Scores.load(folder))

    def save(self, folder: Path) -> Path:
        """Write ``report.json``, which `load` reads."""
        return self.scores.save(folder)

    def header(self) -> list[str]:
        """The table's titles."""
        shown = [column.title for column in self._columns()]
        selected = "sel. %" if self.scores.headline.scale == 100 else "sel."
        return ["row", shown[0], selected, *shown[1:], "params", _SECONDS.title]

    def _columns(self) -> list[Column]:
        return [column for column in self.scores.columns if column.title]

    def rows(self) -> list[list[str]]:
        """The table: a header, then teachers, ensemble, student alone and methods, ``mean ± sd`` over the seeds."""
        rows = [self.header(), *(self._row(score.method, [score]) for score in self.teachers)]
        if self.scores.ensembles:
            each = list(self.scores.ensembles.values())
            first, *others = (_cell(column, [values[column.name] for values in each]) for column in self._columns())
            # The ensemble runs every teacher: it has all their parameters, and no training or selection of its own.
            parameters = f"{sum(score.parameters for score in self.teachers) // len(each):,}"
            rows.append(["ensemble", first, "", *others, parameters, ""])
        return rows + [self._row(name, self.of(name)) for name in self.methods]

    def of(self, name: str) -> list[Score]:
        """A row's runs."""
        return [score for score in self.students if score.method == name]

    def _row(self, name: str, scores: Sequence[Score]) -> list[str]:
        first, *others = (_cell(column, [score.values[column.name] for score in scores]) for column in self._columns())
        headline = self.scores.headline
        selected = _cell(headline, [score.values[f"{headline.name}_selected"] for score in scores])
        seconds = _cell(_SECONDS, [score.seconds_per_epoch for score in scores])
        return [name, first, selected, *others, f"{scores[0].parameters:,}", seconds]

    def figures(self) -> dict[str, Figure]:
        """The figures by file name."""
        headline, scale = self.scores.headline.name, self.scores.headline.scale
        kind = headline.removeprefix("test_")
        suffix = " (%)" if scale == 100 else ""
        # A row with a run that has no scores has no mean.
        drawn = [name for name in self.methods if not any(score.failed for score in self.of(name))]
        if not drawn:
            return {}
        ensembles, references = self.scores.ensembles, {}
        if ensembles:
            references = {
                "ensemble": statistics.fmean(values[headline] for values in ensembles.values()),
                "teachers' mean": statistics.fmean(score.values[headline] for score in self.teachers),
            }
        watched_scale = self.scores.watched_scale
        figures = {
            f"{kind}.png": score_bars(
                {name: [score.values[headline] for score in self.of(name)] for name in drawn},
                references,
                label=f"test {self.scores.quantity}, last epoch{suffix}",
                scale=scale,
            ),
            "learning_curves.png": learning_curves(
                {name: np.array([score.curve for score in self.of(name)]) for name in drawn},
                label=f"validation {self.scores.watched}{' (%)' if watched_scale == 100 else ''}",
                scale=watched_scale,
            ),
        }
        if all(score.bins for name in drawn for score in self.of(name)):
            bins = {name: _summed([score.bins for score in self.of(name)]) for name in drawn}
            ensemble = list(self.scores.ensemble_bins.values())
            figures["reliability.png"] = reliability_diagram(bins, {"ensemble": _summed(ensemble)} if ensemble else {})
        return figures

    def notes(self) -> list[str]:
        """A line about each run that has no scores."""
        return self.scores.failures

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.md``, ``results.csv``, ``report.json``, figures; ``paired.csv`` and ``teachers.csv`` if any.

        Returns:
            The paths.
        """
        footnotes = "".join(f"\n{note}\n" for note in self.notes())
        text = f"{self.scores.heading}\n\n{markdown_table(self.rows())}{footnotes}"
        pages = {"results.csv": csv_text([score.line() for score in self.students])}
        if self.paired:
            pages["paired.csv"] = csv_text([each.line() for row in self.paired for each in row])
            text += f"\n{markdown_table(self.paired_rows())}\n{as_list(LEGEND)}\n"
        if self.teachers:
            pages["teachers.csv"] = csv_text([score.line() for score in self.teachers])
        self.save(folder)
        return write_pages(folder, {**pages, "results.md": text}, self.figures())

    def paired_rows(self) -> list[list[str]]:
        """The table of differences from the student alone; there are several seeds, and other rows."""
        return paired_rows(self.paired)


def as_list(legend: str) -> str:
    """A legend as a Markdown list: an item begins with what it explains and a colon, other lines go on with it."""
    joined = re.sub(rf"\n(?!{_EXPLAINED})", " ", legend)
    return re.sub(rf"^(?={_EXPLAINED})", "- ", joined, flags=re.MULTILINE)


def _summed(bins: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, confidences, hits = np.sum([np.asarray(each, dtype=float) for each in bins], axis=0)
    return counts, confidences, hits


def _cell(column: Column, values: Sequence[float]) -> str:
    if not np.isfinite(values).all():
        return "-"
    mean = column.text(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {column.text(statistics.stdev(values))}"
