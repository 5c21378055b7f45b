"""Plain training: every table's first row, and how teachers are made."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, check_finite
from distill_lightning.layers.call import call
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions


class SupervisedModule(DistillationModule):
    r"""Maximum likelihood of the labels, :math:`L = \mathrm{CE}(s, y)` of a classifier, logged as ``train/ce``.

    With logits for each position, ``(N, T, K)``, and targets ``(N, T)`` it is the mean over all positions that count.
    With ``output: Gaussian`` in place of ``num_classes`` it is the Gaussian's negative log-likelihood, ``train/nll``.

    Args:
        student: the network that learns; maps ``(N, ...)`` to logits ``(N, K)`` or ``(N, T, K)``.
        num_classes: ``K``.
        options: see `TrainingOptions`.

    Raises:
        InputError: the student does not fit.
    """

    per_position = True

    def __init__(
        self, student: nn.Module, *, num_classes: int | None = None, **options: Unpack[TrainingOptions]
    ) -> None:
        super().__init__(student, num_classes=num_classes, **options)

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The labels' negative log-likelihood, mean over the batch."""
        return {self.output.label_term: self.output.label_loss(self.respond(batch), batch)}

    def weights(self) -> dict[str, float]:
        """One."""
        return {self.output.label_term: 1.0}


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
        num_classes: accepted for the command line's link with the data; must be ``None``.
        options: see `TrainingOptions`; ``output: Gaussian`` sets the log-variances' bounds.

    Raises:
        InputError: an option is out of range, the data have classes, or the student does not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_targets: int = 1,
        burn_in_epochs: int = 0,
        num_classes: int | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(student, num_classes=num_classes, num_targets=num_targets, **options)
        check_finite("burn_in_epochs", burn_in_epochs)
        if burn_in_epochs < 0:
            raise InputError(f"burn_in_epochs cannot be negative, got {burn_in_epochs}")
        self.burn_in_epochs = burn_in_epochs

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The squared error and the negative log-likelihood."""
        output = call(self.student, batch.input)
        mean = self.output.prediction(output)[:, : self.num_targets]
        errors = (mean - functional.zero_uncounted(batch.target, batch.counted)).square().sum(dim=1)
        return {
            "squared_error": functional.counted_mean(errors, batch.counted) / 2,
            "nll": self.output.label_loss(output, batch),
        }

    def weights(self) -> dict[str, float]:
        """The squared error during the burn-in, the likelihood after it."""
        burning_in = float(self.current_epoch < self.burn_in_epochs)
        return {"squared_error": burning_in, "nll": 1 - burning_in}
