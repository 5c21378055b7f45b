"""Outputs that are the parameters of a diagonal Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import positive, wide
from distill_lightning.outputs.metrics import GaussianDivergence, regression_metrics
from distill_lightning.outputs.output import Output, check_is_tensor


@dataclass(frozen=True)
class Gaussian(Output):
    """Means, then log-variances of ``d`` real targets, ``(N, 2 d)``; distributions are these within their bounds.

    Args:
        num_targets: ``d``.
        log_var_bounds: that log-variances are clamped to.
        teacher_variance: of teachers that give means only, ``(N, d)``; one number or one per target. Those that give
            log-variances, too, are taken at their word.
        fixed_variance: of the student, whose means alone count then, so that it may give ``(N, d)``; ``None``: it
            predicts its own.

    Raises:
        InputError: a size, a variance or bounds that cannot be used.

    Example:
        >>> import torch
        >>> from torch import tensor
        >>> from distill_lightning import Batch, Gaussian
        >>> output = Gaussian(1)
        >>> batch = Batch(input=torch.zeros(2, 4), target=tensor([[0.5], [3.0]]))
        >>> output.label_loss(tensor([[0.0, 0.0], [1.0, 0.0]]), batch)
        tensor(1.9814)
        >>> output.prediction(tensor([[0.0, 20.0]]))
        tensor([[ 0., 10.]])
    """

    num_targets: int
    log_var_bounds: tuple[float, float] = functional.LOG_VAR_BOUNDS
    teacher_variance: float | list[float] | None = None
    fixed_variance: float | None = None

    name = "gaussian"
    label_term = "nll"
    has_temperature = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        # A checkpoint and a YAML file hold a list, and equal outputs are to be equal.
        object.__setattr__(self, "log_var_bounds", tuple(self.log_var_bounds))
        if self.num_targets < 1:
            raise InputError(f"num_targets must be at least 1, got {self.num_targets}")
        if not self.log_var_bounds[0] < self.log_var_bounds[1]:
            raise InputError(f"log_var_bounds must be (smallest, largest), got {self.log_var_bounds}")
        variances = self._teacher_variances()
        check_finite("teacher_variance", *(variances or ()))
        if variances is not None and (len(variances) != self.num_targets or not all(v > 0 for v in variances)):
            raise InputError(
                f"teacher_variance must be positive, one number or one for each of {self.num_targets}: "
                f"{self.teacher_variance}"
            )
        if self.fixed_variance is not None:
            positive("fixed_variance", self.fixed_variance)

    def as_point(self, variance: float | None) -> Gaussian:
        """One of a ``fixed_variance``, 1 unless another is given."""
        return replace(self, fixed_variance=1.0 if variance is None else variance)

    def check(self, who: str, network: nn.Module, shape: Sequence[int], *, per_position: bool = False) -> None:
        """``(N, 2 d)`` is needed; with a ``fixed_variance`` ``(N, d)`` will do."""
        if self.fixed_variance is not None and self._are_means(shape):
            return
        if len(shape) != 2 or shape[1] != 2 * self.num_targets:
            raise InputError(
                f"{who} ({type(network).__name__}) has an output of shape {tuple(shape)} where "
                f"num_targets={self.num_targets} needs (N, {2 * self.num_targets}), means and log-variances: end it in "
                "a GaussianHead"
            )

    def check_teacher(self, who: str, network: nn.Module, shape: Sequence[int], *, per_position: bool = False) -> None:
        """``(N, 2 d)``, or with a ``teacher_variance`` ``(N, d)``, is needed."""
        if not self._are_means(shape):
            self.check(who, network, shape)
        elif self.teacher_variance is None:
            found = f"{who} ({type(network).__name__}) has an output of shape {tuple(shape)}, means alone"
            raise InputError(f"{found}: give their teacher_variance, or end it in a GaussianHead")

    def check_rule(self, combine: str) -> None:
        """Gaussians are collapsed by their mixture alone."""
        if combine != "probabilities":
            raise InputError("a regression's teachers are collapsed to one Gaussian: combine has no meaning there")

    def describe_answers(self) -> dict[str, Any]:
        """The variance of teachers that give means only, for each target, and the bounds of log-variances."""
        return {"teacher_variance": self._teacher_variances(), "log_var_bounds": list(self.log_var_bounds)}

    def check_target(
        self, who: str, target: Tensor | None, *, per_position: bool = False, is_evaluated: bool = False
    ) -> None:
        """``(N, d)`` is needed, or real numbers ``(N,)`` of a single target."""
        if target is None:
            return
        check_is_tensor(who, target)
        if self.as_target(target).shape[1:] != (self.num_targets,):
            raise InputError(
                f"{who}: the targets have shape {tuple(target.shape)} where num_targets={self.num_targets} needs "
                f"(N, {self.num_targets}): reshape them"
            )

    def as_target(self, target: Tensor) -> Tensor:
        """Targets ``(N, d)``; integers ``(N,)`` stay, for they are classes."""
        is_column = target.ndim == 1 and self.num_targets == 1 and target.is_floating_point()
        return target[:, None] if is_column else target

    def target_rule(self, target: Tensor) -> str:
        """They must be finite."""
        return "finite numbers"

    def wrong_targets(self, target: Tensor) -> Tensor:
        """Rows that hold a number that is not finite."""
        return ~self.as_target(target).isfinite().all(dim=-1)

    def select(self, output: Tensor, target: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """The samples that count."""
        return (output, target) if counted is None else (output[counted], target[counted])

    def counted(self, output: Tensor, batch: Batch) -> Tensor | None:
        """Which samples count, bool ``(N,)``; ``None``: all."""
        return batch.counted

    def label_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """See `functional.gaussian_nll`."""
        mean, log_var = self.prediction(output).chunk(2, dim=1)
        target = functional.zero_uncounted(batch.target, batch.counted)
        return functional.counted_mean(functional.gaussian_nll_rows(mean, log_var, target), batch.counted)

    def divergence_rows(self, output: Tensor, distribution: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Sum over the targets, see `functional.gaussian_kl_rows`; a temperature means nothing here."""
        return functional.gaussian_kl_rows(*distribution.chunk(2, dim=1), *self.prediction(output).chunk(2, dim=1))

    def divergence(self, output: Tensor, distribution: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Mean over the samples that count."""
        return functional.counted_mean(self.divergence_rows(output, distribution), batch.counted)

    def point_divergence_rows(self, output: Tensor, distribution: Tensor) -> Tensor:
        """Squared error to the distribution's mean over twice ``fixed_variance`` (1 without), ``(N,)``."""
        mean = wide(output[:, : self.num_targets])
        variance = 1.0 if self.fixed_variance is None else self.fixed_variance
        return (mean - distribution[:, : self.num_targets]).square().sum(dim=1) / (2 * variance)

    def collapse(
        self,
        outputs: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        combine: str = "probabilities",
        temperature: float = 1.0,
    ) -> Tensor:
        """The Gaussian with the mixture's mean and variance, see `functional.collapse_mixture`."""
        self.check_rule(combine)
        means, variances = zip(*(self._teacher_gaussian(output) for output in outputs), strict=True)
        mean, variance = functional.collapse_mixture(torch.stack(means), torch.stack(variances), weights=weights)
        return functional.join_gaussian(mean, variance.log())

    def uncertainty(self, distribution: Tensor) -> Tensor:
        """Total variance of each sample, ``(N,)``: the sum over the targets."""
        return distribution.chunk(2, dim=1)[1].exp().sum(dim=1)

    def prediction(self, output: Tensor) -> Tensor:
        """Means and log-variances within their bounds, ``(N, 2 d)``."""
        if self.fixed_variance is not None:
            mean = wide(output[:, : self.num_targets])
            return functional.join_gaussian(mean, torch.full_like(mean, math.log(self.fixed_variance)))
        return functional.join_gaussian(*functional.split_gaussian(output, bounds=self.log_var_bounds))

    def teacher_prediction(self, output: Tensor) -> Tensor:
        """Means and log-variances, ``teacher_variance`` where a teacher gives none."""
        mean, variance = self._teacher_gaussian(output)
        return functional.join_gaussian(mean, variance.log())

    def as_prediction(self, distribution: Tensor) -> Tensor:
        """The distribution as it is."""
        return distribution

    def comparison(self, output: Tensor, distribution: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
        """``student_deviation`` and ``teacher_deviation``: mean standard deviations."""
        both = {"student": self.prediction(output), "teacher": distribution}
        deviations = {who: gaussian.chunk(2, dim=1)[1].div(2).exp() for who, gaussian in both.items()}
        if counted is not None:
            counted = counted[:, None].expand(len(counted), self.num_targets)
        return {f"{who}_deviation": functional.counted_mean(rows, counted) for who, rows in deviations.items()}

    def metrics(self) -> MetricCollection:
        """`regression_metrics`."""
        return regression_metrics(self.num_targets)

    def teacher_metrics(self) -> MetricCollection:
        """``teacher_kl`` in nats."""
        return MetricCollection({"teacher_kl": GaussianDivergence()}, compute_groups=False)

    def _are_means(self, shape: Sequence[int]) -> bool:
        return tuple(shape[1:]) == (self.num_targets,)

    def _teacher_variances(self) -> list[float] | None:
        given = self.teacher_variance
        if given is None:
            return None
        return [float(given)] * self.num_targets if isinstance(given, (int, float)) else [float(v) for v in given]

    def _teacher_gaussian(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """One teacher's means and variances."""
        variances = self._teacher_variances()
        if not self._are_means(output.shape) or variances is None:
            mean, log_var = functional.split_gaussian(output, bounds=self.log_var_bounds)
            return mean, log_var.exp()
        # Python numbers written into a tensor of the right device: nothing has to be copied to it.
        columns = [torch.full_like(output[:, 0], value, dtype=torch.float32) for value in variances]
        return wide(output), torch.stack(columns, dim=1)
