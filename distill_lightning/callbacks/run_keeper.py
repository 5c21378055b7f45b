"""The callback that makes a run resumable: it can be killed at any moment and continues as if it had not been."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import is_last_batch
from distill_lightning.storage import whole_file

_SEED_STRIDE = 1_000_003


class RunKeeper(pl.callbacks.Checkpoint):
    """Checkpoints a run after every epoch, and keeps its history and the weights of the best validation epoch.

    Files only appear under their names when they are complete. Every epoch begins with a random state that depends only
    on the seed and the epoch, so a resumed run draws the same numbers as an uninterrupted one. It is for
    trainings in one process.

    Args:
        folder: the folder for ``last.ckpt`` and ``selected.safetensors``.
        seed: seed of the random state.
        monitor: the metric; of equal epochs, the first one is selected. An epoch in which it is NaN is selected only if
            it is NaN in all of them, and then it is the first.
        mode: ``"max"`` if higher values of the metric are better, ``"min"`` if lower ones are.
        note: asked at the end of every epoch what else is to stand in its line of the history.

    Raises:
        InputError: an unknown mode; at the end of an epoch in which the metric was not logged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        note: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        if mode not in ("max", "min"):
            raise InputError(f"RunKeeper: mode must be 'max' or 'min', got {mode!r}")
        self.folder = Path(folder)
        self.seed = seed
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.note = note
        self.history: list[dict[str, float]] = []
        self.selected_epoch = 0
        self._started = self._trained = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history, "selected_epoch": self.selected_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the history of the resumed run."""
        self.history = list(state_dict["history"])
        self.selected_epoch = state_dict["selected_epoch"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the random state and start the clock."""
        torch.manual_seed(self.seed * _SEED_STRIDE + trainer.current_epoch)
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the time: the epoch's training ends with its last batch, and validation is not counted."""
        if is_last_batch(trainer) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a line to the history, keep the weights if they are the best so far, and checkpoint."""
        metrics = dict(sorted(self.metrics_of(trainer, pl_module).items()))
        if self.monitor not in metrics:
            raise InputError(
                f"RunKeeper: {self.monitor} was not logged in this epoch: give monitor= one of {', '.join(metrics)}"
            )
        score = self.sign * metrics[self.monitor]
        before = [self.sign * line[self.monitor] for line in self.history]
        # A maximum that begins with NaN would stay NaN.
        best = max((value for value in before if not math.isnan(value)), default=-math.inf)
        epoch = trainer.current_epoch + 1
        self.history.append({"epoch": epoch, "seconds": self._trained - self._started, **self.note(), **metrics})
        # The first epoch in any case: there is always a selected one.
        if not before or score > best:
            self.selected_epoch = epoch
            self.export_selected(pl_module, self.folder / "selected.safetensors")
        with whole_file(self.folder / "last.ckpt") as partial:
            trainer.save_checkpoint(partial)

    def metrics_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """What an epoch reached, by name: what was logged of it."""
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def export_selected(self, pl_module: pl.LightningModule, path: Path) -> None:
        """Write the weights of the best epoch so far: those of the student, which every module of this package has."""
        pl_module.export_student(path)  # type: ignore[operator]
