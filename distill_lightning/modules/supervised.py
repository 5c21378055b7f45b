"""Plain training: every table's first row, and how teachers are made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.optimization import LRSchedulerCallable, OptimizerCallable, default_optimizer


class SupervisedModule(DistillationModule):
    r"""Cross entropy to the labels, :math:`L = \mathrm{CE}(s, y)`, logged as ``train/ce``.

    With logits for each position, ``(N, T, K)``, and targets ``(N, T)`` it is the mean over all positions.

    Args:
        student: the network that learns; maps ``(N, ...)`` to logits ``(N, K)`` or ``(N, T, K)``.
        num_classes: ``K``.
        label_smoothing: mass that the target gives to all classes evenly, in ``[0, 1)``.
        input_shape: shape of one input, ``(C, H, W)`` or, of tokens, ``(T,)``, to check the network with.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: ``label_smoothing`` is out of range, or the student does not fit.
    """

    per_position = True

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        input_shape: Sequence[int] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        metrics: MetricCollection | None = None,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            student,
            num_classes=num_classes,
            input_shape=input_shape,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            metrics=metrics,
            compile=compile,
            channels_last=channels_last,
        )
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The cross entropy, mean over the batch."""
        logits, target = functional.by_position(self.student(batch.input), batch.target)
        return {"ce": F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)}

    def weights(self) -> dict[str, float]:
        """One."""
        return {"ce": 1.0}
