"""Callbacks that show what a student makes of a few samples of the validation: boxes on images, and translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from distill_lightning.callbacks.figures import log_figure
from distill_lightning.callbacks.tables import Table, log_table
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.errors import InputError
from distill_lightning.plots import DrawnBoxes, detected_boxes


class ValidationSamples(pl.Callback):
    """Base class of callbacks that keep the first samples of a validation, and show them at its end.

    They are those of the first loader and of the first process, the same in every epoch; the sanity check shows none.

    Args:
        samples: how many; fewer, if the first process has fewer.
        every_n_epochs: how many epochs of a ``fit`` pass from one showing to the next; a validation outside of one
            always shows.

    Raises:
        InputError: no samples, or no epochs; later, a module that does something else.
    """

    def __init__(self, *, samples: int, every_n_epochs: int = 1) -> None:
        super().__init__()
        for name, value in (("samples", samples), ("every_n_epochs", every_n_epochs)):
            if value < 1:
                raise InputError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.samples, self.every_n_epochs = samples, every_n_epochs
        # Of each sample, as `keep` returns it.
        self._kept: list[Any] = []

    def keep(self, pl_module: Any, outputs: Any, batch: Any) -> Sequence[Any]:
        """What is to be shown of each sample of a batch that counts; of no more than ``samples`` of them."""
        raise NotImplementedError(f"{type(self).__name__} must define keep(pl_module, outputs, batch)")

    def show(self, trainer: pl.Trainer, pl_module: Any, kept: Sequence[Any]) -> None:
        """Log what was kept."""
        raise NotImplementedError(f"{type(self).__name__} must define show(trainer, pl_module, kept)")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._kept = []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *place: Any
    ) -> None:
        """Keep samples until there are enough."""
        is_first_loader = len(place) < 2 or place[1] == 0
        if is_first_loader and len(self._kept) < self.samples and self._is_due(trainer):
            self._kept = [*self._kept, *self.keep(pl_module, outputs, batch)][: self.samples]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show them."""
        kept, self._kept = self._kept, []
        if kept:
            self.show(trainer, pl_module, kept)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return False
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0


class DetectionFigures(ValidationSamples):
    """Draws what a detector finds on the first images of the validation, logged as ``val/detections``.

    True boxes are drawn, too, dashed in white. It uses what the module's ``validation_step`` returns, and
    `distill_lightning.plots.detected_boxes` draws it; the figure goes to whichever logger is there (`log_figure`).

    ::

        trainer:
          callbacks:
            - {class_path: DetectionFigures, init_args: {samples: 8, every_n_epochs: 5}}

    Attributes:
        figure: the latest figure, of the first process, which a notebook shows; ``None`` before.

    Args:
        samples: number of images.
        every_n_epochs: how many epochs of a ``fit`` pass from one figure to the next.
        threshold: the lowest score of a box that is drawn.

    Raises:
        InputError: no images, no epochs, or a threshold that is no score; later, a module that does not detect.
    """

    def __init__(self, *, samples: int = 4, every_n_epochs: int = 1, threshold: float = 0.5) -> None:
        super().__init__(samples=samples, every_n_epochs=every_n_epochs)
        if not 0 <= threshold <= 1:
            raise InputError(f"DetectionFigures: threshold must be in [0, 1], got {threshold}")
        self.threshold = threshold
        self.figure: Figure | None = None

    def keep(self, pl_module: Any, outputs: Any, batch: Any) -> Sequence[Any]:
        """Image, boxes that were found, and true boxes."""
        found = outputs.get("output") if isinstance(outputs, Mapping) else None
        if not isinstance(found, Sequence) or not all(isinstance(one, Mapping) and "boxes" in one for one in found):
            raise InputError(
                f"DetectionFigures: {type(pl_module).__name__}.validation_step must return {{'output': a list of dicts "
                "with boxes, labels and scores}: leave the callback out where nothing is detected"
            )
        read = DetectionBatch.of(batch)
        counted = [True] * read.size if read.counted is None else read.counted.tolist()
        targets = [None] * read.size if read.target is None else read.target
        rows = [row for row, counts in zip(zip(read.input, targets, strict=True), counted, strict=True) if counts]
        shown = [(image, one, target) for (image, target), one in zip(rows, found, strict=True)]
        return [(_pixels(image), self._found(one), _true(target)) for image, one, target in shown[: self.samples]]

    def show(self, trainer: pl.Trainer, pl_module: Any, kept: Sequence[Any]) -> None:
        """Draw and log."""
        images, found, true = zip(*kept, strict=True)
        names = getattr(pl_module.output, "class_names", None)
        names = names or getattr(getattr(trainer, "datamodule", None), "class_names", None)
        self.figure = detected_boxes(images, found, None if None in true else true, class_names=names)
        log_figure(trainer, "val/detections", self.figure, trainer.global_step)

    def _found(self, found: Mapping[str, Tensor]) -> DrawnBoxes:
        sure = found["scores"] >= self.threshold
        return _drawn({name: found[name][sure] for name in ("boxes", "labels", "scores")})


def _pixels(image: Tensor) -> Any:
    """``(H, W)`` of one channel, ``(H, W, 3)`` of three."""
    image = image.detach().float().cpu()
    return (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()


def _true(target: Mapping[str, Tensor] | None) -> DrawnBoxes | None:
    return None if target is None else _drawn({name: target[name] for name in ("boxes", "labels")})


def _drawn(boxes: Mapping[str, Tensor]) -> DrawnBoxes:
    return DrawnBoxes(**{name: value.detach().float().cpu().numpy() for name, value in boxes.items()})


class TranslationSamples(ValidationSamples):
    """Logs a table of the first translations of the validation, as ``val/translations``.

    Its columns are source, reference and translation, as the module's ``texts`` and ``translate`` make them. It takes
    the translations that ``validation_step`` returns, and translates itself where there are none. The table goes to
    whichever logger is there (`log_table`).

    ::

        trainer:
          callbacks:
            - {class_path: TranslationSamples, init_args: {samples: 20}}

    Attributes:
        table: the latest table, of the first process; ``None`` before.

    Args:
        samples: number of sentences.
        every_n_epochs: how many epochs of a ``fit`` pass from one table to the next.

    Raises:
        InputError: no sentences, or no epochs; later, a module that does not translate.
    """

    def __init__(self, *, samples: int = 8, every_n_epochs: int = 1) -> None:
        super().__init__(samples=samples, every_n_epochs=every_n_epochs)
        self.table: Table | None = None

    def keep(self, pl_module: Any, outputs: Any, batch: Any) -> Sequence[Any]:
        """Source, reference and translation."""
        if not hasattr(pl_module, "translate"):
            raise InputError(
                f"TranslationSamples: {type(pl_module).__name__} has no method translate: leave the callback out where "
                "nothing is translated"
            )
        if "translations" in outputs:
            shown = [outputs[name][: self.samples] for name in ("sources", "references", "translations")]
        else:
            read = pl_module.read_batch(batch)
            rows, counted = torch.arange(read.size, device=read.device), read.counted_rows
            rows = rows if counted is None else rows[counted]
            few = read.replace(index=None, view=None).map(lambda tensor: tensor[rows[: self.samples]])
            texts = [pl_module.texts(ids) for ids in (few.input["input_ids"], few.target)]
            shown = [*texts, pl_module.translate(few)]
        return list(zip(*shown, strict=True))

    def show(self, trainer: pl.Trainer, pl_module: Any, kept: Sequence[Any]) -> None:
        """Log the table."""
        self.table = Table(("source", "reference", "translation"), kept)
        log_table(trainer, "val/translations", self.table, trainer.global_step)
