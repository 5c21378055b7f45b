"""What `compare` returns: a finished comparison, as Python and notebooks look at it."""

from __future__ import annotations

import base64
import html
import importlib
import io
import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from distill_lightning.studies.compare.report import Report
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
        return _frame([score.line() for score in self._scores])

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
        by_row: dict[str, list[dict[str, Any]]] = {}
        for score in self._scores:
            by_row.setdefault(score.method, []).append(_numbers(score.line()))
        teachers = {score.method for score in self.report.teachers}
        rows = [{"row": name, **_over_seeds(lines)} for name, lines in by_row.items()]
        ensembles = [dict(values) for values in self.report.scores.ensembles.values()]
        if ensembles:
            rows.insert(len(teachers), {"row": "ensemble", **_over_seeds(ensembles)})
        return rows


_UNLIMITED = 10_000
# What tells runs apart is no number that has a mean.
_NO_MEAN = ("seed", "teacher_set", "shared", "is_teacher")


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if isinstance(value, (int, float)) and name not in _NO_MEAN}


def _over_seeds(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and, of several runs, standard deviations; NaN where a run has no number."""
    found: dict[str, Any] = {}
    for name in lines[0]:
        values = [float(line.get(name, math.nan)) for line in lines]
        found[name] = lines[0][name] if len(set(values)) == 1 else statistics.fmean(values)
        if name != "parameters":
            known = len(values) > 1 and all(map(math.isfinite, values))
            found[f"{name}_sd"] = statistics.stdev(values) if known else math.nan
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
