"""Plain training of detectors: the row that others are compared with, and how a backbone of Self-KD is used."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distill_lightning.data.batch import Batch
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.errors import InputError
from distill_lightning.modules.base import DistillationModule
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.boxes import DetectionEvaluation, DetectionGuard, Detections, check_images, counted
from distill_lightning.outputs import Boxes
from distill_lightning.teachers.layer_errors import explained


class DetectionModule(DistillationModule):
    """A detector of torchvision, trained the ordinary way: the sum of its own losses, each with weight 1.

    They are logged by the detector's own names, ``train/classifier``, ``train/box_reg``, ``train/objectness`` and
    ``train/rpn_box_reg`` of a Faster R-CNN. Batches are `DetectionBatch` objects, or tuples of images and targets as
    torchvision's reference code collates them. Any network will do that is called like torchvision's detectors, with
    images and targets, and returns a dict of losses in train mode, and boxes, scores and labels in eval mode.

    Logged under ``val/`` and ``test/``: ``map``, ``map_50``, ``voc07_map_50``, ``ece`` and ``map_class_<name>``, see
    `outputs.metrics.detection_metrics`. `torch.optim.lr_scheduler.ReduceLROnPlateau` watches ``val/map``.

    Boxes are numbers of pixels, so images are float32 or wider: with ``precision="16-mixed"`` or ``"bf16-mixed"``, not
    ``"16-true"`` or ``"bf16-true"``, a step computes in fewer bits.

    A detector waits for the device in each step, where it samples boxes: that is torchvision's own code.

    ::

        model:
          class_path: DetectionModule
          init_args:
            student:
              class_path: faster_rcnn
              init_args:
                backbone: {class_path: SmallResNet, init_args: {num_classes: 10}}
                num_classes: 20
                layers: [stage2, stage3]

    Args:
        student: a detector with ``num_classes + 1`` classes, of which class 0 is the background.
        num_classes: ``C``, without the background. Configurations take it from the data module; where that counts the
            background, as the 21 classes of lightning-bolts' ``VOCDetectionDataModule``, derive one whose
            ``num_classes`` is 20.
        class_names: of the classes from 1 on; ``None``: those of the data module, or their numbers.
        options: see `TrainingOptions`; ``transforms`` and ``input_shape`` are for other networks, and a detector whose
            shapes change with every batch is not compiled.

    Raises:
        InputError: an option that has no meaning here, the student is no detector or one of other classes, or the
            schedule waits for the mean average precision to fall.
    """

    evaluation: DetectionEvaluation

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        options.setdefault("output", None)
        self._refuse(options, class_names)
        options["output"] = options["output"] or Boxes(num_classes, class_names)
        super().__init__(student, num_classes=num_classes, **options)
        _check_detector(f"{type(self).__name__}: the student", student, num_classes)
        self.guard, self.evaluation = DetectionGuard(), DetectionEvaluation()
        self._names: list[str] = []

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """The detector's losses."""
        losses = self.student(batch.input, batch.target)
        if not isinstance(losses, dict):
            raise InputError(
                f"{type(self).__name__}: in train mode the student ({type(self.student).__name__}) returns "
                f"{type(losses).__name__} where torchvision's detectors return a dict of losses: give a detector"
            )
        terms = {name.removeprefix("loss_"): loss for name, loss in losses.items()}
        self._names = list(terms)
        return terms

    def weights(self) -> dict[str, float]:
        """One for each loss that the detector had in the last batch."""
        return dict.fromkeys(self._names, 1.0)

    def forward(self, images: Any) -> Detections:  # type: ignore[override]  # boxes are no tensor
        """What the student finds on a list of images ``(C, H, W)``, or on those of a batch, labelled or not."""
        found: Detections = self.student(self.read_batch(images).input)
        return found

    def read_batch(self, batch: Any) -> DetectionBatch:
        """The images and boxes of any data module."""
        return DetectionBatch.of(batch)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Detections:  # type: ignore[override]
        """Boxes, scores and labels of each image of a batch that counts, or of each in a list or tensor of images."""
        batch, where = self.read_batch(batch), f"prediction batch {batch_idx}"
        check_images(self, batch, where)
        return counted(batch, explained(self, lambda one: self(one.input), batch, where))

    def configure_optimizers(self) -> Any:
        """As of every method.

        Raises:
            InputError: `ReduceLROnPlateau` takes a rising precision for a plateau.
        """
        made = super().configure_optimizers()
        schedule = made["lr_scheduler"] if isinstance(made, dict) else None
        schedule = schedule.get("scheduler") if isinstance(schedule, dict) else schedule
        if isinstance(schedule, ReduceLROnPlateau) and schedule.mode == "min" and self.lr_scheduler is not None:
            raise InputError(
                f"{type(self).__name__}: ReduceLROnPlateau watches val/map, which rises: give it mode='max'"
            )
        return made

    def on_validation_epoch_end(self) -> None:
        """Log the metrics under ``val/``."""
        self.evaluation.log(self, "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics under ``test/``."""
        self.evaluation.log(self, "test")

    def _refuse(self, options: TrainingOptions, class_names: Sequence[str] | None) -> None:
        reasons = {
            "transforms": "batches of boxes are not mixed: let the data module transform images and boxes together",
            "input_shape": "images of a detection may have any size: leave it out",
            "compile": "the shapes of a detector change with every batch: leave it out",
        }
        for name, reason in reasons.items():
            if options.get(name):
                raise InputError(f"{type(self).__name__}: {name}={options[name]}: {reason}")  # type: ignore[literal-required]
        if not isinstance(options["output"], Boxes | None):
            raise InputError(f"{type(self).__name__}: output={options['output']}: leave it out, or give Boxes")
        if options["output"] is not None and class_names is not None:
            raise InputError(
                f"{type(self).__name__}: class_names={class_names} would do nothing beside output={options['output']}: "
                "give them to Boxes"
            )


def _check_detector(who: str, student: nn.Module, num_classes: int) -> None:
    if len(inspect.signature(student.forward).parameters) < 2:
        raise InputError(
            f"{who} ({type(student).__name__}) does not take images and targets: give a detector of torchvision"
        )
    for path, name in (
        ("roi_heads.box_predictor.cls_score", "out_features"),
        ("head.classification_head", "num_classes"),
        ("head.classification_head", "num_columns"),
    ):
        part: Any = student
        for step in (*path.split("."), name):
            part = getattr(part, step, None)
        if isinstance(part, int) and part != num_classes + 1:
            advice = "build it so"
            if part == num_classes:
                advice += ", or leave the background out of num_classes, in the data module where it comes from there"
            raise InputError(
                f"{who} ({type(student).__name__}) has {part} classes where num_classes={num_classes} needs "
                f"{num_classes + 1}, because the background is one of them: {advice}"
            )
