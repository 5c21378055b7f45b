"""The style that the figures share."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which is too pale for lines. Black
# is the first row's own.
_BLACK = "#000000"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v")
# Characters above a small panel.
_TITLE = 30


class RowStyle(NamedTuple):
    """How a row of a comparison looks, the same in every figure."""

    color: str
    marker: str


def row_styles(names: Iterable[str]) -> dict[str, RowStyle]:
    """A look for each row by its place: black, six colours, and for further rows these again with other markers.

    Args:
        names: all rows of the comparison, whichever of them a figure shows.
    """
    first, *others = names
    count = len(_COLORS)
    return {first: RowStyle(_BLACK, _MARKERS[0])} | {
        name: RowStyle(_COLORS[place % count], _MARKERS[place // count % len(_MARKERS)])
        for place, name in enumerate(others)
    }


class ShownFigure(Figure):
    """A figure that a notebook shows as the value of a cell, without ``%matplotlib``."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=100)
        return png.getvalue()


def plain(axes: Axes, *, grid: Literal["x", "y", "both"] = "y") -> None:
    """Remove the frame, and put light lines behind the data.

    Args:
        axes: the axes.
        grid: from which axis they go out.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9")
    axes.set_axisbelow(True)


def title(axes: Axes, name: str, style: RowStyle) -> None:
    """Write a row's name in its colour above a small panel, in lines that fit it."""
    axes.set_title("\n".join(textwrap.wrap(name, _TITLE)), color=style.color, fontsize=9)


def panels(figure: Figure, count: int) -> list[Axes]:
    """Small panels with the same axes, in rows of up to four; only those at the left and below have numbers.

    Args:
        figure: an empty figure, which gets its size.
        count: how many.
    """
    columns = min(count, 4)
    rows = -(-count // columns)
    figure.set_size_inches(1 + 2.3 * max(columns, 2), 1.1 + 1.9 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for place, each in enumerate(axes):
        if place >= count:
            each.set_visible(False)
        elif place + columns >= count:
            # The panel below it is empty.
            each.tick_params(labelbottom=True)
    return axes[:count]
