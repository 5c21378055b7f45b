"""The figures of a comparison, from what its runs scored."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from distill_lightning.plots import learning_curves, reliability_diagram, score_bars
from distill_lightning.plots.style import row_styles
from distill_lightning.studies.compare.intervals import Interval
from distill_lightning.studies.compare.scores import Bins, Score, Scores


def figures_of(scores: Scores, intervals: Mapping[str, Interval]) -> dict[str, Figure]:
    """The figures by file name. Rows with a run that has no scores are in none, and the others look as with them.

    Args:
        scores: what the runs scored.
        intervals: of each row's headline.
    """
    rows: dict[str, list[Score]] = {name: [] for name in intervals}
    for score in scores.runs:
        if not score.is_teacher:
            rows[score.method].append(score)
    styles = row_styles(rows)
    rows = {name: own for name, own in rows.items() if not any(score.failed for score in own)}
    if not rows:
        return {}
    headline, percent = scores.headline, " (%)"
    watched = f"validation {scores.watched}{percent if scores.watched_scale == 100 else ''}"
    reference = scores.baseline
    figures = {
        f"{headline.name.removeprefix('test_')}.png": score_bars(
            {name: [score.values[headline.name] for score in own] for name, own in rows.items()},
            _references(scores, intervals),
            intervals={name: (found.mean, found.low, found.high) for name, found in intervals.items() if name in rows},
            mode=headline.mode,
            label=f"test {scores.quantity}, last epoch{percent if headline.scale == 100 else ''}",
            scale=headline.scale,
            styles=styles,
        )
    }
    curves = {name: np.array([score.curve for score in own]) for name, own in rows.items() if own[0].curve}
    if curves:
        figures["learning_curves.png"] = learning_curves(
            curves, reference=reference, label=watched, scale=scores.watched_scale, styles=styles
        )
    if scores.confidence and all(score.bins for own in rows.values() for score in own):
        bins = {name: _summed([score.bins for score in own]) for name, own in rows.items()}
        ensembles = list(scores.ensemble_bins.values())
        references = {"ensemble": _summed(ensembles)} if ensembles else {}
        figures["reliability.png"] = reliability_diagram(bins, references, styles=styles)
    return figures


def _references(scores: Scores, intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Lines to see the rows against: ensemble and teachers, each as a mean over the sets, and the baseline."""
    name = scores.headline.name
    base = {scores.baseline: intervals[scores.baseline].mean}
    if not scores.ensembles:
        found = base
    else:
        teachers = [score.values[name] for score in scores.runs if score.is_teacher]
        ensembles = [values[name] for values in scores.ensembles.values()]
        found = {"ensemble": statistics.fmean(ensembles), "teachers' mean": statistics.fmean(teachers), **base}
    return {title: value for title, value in found.items() if np.isfinite(value)}


def _summed(bins: Sequence[Bins]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, confidences, hits = np.sum([np.asarray(each, dtype=float) for each in bins], axis=0)
    return counts, confidences, hits
