"""Figures of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill_lightning.plots.style import Array, RowStyle, ShownFigure, panels, plain, row_styles, title

# From so many epochs on, the axis is that of the later ones: the first would leave no room for differences.
_LONG = 6


def score_bars(
    scores: Mapping[str, Sequence[float]],
    references: Mapping[str, float],
    *,
    intervals: Mapping[str, tuple[float, float, float]] | None = None,
    mode: Literal["max", "min"] = "max",
    label: str = "test accuracy, last epoch (%)",
    scale: float = 100,
    styles: Mapping[str, RowStyle] | None = None,
) -> Figure:
    """Plot a score by method, the best at the top: a dot for each run, the mean, and the interval of the mean.

    Args:
        scores: scores of each method, one per run; accuracies in ``[0, 1]``, for example.
        references: scores that are drawn as upright lines, for example the ensemble's.
        intervals: for each method the mean and its bounds, which may be NaN; without, the mean of its scores, and no
            bounds.
        mode: whether higher scores are better, or lower ones.
        label: label of the axis.
        scale: the factor by which the scores are multiplied.
        styles: how the methods look; by default by their order.

    Example:
        >>> from distill_lightning.plots import score_bars
        >>> scores = {"alone": [0.90, 0.92], "kd": [0.94, 0.95]}
        >>> figure = score_bars(scores, {"ensemble": 0.97}, intervals={"alone": (0.91, 0.78, 1.0)})
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['kd', 'alone']
    """
    styles = styles or row_styles(scores)
    bounds = {name: (float(np.mean(values)), np.nan, np.nan) for name, values in scores.items()} | dict(intervals or {})
    names = sorted(scores, key=lambda name: bounds[name][0], reverse=mode == "max")
    digits = 1 if scale == 100 else 3
    figure = ShownFigure(figsize=(7.5, 1.3 + 0.34 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, value) in enumerate(references.items()):
        axes.axvline(scale * value, color="0.35", linestyle=("--", ":", "-.")[number % 3], linewidth=1.2, label=name)
    for place, name in enumerate(names):
        color, marker = styles[name]
        shown = scale * np.asarray(scores[name], dtype=float)
        mean, low, high = (scale * bound for bound in bounds[name])
        axes.plot(shown, np.full(len(shown), place) + 0.22, ".", color=color, alpha=0.6, markersize=5, linewidth=0)
        if np.isfinite([low, high]).all():
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=color, capsize=3, linewidth=1.6)
        axes.plot(mean, place, marker, color=color, markersize=6.5)
        axes.annotate(f"{mean:.{digits}f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    has_bounds = any(np.isfinite(low) for _, low, _ in bounds.values())
    axes.set_xlabel(f"{label}\nsmall dots: runs; bars: 95 % interval of the mean" if has_bounds else label)
    axes.margins(x=0.03)
    # The interval of two runs may be ten times as wide as everything else: it goes on outside.
    inside = scale * np.array([*references.values(), *(value for values in scores.values() for value in values)])
    inside = inside[np.isfinite(inside)]
    if len(inside):
        room = 0.75 * np.ptp(inside) or np.inf
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, inside.min() - room), min(right, inside.max() + room))
    plain(axes, grid="x")
    if references:
        figure.legend(loc="outside lower center", ncols=len(references), frameon=False, fontsize=9)
    return figure


def learning_curves(
    curves: Mapping[str, Array],
    *,
    reference: str = "alone",
    label: str = "validation accuracy (%)",
    scale: float = 100,
    styles: Mapping[str, RowStyle] | None = None,
) -> Figure:
    """Plot a validation score by epoch, a panel for each method: the mean over runs, shaded by one standard deviation.

    The other methods' means are grey in every panel, that of the reference is dashed. Where there are six epochs or
    more, the axis is made for the last two thirds of them.

    Args:
        curves: scores ``(runs, epochs)`` of each method; accuracies in ``[0, 1]``, for example.
        reference: the method that stands in every panel for comparison, if it is one of them.
        label: label of the axis.
        scale: the factor by which the scores are multiplied.
        styles: how the methods look; by default by their order.
    """
    styles = styles or row_styles(curves)
    shown = {name: scale * np.asarray(values, dtype=float) for name, values in curves.items()}
    means = {name: values.mean(axis=0) for name, values in shown.items()}
    figure = ShownFigure(layout="constrained")
    axes = panels(figure, len(shown))
    for own, (name, values) in zip(axes, shown.items(), strict=True):
        epochs, mean = np.arange(1, values.shape[1] + 1), means[name]
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
        own.fill_between(epochs, mean - spread, mean + spread, color=styles[name].color, alpha=0.2, linewidth=0)
        own.plot(epochs, mean, color=styles[name].color, linewidth=1.8, zorder=4)
        for other, line in means.items():
            if other == reference and other != name:
                own.plot(epochs, line, color=styles[other].color, linestyle="--", linewidth=1, zorder=3)
            elif other != name:
                own.plot(epochs, line, color="0.85", linewidth=0.8, zorder=1)
        title(own, name, styles[name])
        plain(own)
    length = max(map(len, means.values()))
    late = np.concatenate([values[:, length // 3 :].ravel() for values in shown.values()])
    # An epoch whose score is no number leaves a gap.
    late = late[np.isfinite(late)]
    if length >= _LONG and len(late):
        margin = 0.08 * (late.max() - late.min() or 1.0)
        axes[0].set_ylim(late.min() - margin, late.max() + margin)
    axes[0].xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    dashed = f"; dashed: {reference}" if reference in shown and len(shown) > 1 else ""
    figure.supxlabel(f"epoch{dashed}", fontsize=10)
    figure.supylabel(label, fontsize=10)
    return figure
