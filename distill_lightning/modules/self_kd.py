"""Self-KD (PS-KD): the labels, refined by what the network itself said before."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.data.batch import IGNORED, Batch
from distill_lightning.errors import InputError
from distill_lightning.functional.common import positive, wide
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.alpha import AlphaSchedule, alpha_of
from distill_lightning.modules.parts.past import Past, StoredPast
from distill_lightning.modules.parts.refinement import observe_refinement


class SelfKDModule(DistillationModule):
    r"""Self-Knowledge Distillation with progressive refinement of targets (Self-KD, PS-KD).

    .. math:: L = -\frac{1}{N} \sum_{i=1}^{N} \sum_{k=1}^{K} q_{ik} \log \mathrm{softmax}(z_i)_k, \qquad
        q_i = (1 - \alpha_t) \, y_i + \alpha_t \, s_i, \qquad \alpha_t = \alpha_T \, t / T

    in epoch ``t`` of ``T``, with logits ``z`` ``(N, K)``, labels ``y`` and the network's own past prediction ``s``. It
    is the only term, logged as ``train/self_kd``; the labels are in ``q``. A sample without a past has its label as the
    target, so the first epoch is plain cross entropy. With logits for each position, ``(N, T, K)``, and targets
    ``(N, T)`` the sum goes over all positions that count, each of which has a past of its own.

    The paper says that ``s`` is what the student of the epoch before predicts; its code keeps what was predicted while
    that epoch was training. Here `StoredPast` is the code's way, `PastModel` the equation, and `MovingAverage` an
    extension; positions need one of the latter two.

    With `Mixup` or `CutMix` among the ``transforms`` a mixed input has a mixed label. Networks predict for the mixed
    input; with `StoredPast` the rows of the two samples are mixed like their labels, and a mixed input is not stored.

    Logged besides: ``train/alpha``; ``train/target_gt_prob`` and ``train/target_entropy``, the mean ``q`` at the label
    (of a mixed input, at its first) and the mean entropy of ``q``; ``train/known_fraction``, the part of the samples
    that have a past, and ``train/agree_past``, the part of these whose most probable class is still the past one (0
    where none has). What does not count is neither in these means nor stored.

    Kim, Ji, Yoon, Hwang: *Self-Knowledge Distillation with Progressive Refinement of Targets*,
    https://arxiv.org/abs/2006.12000

    ::

        model:
          class_path: SelfKDModule
          init_args:
            student: {class_path: SmallResNet, init_args: {num_classes: 10, width: 8}}
            alpha_T: 0.8
            past: {class_path: PastModel, init_args: {refresh_epochs: 1}}

    Args:
        student: the network that learns.
        num_classes: ``K``.
        alpha_T: the past's share at the end of the training, in ``[0, 1]``; 0 is plain training, bit for bit.
        alpha_schedule: ``"linear"``, ``"constant"``, or a function of the progress in ``(0, 1]`` that gives the factor
            of ``alpha_T``.
        alpha_unit: whether ``alpha`` changes with every ``"epoch"`` or every optimiser ``"step"``; in the last one it
            is exactly ``alpha_T``.
        total_epochs: ``T``; ``None``: the Trainer's ``max_epochs``.
        past: where ``s`` comes from.
        past_temperature: that ``s`` is softened with, :math:`\mathrm{softmax}(\log s / \tau)`; 1 in the paper.
        options: see `TrainingOptions`.

    Raises:
        InputError: an option is unknown, out of range or would do nothing, every input is mixed and `StoredPast` could
            keep nothing, or, in training, ``T`` is not known, or the past cannot be kept (see its class).
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int,
        alpha_T: float = 0.8,  # noqa: N803  # the paper's name
        alpha_schedule: AlphaSchedule = "linear",
        alpha_unit: Literal["epoch", "step"] = "epoch",
        total_epochs: int | None = None,
        past: Past = StoredPast(),
        past_temperature: float = 1.0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        # Before networks are checked: the rows of a store are of samples.
        self.per_position = not isinstance(past, StoredPast)
        super().__init__(student, num_classes=num_classes, **options)
        if self.num_classes is None:
            raise InputError(f"{type(self).__name__} trains a classifier, which {self.output} is not: give num_classes")
        positive("past_temperature", past_temperature)
        if isinstance(past, StoredPast) and any(getattr(one, "probability", 0) == 1 for one in self.transforms):
            raise InputError(
                "StoredPast keeps no prediction of a mixed input, and probability=1 mixes every one: lower it, or use "
                "past=PastModel()"
            )
        self.past_temperature = past_temperature
        self.alpha = alpha_of(self, alpha_T, alpha_schedule, alpha_unit, total_epochs)
        self.past = past.start()

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The cross entropy to the refined labels."""
        alpha = self.alpha.at(self.trainer)
        logits = self.respond(batch)
        counted = self.output.counted(logits, batch)
        hard = _distributions(batch.target, logits.shape[-1])
        past, known = self.past.read(batch, hard, temperature=self.past_temperature)
        # Without a past exactly the label: (1 - alpha) + alpha need not round to 1.
        target = torch.where(known[..., None], functional.progressive_targets(hard, past, alpha), hard)
        self.past.write(batch, logits.detach())
        rows = functional.soft_cross_entropy_rows(logits, target)
        agree = logits.argmax(dim=-1) == past.argmax(dim=-1)
        observe_refinement(self, alpha, _labels(batch), target, agree=agree, known=known, counted=counted)
        return {"self_kd": functional.counted_mean(rows, counted)}

    def weights(self) -> dict[str, float]:
        """The one term is the loss."""
        return {"self_kd": 1.0}


def _distributions(target: Tensor, num_classes: int) -> Tensor:
    """Distributions ``(..., K)`` as they are, or of classes ``(...)``; what stands for -100 is not looked at."""
    if target.is_floating_point():
        return wide(target)
    return functional.hard_targets(target.masked_fill(target == IGNORED, 0), num_classes)


def _labels(batch: Batch) -> Tensor:
    """The classes ``(N,)`` or ``(N, T)`` of what each row began as."""
    target: Tensor = batch.target if batch.mixture is None else batch.mixture.first
    return target.argmax(dim=-1) if target.is_floating_point() else target.masked_fill(target == IGNORED, 0).long()
