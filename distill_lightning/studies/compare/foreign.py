"""What stands beside a module of somebody else's while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor

from distill_lightning.callbacks import RunKeeper
from distill_lightning.lightning_internals import TrainersBatches, step_precision
from distill_lightning.modules.parts.guard import check_loss
from distill_lightning.studies.compare.outputs_task import OutputsTask
from distill_lightning.studies.compare.subject import Subject
from distill_lightning.studies.compare.task import Task


class SubjectKeeper(RunKeeper):
    """A `RunKeeper` of any module: it keeps the network that is evaluated, and computes scores that nobody logs.

    Arguments of a module, which may be whole networks, do not go into the checkpoint: the configuration has them.

    Args:
        folder: see `RunKeeper`.
        seed: see `RunKeeper`.
        task: what is measured.
        subject: what of the module is evaluated.
        note: see `RunKeeper`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        task: Task,
        subject: Subject,
        note: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        super().__init__(folder, seed=seed, monitor=task.monitor, mode=task.mode, note=note)
        self.task, self.subject = task, subject

    @property
    def state_key(self) -> str:
        """The key of a `RunKeeper` in checkpoints, so that runs of older versions go on."""
        return RunKeeper.__qualname__

    def metrics_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """What the module has logged and, where the monitored metric is not among that, the scores on its data."""
        logged = super().metrics_of(trainer, pl_module)
        if self.monitor in logged or not isinstance(self.task, OutputsTask):
            return logged
        data = cast("Any", trainer).datamodule
        judge = self.subject.judge(data)
        # A loader draws a seed for its workers.
        with torch.random.fork_rng(devices=[]), step_precision(trainer):
            batches = TrainersBatches(trainer, pl_module, data.val_dataloader(), number=0, training=False)
            return logged | {f"val/{name}": value for name, value in judge.score(batches).items()}

    def export_selected(self, pl_module: pl.LightningModule, path: Path) -> None:
        """Write the weights of what is evaluated."""
        self.subject.export_evaluated(path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the arguments out."""
        for name in [name for name in checkpoint if "hyper_parameters" in name or "hparams" in name]:
            del checkpoint[name]


class LossGuard(pl.Callback):
    """Stops a training whose loss is not finite, as modules of this package do it themselves."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss, if the step has returned it.

        Raises:
            NonFiniteError: it is nan or infinite.
        """
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            check_loss(pl_module, loss.detach(), None, batch_idx)
