"""Which run of a comparison is made when, and who makes it."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import Progress

from distill_lightning.studies.compare.attempt import attempt
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.runner import leave_none
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.savings import asked_once
from distill_lightning.studies.progress import COLUMNS, reporting_interrupts

_TRIES = 3
_PAUSE = 0.5
_LONGEST = 60

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


class InProcess:
    """Makes one run after the other, in this process.

    Args:
        experiment: the comparison. Its number of threads per run is set in this process until `close`.
    """

    capacity = 1
    waits_for_others = False

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._next: list[Run] = []
        self._threads_before = torch.get_num_threads()
        if experiment.config.threads_per_run is not None:
            torch.set_num_threads(experiment.config.threads_per_run)

    def submit(self, run: Run) -> None:
        """Remember the run; it is made by `wait`."""
        self._next.append(run)

    def wait(self, on_epoch: OnEpochOf) -> Iterable[Finished]:
        """Make it."""
        run = self._next.pop()
        return [Finished(run, elsewhere=attempt(self.experiment, run, lambda epoch: on_epoch(run, epoch)))]

    def close(self) -> None:
        """Give the threads back."""
        torch.set_num_threads(self._threads_before)


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
        self.elsewhere: set[Path] = set()
        self.reached = {run.folder: run.epochs if run.is_finished else 0 for run in runs}
        self.tries = {run.folder: 0 for run in runs}
        self.not_before = dict.fromkeys(self.reached, 0.0)
        self.bar = progress.add_task("compare", total=sum(run.epochs for run in runs))

    def make(self) -> None:
        self._show()
        while self.waiting or self.at_work:
            self._submit()
            if self.at_work:
                for finished in self.pool.wait(self._advance):
                    self._settle(finished)
            elif self.waiting:
                # All that is left is made by another call, or has to wait for it.
                time.sleep(_PAUSE)

    def _submit(self) -> None:
        for run in list(self.waiting):
            if len(self.at_work) >= self.pool.capacity:
                return
            if run.is_finished:
                self.waiting.remove(run)
                self._advance(run, run.epochs)
            elif self._can_begin(run):
                self.waiting.remove(run)
                self.at_work[run.folder] = run
                self._show()
                self.pool.submit(run)

    def _can_begin(self, run: Run) -> bool:
        if time.monotonic() < self.not_before[run.folder]:
            return False
        return self.pool.waits_for_others or all(other.is_finished for other in run.depends_on)

    def _settle(self, finished: Finished) -> None:
        run = self.at_work.pop(finished.run.folder)
        if finished.elsewhere:
            self.waiting.append(run)
            if run.folder not in self.elsewhere:
                self.elsewhere.add(run.folder)
                self._print(f"{run.title} is made elsewhere ({finished.elsewhere}); this call waits for it")
            self.not_before[run.folder] = time.monotonic() + _PAUSE
        elif finished.error is None:
            self._advance(run, run.epochs)
            self._print(f"{run.title}: {self._told(run)}")
        else:
            self.tries[run.folder] += 1
            if self.tries[run.folder] < _TRIES:
                self.waiting.insert(0, run)
                self._print(f"{run.title}: {finished.error}; it is tried again")
            else:
                leave_none(self.experiment, run, failed=f"{finished.error}, {_TRIES} times")
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
        shown = textwrap.shorten(titles, _LONGEST, placeholder=" ...") or "compare"
        self.progress.update(self.bar, completed=done, description=shown)
