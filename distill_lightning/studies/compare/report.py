"""From the scores of a comparison to its tables, files and figures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from distill_lightning.pages import csv_text, markdown_table, write_pages
from distill_lightning.studies.compare.drawn import figures_of
from distill_lightning.studies.compare.intervals import Interval, interval_of
from distill_lightning.studies.compare.paired import Values, legend, pair, paired_rows, pairs_of
from distill_lightning.studies.compare.scores import GAP, Score, Scores, Section, by_set, selected_name
from distill_lightning.studies.compare.task import Column

# Up to three words and a colon, at the beginning of a line.
_EXPLAINED = r"[^\s:]+( [^\s:]+){0,2}:"
_SECONDS = Column("seconds_per_epoch", "s/epoch", 1, 2)
_MEMORY = Column("peak_memory", "peak MB", 1e-6, 0)


class Report:
    """The tables and figures of a finished comparison.

    Beside the table stand each row's differences from the baseline, paired by the set of teachers and the seed, with
    their intervals and what they come to, where there are several pairs.

    Args:
        scores: what its runs scored.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.teachers = [run for run in scores.runs if run.is_teacher]
        self.students = [run for run in scores.runs if not run.is_teacher]
        self.methods = list(dict.fromkeys(score.method for score in self.students))
        self.paired = pair(
            {name: self._values(name) for name in self.methods},
            [column for column in scores.columns if column.title and column != GAP],
            scores.baseline,
        )

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

    def of(self, name: str) -> list[Score]:
        """A row's runs, or those of the teachers of a name, one for each set."""
        return [score for score in self.scores.runs if score.method == name]

    def _values(self, name: str) -> Values:
        return {score.key: score.values for score in self.of(name)}

    def _columns(self) -> list[Column]:
        shown = [column for column in self.scores.columns if column.title]
        return [column for column in shown if self.scores.confidence or not column.of_confidence]

    def header(self) -> list[str]:
        """The table's titles."""
        shown = [column.title for column in self._columns()]
        selected = "sel. %" if self.scores.headline.scale == 100 else "sel."
        return ["row", shown[0], selected, *shown[1:], "params", *(column.title for column in self._costs())]

    def _costs(self) -> list[Column]:
        """What is known of none of the runs has no column."""
        return [_SECONDS, *([_MEMORY] if any(run.peak_memory for run in self.scores.runs) else [])]

    def rows(self) -> list[list[str]]:
        """The table: a header, then teachers, ensemble, student alone and methods, ``mean ± sd``."""
        teachers = dict.fromkeys(score.method for score in self.teachers)
        rows = [self.header(), *(self._row(name) for name in teachers)]
        if self.scores.ensembles:
            each = [[values] for values in self.scores.ensembles.values()]
            first, *others = (_cell(column, each) for column in self._columns())
            # The ensemble runs every teacher: it has all their parameters, and no training or selection of its own.
            parameters = f"{sum(score.parameters for score in self.teachers) // len(each):,}"
            rows.append(["ensemble", first, "", *others, parameters, *("" for _ in self._costs())])
        return rows + [self._row(name) for name in self.methods]

    def _row(self, name: str) -> list[str]:
        scores, headline = self.of(name), self.scores.headline
        values = by_set(scores)
        first, *others = (_cell(column, values) for column in self._columns())
        selected = [[each[selected_name(headline)] for each in own] for own in values]
        costs = [_cost(column, scores) for column in self._costs()]
        return [name, first, _spread(headline, selected), *others, f"{scores[0].parameters:,}", *costs]

    def interval(self, name: str) -> Interval:
        """Of the mean of a row's headline, over the sets of teachers and the seeds."""
        return interval_of([[each[self.scores.headline.name] for each in own] for own in by_set(self.of(name))])

    def verdicts(self) -> dict[str, str]:
        """What each row's difference from the baseline comes to in the headline; empty where there is but one pair."""
        return {row[0].method: row[0].verdict() for row in self.paired}

    def paired_rows(self) -> list[list[str]]:
        """The table of differences from the baseline; where there are none, a line that says what they need."""
        if self.paired:
            return paired_rows(self.paired, self._columns())
        lacking = "several seeds" if len(self.methods) > 1 else "another row"
        return [[f"no differences from {self.scores.baseline}: they need {lacking}"]]

    def spread_rows(self) -> list[list[str]]:
        """Whose the variance of each row is, where there are several sets of teachers."""
        headline, found = self.scores.headline, {name: self.interval(name) for name in self.methods}
        header = ["", headline.title, "95 % interval", "sd between sets", "sd between seeds"]
        return [header] + [
            [
                name,
                _text(headline, each.mean),
                f"[{_text(headline, each.low)}, {_text(headline, each.high)}]",
                _text(headline, each.between),
                _text(headline, each.within),
            ]
            for name, each in found.items()
        ]

    @property
    def sets(self) -> int:
        """How many sets of teachers there are, or of students where there are none."""
        return len({score.teacher_set for score in self.students})

    def notes(self) -> list[str]:
        """Lines below the table: of each run that has no scores, of what the table speaks, and of its seconds."""
        notes = list(self.scores.failures)
        if self.teachers and self.sets == 1:
            notes.append(
                "All rows learn from the same teachers: what is said here is said of these teachers only, and ± and "
                "intervals cover the students' seeds alone."
            )
        if len(self.students) == len(self.methods):
            notes.append("One run a row: nothing tells how far these figures would vary.")
        if any(score.shared for score in self.scores.runs):
            notes.append("s/epoch: of the epochs in which no other run was made beside it; -: there were none.")
        return notes

    def tables(self) -> list[Section]:
        """What stands below the first table: verdicts and differences, whose the variance is, the other sections."""
        tables = []
        if self.paired:
            lines = "\n".join(f"{name}: {verdict}" for name, verdict in self.verdicts().items())
            tables.append(Section(f"{self.scores.headline.title}, compared with {self.scores.baseline}", [], lines))
            tables.append(Section("", self.paired_rows(), legend(self.paired)))
        if self.sets > 1:
            sets = by_set(self.of(self.methods[0]))
            tables.append(Section(f"Whose the variance is: {pairs_of(sets)}", self.spread_rows(), _SPREAD))
        return tables + self.scores.sections

    def figures(self) -> dict[str, Figure]:
        """The figures by file name."""
        return figures_of(self.scores, {name: self.interval(name) for name in self.methods})

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.md``, ``results.csv``, ``report.json`` and figures.

        Where there are several pairs, ``paired.csv`` as well, where there are teachers, ``teachers.csv``.

        Returns:
            The paths.
        """
        footnotes = "".join(f"\n{note}\n" for note in self.notes())
        text = f"{self.scores.heading}\n\n{markdown_table(self.rows())}{footnotes}"
        for table in self.tables():
            parts = (
                table.title and f"## {table.title}",
                table.rows and markdown_table(table.rows),
                as_list(table.text),
            )
            text += "".join(f"\n{part.rstrip()}\n" for part in parts if part)
        pages = {"results.csv": csv_text([score.line(sets=self.sets) for score in self.students])}
        if self.paired:
            pages["paired.csv"] = csv_text([each.line() for row in self.paired for each in row])
        if self.teachers:
            pages["teachers.csv"] = csv_text([score.line(sets=self.sets) for score in self.teachers])
        written = [*write_pages(folder, {**pages, "results.md": text}, {}), self.save(folder)]
        # Last, so that no figure can cost a table.
        return [*written, *write_pages(folder, {}, self.figures())]


_SPREAD = """\
interval: of the mean of the sets' means, by Student's t on these
between sets: how far the means of sets of teachers lie apart, beyond what their few seeds explain
between seeds: how far students of other seeds lie apart under the same teachers"""


def as_list(legend: str) -> str:
    """A legend as a Markdown list: an item begins with what it explains and a colon, other lines go on with it."""
    joined = re.sub(rf"\n(?!{_EXPLAINED})", " ", legend)
    return re.sub(rf"^(?={_EXPLAINED})", "- ", joined, flags=re.MULTILINE)


def _cell(column: Column, values: Sequence[Sequence[dict[str, float]]]) -> str:
    return _spread(column, [[each[column.name] for each in own] for own in values])


def _spread(column: Column, values: Sequence[Sequence[float]]) -> str:
    """``mean ± sd`` over sets and seeds; of one value, the value."""
    found = interval_of(values)
    if math.isnan(found.mean):
        return "-"
    mean = column.text(found.mean)
    return mean if math.isnan(found.deviation) else f"{mean} ± {column.text(found.deviation)}"


def _cost(column: Column, scores: Sequence[Score]) -> str:
    """Of the runs that tell: the mean and standard deviation of seconds, the most memory."""
    if column is _MEMORY:
        most = max(score.peak_memory for score in scores)
        return column.text(most) if most else "-"
    known = [score.seconds_per_epoch for score in scores if math.isfinite(score.seconds_per_epoch)]
    return _spread(column, [known]) if known else "-"


def _text(column: Column, value: float) -> str:
    return "-" if math.isnan(value) else column.text(value)
