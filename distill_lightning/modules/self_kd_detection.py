"""Self-KD of a detector's classes, an extension of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.functional.common import positive, wide
from distill_lightning.modules.detection import DetectionModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.alpha import AlphaSchedule, alpha_of
from distill_lightning.modules.parts.past import Past, PastModel, RunningNetwork
from distill_lightning.modules.parts.refinement import observe_refinement
from distill_lightning.modules.parts.regions import Regions, check_regions, recorded


class SelfKDDetectionModule(DetectionModule):
    r"""Self-KD of a detector, an **extension** of the paper: its boxes' classes are softened by what it said before.

    The paper's own detection is another: a detector is trained the ordinary way (`DetectionModule`) on a backbone that
    was trained as a classifier by `SelfKDModule`. This is not in the paper, and no number of the paper is of it.

    .. math:: L_\mathrm{classifier} = -\frac{1}{R} \sum_{r=1}^{R} \sum_{k=0}^{C} q_{rk} \log \mathrm{softmax}(z_r)_k,
        \qquad q_r = (1 - \alpha_t) \, y_r + \alpha_t \, s_r, \qquad \alpha_t = \alpha_T \, t / T

    in epoch ``t`` of ``T``, over the ``R`` boxes that the detector has sampled in the batch, with their class logits
    ``z`` ``(R, C + 1)``, their classes ``y`` (0 is the background), and ``s`` what the past detector says **of the very
    same boxes on the same augmented images**. The box regression, masks and keypoints are left alone. Where there is no
    past yet, in the first epoch, and where :math:`\alpha_t = 0`, the training is that of the detector alone, bit for
    bit. Any detector of torchvision's R-CNN family will do.

    With ``objectness`` the region proposals are softened in the same way: :math:`q = (1 - \alpha_t) \, y + \alpha_t \,
    \sigma(z_\mathrm{past})` is the target of the binary cross entropy of the sampled anchors.

    Logged besides, over the sampled boxes: ``train/alpha``; ``train/target_gt_prob`` and ``train/target_entropy``, the
    mean ``q`` at the box's class and the mean entropy of ``q``; ``train/known_fraction``, the part of the boxes that
    have a share of the past in their targets, and ``train/agree_past``, the part of these whose most probable class is
    the past one (0 where there are none).

    Kim, Ji, Yoon, Hwang: *Self-Knowledge Distillation with Progressive Refinement of Targets*,
    https://arxiv.org/abs/2006.12000

    Args:
        student: a `torchvision.models.detection.FasterRCNN`, ``MaskRCNN`` or ``KeypointRCNN``, with ``num_classes + 1``
            classes.
        num_classes: ``C``, without the background.
        alpha_T: the past's share at the end of the training, in ``[0, 1]``; 0 is plain training, bit for bit.
        alpha_schedule: ``"linear"``, ``"constant"``, or a function of the progress in ``(0, 1]`` that gives the factor
            of ``alpha_T``.
        alpha_unit: whether ``alpha`` changes with every ``"epoch"`` or every optimiser ``"step"``.
        total_epochs: ``T``; ``None``: the Trainer's ``max_epochs``.
        past: the past detector, `PastModel` or `MovingAverage`; sampled boxes have no rows that could be stored.
        past_temperature: that ``s`` is softened with.
        foreground_only: whether boxes of the background keep their class as the target.
        objectness: whether the region proposals are softened, too.
        class_names: of the classes from 1 on; ``None``: those of the data module, or their numbers.
        options: see `DetectionModule`.

    Raises:
        InputError: an option is unknown, out of range or would do nothing, the past is a `StoredPast`, the student is
            no detector of this family or one of other classes; in training: ``T`` is not known.
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
        past: Past = PastModel(),
        past_temperature: float = 1.0,
        foreground_only: bool = False,
        objectness: bool = False,
        class_names: Sequence[str] | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(student, num_classes=num_classes, class_names=class_names, **options)
        check_regions(f"{type(self).__name__}: the student", student)
        positive("past_temperature", past_temperature)
        self.past_temperature, self.foreground_only, self.objectness = past_temperature, foreground_only, objectness
        self.alpha = alpha_of(self, alpha_T, alpha_schedule, alpha_unit, total_epochs)
        running = past.start()
        if not isinstance(running, RunningNetwork):
            raise InputError(
                f"{type(self).__name__}: {type(past).__name__} keeps a row of each sample, and boxes have none: "
                "use past=PastModel() or past=MovingAverage()"
            )
        self.past = running

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The detector's losses, with refined targets of its classes."""
        alpha, past = self.alpha.at(self.trainer), self.past.model
        if past is None or alpha == 0:
            terms = super().terms(batch)
            # Of every box the target is its class.
            nothing = torch.zeros(1, dtype=torch.int64, device=terms["classifier"].device)
            hard = functional.hard_targets(nothing, 1)
            observe_refinement(self, alpha, nothing, hard, agree=nothing > 0, known=nothing > 0)
            return terms
        with recorded(self.student) as seen:
            terms = super().terms(batch)
        logits, anchors = seen.asked(past, objectness=self.objectness)
        terms["classifier"] = self._classifier(seen, logits, alpha)
        if anchors is not None:
            terms["objectness"] = self._objectness(seen, anchors, alpha)
        return terms

    def _classifier(self, seen: Regions, past_logits: Tensor, alpha: float) -> Tensor:
        labels, logits = seen.labels, seen.logits
        hard = functional.hard_targets(labels, logits.shape[1])
        past = functional.soften(wide(past_logits).softmax(dim=1), temperature=self.past_temperature)
        target = functional.progressive_targets(hard, past, alpha)
        softened = labels > 0 if self.foreground_only else torch.ones_like(labels, dtype=torch.bool)
        target = torch.where(softened[:, None], target, hard)
        agree = logits.argmax(dim=1) == past.argmax(dim=1)
        observe_refinement(self, alpha, labels, target, agree=agree, known=softened)
        return functional.soft_cross_entropy_rows(logits, target).mean()

    def _objectness(self, seen: Regions, past_logits: Tensor, alpha: float) -> Tensor:
        past = (wide(past_logits) / self.past_temperature).sigmoid()
        target = functional.progressive_targets(seen.is_object, past, alpha)
        rows = functional.soft_binary_cross_entropy_rows(seen.objectness, target)
        return functional.counted_mean(rows, seen.sampled)
