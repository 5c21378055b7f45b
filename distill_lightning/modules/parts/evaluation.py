"""How a student is evaluated, and compared with its teachers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill_lightning.data.batch import Batch, spread
from distill_lightning.functional.common import wide
from distill_lightning.layers import eval_mode
from distill_lightning.layers.call import call
from distill_lightning.lightning_internals import forget_known_metrics, repeated_rows
from distill_lightning.part import Part
from distill_lightning.teachers import Frozen
from distill_lightning.teachers.layer_errors import explained

_STAGES = {"val": "validation", "test": "test"}


class _Answer(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    view: Tensor
    prediction: Tensor


def metrics_of(module: Any, name: str, dataloader_idx: int) -> Any:
    """The metrics of one of several data loaders.

    Args:
        module: a LightningModule.
        name: of its attribute, a `MetricCollection` or an ``nn.ModuleList`` of them, which are the first loader's;
            every other loader gets copies of its own, as submodules.
        dataloader_idx: number of the loader.
    """
    own = _name_of(name, dataloader_idx)
    if not hasattr(module, own):
        setattr(module, own, _fresh(getattr(module, name)))
        forget_known_metrics(module)
    return getattr(module, own)


def reset_metrics(module: Any, *names: str) -> None:
    """Forget what metrics have counted, those of every loader."""
    for name in names:
        loader = 0
        while hasattr(module, _name_of(name, loader)):
            getattr(module, _name_of(name, loader)).reset()
            loader += 1


def _name_of(name: str, dataloader_idx: int) -> str:
    return f"{name}_{dataloader_idx}" if dataloader_idx else name


def _fresh(metrics: Any) -> Any:
    if isinstance(metrics, nn.ModuleList):
        return nn.ModuleList(_fresh(each) for each in metrics)
    copy = metrics.clone()
    copy.reset()
    return copy


class Evaluation(Part):
    """Adds batches to a module's metrics and logs them under ``val/`` and ``test/``.

    Several loaders are counted each on their own, and logged as Lightning does, ``val/nll/dataloader_idx_0``.

    The metrics are the module's own submodules, ``val_metrics`` and so on, so that they move with it. What the teachers
    predict for a validation batch is kept for the rest of the ``fit`` where its samples can be recognised by index and
    view, and the module's ``teachers`` are frozen networks, which say the same again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], _Answer] = {}
        # Whether the comparison with the teachers was logged for the current loader.
        self._compared = False

    def update(
        self, module: Any, batch: Batch, batch_idx: int, stage: str, *, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Add a batch to the metrics of a stage, ``"val"`` or ``"test"``, and of one of its loaders.

        What a distributed sampler has repeated, so that all processes have equally many samples, does not count.

        Returns:
            The student's ``output`` and the ``target`` as the metrics got them, for callbacks.
        """
        metrics = metrics_of(module, f"{stage}_metrics", dataloader_idx)
        teacher_metrics = metrics_of(module, f"{stage}_teacher_metrics", dataloader_idx)
        batch, where = self.looked_at(module, batch, batch_idx, stage, dataloader_idx=dataloader_idx)
        output = explained(module, lambda one: call(module, one.input), batch, where)
        if batch_idx == 0:
            module.check_output("student", module.student, output.shape)
        output = module.output.prediction(module.guard.laid_out(module, output))
        counted = module.output.counted(output, batch)
        selected, target = module.output.select(output, batch.target, counted)
        module.guard.look_at_output(module, selected, batch_idx, stage)
        # Metrics of other packages sum in the type that they are given.
        metrics.update(wide(selected), target)
        # Lightning computes a metric at the end of the epoch, however often it was logged, and a `log` takes longer
        # than a small network. Every loader begins with batch 0.
        if batch_idx == 0:
            self._compared = False
            module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=batch.size)
        answer = self._recalled(stage, batch_idx, batch)
        if answer is None:
            answer = explained(module, module.teacher_prediction, batch, where)
            if answer is not None and self._comes_again(module, stage):
                self._keep(stage, batch_idx, batch, answer)
        if answer is not None:
            teacher_metrics.update(*module.output.select(output, answer, counted))
            if not self._compared:
                self._compared = True
                module.log_dict(teacher_metrics, on_step=False, on_epoch=True, batch_size=batch.size)
        return {"output": selected, "target": target}

    @staticmethod
    def looked_at(
        module: Any, batch: Batch, batch_idx: int, stage: str, *, dataloader_idx: int = 0
    ) -> tuple[Batch, str]:
        """A batch in which what a distributed sampler has repeated does not count, and its name in messages."""
        batch = without_repeated(module, batch, batch_idx, dataloader_idx)
        module.guard.look(module, batch, batch_idx, stage)
        return batch, f"{_STAGES[stage]} batch {batch_idx}"

    @torch.no_grad()
    def score(self, module: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The student's metrics over some batches, by their bare names, logged nowhere."""
        metrics = module.test_metrics.clone()
        with eval_mode(module):
            for batch in batches:
                output = module.output.prediction(module.guard.laid_out(module, call(module, batch.input)))
                counted = module.output.counted(output, batch)
                selected, target = module.output.select(output, batch.target, counted)
                metrics.update(wide(selected), target)
        return {name.removeprefix("test/"): float(value) for name, value in metrics.compute().items()}

    def fit_starts(self, module: Any) -> None:
        """What the teachers said before may have been about other data."""
        self._known.clear()

    def fit_ends(self, module: Any) -> None:
        """What was kept is of no use any more."""
        self._known.clear()

    def validation_starts(self, module: Any) -> None:
        """Within one ``fit`` the data stay the same; another call may bring others."""
        if module.trainer.state.fn != "fit":
            self._known.clear()
        # `validate` leaves states that were made in inference mode, which `fit` must not change.
        reset_metrics(module, "val_metrics", "val_teacher_metrics")

    def test_starts(self, module: Any) -> None:
        """Another call may bring other data."""
        self._known.clear()
        reset_metrics(module, "test_metrics", "test_teacher_metrics")

    @staticmethod
    def _comes_again(module: Any, stage: str) -> bool:
        """Whether the next epoch validates on the same batches, and frozen networks are asked again."""
        # A base class's `Teachers` holds nobody where a subclass answers by other networks, which may change.
        is_frozen = isinstance(module.teachers, Frozen) and len(module.teachers) > 0
        if stage != "val" or module.trainer.state.fn != "fit" or not is_frozen:
            return False
        # Several loaders may have other samples under the same indices.
        return len(module.trainer.num_val_batches) == 1

    def _keep(self, stage: str, number: int, batch: Batch, prediction: Tensor) -> None:
        if batch.key is not None and batch.key.view is not None:
            self._known[stage, number] = _Answer(batch.key.index, batch.key.view, prediction)

    def _recalled(self, stage: str, number: int, batch: Batch) -> Tensor | None:
        answer = self._known.get((stage, number))
        if answer is None or batch.key is None or batch.key.view is None:
            return None
        same = torch.equal(answer.index, batch.key.index) and torch.equal(answer.view, batch.key.view)
        return answer.prediction if same else None


def without_repeated(module: Any, batch: Batch, batch_idx: int, dataloader_idx: int) -> Batch:
    """The batch of an evaluation in which what a distributed sampler has repeated does not count."""
    repeated = repeated_rows(module, batch_idx, dataloader_idx, batch.size)
    if repeated is None:
        return batch
    kept = ~repeated.to(batch.device)
    counted = kept if batch.counted is None else batch.counted & spread(kept, batch.counted)
    return batch.replace(counted=counted, is_checked=batch.is_checked)
