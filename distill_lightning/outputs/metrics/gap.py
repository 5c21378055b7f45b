"""A metric, seen between a baseline and the teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from distill_lightning import functional
from distill_lightning.errors import check_finite


class GapReduction(WrapperMetric):
    """`distill_lightning.functional.gap_reduction` of another metric's value: 0 at the baseline, 1 at the teacher.

    It works for accuracies and for errors, and is not clipped. It is updated with what the other metric is updated
    with.

    Args:
        baseline: the value of what the student is compared with, plain distillation for example.
        teacher: the value of the teacher. Where it is the baseline's, there is no gap, and the result is NaN.
        of: the metric.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import Accuracy, GapReduction, classification_metrics
        >>> metrics = classification_metrics(2)
        >>> metrics.add_metrics({"gap": GapReduction(0.5, 1.0, of=Accuracy())})
        >>> logits, target = tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), tensor([0, 0, 1, 1])
        >>> values = metrics(logits, target)
        >>> values["accuracy"], values["gap"]
        (tensor(0.7500), tensor(0.5000))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, baseline: float, teacher: float, *, of: Metric) -> None:
        super().__init__()
        check_finite("GapReduction: baseline", baseline)
        check_finite("GapReduction: teacher", teacher)
        self.baseline, self.teacher = baseline, teacher
        self.of = of

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Hand a batch on."""
        self.of.update(*args, **kwargs)

    def compute(self) -> Tensor:
        """The gap reduction over everything added, over all processes."""
        return functional.gap_reduction(self.of.compute(), self.baseline, self.teacher)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hand a batch on; the gap reduction over that batch alone."""
        return functional.gap_reduction(self.of(*args, **kwargs), self.baseline, self.teacher)

    def reset(self) -> None:
        """Forget everything added."""
        super().reset()
        self.of.reset()
