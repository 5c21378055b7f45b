"""Callbacks that write what ``predict`` gives as text or JSON, in the order of the data."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import Tensor

from distill_lightning.data.batch import Batch, answered_rows
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.errors import InputError
from distill_lightning.outputs import Boxes
from distill_lightning.processes import gathered
from distill_lightning.storage import free_path, write_whole

_Place = tuple[int, int]
"""Number of the loader, and of the sample in its data."""


class PredictionWriter(pl.Callback):
    """Base class of callbacks that write the predictions of a `Trainer.predict`.

    One file holds what all processes predict, each sample once, in the order of the data: of ``Batch.index``, or where
    batches have none, the order in which an unshuffled sampler gives them to the processes. It is written whole or not
    at all when the prediction is over, by the first process; so each process keeps its predictions until then. Several
    data loaders have a file each, the second ``<name>_1`` and so on.

    Attributes:
        written: the files of the last prediction, in the first process.

    Args:
        path: the file; ``None``: ``predictions.txt`` or ``predictions.json`` in the logger's folder, or with a number
            if there is one.

    Raises:
        InputError: another suffix than the file's format has; in a prediction: the module predicts something else, or
            the disk is full or refuses, and then what was there before is kept.
    """

    suffix: ClassVar[str]

    def __init__(self, *, path: str | Path | None = None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.suffix != self.suffix:
            raise InputError(f"{type(self).__name__} writes {self.suffix} files, got path={path}: name it so")
        self.written: list[Path] = []
        self._kept: dict[_Place, Any] = {}
        # Samples of each loader that came without an index.
        self._counts: dict[int, int] = {}

    @staticmethod
    @abstractmethod
    def fits(pl_module: pl.LightningModule) -> bool:
        """Whether a module predicts what is written here."""

    @abstractmethod
    def read(self, batch: Any) -> Batch:
        """The batch of any data module."""

    @abstractmethod
    def of_batch(self, pl_module: Any, outputs: Any, batch: Batch) -> Sequence[Any]:
        """What is to be written of each sample that has a prediction, as plain values."""

    @abstractmethod
    def content(self, rows: Mapping[int, Any], data: Any) -> str:
        """The file's text.

        Args:
            rows: the samples' values by their place in the data, in its order.
            data: the ``dataset`` of the loader; ``None``: it has none.
        """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last prediction.

        Raises:
            InputError: the module predicts something else.
        """
        if not self.fits(pl_module):
            raise InputError(f"{type(pl_module).__name__} predicts nothing that {type(self).__name__} can write")
        self.written, self._kept, self._counts = [], {}, {}

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *place: Any
    ) -> None:
        """Keep what is predicted of each sample."""
        # The batch's number and, where there are several, that of its loader.
        loader = place[1] if len(place) > 1 else 0
        read = self.read(batch)
        rows = self.of_batch(pl_module, outputs, read)
        if read.key is not None:
            places, answered = read.key.index, answered_rows(read)
            numbers = (places if answered is None else places[answered.to(places.device)]).tolist()
        else:
            before = self._counts.get(loader, 0)
            self._counts[loader] = before + len(rows)
            numbers = [trainer.global_rank + trainer.world_size * (before + row) for row in range(len(rows))]
        self._kept |= {(loader, number): row for number, row in zip(numbers, rows, strict=True)}

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files."""
        # Every process takes part here.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        every: dict[_Place, Any] = {}
        for kept in gathered(self._kept):
            every |= kept
        self._kept = {}
        if not trainer.is_global_zero:
            return
        path = free_path(folder / f"predictions{self.suffix}") if self.path is None else self.path
        for loader in sorted({loader for loader, _ in every} | {0}):
            own = path.with_name(f"{path.stem}_{loader}{path.suffix}") if loader else path
            rows = {number: row for (other, number), row in sorted(every.items()) if other == loader}
            write_whole(own, [self.content(rows, _data_of(trainer, loader)).encode()])
            self.written.append(own)


class TranslationWriter(PredictionWriter):
    """Writes translations as text in UTF-8, one line for each sentence.

    ::

        trainer:
          callbacks:
            - {class_path: TranslationWriter, init_args: {path: translations.txt}}

    Attributes:
        written: the files of the last prediction, in the first process.

    Args:
        path: the file, which ends in ``.txt``; ``None``: ``predictions.txt`` in the logger's folder, or with a number
            if there is one.

    Raises:
        InputError: another suffix; in a prediction: the module does not translate, or the disk is full or refuses, and
            then what was there before is kept.
    """

    suffix = ".txt"

    @staticmethod
    def fits(pl_module: pl.LightningModule) -> bool:
        """Whether it has a method ``translate``."""
        return hasattr(pl_module, "translate")

    def read(self, batch: Any) -> Batch:
        """Sentences."""
        return Batch.of(batch)

    def of_batch(self, pl_module: Any, outputs: Any, batch: Batch) -> Sequence[Any]:
        """The sentences."""
        texts: list[str] = pl_module.texts(outputs) if isinstance(outputs, Tensor) else outputs
        return [" ".join(text.splitlines()) for text in texts]

    def content(self, rows: Mapping[int, Any], data: Any) -> str:
        """A line for each."""
        return "".join(f"{row}\n" for row in rows.values())


class DetectionWriter(PredictionWriter):
    """Writes boxes as JSON in COCO's format of results, which its tools read.

    That is a list of ``{"image_id": i, "category_id": k, "bbox": [left, top, width, height], "score": s}``, in pixels,
    one for each box, image by image and as the detector returned them. ``image_id`` is that of the image's target, or
    where there is none, its place in the data. ``category_id`` is the label: 1 is the first class. Where the loader's
    data set has a method ``file_name(place)``, as those of `VOCDetectionDataModule`, each box has its image's
    ``file_name``, too.

    ::

        trainer:
          callbacks:
            - {class_path: DetectionWriter, init_args: {path: detections.json}}

    Attributes:
        written: the files of the last prediction, in the first process.

    Args:
        path: the file, which ends in ``.json``; ``None``: ``predictions.json`` in the logger's folder, or with a number
            if there is one.

    Raises:
        InputError: another suffix; in a prediction: the module does not detect, or the disk is full or refuses, and
            then what was there before is kept.
    """

    suffix = ".json"

    @staticmethod
    def fits(pl_module: pl.LightningModule) -> bool:
        """Whether its output is `Boxes`."""
        return isinstance(getattr(pl_module, "output", None), Boxes)

    def read(self, batch: Any) -> Batch:
        """Images."""
        return DetectionBatch.of(batch)

    def of_batch(self, pl_module: Any, outputs: Any, batch: Batch) -> Sequence[Any]:
        """Of each image its id and its boxes."""
        counted = [True] * batch.size if batch.counted is None else batch.counted.tolist()
        targets = [{}] * batch.size if batch.target is None else batch.target
        ids = [_plain(target.get("image_id")) for target, counts in zip(targets, counted, strict=True) if counts]
        return [(number, _results(found)) for number, found in zip(ids, outputs, strict=True)]

    def content(self, rows: Mapping[int, Any], data: Any) -> str:
        """One list."""
        name_of: Callable[[int], str] | None = getattr(data, "file_name", None)
        found = [
            {"image_id": place if number is None else number, **box}
            | ({} if name_of is None else {"file_name": name_of(place)})
            for place, (number, boxes) in rows.items()
            for box in boxes
        ]
        return json.dumps(found) + "\n"


def _results(found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    boxes, scores = found["boxes"].float(), found["scores"].float()
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    rows = zip(found["labels"].tolist(), corners.tolist(), sides.tolist(), scores.tolist(), strict=True)
    return [{"category_id": label, "bbox": [*corner, *side], "score": score} for label, corner, side, score in rows]


def _data_of(trainer: pl.Trainer, loader: int) -> Any:
    """What one of the loaders reads."""
    loaders: Any = trainer.predict_dataloaders
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return getattr(loaders[loader] if isinstance(loaders, Sequence) else loaders, "dataset", None)


def _plain(number: Any) -> int | None:
    return None if number is None else int(number)


WRITERS: tuple[type[PredictionWriter], ...] = (TranslationWriter, DetectionWriter)


def writer_for(pl_module: pl.LightningModule) -> PredictionWriter | None:
    """A writer of what a module predicts, to the logger's folder; ``None``: there is no format of its own for it."""
    return next((writer() for writer in WRITERS if writer.fits(pl_module)), None)
