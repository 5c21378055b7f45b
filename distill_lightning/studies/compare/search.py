"""What the trials of a comparison's searches reached, and which of them each row takes its options from."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill_lightning.errors import InputError, NonFiniteError, refusing
from distill_lightning.storage import write_whole
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.task import Task
from distill_lightning.studies.compare.trials import Options, told

_CHOSEN = "chosen.json"


@dataclass(frozen=True)
class Trial:
    """A combination of options that a row has tried.

    Attributes:
        row: which row.
        options: the combination.
        scores: the task's validation metric after the last epoch, by seed; NaN where a run has no finite numbers.
        is_chosen: whether the row's students in the table have these options.
    """

    row: str
    options: Options
    scores: dict[int, float]
    is_chosen: bool

    @property
    def mean(self) -> float:
        """Over the seeds; NaN unless all have finite numbers."""
        return statistics.fmean(self.scores.values())

    def line(self) -> dict[str, object]:
        """By the columns of ``search.csv``."""
        return {
            "method": self.row,
            "options": json.dumps(dict(self.options)),
            "validation": self.mean,
            "seeds": " ".join(map(str, self.scores)),
            "chosen": self.is_chosen,
        }


def trials_in(runs: Iterable[Run], task: Task) -> list[Trial]:
    """What the finished trials of a row, or of all rows, have reached, in the order they were planned.

    Of a row's combinations that have finite numbers with every seed, the first of those with the best mean is chosen.
    """
    scores: dict[tuple[str, str], dict[int, float]] = {}
    options = {}
    for run in runs:
        if run.in_search and run.options:
            key = (run.name, json.dumps(run.options))
            options[key] = run.options
            scores.setdefault(key, {})[run.seed] = _score(run, task)
    sign = 1 if task.mode == "max" else -1
    best: dict[str, tuple[float, str]] = {}
    for (row, key), found in scores.items():
        reached = sign * statistics.fmean(found.values())
        if not math.isnan(reached) and (row not in best or reached > best[row][0]):
            best[row] = (reached, key)
    return [
        Trial(row, options[row, key], found, row in best and best[row][1] == key)
        for (row, key), found in scores.items()
    ]


def _score(run: Run, task: Task) -> float:
    history = run.result().history
    score = history[-1][task.monitor] if history else math.nan
    return score if math.isfinite(score) else math.nan


def options_of(run: Run, task: Task) -> Options:
    """The options that a run has in place of its row's: a trial's own, or those that its row's trials speak for.

    What was chosen is written beside the trials, and what was once written holds: trials that are made again, and then
    speak for others, do not leave a row with two kinds of students.

    Raises:
        InputError: the trials speak for other options than those that were chosen.
        NonFiniteError: no combination has finite numbers.
    """
    if not run.chosen_from:
        return run.options
    trials = trials_in(run.chosen_from, task)
    chosen = next((trial.options for trial in trials if trial.is_chosen), None)
    if chosen is None:
        raise NonFiniteError(f"search.{run.name}: no combination of options has finite numbers with every seed")
    path = run.chosen_from[0].folder.parent.parent / _CHOSEN
    plain = json.loads(json.dumps({"options": dict(chosen), "monitor": task.monitor}))
    if path.exists():
        with refusing(f"{path} is damaged, remove it", ValueError, TypeError, KeyError):
            known = json.loads(path.read_text())["options"]
        if known != plain["options"]:
            raise InputError(
                f"{path}: {run.name} had {told(tuple(known.items()))}, but its trials speak for {told(chosen)} now: "
                "remove that file and the row's runs, or make all runs again with --anew"
            )
    else:
        tried = [{**dict(trial.options), "validation": list(trial.scores.values())} for trial in trials]
        write_whole(path, [json.dumps({**plain, "tried": tried}, indent=1).encode()])
    return chosen


def search_rows(trials: Sequence[Trial], task: Task) -> list[list[str]]:
    """The table of what was tried: a header, and a row for each combination; nothing where nothing was searched."""
    if not trials:
        return []
    count = len(trials[0].scores)
    title = f"validation {task.watched}{' %' if task.watched_scale == 100 else ''}"
    header = ["row", "options tried", title if count == 1 else f"{title}, mean of {count} seeds", ""]
    return [header, *([each.row, told(each.options), _shown(each, task), _mark(each)] for each in trials)]


def search_note(trials: Sequence[Trial], rows: Iterable[str]) -> str:
    """How rows came to their options, in a sentence or two; empty where nothing was searched.

    Args:
        trials: of all rows.
        rows: the table's rows.
    """
    if not trials:
        return ""
    counts = Counter(trial.row for trial in trials)
    seeds = ", ".join(map(str, trials[0].scores))
    left = [row for row in rows if row not in counts]
    which = f"seed{'s' if len(trials[0].scores) > 1 else ''} {seeds}, of which the table has none"
    count = counts[trials[0].row]
    note = f"Options of {', '.join(counts)}: the best in validation of {count} combinations each, with {which}."
    return f"{note} Not searched: {', '.join(left)}." if left else note


def _shown(trial: Trial, task: Task) -> str:
    digits = 1 if task.watched_scale == 100 else 3
    return "-" if math.isnan(trial.mean) else f"{task.watched_scale * trial.mean:.{digits}f}"


def _mark(trial: Trial) -> str:
    return "chosen" if trial.is_chosen else ""
