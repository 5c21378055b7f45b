"""What the finished runs of a comparison scored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from matplotlib.figure import Figure
from torch import Tensor

from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import ALONE
from distill_lightning.studies.compare.runner import load_test_targets
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.scored_task import ScoredTask
from distill_lightning.studies.compare.task import Column

GAP = Column("gap_closed", "gap %", 100, 0, of_ensemble=True)


@dataclass(frozen=True)
class Measures:
    """What the runs of a comparison scored.

    Attributes:
        columns: that have a value, the headline first.
        values: by the folder of a run with finite numbers, by column; under ``<headline>_selected`` the headline with
            the weights of the selected epoch.
        ensemble: the values of the teachers' ensemble; ``None``: there are no teachers.
        figures: makes the task's own figures, by file name, of the rows with these names.
    """

    columns: list[Column]
    values: dict[Path, dict[str, float]]
    ensemble: dict[str, float] | None
    figures: Callable[[Sequence[str]], dict[str, Figure]]


def selected_name(headline: Column) -> str:
    """Under which name the headline stands with the weights of the selected epoch."""
    return f"{headline.name}_selected"


def measures_of(experiment: Experiment, runs: Sequence[Run]) -> Measures:
    """The scores of a comparison's finished runs, of teachers and of students."""
    finite = [run for run in runs if (run.is_teacher or run.is_student) and not run.result().diverged]
    if isinstance(experiment.task, ScoredTask):
        return _logged(experiment.task, finite)
    targets, counted = load_test_targets(experiment)
    outputs = {run.folder: {name: output[counted] for name, output in run.outputs().items()} for run in finite}
    return _computed(cast("OutputsTask", experiment.task), finite, outputs, targets[counted])


def _logged(task: ScoredTask, runs: Sequence[Run]) -> Measures:
    headline, values = task.headline.name, {}
    for run in runs:
        scores = run.result().scores
        first = {headline: scores["last"][headline], selected_name(task.headline): scores["selected"][headline]}
        values[run.folder] = {**first, **{name: value for name, value in scores["last"].items() if name != headline}}
    return Measures(task.measured(with_ensemble=False), values, None, _no_figures)


def _no_figures(_: Sequence[str]) -> dict[str, Figure]:
    return {}


def _computed(
    task: OutputsTask, runs: Sequence[Run], outputs: dict[Path, dict[str, Tensor]], targets: Tensor
) -> Measures:
    teachers = [outputs[run.folder]["last"] for run in runs if run.is_teacher]
    ensemble = task.combine(teachers) if teachers else None
    reached = None if ensemble is None else task.score(ensemble, targets)
    alone = [task.score(outputs[run.folder]["last"], targets) for run in runs if run.name == ALONE]
    start = statistics.fmean(alone) if alone else math.nan

    def quality(output: Tensor) -> dict[str, float]:
        values = task.measure(output, targets, ensemble)
        if reached is not None:
            values[GAP.name] = task.gap_closed(values[task.headline.name], start, reached)
        return values

    values = {}
    for run in runs:
        last = quality(outputs[run.folder]["last"])
        first = {task.headline.name: last.pop(task.headline.name)}
        first[selected_name(task.headline)] = task.score(outputs[run.folder]["selected"], targets)
        values[run.folder] = {**first, **last}

    def figures(names: Sequence[str]) -> dict[str, Figure]:
        rows = {name: [outputs[run.folder]["last"] for run in runs if run.name == name] for name in names}
        return task.figures(rows, ensemble, targets)

    columns = task.measured(with_ensemble=ensemble is not None) + ([] if ensemble is None else [GAP])
    return Measures(columns, values, None if ensemble is None else quality(ensemble), figures)
