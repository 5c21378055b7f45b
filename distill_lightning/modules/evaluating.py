"""How every student is evaluated, and how it is compared with its teachers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.modules.frozen import FrozenPartsModule
from distill_lightning.outputs.metrics import default_metrics, teacher_metrics
from distill_lightning.processes import is_alone
from distill_lightning.teachers.cache import TeacherAnswers


class EvaluatedModule(FrozenPartsModule):
    """A student whose metrics are logged under ``val/`` and ``test/``; base of `DistillationModule`.

    Attributes:
        per_position: whether the method takes a classifier's output for each position, ``(N, T, K)``, with targets
            ``(N, T)``; the metrics then count positions.
    """

    per_position: ClassVar[bool] = False
    num_classes: int | None
    num_targets: int | None

    def make_metrics(self, metrics: MetricCollection | None) -> None:
        """Make the metrics of validation and test, and those beside the teachers; called once.

        Args:
            metrics: of the student's output and the target; ``None``: those of the task.
        """
        metrics = metrics or default_metrics(self.num_classes, self.num_targets)
        beside = teacher_metrics(self.num_classes)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.val_teacher_metrics = beside.clone(prefix="val/")
        self.test_teacher_metrics = beside.clone(prefix="test/")
        self._answers = TeacherAnswers()

    def forward(self, inputs: Tensor) -> Tensor:
        """The student's output for ``inputs``."""
        output: Tensor = self.student(inputs)
        return output

    def teacher_prediction(self, batch: Batch) -> Tensor | None:
        """The teachers' one prediction for a batch, which the student is compared with; ``None``: there is none."""
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the metrics under ``val/``; callbacks get the student's ``output`` and the ``target``."""
        return self._evaluate(self._checked(batch), batch_idx, self.val_metrics, self.val_teacher_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the metrics under ``test/``; callbacks get the student's ``output`` and the ``target``."""
        return self._evaluate(self._checked(batch), batch_idx, self.test_metrics, self.test_teacher_metrics)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """The student's output for a batch, or for a tensor of inputs."""
        if isinstance(batch, Tensor):
            return self.forward(batch)
        batch = Batch.of(batch)
        return self._counted(batch, self.forward(batch.input))

    def evaluated(self, output: Tensor) -> Tensor:
        """What the metrics read of the student's output: here, the output itself."""
        return output

    def _evaluate(
        self, batch: Batch, batch_idx: int, metrics: MetricCollection, beside: MetricCollection
    ) -> dict[str, Tensor]:
        output = self._counted(batch, self.evaluated(self.forward(batch.input)))
        counted, target = self._positions(output, self._counted(batch, batch.target))
        metrics.update(counted, target)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=batch.size)
        answer = self._answers.recall(beside, batch_idx, batch)
        if answer is None:
            answer = self.teacher_prediction(batch)
        if answer is not None:
            if self._teachers_stand_still():
                self._answers.keep(beside, batch_idx, batch, answer)
            beside.update(*self._positions(output, self._counted(batch, answer)))
            self.log_dict(beside, on_step=False, on_epoch=True, batch_size=batch.size)
        return {"output": counted, "target": target}

    @torch.no_grad()
    def score(self, batches: Iterable[Any]) -> dict[str, float]:
        """The student's metrics over some batches, by their bare names, logged nowhere.

        Args:
            batches: on the module's device, as for `validation_step`.
        """
        metrics = self.test_metrics.clone()
        training = self.training
        self.eval()
        for given in batches:
            batch = self._checked(given)
            output = self._counted(batch, self.evaluated(self.forward(batch.input)))
            metrics.update(*self._positions(output, self._counted(batch, batch.target)))
        self.train(training)
        return {name.removeprefix("test/"): float(value) for name, value in metrics.compute().items()}

    def _checked(self, batch: Any) -> Batch:
        """The batch, if its targets are of a kind that the method takes."""
        checked = Batch.of(batch)
        target = checked.target
        if self.num_classes is not None and not self.per_position and _are_classes_of_positions(target):
            raise InputError(
                f"{type(self).__name__} takes one class for each sample, and the targets have shape "
                f"{tuple(target.shape)}: SupervisedModule and KDModule take one for each position"
            )
        return checked

    def _positions(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return functional.by_position(output, target) if self.per_position else (output, target)

    def _teachers_stand_still(self) -> bool:
        """Whether what the teachers said holds for the whole ``fit``, about samples that their index tells apart."""
        # Two loaders may have other samples under the same indices.
        return "teachers" in self.frozen and len(self.trainer.num_val_batches) == 1

    @staticmethod
    def _counted(batch: Batch, values: Tensor) -> Tensor:
        """The rows of a batch, without the samples that are counted in another process."""
        # View -1 marks a sample that only fills up a process's share.
        return values if is_alone() or batch.view is None else values[batch.view >= 0]

    def on_fit_start(self) -> None:
        """What the teachers said before may have been about other data."""
        self._answers.forget()

    def on_fit_end(self) -> None:
        """What was kept is of no use any more."""
        self._answers.forget()

    def on_validation_start(self) -> None:
        """Within one ``fit`` the data stay the same; another call may bring others."""
        if self.trainer.state.fn != "fit":
            self._answers.forget()
        # `validate` leaves states that were made in inference mode, which `fit` must not change.
        self.val_metrics.reset()
        self.val_teacher_metrics.reset()

    def on_test_start(self) -> None:
        """Another call may bring other data."""
        self._answers.forget()
        self.test_metrics.reset()
        self.test_teacher_metrics.reset()


def _are_classes_of_positions(target: Any) -> bool:
    return isinstance(target, Tensor) and target.ndim > 1 and not target.is_floating_point()
