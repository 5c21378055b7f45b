"""What regressions with a predicted variance are judged by.

Networks give the parameters of a diagonal Gaussian, ``(N, 2 d)``: first the ``d`` means, then the ``d`` log-variances.
They are used as they are, in float32; a log-variance is never clamped here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.outputs.metrics.exact import ExactMetric
from distill_lightning.outputs.metrics.mean import SampleMean


class GaussianMeanAbsoluteError(ExactMetric, MeanAbsoluteError):
    """torchmetrics' mean absolute error of the predicted means: mean over samples and targets.

    From outputs ``(N, 2 d)`` and targets ``(N, d)``.

    Args:
        num_targets: ``d``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import GaussianMeanAbsoluteError
        >>> output, target = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[0.5], [3.0]])
        >>> metric = GaussianMeanAbsoluteError(num_targets=1)
        >>> metric.update(output, target)
        >>> metric.compute()
        tensor(1.2500)
    """

    def __init__(self, *, num_targets: int) -> None:
        super().__init__()
        self.num_targets = num_targets

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        mean, _ = _gaussian(preds, target, self.num_targets)
        super().update(mean.flatten(), target.to(mean).flatten())


class GaussianRootMeanSquaredError(ExactMetric, MeanSquaredError):
    """torchmetrics' mean squared error of the predicted means, and its root: over samples and targets.

    From outputs ``(N, 2 d)`` and targets ``(N, d)``.

    Args:
        num_targets: ``d``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import GaussianRootMeanSquaredError
        >>> output, target = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[0.5], [3.0]])
        >>> metric = GaussianRootMeanSquaredError(num_targets=1)
        >>> metric.update(output, target)
        >>> metric.compute()
        tensor(1.4577)
    """

    def __init__(self, *, num_targets: int) -> None:
        super().__init__(squared=False)
        self.num_targets = num_targets

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        mean, _ = _gaussian(preds, target, self.num_targets)
        super().update(mean.flatten(), target.to(mean).flatten())


class GaussianNegativeLogLikelihood(SampleMean):
    """`distill_lightning.functional.gaussian_nll` over all batches, in nats.

    Sum over the targets, mean over the samples, with the constant ``d / 2 * log(2 pi)``; it may be negative. From
    outputs ``(N, 2 d)`` and targets ``(N, d)``.

    Args:
        num_targets: ``d``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import GaussianNegativeLogLikelihood
        >>> output, target = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[0.5], [3.0]])
        >>> metric = GaussianNegativeLogLikelihood(num_targets=1)
        >>> metric.update(output, target)
        >>> metric.compute()
        tensor(1.9814)
    """

    def __init__(self, *, num_targets: int) -> None:
        super().__init__()
        self.num_targets = num_targets

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.add(functional.gaussian_nll(*_gaussian(output, target, self.num_targets), target), len(target))


class IntervalCalibration(ExactMetric):
    """`distill_lightning.functional.interval_calibration` over all batches, in ``[0, 0.5]``.

    The mean over the central intervals of levels 0.1, 0.2, ... 0.9 of the absolute difference between the share of
    targets inside the predicted interval and the level. From outputs ``(N, 2 d)`` and targets ``(N, d)``.

    Args:
        num_targets: ``d``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import IntervalCalibration
        >>> output, target = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[0.5], [3.0]])
        >>> metric = IntervalCalibration(num_targets=1)
        >>> metric.update(output, target)
        >>> metric.compute()
        tensor(0.1889)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    hits: Tensor
    count: Tensor

    def __init__(self, *, num_targets: int) -> None:
        super().__init__()
        self.num_targets = num_targets
        self.add_state("hits", torch.zeros(9, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self.hits += functional.interval_hits(*_gaussian(output, target, self.num_targets), target)
        self.count += target.numel()

    def compute(self) -> Tensor:
        """The mean difference over everything added; NaN if that is nothing."""
        return functional.interval_error(self.hits, self.count)


class GaussianDivergence(SampleMean):
    r"""Mean over the samples of :math:`\mathrm{KL}(\text{teacher} \,\|\, \text{student})` of two Gaussians, in nats.

    `distill_lightning.functional.gaussian_kl` over all batches, summed over the targets; from the student's and the
    teacher's outputs, both ``(N, 2 d)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import GaussianDivergence
        >>> student, teacher = tensor([[0.0, 0.0]]), tensor([[1.0, 0.0]])
        >>> metric = GaussianDivergence()
        >>> metric.update(student, teacher)
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add a batch."""
        divergence = functional.gaussian_kl(*_split(teacher), *_split(student))
        self.add(divergence, len(student))


class AngularError(SampleMean):
    """Mean angle in space between predicted and true directions of gaze, of `distill_lightning.functional.gaze_angle`.

    From predictions ``(N, 2)``, or a Gaussian's parameters ``(N, 4)`` of which the two means count, and targets
    ``(N, 2)``: pitch and yaw in radians.

    Args:
        unit: of the result, ``"degrees"`` or ``"radians"``.

    Raises:
        InputError: the unit is unknown.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import AngularError
        >>> prediction, target = tensor([[0.0, 0.0]]), tensor([[0.0, 0.5]])
        >>> metric = AngularError()
        >>> metric.update(prediction, target)
        >>> metric.compute()
        tensor(28.6479)
    """

    def __init__(self, *, unit: Literal["degrees", "radians"] = "degrees") -> None:
        super().__init__()
        if unit not in ("degrees", "radians"):
            raise InputError(f"unit must be 'degrees' or 'radians', got {unit!r}")
        self.unit = unit

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        if prediction.ndim != 2 or prediction.shape[1] not in (2, 4):
            raise InputError(
                "AngularError needs predictions (N, 2), pitch and yaw, or (N, 4) with their log-variances; "
                f"got {tuple(prediction.shape)}"
            )
        angle = functional.gaze_angle(prediction[:, :2], target)
        self.add((angle.rad2deg() if self.unit == "degrees" else angle).mean(), len(target))


def regression_metrics(num_targets: int) -> MetricCollection:
    """What every regression with ``num_targets`` targets and a predicted variance is judged by.

    ``mae`` and ``rmse`` (over samples and targets), ``nll`` (nats a sample) and ``calibration_error`` (see
    `IntervalCalibration`).

    Args:
        num_targets: ``d``.

    Raises:
        InputError: ``num_targets`` is not positive.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics import regression_metrics
        >>> output, target = tensor([[0.0, 0.0], [1.0, 0.0]]), tensor([[0.5], [3.0]])
        >>> metrics = regression_metrics(1)
        >>> values = metrics(output, target)
        >>> {name: round(float(value), 4) for name, value in values.items()}
        {'calibration_error': 0.1889, 'mae': 1.25, 'nll': 1.9814, 'rmse': 1.4577}
    """
    if num_targets < 1:
        raise InputError(f"num_targets must be at least 1, got {num_targets}")
    metrics: dict[str, Metric | MetricCollection] = {
        "mae": GaussianMeanAbsoluteError(num_targets=num_targets),
        "rmse": GaussianRootMeanSquaredError(num_targets=num_targets),
        "nll": GaussianNegativeLogLikelihood(num_targets=num_targets),
        "calibration_error": IntervalCalibration(num_targets=num_targets),
    }
    return MetricCollection(metrics, compute_groups=False)


def _gaussian(output: Tensor, target: Tensor, num_targets: int) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, both ``(N, d)``, of outputs that fit the targets."""
    if output.shape != (len(target), 2 * num_targets) or target.shape != (len(target), num_targets):
        # Left alone, (N,) against (N, 1) would be compared all with all.
        raise InputError(
            f"num_targets={num_targets} needs outputs (N, {2 * num_targets}), means and log-variances, and targets "
            f"(N, {num_targets}); got {tuple(output.shape)} and {tuple(target.shape)}"
        )
    return _split(output)


def _split(output: Tensor) -> tuple[Tensor, Tensor]:
    return functional.split_gaussian(output, bounds=(-math.inf, math.inf))
