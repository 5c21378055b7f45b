"""The trainings of a study one after the other, and the bar that shows how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERRUPTED = 130
COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
    TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
)  # fmt: skip
"""Of a study's progress bar."""

OnEpoch = Callable[[int], None]
"""Called with the number of finished epochs of a training, after each."""


class Training(Protocol):
    """A run of a study."""

    @property
    def title(self) -> str:
        """For the progress bar."""

    @property
    def is_finished(self) -> bool:
        """Whether it need not be made again."""


T = TypeVar("T", bound=Training)


def train_missing(
    runs: Sequence[T],
    train: Callable[[T, OnEpoch], None],
    *,
    name: str,
    epochs: Callable[[T], int],
    folder: Path,
    console: Console,
) -> None:
    """Train the runs that are not finished, in their order, under a progress bar.

    Args:
        runs: all runs of the study.
        train: trains a run.
        name: what the bar shows before the first run.
        epochs: the length of a run.
        folder: the folder of the study, for the message after an interrupt.
        console: where the bar is shown.

    Raises:
        SystemExit: with status 130, after Ctrl-C.
    """
    with reporting_interrupts(runs, folder, console), Progress(*COLUMNS, console=console) as progress:
        done = sum(epochs(run) for run in runs if run.is_finished)
        bar = progress.add_task(name, total=sum(map(epochs, runs)), completed=done)
        for run in runs:
            if run.is_finished:
                continue
            progress.update(bar, description=run.title)
            start = done

            def advance(epoch: int, start: int = start) -> None:
                progress.update(bar, completed=start + epoch)

            train(run, advance)
            done += epochs(run)
            progress.update(bar, completed=done)


@contextmanager
def reporting_interrupts(runs: Sequence[Training], folder: Path, console: Console) -> Iterator[None]:
    """After Ctrl-C, print what is kept, and exit with the status that shells give to it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning leaves the process once it has seen the interrupt.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        done = sum(run.is_finished for run in runs)
        console.print(
            f"Interrupted: {done} of {len(runs)} runs are finished and kept in {folder}; the same command goes on "
            "with the others.",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(INTERRUPTED) from None


class EpochCounter(pl.Callback):
    """Reports how many epochs of a training are done.

    Args:
        on_epoch: called with the number, after each.
    """

    def __init__(self, on_epoch: OnEpoch) -> None:
        self.on_epoch = on_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch."""
        self.on_epoch(trainer.current_epoch + 1)
