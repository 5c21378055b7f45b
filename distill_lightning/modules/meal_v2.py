"""MEAL V2: the mean prediction of an ensemble as the only target, and a discriminator beside it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Unpack, get_args

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import wide
from distill_lightning.layers.call import call
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.adversary import (
    Adversary,
    Liveness,
    OfficialDiscriminator,
    Shown,
    discriminator_term,
)
from distill_lightning.part import Part
from distill_lightning.schedules import GroupSchedules
from distill_lightning.teachers import Given, MeanLogits, Softened, Teachers

# Parts of ln K. A loss as near as that to ln K is what random weights give; but to teachers that are themselves as
# unsure as that, a good student has such a loss, too.
_UNTRAINED = 0.1
_UNSURE = 0.5


class MEALV2Module(DistillationModule):
    r"""MEAL V2: a pretrained student follows an ensemble's mean prediction, without labels.

    .. math:: L = -\frac{T^2}{N} \sum_{i,c} \bar p_{ic} \log \mathrm{softmax}(s_i / T)_c
        + \gamma \, L_D + \lambda \, \mathrm{CE}(s, y),
        \qquad \bar p = \frac{1}{M} \sum_m \mathrm{softmax}(z_m / T)

    with student logits ``s`` and teachers' logits ``z_m``, both ``(N, K)``; summed over the classes, averaged over the
    batch, in nats. :math:`L_D` is `functional.discriminator_loss` of a small network that is shown the student's logits
    and the mean :math:`\frac{1}{M} \sum_m z_m` of the teachers' raw logits, and tells which is which.

    The method's predecessor, MEAL, is named for adversarial learning; the released code of this one, and so the
    default, is not adversarial: student and discriminator **together** lower :math:`L_D` (``"cooperative"``), which
    pushes the student's logits a little away from the teachers', "as a regularizer", its author says.
    ``"adversarial"`` turns the gradient round between them, with the same optimiser.

    The released training: SGD with learning rate 0.01 (0.001 after 101 epochs), momentum 0.9 and **no weight decay**,
    no labels, and a student that begins with pretrained weights (`Pretrained`), on which the result rests. From
    scratch, labels help: set ``hard_label_weight``.

    Logged: ``train/similarity``, ``train/discriminator`` and ``train/ce``, unweighted, as far as they are part of the
    loss; ``train/kl`` (the similarity without the teachers' own entropy: what the student can still gain),
    ``train/teacher_entropy`` (of :math:`\bar p`, nats), ``train/agreement`` (samples on which student and ensemble name
    the same class), ``train/discriminator_accuracy`` (of rows; 0.5 is chance) and, but for `FixedDiscriminator`,
    ``train/discriminator_dead`` (outputs that are exactly zero). After an epoch it warns of a discriminator with an
    output that was zero for every row, and after the first epoch of a student that looked untrained.

    Gradient clipping by norm counts the discriminator's gradient, too.

    Shen, Savvides: *MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks*,
    https://arxiv.org/abs/2009.08453

    ::

        model:
          class_path: MEALV2Module
          init_args:
            student:
              class_path: distill_lightning.Pretrained
              init_args: {network: {class_path: SmallResNet, init_args: {width: 8}}, checkpoint: student.ckpt}
            teachers:
              - class_path: distill_lightning.Pretrained
                init_args: {network: {class_path: SmallResNet, init_args: {width: 16}}, checkpoint: teacher.ckpt}
            discriminator: {class_path: FixedDiscriminator, init_args: {lr: 1.0e-4}}

    Args:
        student: the network that learns.
        teachers: a network, several, a `TeacherEnsemble`, whose ``weights`` weigh probabilities and logits alike, or a
            `TeacherStore`.
        num_classes: ``K``.
        discriminator: `OfficialDiscriminator`, `FixedDiscriminator` (below 256 classes), `OwnDiscriminator` or
            `NoDiscriminator`.
        hard_label_weight: :math:`\lambda`; 0 never looks at the labels.
        temperature: ``T``, 1 in the paper.
        options: see `TrainingOptions`.

    Raises:
        InputError: an option is out of range, a network does not fit, or schedules cannot be stepped together.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Given = None,
        *,
        num_classes: int,
        discriminator: Adversary = OfficialDiscriminator(),
        hard_label_weight: float = 0.0,
        temperature: float = 1.0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(student, num_classes=num_classes, **options)
        if self.num_classes is None:
            raise InputError(f"{type(self).__name__} trains a classifier, which {self.output} is not: give num_classes")
        check_finite("hard_label_weight", hard_label_weight)
        if not hard_label_weight >= 0:
            raise InputError(f"hard_label_weight cannot be negative, got {hard_label_weight}")
        if discriminator.shown not in get_args(Shown):
            kind, known = type(discriminator).__name__, ", ".join(get_args(Shown))
            raise InputError(f"{kind}: shown must be one of {known}, got {discriminator.shown!r}")
        self.adversary, self.hard_label_weight, self.temperature = discriminator, hard_label_weight, temperature
        self.discriminator = discriminator.make(num_classes)
        reads_logits = discriminator.shown == "logits"
        self.teachers = Teachers(teachers, ask=[Softened(temperature), *([MeanLogits()] if reads_logits else [])])
        store = self.teachers.store
        if reads_logits and store is not None and store.top_k is not None:
            raise InputError(
                "MEAL V2: a store of the top_k probabilities would keep all mean logits beside them, for the "
                "discriminator: give the discriminator shown='probabilities', or leave top_k out"
            )
        self.liveness, self.first_batch = Liveness(), FirstBatch()
        if discriminator.has_own_group and (self.lr_scheduler or discriminator.lr_scheduler):
            self.lr_scheduler = partial(GroupSchedules, factories=[self.lr_scheduler, discriminator.lr_scheduler])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Everything trainable, the discriminator in a group of its own if its learning rate is its own."""
        groups = super().parameter_groups()
        if self.discriminator is None or not self.adversary.has_own_group:
            return groups
        own = {} if self.adversary.lr is None else {"lr": self.adversary.lr}
        parameters = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        places = {id(parameter) for parameter in parameters}
        others = [parameter for parameter in groups[0]["params"] if id(parameter) not in places]
        return [{"params": others}, {"params": parameters, **own}]

    @property
    def reads_labels(self) -> bool:
        """Whether the labels have a weight."""
        return self.hard_label_weight > 0

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The similarity to the ensemble's prediction, the discriminator's loss, and the labels' cross entropy."""
        logits = call(self.student, batch.input)
        probs = self.teachers.probabilities(batch)
        softened = wide(logits) / self.temperature
        cross_entropy = functional.counted_mean(functional.soft_cross_entropy_rows(softened, probs), batch.counted)
        self._observe(batch, logits, probs, cross_entropy.detach())
        terms = {"similarity": cross_entropy * self.temperature**2}
        if self.discriminator is not None:
            student, teacher = self._shown(batch, logits, softened, probs)
            terms["discriminator"], observed, alive = discriminator_term(
                self.discriminator, self.adversary.mode, student, teacher, batch.counted
            )
            for name, value in observed.items():
                self.observe(name, value)
            if alive is not None:
                self.liveness.see(alive)
        if self.hard_label_weight:
            terms["ce"] = self.output.label_loss(logits, batch)
        return terms

    def weights(self) -> dict[str, float]:
        """One, the discriminator's weight and ``hard_label_weight``."""
        weights = {"similarity": 1.0}
        if self.discriminator is not None:
            weights["discriminator"] = self.adversary.weight
        if self.hard_label_weight:
            weights["ce"] = self.hard_label_weight
        return weights

    def _shown(self, batch: Batch, logits: Tensor, softened: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """What the discriminator is shown of the student and of the teachers."""
        if self.adversary.shown == "logits":
            return logits, self.teachers.mean_logits(batch)
        if self.adversary.shown == "probabilities":
            return F.softmax(softened, dim=-1), probs
        return F.log_softmax(softened, dim=-1), self.output.as_prediction(probs)

    @torch.no_grad()
    def _observe(self, batch: Batch, logits: Tensor, probs: Tensor, cross_entropy: Tensor) -> None:
        entropy = functional.counted_mean(self.output.uncertainty(probs), batch.counted)
        self.observe("kl", (cross_entropy - entropy) * self.temperature**2)
        self.observe("teacher_entropy", entropy)
        self.observe("agreement", self.output.comparison(logits, probs, batch.counted)["agreement"])
        self.first_batch.see(self, cross_entropy, entropy)


class FirstBatch(Part):
    """Warns after the first epoch of a student that was no better than random weights in the first batch."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def see(self, module: Any, loss: Tensor, entropy: Tensor) -> None:
        """Keep the first batch's loss and its teachers' entropy, in nats."""
        if self._first is None and module.current_epoch == 0 and not module.hard_label_weight:
            self._first = torch.stack([loss, entropy]) / math.log(module.num_classes)

    def epoch_ends(self, module: Any) -> None:
        """Warn; a step would have to wait for the device."""
        if self._first is None:
            return
        loss, entropy = self._first.tolist()
        self._first = None
        if abs(loss - 1) <= _UNTRAINED and entropy < _UNSURE:
            rank_zero_warn(
                f"MEALV2Module: in its first batch the student was as far from its teachers as by guessing "
                f"({loss:.2f} ln K): MEAL V2 begins with pretrained weights (distill_lightning.Pretrained); from "
                "scratch, set hard_label_weight, too"
            )
