"""Hinton's distillation: the row that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.optimization import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.teachers import TeacherStore
from distill_lightning.teachers.origin import ensemble_if_any, rule_of


class KDModule(DistillationModule):
    r"""Knowledge distillation from any number of teachers.

    .. math:: L = \lambda \, \mathrm{CE}(s, y) + (1 - \lambda) \, T^2 \,
        \mathrm{KL}\!\left(\frac{1}{M} \sum_m \mathrm{softmax}(z_m / T) \,\Big\|\, \mathrm{softmax}(s / T)\right)

    with student logits ``s`` and teachers' logits ``z_m``, both ``(N, K)``; the KL is summed over the classes and
    averaged over the batch. With logits for each position, ``(N, T, K)``, and labels ``(N, T)``, both terms are means
    over all positions. Logged as ``train/ce`` and ``train/kd``. The teachers are frozen.

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, https://arxiv.org/abs/1503.02531

    Args:
        student: the network that learns.
        teachers: a network, several, or a `TeacherEnsemble` with weights or another rule.
        num_classes: ``K``.
        temperature: ``T``.
        hard_label_weight: the labels' share :math:`\lambda` in ``[0, 1]``; 0 never looks at the labels.
        store: keeps what the teachers say, see `TeacherStore`; with a complete one ``teachers`` may be ``None``.
        input_shape: shape of one input, ``(C, H, W)`` or, of tokens, ``(T,)``, to check the networks with.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: an option is out of range, or a network does not fit.
    """

    frozen = ("teachers",)
    per_position = True

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module] | None = None,
        *,
        num_classes: int,
        temperature: float = 4.0,
        hard_label_weight: float = 0.1,
        store: TeacherStore | None = None,
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
        if not temperature > 0:
            raise InputError(f"temperature must be positive, got {temperature}")
        if not 0 <= hard_label_weight <= 1:
            raise InputError(f"hard_label_weight must be in [0, 1], got {hard_label_weight}")
        self.teachers, self.teacher_store = ensemble_if_any(teachers), store
        if input_shape is not None and self.teachers is not None:
            self.teachers.check(input_shape, num_classes, per_position=True)
        self.temperature = temperature
        self.hard_label_weight = hard_label_weight

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The labels' cross entropy and the divergence from the teachers' mean prediction."""
        logits = self.student(batch.input)
        teacher_probs = self.told(batch)["probabilities"]
        return {
            "ce": F.cross_entropy(*functional.by_position(logits, batch.target)),
            "kd": functional.softened_kl(logits, teacher_probs, temperature=self.temperature, from_logits=False),
        }

    def answers(self, logits: Tensor) -> dict[str, Tensor]:
        """The ensemble's softened prediction."""
        return {"probabilities": rule_of(self).combined(logits, temperature=self.temperature)}

    def question(self) -> dict[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}

    def weights(self) -> dict[str, float]:
        """The labels' share, and the rest."""
        return {"ce": self.hard_label_weight, "kd": 1 - self.hard_label_weight}
