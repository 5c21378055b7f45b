"""How good the teachers are, before a student spends hours on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, islice
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import MetricCollection

from distill_lightning.callbacks.figures import log_figure
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import TrainersBatches, step_precision, undrawn, validation_loaders
from distill_lightning.outputs import Output
from distill_lightning.plots import teacher_bars
from distill_lightning.teachers import Teachers


class TeacherReport(pl.Callback):
    """Runs every teacher, and the ensemble, over the validation data once before the training starts.

    A teacher that is little better than guessing is warned of: most often its images were normalised otherwise, its
    classes are in another order, or its weights were not loaded. Random numbers, modes and samplers are left as they
    were, so the training is the same with and without this callback.

    The metrics are those of the module's output over the same batches as validation's (``limit_val_batches`` holds),
    `outputs.metrics.classification_metrics` or `outputs.metrics.regression_metrics`; they are logged as
    ``teacher/<name>/<metric>``, the figure as ``teachers``. A single teacher has no ensemble. Several data loaders are
    reported each on its own, with names that end in ``/dataloader_idx_0`` and so on.

    Attributes:
        rows: a dict for each teacher: ``name`` (``teacher_0``, ... ``ensemble``) and the metrics as numbers; one for
            each of several data loaders, with its number as ``loader``.
        figure: `distill_lightning.plots.teacher_bars` of the rows of the first loader, in the first process; ``None``
            before.

    Args:
        near_chance: warn of a teacher whose accuracy is at most this many times that of guessing, ``1 / K``.

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
        measured = _measured(trainer, pl_module)
        # Every process takes part here.
        reports = [[_row(name, metrics) for name, metrics in of_loader.items()] for of_loader in measured]
        several = len(reports) > 1
        self.rows = [
            {**row, **({"loader": number} if several else {})} for number, rows in enumerate(reports) for row in rows
        ]
        if not trainer.is_global_zero:
            return
        logs: dict[str, float] = {}
        figures = {}
        for number, rows in enumerate(reports):
            suffix = f"/dataloader_idx_{number}" if several else ""
            self._warn(rows, classes, f" of loader {number}" if several else "")
            figures[f"teachers{suffix}"] = teacher_bars(rows, chance=None if classes is None else 1 / classes)
            logs |= {
                f"teacher/{row['name']}/{metric}{suffix}": value
                for row in rows
                for metric, value in row.items()
                if metric != "name"
            }
        for logger in trainer.loggers:
            logger.log_metrics(logs, step=trainer.global_step)
        for name, figure in figures.items():
            log_figure(trainer, name, figure, trainer.global_step)
        self.figure = next(iter(figures.values()))

    def _warn(self, rows: Sequence[Mapping[str, Any]], classes: int | None, of: str) -> None:
        for row in rows:
            if classes is not None and row["name"] != "ensemble" and row["accuracy"] <= self.near_chance / classes:
                warnings.warn(
                    f"{row['name']} has an accuracy of {row['accuracy']:.3f} on the validation data{of}, little better "
                    f"than guessing among {classes} classes: check its weights, the order of its classes and the "
                    "normalisation of its inputs",
                    stacklevel=3,
                )


def _row(name: str, metrics: MetricCollection) -> dict[str, Any]:
    return {"name": name, **{metric: float(value) for metric, value in metrics.compute().items()}}


def _measured(trainer: pl.Trainer, pl_module: Any) -> list[dict[str, MetricCollection]]:
    """Of each loader, the metrics of each teacher and, if there are several, of the ensemble, by name."""
    if not hasattr(pl_module, "teacher_predictions") or not isinstance(getattr(pl_module, "output", None), Output):
        raise _without_teachers(pl_module)
    output: Output = pl_module.output
    measured: list[dict[str, MetricCollection]] = []
    teachers = getattr(pl_module, "teachers", None)
    ensemble = teachers.ensemble if isinstance(teachers, Teachers) else None
    with _validating(trainer, pl_module) as loaders, nullcontext() if ensemble is None else ensemble.remembering():
        for batches in loaders:
            measured.append({})
            for batch in batches:
                for name, prediction in _predictions(pl_module, batch):
                    metrics = measured[-1].setdefault(name, output.metrics().to(pl_module.device))
                    metrics.update(*output.select(prediction, batch.target, output.counted(prediction, batch)))
    return measured


def _predictions(pl_module: Any, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Each teacher's and, if there are several, the ensemble's, by name."""
    each = pl_module.teacher_predictions(batch)
    yield from ((f"teacher_{number}", one) for number, one in enumerate(each))
    if len(each) != 1:
        ensemble = pl_module.teacher_prediction(batch)
        if ensemble is None:
            raise _without_teachers(pl_module)
        yield "ensemble", ensemble


def _without_teachers(pl_module: pl.LightningModule) -> InputError:
    return InputError(f"TeacherReport: {type(pl_module).__name__} has no teachers to report on: leave the callback out")


@contextmanager
def _validating(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[list[Iterable[Batch]]]:
    """Each loader's batches of validation; afterwards modes, random numbers and the Trainer's stage are as before."""
    frozen = [network for one in getattr(pl_module, "frozen", {}).values() for network in one.networks]
    with ExitStack() as stack:
        for module in chain.from_iterable(network.modules() for network in (pl_module, *frozen)):
            stack.callback(setattr, module, "training", module.training)
        # The stage that the data see when they are asked for loaders.
        stack.callback(setattr, trainer, "training", True)  # noqa: FBT003
        trainer.validating = True
        stack.enter_context(isolate_rng())
        loaders = _loaders(trainer)
        for loader in loaders:
            stack.enter_context(undrawn(loader))
        stack.enter_context(torch.no_grad())
        stack.enter_context(step_precision(trainer))
        for network in (pl_module, *frozen):
            network.eval()
        yield [
            islice(
                TrainersBatches(trainer, pl_module, loader, number=number, training=False),
                None if math.isinf(limit) else int(limit),
            )
            for number, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True))
        ]


def _loaders(trainer: pl.Trainer) -> list[Any]:
    found = _flat(validation_loaders(trainer))
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
