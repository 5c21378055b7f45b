"""Figures of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.plots.style import Array, ShownFigure, plain


def score_bars(
    scores: Mapping[str, Sequence[float]],
    references: Mapping[str, float],
    *,
    label: str = "test accuracy, last epoch (%)",
    scale: float = 100,
) -> Figure:
    """Plot a score by method: a dot for each seed, with the mean and one standard deviation over the seeds.

    Args:
        scores: scores of each method, one per seed; accuracies in ``[0, 1]``, for example.
        references: scores that are drawn as dashed lines, for example the ensemble's.
        label: label of the axis.
        scale: the factor by which the scores are multiplied.
    """
    figure = ShownFigure(figsize=(1.6 + 1.2 * len(scores), 4), layout="constrained")
    axes = figure.add_subplot()
    digits = 1 if scale == 100 else 3
    for place, (name, values) in enumerate(scores.items()):
        shown = scale * np.asarray(values, dtype=float)
        spread = shown.std(ddof=1) if len(shown) > 1 else 0.0
        color = f"C{place % 10}"
        axes.plot(np.full(len(shown), place) - 0.15, shown, "o", color=color, alpha=0.5, markersize=4)
        axes.errorbar(place + 0.05, shown.mean(), spread, fmt="s", color=color, capsize=5, markersize=7, label=name)
        axes.annotate(f"{shown.mean():.{digits}f}", (place + 0.15, shown.mean()), va="center", fontsize=9)
    for number, (name, value) in enumerate(references.items()):
        axes.axhline(scale * value, color="0.4", linestyle=["--", ":"][number % 2], linewidth=1)
        axes.annotate(name, (-0.45, scale * value), va="bottom", fontsize=8, color="0.3")
    axes.set_xticks(range(len(scores)), list(scores), rotation=20, ha="right")
    axes.set_xlim(-0.5, len(scores) - 0.4)
    axes.set_ylabel(label)
    plain(axes)
    return figure


def learning_curves(
    curves: Mapping[str, Array], *, label: str = "validation accuracy (%)", scale: float = 100
) -> Figure:
    """Plot a validation score by epoch: the mean over seeds, shaded by one standard deviation.

    Args:
        curves: scores ``(seeds, epochs)`` of each method; accuracies in ``[0, 1]``, for example.
        label: label of the axis.
        scale: the factor by which the scores are multiplied.
    """
    figure = ShownFigure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(curves.items()):
        shown = scale * np.asarray(values, dtype=float)
        epochs = np.arange(1, shown.shape[1] + 1)
        mean = shown.mean(axis=0)
        spread = shown.std(axis=0, ddof=1) if len(shown) > 1 else np.zeros_like(mean)
        axes.plot(epochs, mean, color=f"C{place % 10}", label=name)
        axes.fill_between(epochs, mean - spread, mean + spread, color=f"C{place % 10}", alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    plain(axes)
    return figure
