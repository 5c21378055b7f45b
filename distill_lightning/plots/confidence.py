"""Figures of the calibration of predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.plots.style import Array, RowStyle, ShownFigure, panels, plain, row_styles, title

Bins = tuple[Array, Array, Array]
Curve = tuple[Array, Array]

# Of so few samples an accuracy says nothing.
_FEWEST = 10


def reliability_diagram(
    bins: Mapping[str, Bins],
    references: Mapping[str, Bins] | None = None,
    *,
    styles: Mapping[str, RowStyle] | None = None,
) -> Figure:
    """Plot accuracy against confidence by bin, a panel for each method, over the share of samples in each bin.

    Args:
        bins: for each method what `distill_lightning.functional.calibration_bins` returns: counts, sums of confidences
            and hits. Bins with fewer than 10 samples are not drawn.
        references: bins that are drawn in grey in every panel, for example the ensemble's.
        styles: how the methods look; by default by their order.
    """
    styles = styles or row_styles(bins)
    figure = ShownFigure(layout="constrained")
    axes = panels(figure, len(bins))
    for own, (name, (counts, confidences, hits)) in zip(axes, bins.items(), strict=True):
        color, marker = styles[name]
        own.bar((np.arange(len(counts)) + 0.5) / len(counts), counts / counts.sum(), 1 / len(counts), color="0.88")
        own.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1)
        own.plot(*_drawn(counts, confidences, hits), marker=marker, color=color, markersize=3.5, label=name)
        for number, (other, given) in enumerate((references or {}).items()):
            own.plot(*_drawn(*given), color="0.4", linestyle=("-", ":")[number % 2], linewidth=1.2, label=other)
        title(own, name, styles[name])
        own.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        plain(own)
    others = f"; grey: {', '.join(references)}" if references else ""
    figure.supxlabel(f"confidence{others}", fontsize=10)
    figure.supylabel("accuracy; bars: share of samples", fontsize=10)
    return figure


def _drawn(counts: Array, confidences: Array, hits: Array) -> tuple[Array, Array]:
    """Mean confidence and accuracy of the bins that hold enough samples."""
    filled = counts >= _FEWEST
    return confidences[filled] / counts[filled], hits[filled] / counts[filled]


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
