"""Hinton's distillation: the row that every method must beat."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.teachers import Given, Softened, Teachers


class KDModule(DistillationModule):
    r"""Knowledge distillation from any number of teachers.

    .. math:: L = \lambda \, \mathrm{CE}(s, y) + (1 - \lambda) \, T^2 \,
        \mathrm{KL}\!\left(\frac{1}{M} \sum_m \mathrm{softmax}(z_m / T) \,\Big\|\, \mathrm{softmax}(s / T)\right)

    with student logits ``s`` and teachers' logits ``z_m``, both ``(N, K)``; the KL is summed over the classes and
    averaged over the batch. With logits for each position, ``(N, T, K)``, and labels ``(N, T)``, both terms are means
    over the positions that count. Logged as ``train/ce`` and ``train/kd``. The teachers are frozen.

    Of a regression, with ``num_targets``, the terms are the negative log-likelihood (``train/nll``) and the divergence
    of the Gaussian to which the teachers are collapsed from the student's.

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, https://arxiv.org/abs/1503.02531

    Args:
        student: the network that learns.
        teachers: a network, several, a `TeacherEnsemble` with weights or another rule, or a `TeacherStore`.
        num_classes: ``K`` of a classifier.
        num_targets: ``d`` of a regression.
        temperature: ``T`` of a classifier; a regression has none.
        hard_label_weight: the labels' share :math:`\lambda` in ``[0, 1]``; 0 never looks at the labels, which
            may then be missing.
        options: see `TrainingOptions`.

    Raises:
        InputError: an option is out of range, or a network does not fit.
    """

    per_position = True

    def __init__(
        self,
        student: nn.Module,
        teachers: Given = None,
        *,
        num_classes: int | None = None,
        num_targets: int | None = None,
        temperature: float = 4.0,
        hard_label_weight: float = 0.1,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(student, num_classes=num_classes, num_targets=num_targets, **options)
        if not 0 <= hard_label_weight <= 1:
            raise InputError(f"hard_label_weight must be in [0, 1], got {hard_label_weight}")
        if not self.output.has_temperature:
            self.refuse_unused("temperature", temperature, f"with {type(self.output).__name__} outputs")
        self.teachers = Teachers(teachers, ask=[Softened(temperature)])
        self.temperature, self.hard_label_weight = temperature, hard_label_weight

    @property
    def reads_labels(self) -> bool:
        """Whether the labels have a weight."""
        return self.hard_label_weight > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The labels' likelihood and the divergence from the teachers' one distribution."""
        output = self.respond(batch)
        teacher = self.teachers.distribution(batch)
        # Labels that have no weight may be missing.
        label = {self.output.label_term: self.output.label_loss(output, batch)} if self.hard_label_weight else {}
        return {**label, "kd": self.output.divergence(output, teacher, batch, temperature=self.temperature)}

    def weights(self) -> dict[str, float]:
        """The labels' share, and the rest."""
        label = {self.output.label_term: self.hard_label_weight} if self.hard_label_weight else {}
        return {**label, "kd": 1 - self.hard_label_weight}
