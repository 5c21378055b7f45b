"""The guard and the evaluation of what predicts boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_lightning.data.batch import Batch, first_tensor
from distill_lightning.errors import InputError, NonFiniteError
from distill_lightning.layers import eval_mode
from distill_lightning.lightning_internals import suffix_of_loader
from distill_lightning.modules.parts.evaluation import Evaluation, metrics_of
from distill_lightning.modules.parts.guard import FIRST, STAGES, WAY_OUT, Guard, named
from distill_lightning.outputs.metrics import COCOAveragePrecision
from distill_lightning.outputs.metrics.detection import check_class_names, coco_backend
from distill_lightning.teachers.layer_errors import explained

Detections = list[dict[str, Tensor]]
"""What a detector returns of each image: ``boxes``, ``scores`` and ``labels``."""


def counted(batch: Batch, of_each: Sequence[Any]) -> list[Any]:
    """What belongs to the images of a batch that count.

    Args:
        batch: of ``N`` images.
        of_each: ``N`` of anything.
    """
    if batch.counted is None:
        return list(of_each)
    return [one for one, counts in zip(of_each, batch.counted.tolist(), strict=True) if counts]


class DetectionGuard(Guard):
    """A `Guard` that looks at boxes and their classes, before the detector stumbles over them."""

    def look(self, module: Any, batch: Any, number: int, stage: str) -> None:
        """Look at the boxes of a batch that is on the module's device.

        Args:
            module: whose ``num_classes`` tells which classes there are.
            batch: of any data module.
            number: of the batch in its epoch.
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            InputError: boxes or classes that cannot be right, and the message names the image; or images of bytes.
        """
        ready = module.read_batch(batch)
        check_images(module, ready, f"{STAGES[stage]} batch {number}")
        if ready.target is None or not _is_read(first_tensor(ready.input), number):
            return
        for row, (image, target) in enumerate(zip(ready.input, ready.target, strict=True)):
            if wrong := _wrong(target, module.num_classes, image):
                which = int(target["image_id"]) if "image_id" in target else named(ready, [row])
                raise InputError(
                    f"{type(module).__name__}: image {which} in {STAGES[stage]} batch {number} has {wrong}"
                )

    def look_at_output(self, module: Any, output: Any, number: int, stage: str) -> None:
        """Look at what a detector found in an evaluation.

        Raises:
            NonFiniteError: it is not finite.
        """
        values = [value for found in output for value in (found["boxes"], found["scores"])]
        if not values or not _is_read(values[0], number):
            return
        if not all(value.isfinite().all() for value in values):
            raise NonFiniteError(
                f"{type(module).__name__}: the student ({type(module.student).__name__}) gives nan or inf in "
                f"{STAGES[stage]} batch {number}: {WAY_OUT}"
            )


def check_images(module: Any, batch: Batch, where: str) -> None:
    """Look at the type of the images.

    Args:
        module: that detects.
        batch: of images.
        where: the batch's name in the message.

    Raises:
        InputError: they are bytes, or so coarse that boxes of their type would not name single pixels.
    """
    kinds = {image.dtype for image in batch.input}
    who = f"{type(module).__name__}: the images in {where} are"
    if bytes_of := next((kind for kind in kinds if not kind.is_floating_point), None):
        raise InputError(
            f"{who} {bytes_of}, and a detector reads floats in [0, 1]: let the data module give "
            "v2.ToDtype(torch.float32, scale=True)"
        )
    if coarse := next((kind for kind in kinds if kind.itemsize < 4), None):
        raise InputError(
            f"{who} {coarse}, in which boxes, which are converted with them, are rounded by pixels: train with "
            "precision='16-mixed' or 'bf16-mixed'"
        )


class DetectionEvaluation(Evaluation):
    """Adds the images of a batch to a module's metrics, which are computed and logged once all are there.

    One computation gives many of them, the mean average precision of each class for example.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaders: dict[str, set[int]] = {}

    def update(  # type: ignore[override]  # of each image
        self, module: Any, batch: Batch, batch_idx: int, stage: str, *, dataloader_idx: int = 0
    ) -> dict[str, Detections]:
        """Add a batch to the metrics of a stage, ``"val"`` or ``"test"``, and of one of its loaders.

        Returns:
            The student's ``output`` and the ``target`` of each image that counts, for callbacks.
        """
        batch, where = self.looked_at(module, batch, batch_idx, stage, dataloader_idx=dataloader_idx)
        output = counted(batch, explained(module, lambda one: module.student(one.input), batch, where))
        target = counted(batch, batch.target)
        module.guard.look_at_output(module, output, batch_idx, stage)
        metrics_of(module, f"{stage}_metrics", dataloader_idx).update(output, target)
        self._loaders.setdefault(stage, set()).add(dataloader_idx)
        return {"output": output, "target": target}

    def log(self, module: Any, stage: str) -> None:
        """Log the metrics of a stage whose batches have all been added."""
        loaders = sorted(self._loaders.pop(stage, ()))
        for loader in loaders:
            metrics = metrics_of(module, f"{stage}_metrics", loader)
            _name_classes(module, metrics)
            suffix = suffix_of_loader(loader) if len(loaders) > 1 else ""
            values = {f"{name}{suffix}": value for name, value in _scalars(metrics.compute()).items()}
            # All processes have computed the same; Lightning warns where it is not told to make sure.
            module.log_dict(values, sync_dist=True, add_dataloader_idx=False)

    @torch.no_grad()
    def score(self, module: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """The student's metrics over some batches, by their bare names, logged nowhere."""
        metrics = module.test_metrics.clone()
        metrics.reset()
        with eval_mode(module):
            for batch in batches:
                metrics.update(counted(batch, module.student(batch.input)), counted(batch, batch.target))
        return {name.removeprefix("test/"): float(value) for name, value in _scalars(metrics.compute()).items()}

    def fit_starts(self, module: Any) -> None:
        """Make sure that a validation can be computed, before an epoch is trained."""
        super().fit_starts(module)
        if module.trainer.enable_validation:
            _prepare(module, module.val_metrics)

    def validation_starts(self, module: Any) -> None:
        """Forget what an interrupted validation has left."""
        super().validation_starts(module)
        _prepare(module, module.val_metrics)
        self._loaders.pop("val", None)

    def test_starts(self, module: Any) -> None:
        """Forget what an interrupted test has left."""
        super().test_starts(module)
        _prepare(module, module.test_metrics)
        self._loaders.pop("test", None)


def _scalars(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What can be logged: torchmetrics' own metrics of boxes return rows of numbers, too."""
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and value.numel() == 1}


def _prepare(module: Any, metrics: Any) -> None:
    """Refuse before the first image what would be refused after the last."""
    if any(isinstance(metric, COCOAveragePrecision) for metric in metrics.values()):
        coco_backend()
    _name_classes(module, metrics)


def _name_classes(module: Any, metrics: Any) -> None:
    """Give classes without names those of the data module."""
    names = getattr(getattr(module.trainer, "datamodule", None), "class_names", None)
    for metric in metrics.values():
        is_nameless = isinstance(metric, COCOAveragePrecision) and metric.class_names is None
        if is_nameless and names is not None and len(names) == metric.num_classes:
            check_class_names(metric.num_classes, names)
            metric.class_names = tuple(names)


def _is_read(tensor: Tensor, number: int) -> bool:
    """Whether a batch is looked at: each on the CPU, elsewhere an epoch's first ones, because that waits."""
    return tensor.device.type == "cpu" or number < FIRST


def _wrong(target: Mapping[str, Tensor], num_classes: int, image: Tensor) -> str:
    """What is wrong with the boxes of an image, and what to do; nothing if all is well."""
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        return (
            f"boxes of {str(boxes.dtype).removeprefix('torch.')} {tuple(boxes.shape)}: give floats (M, 4), left, top, "
            "right and bottom"
        )
    if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
        return f"labels of {str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}: give int64 ({len(boxes)},)"
    unknown = (labels < 1) | (labels > num_classes)
    if unknown.any():
        return (
            f"an object of class {int(labels[unknown][0])}, and classes go from 1 to {num_classes} (0 is the "
            "background): mend the data module, or set num_classes"
        )
    empty = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1) | ~boxes.isfinite().all(dim=1)
    if empty.any():
        return f"the box {boxes[empty][0].tolist()}, which has no area: leave it out of the data"
    height, width = image.shape[1:]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    outside = ((middle < 0) | (middle > middle.new_tensor([width, height]))).any(dim=1)
    if outside.any():
        return (
            f"the box {boxes[outside][0].tolist()}, whose centre is outside of its {width}x{height} pixels: resize "
            "and crop boxes with their image"
        )
    return ""
