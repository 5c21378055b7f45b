"""What a comparison of classifiers, or of regressions, measures: the outputs that its runs keep."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from distill_lightning import functional
from distill_lightning.functional.calibration import ECE_BINS
from distill_lightning.outputs import Categorical, Gaussian, Output
from distill_lightning.pages import fixed
from distill_lightning.studies.compare.task import Column, Task


class OutputsTask(Task):
    """Measures the outputs of a network on the test samples, which its run keeps."""

    @abstractmethod
    def flat_targets(self, targets: Tensor) -> Tensor:
        """Targets as `measure` reads them, one per row, each position of a sequence a row of its own."""

    @abstractmethod
    def flat_output(self, output: Tensor) -> Tensor:
        """Predictions as `measure` reads them, row by row those of `flat_targets`."""

    @abstractmethod
    def _output_kind(self, output: Tensor) -> Output:
        """The kind of output that predictions like these are."""

    def bins(self, output: Tensor, targets: Tensor) -> list[list[float]]:
        """Counts, sums of confidences and hits by confidence; empty where there are no confidences."""
        return []

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The ensemble's prediction from its members', in the form that `measure` reads."""
        kind = self._output_kind(outputs[0])
        return kind.as_prediction(kind.collapse(outputs))

    def measure(self, output: Tensor, targets: Tensor, ensemble: Tensor | None) -> dict[str, float]:
        """The values of all columns, by name; without an ensemble, none of those that compare with it."""
        kind = self._output_kind(output)
        values = dict(kind.metrics()(output, targets))
        if ensemble is not None:
            values |= kind.teacher_metrics()(output, ensemble)
        values[self.headline.name] = values[self.monitor.removeprefix("val/")]
        names = [column.name for column in self.measured(with_ensemble=ensemble is not None)]
        # No fifth place among five classes or fewer.
        return {name: float(values[name]) if name in values else float("nan") for name in names}

    def score(self, output: Tensor, targets: Tensor) -> float:
        """The headline's value alone."""
        return float(self._output_kind(output).metrics()(output, targets)[self.monitor.removeprefix("val/")])

    def gap_closed(self, value: float, alone: float, ensemble: float) -> float:
        """How much of the way from the student alone to the ensemble; NaN where the ensemble is no better."""
        better = ensemble > alone if self.mode == "max" else ensemble < alone
        return (value - alone) / (ensemble - alone) if better else float("nan")


class Classification(OutputsTask):
    """Logits ``(N, K)`` and classes ``(N,)``."""

    headline = Column("test_accuracy", "test %", 100, 2)
    quantity = watched = "accuracy"
    watched_scale = 100
    columns = (
        Column("nll", "NLL", mode="min"),
        Column("ece", "ECE %", 100, 2, mode="min"),
        Column("brier"),
        Column("aurc"),
        Column("eaurc"),
        Column("top5"),
        Column("agreement", "agree %", 100, 1, of_ensemble=True),
        Column("teacher_kl", of_ensemble=True),
    )
    monitor = "val/accuracy"
    mode = "max"
    module = "SupervisedModule"
    _legend = f"""\
test: accuracy on the test images with the weights after the last epoch, which all columns but the next describe
sel.: test accuracy with the weights of the epoch that was best on the validation images
NLL: mean negative log-likelihood (nats); ECE: expected calibration error ({ECE_BINS} bins)"""
    _ensemble_legend = """\
agree: test images on which the ensemble names the same class
gap: how much of the way from the student alone (mean over its seeds) to the ensemble is closed"""

    def flat_targets(self, targets: Tensor) -> Tensor:
        """Classes ``(N,)``."""
        return targets.flatten()

    def flat_output(self, output: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        return output.flatten(0, -2)

    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """The accuracy."""
        return f"validation accuracy {100 * metrics[self.monitor]:.1f} %"

    def bins(self, output: Tensor, targets: Tensor) -> list[list[float]]:
        """How well confidences and accuracies agree."""
        confidence, predicted = F.softmax(output, dim=-1).max(dim=-1)
        return [part.tolist() for part in functional.calibration_bins(confidence, predicted == targets, bins=ECE_BINS)]

    def _output_kind(self, output: Tensor) -> Output:
        return Categorical(output.shape[1])


class Regression(OutputsTask):
    """A Gaussian's parameters ``(N, 2 d)`` and targets ``(N, d)``."""

    headline = Column("test_mae", "MAE", mode="min")
    quantity = watched = "mean absolute error"
    columns = (
        Column("rmse", "RMSE", mode="min"),
        Column("nll", "NLL", mode="min"),
        Column("calibration_error", "calib. %", 100, 1, mode="min"),
        Column("teacher_kl", "KL ens.", mode="min", of_ensemble=True),
    )
    monitor = "val/mae"
    mode = "min"
    module = "RegressionModule"
    _legend = """\
MAE: mean absolute error on the test images, in the targets' unit, with the weights after the last epoch, which all
columns but the next describe; sel.: with the weights of the epoch that was best on the validation images
RMSE: root of the mean square error; NLL: mean negative log-likelihood (nats)
calib.: mean distance between level and coverage of nine central predicted intervals"""
    _ensemble_legend = """\
KL ens.: mean divergence from the ensemble (nats)
gap: how much of the way from the student alone (mean over its seeds) to the ensemble is closed"""

    def flat_targets(self, targets: Tensor) -> Tensor:
        """Targets ``(N, d)``, as they are."""
        return targets

    def flat_output(self, output: Tensor) -> Tensor:
        """Parameters ``(N, 2 d)``, as they are."""
        return output

    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """The mean absolute error."""
        return f"validation error {fixed(metrics[self.monitor], 3)}"

    def _output_kind(self, output: Tensor) -> Output:
        # The predictions are within their module's bounds, whichever these are.
        return Gaussian(output.shape[1] // 2, log_var_bounds=(-math.inf, math.inf))
