"""What the trials of a comparison's searches reached, and which of them each row takes its options from."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_lightning.errors import InputError, NonFiniteError, refusing
from distill_lightning.pages import csv_text, write_pages
from distill_lightning.storage import write_whole
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.scores import Section
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
    for (row, combination), found in scores.items():
        reached = sign * statistics.fmean(found.values())
        if not math.isnan(reached) and (row not in best or reached > best[row][0]):
            best[row] = (reached, combination)
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
        raise NonFiniteError(
            f"search.{run.name}: no combination of options has finite numbers with every seed: they failed or diverged"
        )
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


def search_section(trials: Sequence[Trial], task: Task, rows: Iterable[str]) -> list[Section]:
    """What a report tells of the searches: each combination with what it reached; none where nothing was searched.

    Args:
        trials: of all rows.
        task: whose validation they were chosen by.
        rows: the table's rows.
    """
    if not trials:
        return []
    seeds, counts = list(trials[0].scores), Counter(trial.row for trial in trials)
    reached = f"validation {task.watched}{' %' if task.watched_scale == 100 else ''}"
    header = ["row", "options tried", reached if len(seeds) == 1 else f"{reached}, mean", ""]
    table = [[each.row, told(each.options), _shown(each, task), "chosen" if each.is_chosen else ""] for each in trials]
    which = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
    text = (
        f"{counts[trials[0].row]} combinations of options for each of these rows, with {which}, of which the table has "
        "none; the best on the validation samples after the last epoch is the row's in the table."
    )
    left = [row for row in rows if row not in counts]
    return [Section("Search", [header, *table], f"{text} Not searched: {', '.join(left)}." if left else text)]


def write_search(folder: Path, trials: Sequence[Trial]) -> list[Path]:
    """Write ``search.csv``, a line for each combination; nothing where nothing was searched."""
    return write_pages(folder, {"search.csv": csv_text([each.line() for each in trials])}, {}) if trials else []


def _shown(trial: Trial, task: Task) -> str:
    digits = 1 if task.watched_scale == 100 else 3
    return "-" if math.isnan(trial.mean) else f"{task.watched_scale * trial.mean:.{digits}f}"
