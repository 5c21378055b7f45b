"""Figures of the calibration of predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.plots.style import Array, ShownFigure, plain

Bins = tuple[Array, Array, Array]
Curve = tuple[Array, Array]


def reliability_diagram(bins: Mapping[str, Bins], references: Mapping[str, Bins] | None = None) -> Figure:
    """Plot accuracy against confidence by bin, and the share of samples in each bin.

    Args:
        bins: for each method what `distill_lightning.functional.calibration_bins` returns: counts, sums of confidences
            and hits. Bins with fewer than 10 samples are not drawn.
        references: bins that are drawn in grey, for example the ensemble's.
    """
    figure = ShownFigure(figsize=(5, 5.5), layout="constrained")
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
        plain(axes)
    return figure


def risk_coverage_curve(curves: Mapping[str, Curve]) -> Figure:
    """Plot the share of errors among the most confident samples against the coverage.

    The dashed line is the best order of the same answers, with every error after every right answer. The shaded area
    between the two is E-AURC; the legend shows it and AURC in per mille.

    Args:
        curves: for each method what `distill_lightning.functional.risk_coverage` returns: coverage and risk ``(N,)``.
    """
    figure = ShownFigure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, (coverage, risk)) in enumerate(curves.items()):
        color = f"C{place % 10}"
        ranks = np.arange(1, len(risk) + 1)
        errors = round(float(risk[-1]) * len(risk))
        best = np.maximum(ranks - (len(risk) - errors), 0) / ranks
        label = f"{name}: AURC {1000 * np.mean(risk):.1f} ‰, E-AURC {1000 * np.mean(risk - best):.1f} ‰"
        axes.plot(coverage, 100 * risk, color=color, label=label)
        axes.plot(coverage, 100 * best, color=color, linestyle="--", linewidth=1)
        axes.fill_between(coverage, 100 * best, 100 * risk, color=color, alpha=0.15, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("coverage: share of samples answered, the most confident first")
    axes.set_ylabel("risk: errors among them (%)")
    axes.legend(frameon=False)
    plain(axes)
    return figure
