"""Figures of a compression run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from distill_lightning.plots.style import ShownFigure, plain


def plot_pareto(
    scores: Mapping[str, Sequence[float]],
    costs: Mapping[str, Mapping[str, float]],
    *,
    dense: str = "dense",
    controls: Set[str] = frozenset(),
    label: str = "test accuracy (%)",
    scale: float = 100,
    logarithmic: Set[str] = frozenset({"bytes"}),
) -> Figure:
    """Plot a score against costs, one panel for each; up and to the left is better (down, if lower scores are better).

    Args:
        scores: scores of each stage, one per seed; accuracies in ``[0, 1]``, for example.
        costs: for each panel, by its title (with the unit), the cost of each stage. A stage without a cost is left out.
        dense: the stage that is marked with a star and dashed lines.
        controls: stages that are drawn with hollow markers.
        label: label of the score's axis.
        scale: the factor by which the scores are multiplied.
        logarithmic: titles of the panels with a logarithmic axis.
    """
    figure = ShownFigure(figsize=(4.2 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.05})[0]
    for axes, (title, values) in zip(panels, costs.items(), strict=True):
        for place, (name, seeds) in enumerate(scores.items()):
            if name not in values:
                continue
            shown = scale * np.asarray(seeds, dtype=float)
            spread = shown.std(ddof=1) if len(shown) > 1 else 0.0
            color = f"C{place % 10}"
            axes.errorbar(
                values[name],
                shown.mean(),
                spread,
                fmt="*" if name == dense else "o",
                color=color,
                markerfacecolor="none" if name in controls else color,
                markersize=13 if name == dense else 7,
                capsize=3,
                label=name,
            )
            if name == dense:
                axes.axhline(shown.mean(), color="0.7", linestyle="--", linewidth=1, zorder=0)
                axes.axvline(values[name], color="0.7", linestyle="--", linewidth=1, zorder=0)
        axes.set_xlabel(title)
        axes.margins(0.1)
        _cost_axis(axes, logarithmic=title in logarithmic)
        plain(axes)
    panels[0].set_ylabel(label)
    entries = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _cost_axis(axes: Axes, *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        # From 0: the points' own range may be narrow and far from it.
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.tick_params(axis="x", labelsize=8)


def _short(value: float, _place: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def plot_sparsity(
    sparsity: Mapping[str, ArrayLike], *, times: ArrayLike | None = None, label: str = "epoch", overall: str = "overall"
) -> Figure:
    """Plot the share of zeros in each layer over time.

    Args:
        sparsity: the share of zeros in each layer, in ``[0, 1]``, one value per time.
        times: the times; ``None`` for 1, 2, 3 and so on.
        label: label of the time axis.
        overall: the entry that is drawn in black with a thick line, if present.
    """
    figure = ShownFigure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(sparsity.items()):
        shown = 100 * np.asarray(values, dtype=float)
        at = np.arange(1, len(shown) + 1) if times is None else np.asarray(times, dtype=float)
        look = {"color": "black", "linewidth": 2.5} if name == overall else {"color": _color(place, len(sparsity))}
        axes.plot(at, shown, label=name, drawstyle="steps-post", **look)
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)
    axes.set_ylabel("weights that are zero (%)")
    _legend(axes, len(sparsity))
    plain(axes)
    return figure


def plot_sensitivity(
    curves: Mapping[str, ArrayLike],
    amounts: ArrayLike,
    *,
    reference: float | None = None,
    label: str = "validation accuracy (%)",
    scale: float = 100,
    amount: str = "part of the layer that is removed",
) -> Figure:
    """Plot a score with only one layer compressed: a curve for each layer.

    Args:
        curves: the scores for each layer, one per amount.
        amounts: how much the layer is compressed.
        reference: the score of the uncompressed network, drawn as a dashed line.
        label: label of the score's axis.
        scale: the factor by which the scores are multiplied.
        amount: label of the axis of amounts.
    """
    figure = ShownFigure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    at = np.asarray(amounts, dtype=float)
    for place, (name, values) in enumerate(curves.items()):
        shown = scale * np.asarray(values, dtype=float)
        axes.plot(at, shown, marker="o", markersize=3, color=_color(place, len(curves)), label=name)
    if reference is not None:
        axes.axhline(scale * reference, color="0.4", linestyle="--", linewidth=1)
    axes.set_xlabel(amount)
    axes.set_ylabel(label)
    _legend(axes, len(curves))
    plain(axes)
    return figure


def plot_spectra(singular_values: Mapping[str, ArrayLike], ranks: Mapping[str, int]) -> Figure:
    """Plot the singular values of layers relative to the largest one, with the chosen ranks.

    Args:
        singular_values: the singular values of each layer, in descending order.
        ranks: the chosen rank of each layer, shown as a dot at the last singular value that is kept. Layers without one
            were not factored.
    """
    figure = ShownFigure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(singular_values.items()):
        shown = np.asarray(values, dtype=float)
        shown = shown / shown[0]
        color = _color(place, len(singular_values))
        rank = ranks.get(name)
        chosen = "not factored" if rank is None else f"rank {rank} of {len(shown)}"
        axes.plot(np.arange(1, len(shown) + 1), shown, color=color, label=f"{name}: {chosen}")
        if rank is not None:
            axes.plot(rank, shown[rank - 1], "o", color=color)
    axes.set_yscale("log")
    # Singular values below this are rounding errors.
    axes.set_ylim(bottom=max(1e-4, axes.get_ylim()[0]))
    axes.set_xlabel("number")
    axes.set_ylabel("singular value, part of the largest")
    _legend(axes, len(singular_values))
    plain(axes)
    return figure


def plot_codebook(
    weights: Mapping[str, ArrayLike | Mapping[str, Any]], levels: Mapping[str, ArrayLike], *, bins: int = 80
) -> Figure:
    """Plot the distribution of layers' weights, with the values that replace them.

    Weights that are zero, mostly because they were pruned, would be so high a bar that nothing else could be seen: a
    dotted line is in their place, and the title tells their share.

    Args:
        weights: of each layer, before they were shared or quantized: the weights, of any shape; or their histogram, the
            number of ``"zeros"`` and, of the other weights, the range from ``"low"`` to ``"high"`` and the ``"counts"``
            in equal bins of it.
        levels: the values of each layer that have replaced them.
        bins: bins of the histograms of weights.
    """
    columns = min(3, len(weights))
    lines = -(-len(weights) // columns)
    figure = ShownFigure(figsize=(4.2 * columns, 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, values) in zip(panels, weights.items(), strict=False):
        told = values if isinstance(values, Mapping) else _binned(values, bins)
        counts = np.asarray(told["counts"], dtype=float)
        found = np.unique(np.asarray(levels[name], dtype=float))
        edges = np.linspace(told["low"], told["high"], len(counts) + 1)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="0.75")
        if told["zeros"]:
            axes.axvline(0, color="0.2", linewidth=1, linestyle=":")
        for level in found:
            axes.axvline(level, color="C3", linewidth=1, ymax=0.92)
        zeros = f", {told['zeros'] / (told['zeros'] + counts.sum()):.0%} zeros" if told["zeros"] else ""
        axes.set_title(f"{name}: {len(found)} values{zeros}", fontsize=10)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(weights) :]:
        axes.set_visible(False)
    return figure


def _binned(values: ArrayLike, bins: int) -> dict[str, Any]:
    shown = np.asarray(values, dtype=float).ravel()
    others = shown[shown != 0]
    counts, edges = np.histogram(others, bins) if len(others) else (np.zeros(0), np.zeros(1))
    return {"zeros": len(shown) - len(others), "low": edges[0], "high": edges[-1], "counts": counts}


def plot_bits(bits: Mapping[str, float], *, sizes: Mapping[str, int] | None = None) -> Figure:
    """Plot the bits of each layer's weights as bars.

    Args:
        bits: bits of each layer.
        sizes: number of weights of each layer, which is shown beside its bar and weights the mean (the dashed line).
    """
    figure = ShownFigure(figsize=(7, 1.1 + 0.3 * len(bits)), layout="constrained")
    axes = figure.add_subplot()
    values = np.array(list(bits.values()), dtype=float)
    axes.barh(range(len(bits)), values, color="C0", height=0.7)
    for place, (name, value) in enumerate(bits.items()):
        text = f"{value:g}" + (f"  ({sizes[name]:,} weights)" if sizes else "")
        axes.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    if sizes:
        mean = float(np.average(values, weights=[sizes[name] for name in bits]))
        axes.axvline(mean, color="0.3", linestyle="--", linewidth=1, zorder=0)
        axes.set_title(f"{mean:.2f} bits for a weight on average", fontsize=10, loc="left")
    axes.set_yticks(range(len(bits)), list(bits))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * values.max() if sizes else 1.1 * values.max())
    axes.set_xlabel("bits")
    plain(axes)
    axes.grid(visible=False, axis="y")
    return figure


def plot_latency(
    times: Mapping[str, tuple[ArrayLike, ArrayLike]], *, label: str = "processor time (ms)", dense: str = "dense"
) -> Figure:
    """Plot the times of dense and compressed networks that were measured in turns, with their medians.

    Args:
        times: by name ("batch 32", for example), the times of the dense and of the compressed network, one per turn.
        label: label of the axis, with its unit.
        dense: what the dense network is called.
    """
    figure = ShownFigure(figsize=(1.6 + 1.8 * len(times), 4), layout="constrained")
    axes = figure.add_subplot()
    # Batches of 1 and of 32 only fit on the same axis if it is logarithmic.
    for place, pair in enumerate(times.values()):
        for side, (values, name) in enumerate(zip(pair, (dense, "compressed"), strict=True)):
            shown = np.asarray(values, dtype=float)
            at, color = place + 0.4 * side - 0.2, f"C{side}"
            bodies: Any = axes.violinplot(shown, [at], widths=0.34, showextrema=False)["bodies"]
            for part in bodies:
                part.set_facecolor(color)
                part.set_alpha(0.4)
            median = float(np.median(shown))
            axes.hlines(median, at - 0.12, at + 0.12, color=color, linewidth=2, label=f"_{name}" if place else name)
            axes.annotate(
                f"{median:.3g}", (at, shown.max()), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(range(len(times)), list(times))
    axes.set_xlim(-0.5, len(times) - 0.3)
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    plain(axes)
    return figure


def _color(place: int, number: int) -> str | tuple[float, ...]:
    """Distinct colours for up to ten layers, otherwise shades in the order of the layers."""
    if number <= 10:
        return f"C{place}"
    share = place / (number - 1)
    return (0.15 + 0.75 * share, 0.35 + 0.25 * share, 0.75 - 0.6 * share)


def _legend(axes: Axes, entries: int) -> None:
    # The legend of many layers would cover the curves.
    if entries <= 6:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + entries // 25)
