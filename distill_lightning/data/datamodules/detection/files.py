"""Images in files, and the boxes of the objects on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from distill_lightning.data.batch import Batch
from distill_lightning.data.columns import Columns
from distill_lightning.data.datamodules.detection.augmentation import DetectionAugmentation
from distill_lightning.data.datamodules.image_file import decode
from distill_lightning.data.datamodules.view_dataset import ViewDataset, ViewKey
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.data.views import uniform_draws
from distill_lightning.errors import InputError

# Keeps the draws of the views apart from others.
_STREAM = 0x424F5845
# EXIF's tag; of upright images it is 1.
_ORIENTATION = 0x0112
# Red, green and blue in a grey image, in parts of 2 ** 16, so that grey stays what it is; as Pillow has them.
_GREY = (19595, 38470, 7471)


class AnnotatedFile(NamedTuple):
    """An image file, and the objects on it.

    Attributes:
        path: below some folder.
        size: width and height in pixels.
        boxes: left, top, right and bottom of each object.
        labels: their classes, from 1.
        difficult: whether they are hard to recognise.
    """

    path: str
    size: tuple[int, int]
    boxes: Sequence[tuple[float, float, float, float]]
    labels: Sequence[int]
    difficult: Sequence[bool]


class AnnotatedFiles(NamedTuple):
    """Image files below a folder, and the objects on them, in few arrays that worker processes share.

    Attributes:
        paths: of the ``N`` images, as bytes ``(N,)``.
        sizes: width and height of each, int64 ``(N, 2)``.
        starts: where each image's objects begin among all, and the end of the last, int64 ``(N + 1,)``.
        boxes: left, top, right and bottom of all objects in pixels, float32 ``(T, 4)``.
        labels: their classes, from 1, int64 ``(T,)``.
        difficult: whether they are hard to recognise, bool ``(T,)``.
    """

    paths: NDArray[np.bytes_]
    sizes: Tensor
    starts: Tensor
    boxes: Tensor
    labels: Tensor
    difficult: Tensor

    @classmethod
    def of(cls, files: Sequence[AnnotatedFile]) -> AnnotatedFiles:
        """The files one by one, put together."""
        counts = torch.tensor([len(file.labels) for file in files], dtype=torch.int64)
        return cls(
            np.array([os.fsencode(file.path) for file in files], dtype=np.bytes_),
            torch.tensor([file.size for file in files], dtype=torch.int64).view(-1, 2),
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            torch.tensor([box for file in files for box in file.boxes], dtype=torch.float32).view(-1, 4),
            torch.tensor([label for file in files for label in file.labels], dtype=torch.int64),
            torch.tensor([hard for file in files for hard in file.difficult], dtype=torch.bool),
        )

    def objects(self, place: int) -> slice:
        """Where an image's objects are among all."""
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

    def take(self, index: Tensor) -> AnnotatedFiles:
        """The images at ``index``."""
        begins, ends = self.starts[index].tolist(), self.starts[index + 1].tolist()
        rows = torch.cat(
            [torch.arange(0), *(torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True))]
        )
        counts = self.starts.diff()[index]
        return AnnotatedFiles(
            self.paths[index.numpy()],
            self.sizes[index],
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            self.boxes[rows],
            self.labels[rows],
            self.difficult[rows],
        )

    def without_difficult(self) -> AnnotatedFiles:
        """The same images without the objects that are hard to recognise."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), (~self.difficult).cumsum(0)])
        easy = ~self.difficult
        return self._replace(
            starts=before[self.starts],
            boxes=self.boxes[easy],
            labels=self.labels[easy],
            difficult=self.difficult[easy],
        )


class DetectionFiles(ViewDataset):
    """Images in files with the boxes of their objects, each decoded when it is asked for, as a `DetectionBatch`.

    Args:
        folder: where the files' paths begin.
        files: the samples.
        channels: 3, or 1 for grey images.
        augmentation: what is drawn for a view; ``None``: every view is the plain image.
        seed: of the views.
    """

    depends_on = ("seed", "channels", "augmentation")

    def __init__(
        self,
        folder: str | Path,
        files: AnnotatedFiles,
        *,
        channels: int = 3,
        augmentation: DetectionAugmentation | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed, partners=False)
        self.folder, self.files = Path(folder), files
        self.channels, self.augmentation = channels, augmentation

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, key: ViewKey) -> Batch:
        """One image, its target, and its key."""
        batch = self.__getitems__([key])
        return Batch(batch.input[0], batch.target[0], batch.index[0], batch.view[0])  # type: ignore[index]

    def make(self, index: Tensor, view: Tensor) -> DetectionBatch:
        """The batch of these views, both ``(N,)``; ``image_id`` is the index.

        Raises:
            InputError: a file cannot be read or decoded, or the image is not as large as its annotation says.
        """
        draws = uniform_draws(self.seed + _STREAM, index, view, 1)[:, 0].double()
        seeds = (draws * 2**53).long().tolist()
        images, targets = zip(*map(self._view, index.tolist(), seeds), strict=True)
        return DetectionBatch(list(images), list(targets), index, view)

    def file_name(self, place: int) -> str:
        """Name of the image at a place of this set, below the folder, with the name of its own."""
        return os.fsdecode(self.files.paths[place])

    def columns(self) -> Columns:
        """Paths, below the folder, and objects."""
        boxes, labels, difficult = (part.numpy() for part in self.files[3:])
        rows = map(self.files.objects, range(len(self)))
        objects = [boxes[row].tobytes() + labels[row].tobytes() + difficult[row].tobytes() for row in rows]
        return Columns(names=self.files.paths.tolist(), labels=objects, folder=str(self.folder))

    def _view(self, sample: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self._decoded(sample)
        of_image = self.files.objects(sample)
        boxes, labels, difficult = (part[of_image] for part in self.files[3:])
        if self.augmentation is not None:
            image, boxes, kept = self.augmentation(image, boxes, seed=seed)
            labels, difficult = labels[kept], difficult[kept]
        target = {
            "boxes": boxes.clone(),
            "labels": labels.clone(),
            "difficult": difficult.clone(),
            "image_id": torch.tensor(sample),
        }
        return v2.functional.to_dtype(image, torch.float32, scale=True), target

    def _decoded(self, sample: int) -> Tensor:
        path = self.folder / self.file_name(sample)
        image = decode(path)
        size = (image.shape[2], image.shape[1])
        said = tuple(self.files.sizes[sample].tolist())
        if size != said:
            with Image.open(path) as opened:
                is_turned = opened.getexif().get(_ORIENTATION, 1) > 1
            turned = " as its EXIF orientation turns it" if is_turned else ""
            way_out = "save it upright, or annotate what a viewer shows" if is_turned else "mend one of the two"
            raise InputError(
                f"{path} has {size[0]}x{size[1]} pixels{turned}, and its annotation says {said[0]}x{said[1]}: its "
                f"boxes would be elsewhere; {way_out}"
            )
        return image if self.channels == 3 else grey(image)


def grey(image: Tensor) -> Tensor:
    """A coloured image as a grey one, ``(3, H, W)`` to ``(1, H, W)``, uint8, by the weights of ITU-R 601.

    Example:
        >>> import torch
        >>> from distill_lightning.data.datamodules.detection.files import grey
        >>> grey(torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1))
        tensor([[[76]]], dtype=torch.uint8)
    """
    red, green, blue = (channel.int() * weight for channel, weight in zip(image, _GREY, strict=True))
    levels: Tensor = (red + green + blue + 2**15) >> 16
    return levels.to(torch.uint8)[None]
