"""Which run of a comparison is made when, and who makes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.runner import execute, give_up
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.savings import asked_once
from distill_lightning.studies.progress import COLUMNS, OnEpoch, reporting_interrupts

_TRIES = 3
_PAUSE = 0.5

OnEpochOf = Callable[[Run, int], None]
"""Called with a run and the number of its finished epochs, after each."""


@dataclass(frozen=True)
class Finished:
    """What became of a run that was handed to a pool.

    Attributes:
        run: which.
        error: why it has left no result and is to be tried again, in one line; ``None``: it has left one, or somebody
            else is making it.
        elsewhere: who else is making it; empty: nobody.
    """

    run: Run
    error: str | None = None
    elsewhere: str = ""


class Pool(Protocol):
    """Makes runs: here, in processes of its own, on other machines.

    A run that diverges or fails leaves a result that says so; that is not the pool's concern.

    Attributes:
        capacity: how many runs it makes at a time; it is handed no more than these.
        waits_for_others: whether it is handed runs whose ``depends_on`` are not finished, and waits for these itself.
    """

    capacity: int
    waits_for_others: bool

    def submit(self, run: Run) -> None:
        """Begin with a run."""

    def wait(self, on_epoch: OnEpochOf) -> Iterable[Finished]:
        """Wait for what was submitted, a second or until a run has ended, and tell meanwhile how far the runs are.

        Args:
            on_epoch: called after every epoch of a run.

        Returns:
            The runs that have ended since; perhaps none.

        Raises:
            InputError: what no further run can do anything about: a full disk, other data.
        """

    def close(self) -> None:
        """End everything that it has begun, at once."""


def make(experiment: Experiment, run: Run, on_epoch: OnEpoch) -> Finished:
    """Make a run in this process, which is what every pool does in the end.

    Args:
        experiment: builds its objects.
        run: which; those that it depends on are finished.
        on_epoch: called with the number of finished epochs, after each.
    """
    execute(experiment, run, on_epoch)
    return Finished(run)


class InProcess:
    """Makes one run after the other, in this process.

    Args:
        experiment: the comparison.
    """

    capacity = 1
    waits_for_others = False

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._next: list[Run] = []

    def submit(self, run: Run) -> None:
        """Remember the run; it is made by `wait`."""
        self._next.append(run)

    def wait(self, on_epoch: OnEpochOf) -> Iterable[Finished]:
        """Make it."""
        run = self._next.pop()
        return [make(self.experiment, run, lambda epoch: on_epoch(run, epoch))]

    def close(self) -> None:
        """Nothing is left to end."""


def make_all(experiment: Experiment, runs: Sequence[Run], pool: Pool, console: Console) -> None:
    """Make the runs that are not finished, none before those that it depends on, under a progress bar.

    Args:
        experiment: the comparison.
        runs: its runs, in the order in which they are made where there is a choice.
        pool: what makes them.
        console: where the bar is shown, and a line for each run that has ended.

    Raises:
        InputError: the pool's.
        SystemExit: with status 130, after Ctrl-C.
    """
    folder = Path(experiment.config.output)
    with reporting_interrupts(runs, folder, console), Progress(*COLUMNS, console=console) as progress:
        try:
            _Schedule(experiment, runs, pool, progress).make()
        finally:
            pool.close()


class _Schedule:
    """Who is at work, who waits for whom."""

    def __init__(self, experiment: Experiment, runs: Sequence[Run], pool: Pool, progress: Progress) -> None:
        self.experiment, self.runs, self.pool, self.progress = experiment, runs, pool, progress
        self.waiting = [run for run in runs if not run.is_finished]
        self.at_work: dict[Path, Run] = {}
        self.reached = {run.folder: run.epochs if run.is_finished else 0 for run in runs}
        self.tries = {run.folder: 0 for run in runs}
        self.bar = progress.add_task("compare", total=sum(run.epochs for run in runs))

    def make(self) -> None:
        self._show()
        while self.waiting or self.at_work:
            self._submit()
            if not self.at_work:
                # All that is left is made, or waited for, by another call.
                time.sleep(_PAUSE)
                continue
            for finished in self.pool.wait(self._advance):
                self._settle(finished)

    def _submit(self) -> None:
        for run in list(self.waiting):
            if len(self.at_work) >= self.pool.capacity:
                return
            if run.is_finished:
                self.waiting.remove(run)
                self._advance(run, run.epochs)
            elif self.pool.waits_for_others or all(other.is_finished for other in run.depends_on):
                self.waiting.remove(run)
                self.at_work[run.folder] = run
                self._show()
                self.pool.submit(run)

    def _settle(self, finished: Finished) -> None:
        run = self.at_work.pop(finished.run.folder)
        if finished.elsewhere:
            self.waiting.append(run)
        elif finished.error is None:
            self._advance(run, run.epochs)
            self._print(f"{run.title}: {self._told(run)}")
        else:
            self.tries[run.folder] += 1
            if self.tries[run.folder] < _TRIES:
                self.waiting.insert(0, run)
                self._print(f"{run.title}: {finished.error}; it is tried again")
            else:
                give_up(self.experiment, run, f"{finished.error}, {_TRIES} times")
                self._advance(run, run.epochs)
                self._print(f"{run.title}: {finished.error}, {_TRIES} times: given up")

    def _told(self, run: Run) -> str:
        result = run.result()
        if run.makes_store and not result.without_scores:
            return asked_once(result)
        if result.without_scores or not result.history:
            return result.without_scores or "done"
        makes = run.makes_backbone
        task = self.experiment.backbones[makes].task if makes else self.experiment.task
        return task.validation_score(result.history[-1])

    def _print(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _advance(self, run: Run, epoch: int) -> None:
        self.reached[run.folder] = epoch
        self._show()

    def _show(self) -> None:
        titles = ", ".join(run.title for run in self.at_work.values())
        done = sum(self.reached.values())
        self.progress.update(self.bar, completed=done, description=titles or "compare")
