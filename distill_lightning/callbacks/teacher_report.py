"""How good the teachers are, before a student spends hours on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.lightning_internals import TrainersBatches, undrawn
from distill_lightning.callbacks.figures import log_figure
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.outputs.metrics import classification_metrics, regression_metrics
from distill_lightning.plots import teacher_bars


class TeacherReport(pl.Callback):
    """Runs every teacher, and the ensemble, over the validation data once before the training starts.

    A teacher that is little better than guessing is warned of: most often its images were normalised otherwise, its
    classes are in another order, or its weights were not loaded. Random numbers, modes and samplers are left as they
    were, so the training is the same with and without this callback.

    The metrics are `distill_lightning.outputs.metrics.classification_metrics` over the same batches as validation's
    (``limit_val_batches`` holds), in regression `distill_lightning.outputs.metrics.regression_metrics`; they are logged as
    ``teacher/<name>/<metric>``, the figure as ``teachers``. A single teacher has no ensemble.

    Attributes:
        rows: a dict for each teacher: ``name`` (``teacher_0``, ... ``ensemble``) and the metrics as numbers.
        figure: `distill_lightning.plots.teacher_bars` of the rows, in the first process; ``None`` before.

    Args:
        near_chance: a teacher is warned of whose accuracy is at most this many times that of guessing, ``1 / K``.

    Raises:
        InputError: when the training starts: the module has no teachers, or there are no validation data.
    """

    def __init__(self, *, near_chance: float = 1.5) -> None:
        super().__init__()
        self.near_chance = near_chance
        self.rows: list[dict[str, Any]] = []
        self.figure: Figure | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report; the data are set up by now."""
        classes = getattr(pl_module, "num_classes", None)
        measured = _classifiers(trainer, pl_module) if classes is not None else _regression(trainer, pl_module)
        # Every process takes part here.
        self.rows = [
            {"name": name, **{metric: float(value) for metric, value in metrics.compute().items()}}
            for name, metrics in measured.items()
        ]
        if not trainer.is_global_zero:
            return
        self.figure = teacher_bars(self.rows, chance=None if classes is None else 1 / classes)
        for row in self.rows:
            if classes is not None and row["name"] != "ensemble" and row["accuracy"] <= self.near_chance / classes:
                warnings.warn(
                    f"{row['name']} has an accuracy of {row['accuracy']:.3f} on the validation data, little better "
                    f"than guessing among {classes} classes: check its weights, the order of its classes and the "
                    "normalisation of its inputs",
                    stacklevel=2,
                )
        logs = {
            f"teacher/{row['name']}/{metric}": value
            for row in self.rows
            for metric, value in row.items()
            if metric != "name"
        }
        for logger in trainer.loggers:
            logger.log_metrics(logs, step=trainer.global_step)
        log_figure(trainer, "teachers", self.figure, trainer.global_step)


def _classifiers(trainer: pl.Trainer, pl_module: Any) -> dict[str, MetricCollection]:
    teachers = getattr(pl_module, "teachers", None)
    if not isinstance(teachers, Iterable) or not hasattr(teachers, "combined"):
        raise _without_teachers(pl_module)
    networks: list[nn.Module] = list(teachers)
    names = [f"teacher_{number}" for number in range(len(networks))] + ["ensemble"] * (len(networks) > 1)
    measured = {name: classification_metrics(pl_module.num_classes).to(pl_module.device) for name in names}
    with _validating(trainer, pl_module) as batches:
        for batch in batches:
            logits = torch.stack([network(batch.input) for network in networks])
            # A probability that underflowed to zero would be an infinite logit.
            ensemble = teachers.combined(logits).float().clamp_min(torch.finfo(torch.float32).tiny).log()
            for metrics, output in zip(measured.values(), [*logits, ensemble], strict=False):
                counted, target = _counted(batch, output), _counted(batch, batch.target)
                metrics.update(*functional.by_position(counted, target))
    return measured


def _regression(trainer: pl.Trainer, pl_module: Any) -> dict[str, MetricCollection]:
    measured: dict[str, MetricCollection] = {}
    if getattr(pl_module, "num_targets", None) is None or not hasattr(pl_module, "teacher_predictions"):
        raise _without_teachers(pl_module)
    with _validating(trainer, pl_module) as batches:
        for batch in batches:
            each = {f"teacher_{number}": one for number, one in enumerate(pl_module.teacher_predictions(batch))}
            predictions = each if len(each) == 1 else each | {"ensemble": pl_module.teacher_prediction(batch)}
            for name, prediction in predictions.items():
                if prediction is None:
                    raise _without_teachers(pl_module)
                metrics = measured.setdefault(name, regression_metrics(pl_module.num_targets).to(pl_module.device))
                metrics.update(_counted(batch, prediction), _counted(batch, batch.target))
    return measured


def _without_teachers(pl_module: pl.LightningModule) -> InputError:
    return InputError(f"TeacherReport: {type(pl_module).__name__} has no teachers to report on: leave the callback out")


@contextmanager
def _validating(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Iterator[Batch]]:
    """The batches of validation; afterwards modes, random numbers and the Trainer's stage are as they were."""
    with ExitStack() as stack:
        for module in pl_module.modules():
            stack.callback(setattr, module, "training", module.training)
        # The stage that the data see when they are asked for loaders.
        stack.callback(setattr, trainer, "training", True)  # noqa: FBT003
        trainer.validating = True
        stack.enter_context(isolate_rng())
        loaders = _loaders(trainer)
        for loader in loaders:
            stack.enter_context(undrawn(loader))
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.val_step_context())
        pl_module.eval()
        yield chain.from_iterable(
            islice(
                TrainersBatches(trainer, pl_module, loader, number=number, training=False),
                None if math.isinf(limit) else int(limit),
            )
            for number, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True))
        )


def _loaders(trainer: pl.Trainer) -> list[Any]:
    if trainer.val_dataloaders is None:
        # Without a sanity check, and before an epoch without validation, the Trainer has not asked for them yet.
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    found = _flat(trainer.val_dataloaders)
    if not found:
        raise InputError(
            "TeacherReport runs the teachers over the validation data, and there are none: give the data module a "
            "val_dataloader and the Trainer a limit_val_batches above 0, or leave the callback out"
        )
    return found


def _flat(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [loader for part in loaders for loader in _flat(part)]
    return [loaders]


def _counted(batch: Batch, values: Tensor) -> Tensor:
    # View -1 marks a sample that only fills up a process's share.
    return values if batch.view is None else values[batch.view >= 0]
