"""Figures of the teachers, before they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.plots.style import ShownFigure, plain

# The metrics that are drawn, with titles and scales.
_SHOWN = {
    "accuracy": ("accuracy (%)", 100),
    "mae": ("MAE", 1),
    "rmse": ("RMSE", 1),
    "nll": ("NLL (nats)", 1),
    "ece": ("ECE (%)", 100),
    "calibration_error": ("calibration error", 1),
}


def teacher_bars(rows: Sequence[Mapping[str, float | str]], *, chance: float | None = None) -> Figure:
    """Plot one panel for each metric with one bar for each teacher; the ensemble is grey.

    Args:
        rows: the rows of a `distill_lightning.callbacks.TeacherReport`, each with a ``name`` and metrics. Of the
            metrics, ``accuracy``, ``mae``, ``rmse``, ``nll``, ``ece`` and ``calibration_error`` are drawn if present.
        chance: an accuracy in ``[0, 1]`` that is drawn as a dashed line, for example that of guessing.
    """
    names = [str(row["name"]) for row in rows]
    shown = [metric for metric in _SHOWN if metric in rows[0]]
    figure = ShownFigure(figsize=(1 + (1 + 0.6 * len(rows)) * len(shown), 3.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        title, scale = _SHOWN[metric]
        values = scale * np.array([float(row[metric]) for row in rows])
        bars = axes.bar(range(len(rows)), values, color=["0.6" if name == "ensemble" else "C0" for name in names])
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_xticks(range(len(rows)), names, rotation=20, ha="right")
        if metric == "accuracy" and chance is not None:
            axes.axhline(100 * chance, color="0.3", linestyle="--", linewidth=1)
            title = f"{title}, dashed: chance"
        axes.set_title(title, fontsize=10)
        plain(axes)
    return figure
