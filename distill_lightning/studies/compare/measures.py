"""What the finished runs of a comparison scored."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.rows import ALONE
from distill_lightning.studies.compare.runner import BESIDE, load_test_targets
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.scored_task import ScoredTask
from distill_lightning.studies.compare.scores import GAP, Bins, Score, Scores, Section, selected_name
from distill_lightning.studies.compare.task import Column, Task

_Outputs = Mapping[Path, Mapping[str, Tensor]]


def scores_of(
    experiment: Experiment,
    runs: Sequence[Run],
    *,
    heading: str = "",
    legend: str = "",
    sections: Sequence[Section] = (),
) -> Scores:
    """What a comparison's finished runs scored, teachers and students, and all that a report tells of them.

    The gap that a run closes is its distance from the mean score of the student alone, as a part of the distance from
    there to the ensemble; 0 for the student alone on average, 1 at the ensemble's score. Both are those of the run's
    own set of teachers.

    Args:
        experiment: the comparison.
        runs: its finished runs.
        heading: what stands above the table, in Markdown.
        legend: what the table's titles mean.
        sections: what else there is to tell.
    """
    task, config = experiment.task, experiment.config
    failures = [f"{run.title}: {run.result().without_scores}" for run in runs if run.result().without_scores]
    runs = [run for run in runs if run.is_teacher or run.is_student]
    finite = [run for run in runs if not run.result().without_scores]
    ensembles: dict[int, dict[str, float]] = {}
    ensemble_bins: dict[int, Bins] = {}
    if isinstance(task, ScoredTask):
        columns = task.measured(with_ensemble=False)
        scores = [_score(run, task, columns, partial(_logged, task)) for run in runs]
    else:
        task = cast("OutputsTask", task)
        targets, counted = load_test_targets(experiment)
        outputs = {run.folder: {name: output[counted] for name, output in run.outputs().items()} for run in finite}
        with_ensemble = any(run.is_teacher for run in runs)
        columns = task.measured(with_ensemble=with_ensemble) + ([GAP] if with_ensemble else [])
        scores = []
        for number in dict.fromkeys(run.teacher_set for run in runs):
            own = [run for run in runs if run.teacher_set == number]
            measured = _OfSet(task, own, outputs, targets[counted])
            scores += [_score(run, task, columns, measured.values, measured.bins) for run in own]
            if measured.ensemble is not None:
                ensembles[number] = measured.quality(measured.ensemble)
                ensemble_bins[number] = task.bins(measured.ensemble, measured.targets)
    return Scores(
        columns, task.quantity, task.watched, task.watched_scale, scores, ensembles, ensemble_bins, failures,
        heading, legend, list(sections), config.baseline, config.confidence,
    )  # fmt: skip


class _OfSet:
    """Measures the outputs of the runs of one set of teachers."""

    def __init__(self, task: OutputsTask, runs: Sequence[Run], outputs: _Outputs, targets: Tensor) -> None:
        self._task, self._outputs, self.targets = task, outputs, targets
        teachers = [run for run in runs if run.is_teacher]
        is_whole = bool(teachers) and all(run.folder in outputs for run in teachers)
        self.ensemble = task.combine([outputs[run.folder]["last"] for run in teachers]) if is_whole else None
        self._reached = None if self.ensemble is None else task.score(self.ensemble, targets)
        alone = [run for run in runs if run.name == ALONE and run.folder in outputs]
        self._start = _mean([task.score(outputs[run.folder]["last"], targets) for run in alone])

    def quality(self, output: Tensor) -> dict[str, float]:
        """The values of all columns."""
        values = self._task.measure(output, self.targets, self.ensemble)
        if self._reached is not None:
            values[GAP.name] = self._task.gap_closed(values[self._task.headline.name], self._start, self._reached)
        return values

    def values(self, run: Run) -> dict[str, float]:
        """The values of all columns, and the headline's with the weights of the selected epoch."""
        task, outputs = self._task, self._outputs[run.folder]
        return _ordered(task, self.quality(outputs["last"]), task.score(outputs["selected"], self.targets))

    def bins(self, run: Run) -> Bins:
        """Of the run's confidences, where the task has such."""
        return self._task.bins(self._outputs[run.folder]["last"], self.targets)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _ordered(task: Task, last: Mapping[str, float], selected: float) -> dict[str, float]:
    """The headline, what it is with the selected epoch's weights, and the others."""
    name = task.headline.name
    first = {name: last[name], selected_name(task.headline): selected}
    return {**first, **{other: value for other, value in last.items() if other != name}}


def _logged(task: ScoredTask, run: Run) -> dict[str, float]:
    scores = run.result().scores
    return _ordered(task, scores["last"], scores["selected"][task.headline.name])


def _score(
    run: Run,
    task: Task,
    columns: Sequence[Column],
    values_of: Callable[[Run], dict[str, float]],
    bins_of: Callable[[Run], Bins] = lambda _: [],
) -> Score:
    result = run.result()
    failed = result.without_scores
    # An ensemble with a teacher that failed has no scores, and nothing to compare with.
    values = _ordered(task, {column.name: math.nan for column in columns}, math.nan)
    if not failed:
        values |= values_of(run)
    # With others beside it, an epoch takes as long as they let it.
    seconds = [line["seconds"] for line in result.history if not line.get(BESIDE)]
    return Score(
        run.name,
        run.seed,
        values,
        result.parameters,
        statistics.median(seconds) if seconds else math.nan,
        teacher_set=run.teacher_set,
        peak_memory=result.peak_memory,
        shared=result.shared,
        is_teacher=run.is_teacher,
        failed=failed,
        curve=[line[task.monitor] for line in result.history],
        bins=[] if failed else bins_of(run),
    )
