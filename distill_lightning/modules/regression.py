"""Plain training of a network that predicts a distribution over real numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.optimization import LRSchedulerCallable, OptimizerCallable, default_optimizer


class RegressionModule(DistillationModule):
    r"""Maximum likelihood of a diagonal Gaussian: how teachers of a regression are trained, and its row to beat.

    .. math:: L = \frac{1}{N} \sum_i \sum_j \tfrac12 \left[ s_{ij} + (y_{ij} - m_{ij})^2 e^{-s_{ij}}
        + \log 2\pi \right]

    with the network's means ``m`` and log-variances ``s``, both ``(N, d)``. For the first epochs of a burn-in the loss
    is the halved squared error :math:`\frac{1}{N} \sum_i \sum_j \frac12 (y_{ij} - m_{ij})^2` alone: the mean is learnt
    before the deviation. Logged as ``train/nll`` and ``train/squared_error``.

    Nix, Weigend: *Estimating the Mean and Variance of the Target Probability Distribution*, ICNN 1994.

    Args:
        student: the network that learns; gives means, then log-variances, ``(N, 2 d)``.
        num_targets: ``d``.
        burn_in_epochs: epochs with the squared error.
        log_var_bounds: that the log-variances are clamped to.
        num_classes: must be ``None``; the data of a regression say so.
        input_shape: shape of one input, ``(C, H, W)``, to check the network with.
        optimizer: makes the optimiser from the trainable parameters.
        lr_scheduler: makes the schedule from the optimiser.
        metrics: of the student's output and the target.
        compile: see `DistillationModule`.
        channels_last: see `DistillationModule`.

    Raises:
        InputError: an option is out of range, the data have classes, or the student does not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_targets: int = 1,
        burn_in_epochs: int = 0,
        log_var_bounds: tuple[float, float] = functional.LOG_VAR_BOUNDS,
        num_classes: int | None = None,
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
            num_targets=num_targets,
            input_shape=input_shape,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            metrics=metrics,
            compile=compile,
            channels_last=channels_last,
        )
        if burn_in_epochs < 0:
            raise InputError(f"burn_in_epochs cannot be negative, got {burn_in_epochs}")
        check_bounds(log_var_bounds)
        self.burn_in_epochs = burn_in_epochs
        self.log_var_bounds = log_var_bounds

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The squared error and the negative log-likelihood."""
        mean, log_var = functional.split_gaussian(self.student(batch.input), bounds=self.log_var_bounds)
        return {
            "squared_error": (mean - batch.target).square().sum(dim=1).mean() / 2,
            "nll": functional.gaussian_nll(mean, log_var, batch.target),
        }

    def weights(self) -> dict[str, float]:
        """The squared error during the burn-in, the likelihood after it."""
        burning_in = float(self.current_epoch < self.burn_in_epochs)
        return {"squared_error": burning_in, "nll": 1 - burning_in}

    def evaluated(self, output: Tensor) -> Tensor:
        """Means and log-variances within their bounds, ``(N, 2 d)``."""
        return functional.join_gaussian(*functional.split_gaussian(output, bounds=self.log_var_bounds))


def check_bounds(log_var_bounds: tuple[float, float]) -> None:
    """Refuse bounds that have no log-variance between them."""
    if not log_var_bounds[0] < log_var_bounds[1]:
        raise InputError(f"log_var_bounds must be (smallest, largest), got {log_var_bounds}")
