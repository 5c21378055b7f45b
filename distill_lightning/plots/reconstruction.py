"""Figures of the probes that reconstruct one feature map from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill_lightning.plots.style import ShownFigure, plain

_STYLES = ("-", "--", ":", "-.")


def reconstruction_errors(
    absolute: Mapping[tuple[str, str], Sequence[float]], relative: Mapping[tuple[str, str], Sequence[float]]
) -> Figure:
    """Plot reconstruction errors by epoch: absolute ones on the left, relative ones on the right.

    Curves with the same target have the same colour, and different line styles for the networks that are probed.

    Args:
        absolute: the errors of each ``(network, target)``, one per epoch; a network that is its own target
            reconstructs itself.
        relative: the errors of the same pairs, divided by the size of the target.
    """
    figure = ShownFigure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    targets = list(dict.fromkeys(target for _, target in absolute))
    for axes, curves, title in ((left, absolute, "absolute error"), (right, relative, "relative error")):
        seen: dict[str, int] = {}
        for (network, target), errors in curves.items():
            stroke = seen.setdefault(target, 0)
            seen[target] += 1
            axes.plot(
                np.arange(1, len(errors) + 1),
                errors,
                color=f"C{targets.index(target) % 10}",
                linestyle=_STYLES[stroke % len(_STYLES)],
                marker="o",
                markersize=3,
                label=network if network == target else f"{network} to {target}",
            )
        _dress(axes, title)
    right.legend(frameon=False, fontsize=8)
    return figure


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
