"""Callbacks that draw figures in validation and test, and a function that logs a figure with any logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
from matplotlib.figure import Figure
from torch import Tensor

from distill_lightning import functional
from distill_lightning.callbacks.loggers import Take, folder_of, hand_over
from distill_lightning.errors import InputError
from distill_lightning.outputs.metrics import Confidences
from distill_lightning.plots import reliability_diagram, risk_coverage_curve
from distill_lightning.storage import whole_file


def _save(logger: Any, name: str, figure: Figure, step: int) -> None:
    folder = folder_of(logger, "figures", name)
    if folder is not None:
        with whole_file(folder / _file_name(name, step)) as partial:
            figure.savefig(partial, dpi=150)


def _file_name(name: str, step: int) -> str:
    return f"{name.replace('/', '_')}_{step}.png"


_TAKES: dict[str, Take] = {
    "TensorBoardLogger": lambda logger, name, figure, step: logger.experiment.add_figure(
        name, figure, global_step=step, close=False
    ),
    "WandbLogger": lambda logger, name, figure, step: logger.log_image(key=name, images=[figure], step=step),
    "MLFlowLogger": lambda logger, name, figure, step: logger.experiment.log_figure(
        logger.run_id, figure, f"figures/{_file_name(name, step)}"
    ),
    "CometLogger": lambda logger, name, figure, step: logger.experiment.log_figure(
        figure_name=name, figure=figure, step=step
    ),
    "NeptuneLogger": lambda logger, name, figure, step: logger.experiment[name].append(figure, step=step),
    "Logger": _save,
}


def log_figure(trainer: pl.Trainer, name: str, figure: Figure, step: int) -> None:
    """Log a figure with every logger of a Trainer; only the first process does anything, and only if there are loggers.

    TensorBoard, Weights & Biases, MLflow, Comet and Neptune receive the figure. For any other logger, such as
    `CSVLogger`, the file ``figures/<name>_<step>.png`` is written to its folder.

    Args:
        trainer: the Trainer with the loggers.
        name: the figure's name in the logger, such as ``val/reliability``.
        figure: the figure.
        step: the training step it belongs to.
    """
    hand_over(trainer, _TAKES, name, figure, step)


class ConfidenceFigure(pl.Callback):
    """Base class of figures of a classifier's confidences, drawn at the end of every validation and test.

    It uses what the module's ``validation_step`` and ``test_step`` return. The figure shows the samples of all
    processes; the first one draws and logs it (`log_figure`). Several data loaders have a figure each, which is logged
    under the name that their metrics have, ``val/reliability/dataloader_idx_0`` and so on.

    Attributes:
        figure: the latest figure, of the first loader, which a notebook shows; ``None`` before.
        figures: the latest figures of all loaders, in their order.

    Args:
        stages: ``"val"``, ``"test"`` or both.

    Raises:
        InputError: an unknown stage; later, a module that does not classify.
    """

    title: ClassVar[str]

    def __init__(self, *, stages: Sequence[Literal["val", "test"]] = ("val", "test")) -> None:
        super().__init__()
        if isinstance(stages, str) or not set(stages) <= {"val", "test"} or not stages:
            raise InputError(f"stages must be a list of 'val' and 'test', got {stages!r}")
        self.stages = tuple(stages)
        self.figure: Figure | None = None
        self.figures: list[Figure] = []
        # Of each loader.
        self._seen: list[Confidences] = []

    def draw(self, stage: str, confidence: Tensor, correct: Tensor) -> Figure:
        """Draw the figure of a stage from confidences and correctness, float32 ``(N,)`` on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(stage, confidence, correct)")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear what was kept from the last epoch."""
        self._begin(pl_module, trainer.num_val_batches)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear what was kept from the last epoch."""
        self._begin(pl_module, trainer.num_test_batches)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *place: Any
    ) -> None:
        """Keep what the figure needs from a batch."""
        self._add("val", pl_module, outputs, place)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *place: Any) -> None:
        """Keep what the figure needs from a batch."""
        self._add("test", pl_module, outputs, place)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw and log the figure, except in the sanity check."""
        if not trainer.sanity_checking:
            self._end("val", trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self._end("test", trainer)

    def _begin(self, pl_module: pl.LightningModule, loaders: Sequence[Any]) -> None:
        self._seen = [Confidences().to(pl_module.device) for _ in loaders]

    def _add(self, stage: str, pl_module: pl.LightningModule, outputs: Any, place: Sequence[Any]) -> None:
        if stage in self.stages:
            step = "test_step" if stage == "test" else "validation_step"
            # The batch, its number and, where there are several, the number of its loader.
            loader = place[2] if len(place) > 2 else 0
            self._seen[loader].update(*_logits_and_classes(self, step, pl_module, outputs))

    def _end(self, stage: str, trainer: pl.Trainer) -> None:
        if stage not in self.stages:
            return
        # Every process takes part here. torchmetrics drops the dimension of a single sample.
        found = [[part.reshape(-1).cpu() for part in seen.compute()] for seen in self._seen]
        self._seen = []
        if not trainer.is_global_zero:
            return
        drawn = {n: self.draw(stage, *numbers) for n, numbers in enumerate(found) if len(numbers[0])}
        for loader, figure in drawn.items():
            suffix = f"/dataloader_idx_{loader}" if len(found) > 1 else ""
            log_figure(trainer, f"{stage}/{self.title}{suffix}", figure, trainer.global_step)
        if drawn:
            self.figures = list(drawn.values())
            self.figure = self.figures[0]


class ReliabilityDiagram(ConfidenceFigure):
    """The reliability diagram, accuracy by confidence, logged as ``val/reliability`` and ``test/reliability``.

    Bins with fewer than 10 samples are not drawn. `distill_lightning.plots.reliability_diagram` draws it.

    Attributes:
        figure: the latest figure, which a notebook shows; ``None`` before.

    Args:
        stages: ``"val"``, ``"test"`` or both.
        bins: number of equally wide bins.

    Raises:
        InputError: an unknown stage, or no bins; later, a module that does not classify.
    """

    title = "reliability"

    def __init__(self, *, stages: Sequence[Literal["val", "test"]] = ("val", "test"), bins: int = 15) -> None:
        super().__init__(stages=stages)
        if bins < 1:
            raise InputError(f"bins must be at least 1, got {bins}")
        self.bins = bins

    def draw(self, stage: str, confidence: Tensor, correct: Tensor) -> Figure:
        """The diagram."""
        counts, confidences, hits = functional.calibration_bins(confidence, correct, bins=self.bins)
        return reliability_diagram({stage: (counts.numpy(), confidences.numpy(), hits.numpy())})


class RiskCoverage(ConfidenceFigure):
    """The risk-coverage curve, logged as ``val/risk_coverage`` and ``test/risk_coverage``.

    `distill_lightning.plots.risk_coverage_curve` draws it, together with the best order of the same answers.

    Attributes:
        figure: the latest figure, which a notebook shows; ``None`` before.

    Args:
        stages: ``"val"``, ``"test"`` or both.

    Raises:
        InputError: an unknown stage; later, a module that does not classify.
    """

    title = "risk_coverage"

    def draw(self, stage: str, confidence: Tensor, correct: Tensor) -> Figure:
        """The curve."""
        coverage, risk = functional.risk_coverage(confidence, correct)
        return risk_coverage_curve({stage: (coverage.double().numpy(), risk.double().numpy())})


def _logits_and_classes(
    callback: ConfidenceFigure, step: str, pl_module: pl.LightningModule, outputs: Any
) -> tuple[Tensor, Tensor]:
    who = f"{type(callback).__name__}: {type(pl_module).__name__}.{step}"
    if not isinstance(outputs, dict) or not {"output", "target"} <= outputs.keys():
        raise InputError(f"{who} must return {{'output': logits (N, K), 'target': classes (N,)}}")
    output, target = outputs["output"], outputs["target"]
    if output.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        raise InputError(
            f"{who} returns an output {tuple(output.shape)} and a {target.dtype} target {tuple(target.shape)}, where "
            "logits (N, K) and classes (N,) are needed: leave the callback out where there are no classes"
        )
    return output, target
