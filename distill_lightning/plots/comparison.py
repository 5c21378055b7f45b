"""Figures of a comparison: arrays in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bins = tuple[Array, Array, Array]


def accuracy_bars(scores: Mapping[str, Sequence[float]], references: Mapping[str, float]) -> Figure:
    """Test accuracy by method: every seed a dot, the mean and one standard deviation over the seeds.

    Args:
        scores: accuracies in ``[0, 1]`` of each method, one per seed.
        references: accuracies drawn as dashed lines, the ensemble's for example.
    """
    figure = Figure(figsize=(1.6 + 1.2 * len(scores), 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(scores.items()):
        percent = 100 * np.asarray(values, dtype=float)
        spread = percent.std(ddof=1) if len(percent) > 1 else 0.0
        color = f"C{place % 10}"
        axes.plot(np.full(len(percent), place) - 0.15, percent, "o", color=color, alpha=0.5, markersize=4)
        axes.errorbar(place + 0.05, percent.mean(), spread, fmt="s", color=color, capsize=5, markersize=7, label=name)
        axes.annotate(f"{percent.mean():.1f}", (place + 0.15, percent.mean()), va="center", fontsize=9)
    for number, (name, value) in enumerate(references.items()):
        axes.axhline(100 * value, color="0.4", linestyle=["--", ":"][number % 2], linewidth=1)
        axes.annotate(name, (-0.45, 100 * value), va="bottom", fontsize=8, color="0.3")
    axes.set_xticks(range(len(scores)), list(scores), rotation=20, ha="right")
    axes.set_xlim(-0.5, len(scores) - 0.4)
    axes.set_ylabel("test accuracy, last epoch (%)")
    _plain(axes)
    return figure


def learning_curves(curves: Mapping[str, Array]) -> Figure:
    """Validation accuracy by epoch: the mean over seeds, shaded by one standard deviation.

    Args:
        curves: ``(seeds, epochs)`` accuracies in ``[0, 1]`` of each method.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(curves.items()):
        percent = 100 * np.asarray(values, dtype=float)
        epochs = np.arange(1, percent.shape[1] + 1)
        mean = percent.mean(axis=0)
        spread = percent.std(axis=0, ddof=1) if len(percent) > 1 else np.zeros_like(mean)
        axes.plot(epochs, mean, color=f"C{place % 10}", label=name)
        axes.fill_between(epochs, mean - spread, mean + spread, color=f"C{place % 10}", alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    axes.legend(frameon=False)
    _plain(axes)
    return figure


def reliability_diagram(bins: Mapping[str, Bins], references: Mapping[str, Bins] | None = None) -> Figure:
    """Accuracy against confidence by bin, and how many samples lie in each bin.

    Args:
        bins: for each method what `distill_lightning.functional.calibration_bins` gives: counts, sums of confidences,
            hits. Bins with fewer than 10 samples are not drawn.
        references: likewise, drawn in grey: the ensemble's for example.
    """
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
    colors = [f"C{place % 10}" for place in range(len(bins))] + ["0.4"] * len(references or {})
    for color, (name, (counts, confidences, hits)) in zip(colors, {**bins, **(references or {})}.items(), strict=True):
        filled = counts >= 10
        confidence, accuracy = confidences[filled] / counts[filled], hits[filled] / counts[filled]
        above.plot(confidence, accuracy, "o-", color=color, markersize=4, label=name)
        centres = (np.arange(len(counts)) + 0.5) / len(counts)
        below.step(centres, counts / counts.sum(), where="mid", color=color)
    above.set_ylabel("accuracy")
    above.legend(frameon=False)
    below.set_ylabel("share of samples")
    below.set_xlabel("confidence")
    for axes in (above, below):
        _plain(axes)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
