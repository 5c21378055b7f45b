"""What `compare` returns: a finished comparison, as Python and notebooks look at it."""

from __future__ import annotations

import base64
import html
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from distill_lightning.studies.compare.intervals import interval_of
from distill_lightning.studies.compare.report import Report
from distill_lightning.studies.compare.scores import Score, by_set
from distill_lightning.studies.output import table_of


class Comparison:
    """A finished comparison.

    A notebook shows it as its table and figures, ``print`` as its table.

    Args:
        report: its scores.
        folder: where its files are: ``results.md``, ``results.csv``, every run's ``student.safetensors`` below
            ``runs``, and the rest.

    Attributes:
        report: its scores.
        folder: where its files are.

    Example:
        >>> from distill_lightning import Comparison
        >>> Comparison.load("results/of/nobody")
        Traceback (most recent call last):
        distill_lightning.errors.InputError: results/of/nobody has no report.json: run the comparison to its end first
    """

    def __init__(self, report: Report, folder: Path) -> None:
        self.report, self.folder = report, folder

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read a comparison that was made before, here or elsewhere; neither its data nor its networks are needed.

        Args:
            folder: its output folder.

        Raises:
            InputError: there is no finished comparison in it.
        """
        return cls(Report.load(Path(folder)), Path(folder))

    @property
    def table(self) -> Any:
        """A row of numbers for each row of the table: means over the seeds, and standard deviations as ``<name>_sd``.

        The columns are those of ``results.csv``; shares are parts of 1, ``None`` or NaN stands where there is no
        number. A ``pandas.DataFrame`` with the rows' names as its index if pandas is installed, else a list of dicts.
        """
        return _frame(self._rows(), index="row")

    @property
    def runs(self) -> Any:
        """The numbers of each run, teachers' first: a ``pandas.DataFrame`` if pandas is installed, else dicts."""
        return _frame([score.line(sets=self.report.sets) for score in self._scores])

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The figures, by file name without ``.png``; a notebook shows one that is the last value of a cell."""
        return {name.removesuffix(".png"): figure for name, figure in self.report.figures().items()}

    def __repr__(self) -> str:
        shown = io.StringIO()
        # Text alone, whatever shows it, in lines as long as they are.
        console = Console(file=shown, width=_UNLIMITED, force_jupyter=False, force_terminal=False, color_system=None)
        console.print(table_of(self.report.rows()))
        for note in self.report.notes():
            console.print(note, markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())

    def _repr_html_(self) -> str:
        parts = [_html_table(self.report.rows())]
        parts += [f"<p>{html.escape(note)}</p>" for note in self.report.notes()]
        if self.report.paired:
            parts.append(_html_table(self.report.paired_rows()))
        parts += [_html_image(name, figure) for name, figure in self.figures.items()]
        return "\n".join(parts)

    @property
    def _scores(self) -> list[Any]:
        return [*self.report.teachers, *self.report.students]

    def _rows(self) -> list[dict[str, Any]]:
        """The rows in the order of the report's table."""
        names = dict.fromkeys(score.method for score in self._scores)
        rows = [{"row": name, **_over_runs(self.report.of(name))} for name in names]
        ensembles = [[values] for values in self.report.scores.ensembles.values()]
        if ensembles:
            teachers = self.report.teachers
            parameters = sum(score.parameters for score in teachers) // len(ensembles)
            row = {"row": "ensemble", **_over_sets(ensembles), "parameters": parameters}
            rows.insert(len({score.method for score in teachers}), row)
        return rows


_UNLIMITED = 10_000


def _over_runs(scores: Sequence[Score]) -> dict[str, Any]:
    """What the report's table says of a row, as numbers: seconds are of the runs that tell, memory is the most."""
    seconds = [score.seconds_per_epoch for score in scores if math.isfinite(score.seconds_per_epoch)]
    known = interval_of([seconds]) if seconds else None
    return {
        **_over_sets(by_set(scores)),
        "parameters": scores[0].parameters,
        "seconds_per_epoch": math.nan if known is None else known.mean,
        "seconds_per_epoch_sd": math.nan if known is None else known.deviation,
        "peak_memory": max(score.peak_memory for score in scores) or math.nan,
    }


def _over_sets(values: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Means and standard deviations over sets of teachers and the seeds under each; NaN where a run has no number."""
    found: dict[str, float] = {}
    for name in values[0][0]:
        interval = interval_of([[each.get(name, math.nan) for each in own] for own in values])
        found |= {name: interval.mean, f"{name}_sd": interval.deviation}
    return found


def _frame(rows: list[dict[str, Any]], index: str | None = None) -> Any:
    """A data frame, or the rows themselves where pandas is not installed."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        return rows
    frame = pandas.DataFrame(rows)
    return frame if index is None else frame.set_index(index)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = ["<table>", _html_row("th", header), *(_html_row("td", row) for row in body), "</table>"]
    return "\n".join(lines)


def _html_row(kind: str, cells: Sequence[str]) -> str:
    # The rows' names stand at the left, numbers at the right.
    sides = ["left", *["right"] * (len(cells) - 1)]
    return "".join(
        ["<tr>"]
        + [
            f'<{kind} style="text-align: {side}">{html.escape(cell)}</{kind}>'
            for side, cell in zip(sides, cells, strict=True)
        ]
        + ["</tr>"]
    )


def _html_image(name: str, figure: Figure) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
