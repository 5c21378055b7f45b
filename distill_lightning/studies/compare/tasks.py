"""What a comparison of classifiers, or of regressions, measures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from distill_lightning import functional
from distill_lightning.functional.calibration import ECE_BINS
from distill_lightning.modules import DistillationModule, RegressionModule, SupervisedModule
from distill_lightning.outputs import Categorical, Gaussian, Output
from distill_lightning.pages import fixed
from distill_lightning.plots import reliability_diagram

_TIMES = """\
params: parameters of the network that is used at test time; s/epoch: median over the epochs, training only"""


@dataclass(frozen=True)
class Column:
    """A measured value: its name in the CSV, its title in the table and how it is written there.

    A column without a title stands in the CSV alone.
    """

    name: str
    title: str = ""
    scale: float = 1
    digits: int = 3

    def text(self, mean: float) -> str:
        """The mean as the table shows it."""
        return fixed(self.scale * mean, self.digits)


class Task(ABC):
    """Measures predictions on the test images.

    Attributes:
        headline: the first column, which the gap and the figures are about.
        quantity: what the headline measures, in words.
        columns: the others.
        monitor: the validation metric that an epoch is selected by.
        mode: whether more of it, and of the headline, is better.
        module: what trains teachers and the student alone.
        legend: what the table's titles mean.
    """

    headline: Column
    quantity: str
    columns: tuple[Column, ...]
    monitor: str
    mode: Literal["max", "min"]
    module: type[DistillationModule]
    legend: str

    @abstractmethod
    def flat_targets(self, targets: Tensor) -> Tensor:
        """Targets as `measure` reads them, one per row, each position of a sequence a row of its own."""

    @abstractmethod
    def flat_output(self, output: Tensor) -> Tensor:
        """Predictions as `measure` reads them, row by row those of `flat_targets`."""

    @abstractmethod
    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """What an epoch reached on the validation images, for a line about its run."""

    def figures(self, rows: Mapping[str, Sequence[Tensor]], ensemble: Tensor, targets: Tensor) -> dict[str, Figure]:
        """Figures by file name that only this task has.

        Args:
            rows: by the row's name, the predictions of its runs.
            ensemble: the ensemble's predictions.
            targets: the test samples' targets.
        """
        return {}

    @abstractmethod
    def _output_kind(self, output: Tensor) -> Output:
        """The kind of output that predictions like these are."""

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """The ensemble's prediction from its members', in the form that `measure` reads."""
        kind = self._output_kind(outputs[0])
        return kind.as_prediction(kind.collapse(outputs))

    def measure(self, output: Tensor, targets: Tensor, ensemble: Tensor) -> dict[str, float]:
        """The values of all columns, by name."""
        kind = self._output_kind(output)
        values = {**kind.metrics()(output, targets), **kind.teacher_metrics()(output, ensemble)}
        values[self.headline.name] = values[self.monitor.removeprefix("val/")]
        names = [column.name for column in (self.headline, *self.columns)]
        # No fifth place among five classes or fewer.
        return {name: float(values[name]) if name in values else float("nan") for name in names}

    def score(self, output: Tensor, targets: Tensor) -> float:
        """The headline's value alone."""
        return float(self._output_kind(output).metrics()(output, targets)[self.monitor.removeprefix("val/")])

    def gap_closed(self, value: float, alone: float, ensemble: float) -> float:
        """How much of the way from the student alone to the ensemble; NaN where the ensemble is no better."""
        better = ensemble > alone if self.mode == "max" else ensemble < alone
        return (value - alone) / (ensemble - alone) if better else float("nan")


class Classification(Task):
    """Logits ``(N, K)`` and classes ``(N,)``."""

    headline = Column("test_accuracy", "test %", 100, 2)
    quantity = "accuracy"
    columns = (
        Column("nll", "NLL"),
        Column("ece", "ECE %", 100, 2),
        Column("brier"),
        Column("aurc"),
        Column("eaurc"),
        Column("top5"),
        Column("agreement", "agree %", 100, 1),
        Column("teacher_kl"),
    )
    monitor = "val/accuracy"
    mode = "max"
    module = SupervisedModule
    legend = f"""\
test: accuracy on the test images with the weights after the last epoch, which all columns but the next describe
sel.: test accuracy with the weights of the epoch that was best on the validation images
NLL: mean negative log-likelihood (nats); ECE: expected calibration error ({ECE_BINS} bins)
agree: test images on which the ensemble names the same class
gap: how much of the way from the student alone (mean over its seeds) to the ensemble is closed
{_TIMES}"""

    def flat_targets(self, targets: Tensor) -> Tensor:
        """Classes ``(N,)``."""
        return targets.flatten()

    def flat_output(self, output: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        return output.flatten(0, -2)

    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """The accuracy."""
        return f"validation accuracy {100 * metrics[self.monitor]:.1f} %"

    def figures(self, rows: Mapping[str, Sequence[Tensor]], ensemble: Tensor, targets: Tensor) -> dict[str, Figure]:
        """How well confidences and accuracies agree."""
        bins = {name: _bins(outputs, targets) for name, outputs in rows.items()}
        return {"reliability.png": reliability_diagram(bins, {"ensemble": _bins([ensemble], targets)})}

    def _output_kind(self, output: Tensor) -> Output:
        return Categorical(output.shape[1])


class Regression(Task):
    """A Gaussian's parameters ``(N, 2 d)`` and targets ``(N, d)``."""

    headline = Column("test_mae", "MAE")
    quantity = "mean absolute error"
    columns = (
        Column("rmse", "RMSE"),
        Column("nll", "NLL"),
        Column("calibration_error", "calib. %", 100, 1),
        Column("teacher_kl", "KL ens."),
    )
    monitor = "val/mae"
    mode = "min"
    module = RegressionModule
    legend = f"""\
MAE: mean absolute error on the test images, in the targets' unit, with the weights after the last epoch, which all
columns but the next describe; sel.: with the weights of the epoch that was best on the validation images
RMSE: root of the mean square error; NLL: mean negative log-likelihood (nats)
calib.: mean distance between level and coverage of nine central predicted intervals
KL ens.: mean divergence from the ensemble (nats)
gap: how much of the way from the student alone (mean over its seeds) to the ensemble is closed
{_TIMES}"""

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


def task_of(num_classes: int | None) -> Task:
    """The task of data with so many classes; ``None``: a regression's."""
    return Regression() if num_classes is None else Classification()


def _bins(outputs: Sequence[Tensor], targets: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, mean confidences and accuracies by confidence, over the logits of several runs."""
    confidence, predicted = F.softmax(torch.cat(list(outputs)), dim=-1).max(dim=-1)
    correct = predicted == targets.repeat(len(outputs))
    counts, confidences, hits = functional.calibration_bins(confidence, correct, bins=ECE_BINS)
    return counts.numpy(), confidences.numpy(), hits.numpy()
