"""CIFAR-10 and CIFAR-100 from their pickled files, or torchvision's download."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, Unpack

import numpy as np
import torch
from torchvision import datasets

from distill_lightning.data.augmentation import RandAugment
from distill_lightning.data.datamodules.cifar_pickle import read_pickle, whole_numbers
from distill_lightning.data.datamodules.in_memory import Images, InMemoryImageDataModule
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.errors import InputError, refusing

_SITE = "https://www.cs.toronto.edu/~kriz"
_SHAPE = (3, 32, 32)


class _Files(NamedTuple):
    """Names of one of the two sets' folder and files, and of the keys in these."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    class_names: str


_FILES = {
    10: _Files(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        class_names="label_names",
    ),
    100: _Files(
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        class_names="fine_label_names",
    ),
}
_CLASS_NAMES = {
    10: "airplane automobile bird cat deer dog frog horse ship truck",
    100: """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """,
}


class CIFARDataModule(InMemoryImageDataModule):
    """CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test photographs in colour, 32x32 pixels.

    The validation images are drawn by ``seed`` from the training files; the test files are for test alone. By default
    the training views are those of most papers: a random crop after 4 pixels of padding, and a mirror image half of the
    time. ``cutout=16`` (CIFAR-10) or ``cutout=8`` (CIFAR-100) is Cutout's. Pixels are normalised by mean and deviation
    as Self-KD and many others do it; these deviations are averages of the single images' standard deviations, and a
    little smaller than the deviation of all pixels.

    The pickled files are read without running anything that stands in them; a file that asks for that is refused. They
    may have been written again, with keys of another type or lists in place of arrays. Krizhevsky: *Learning Multiple
    Layers of Features from Tiny Images*, https://www.cs.toronto.edu/~kriz/cifar.html

    Args:
        data_dir: the folder with ``cifar-10-batches-py`` or ``cifar-100-python``, or that folder itself.
        num_classes: 10 or 100, which of the two sets.
        download: fetch the files with torchvision into ``data_dir`` where one is missing.
        val_size: number of validation images; 0: all 50,000 are trained on, as most papers do, and none validates.
        test_size: number of test images, the first ones; ``None``: all 10,000.
        padding: pixels of zeros around a training image that its random crop may take in.
        flip: whether half of the training views are mirrored.
        cutout: side in pixels of a square of the mean colour in every training view; 0: none.
        randaugment: operations that are drawn for every training view; ``None``: none.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Attributes:
        class_names: the usual ones; after ``setup`` those in ``batches.meta`` or ``meta``, where there is such a file.

    Raises:
        InputError: ``num_classes`` is another number, or a size is too small; from ``setup``: a file is missing,
            damaged, or asks for code to be run, or a size is larger than the data.

    Example:
        >>> data = CIFARDataModule(data_dir="data", num_classes=100, cutout=8)  # doctest: +SKIP
        >>> data.dataset("train")[0, 0].input.shape  # doctest: +SKIP
        torch.Size([3, 32, 32])
    """

    num_classes: int
    input_shape = _SHAPE
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)

    def __init__(
        self,
        *,
        data_dir: str | Path,
        num_classes: Literal[10, 100] = 10,
        download: bool = False,
        val_size: int = 5000,
        test_size: int | None = None,
        padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        randaugment: RandAugment | None = None,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(
            val_size=val_size,
            test_size=test_size,
            padding=padding,
            flip=flip,
            cutout=cutout,
            randaugment=randaugment,
            **options,
        )
        if num_classes not in _FILES:
            raise InputError(f"num_classes must be 10 or 100, for CIFAR-10 or CIFAR-100, got {num_classes}")
        self.data_dir, self.download = Path(data_dir), download
        self.num_classes = num_classes
        self.class_names = tuple(_CLASS_NAMES[num_classes].split())
        self._files = _FILES[num_classes]

    def prepare_data(self) -> None:
        """Download the files, where that was asked for and one is missing."""
        if self.download and not all(self._path(name).is_file() for name in (*self._files.train, self._files.test)):
            kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[self.num_classes]
            with refusing(f"{self.data_dir}: the download failed", OSError, RuntimeError):
                kind(str(self.data_dir), download=True)

    def read(self) -> tuple[Images, Images]:
        """The training files' images and the test file's; the classes get the names that the meta file gives them."""
        meta = self._path(self._files.meta)
        if meta.is_file():
            self.class_names = self._names(meta)
        parts = [self._part(name) for name in self._files.train]
        rest = Images(torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts]))
        return rest, self._part(self._files.test)

    def _path(self, name: str) -> Path:
        below = self.data_dir / self._files.folder
        return (below if below.is_dir() else self.data_dir) / name

    def _part(self, name: str) -> Images:
        path = self._path(name)
        if not path.is_file():
            raise InputError(
                f"no {name} in {path.parent}: unpack {_SITE}/cifar-{self.num_classes}-python.tar.gz there, or give "
                "download=True"
            )
        content = read_pickle(path)
        pixels, labels = (whole_numbers(path, content, key) for key in ("data", self._files.labels))
        count = len(labels) if labels.ndim == 1 else -1
        if pixels.shape not in ((count, 3072), (count, *_SHAPE)):
            raise InputError(
                f"{path} holds data {pixels.shape} and labels {labels.shape}, not (N, 3072) and (N,): these are not "
                "CIFAR's files"
            )
        for what, values, top in (("data", pixels, 255), (self._files.labels, labels, self.num_classes - 1)):
            if count and not 0 <= int(values.min()) <= int(values.max()) <= top:
                raise InputError(
                    f"{path}: {what} go from {values.min()} to {values.max()}, not from 0 to {top}: these are not "
                    f"CIFAR-{self.num_classes}'s files"
                )
        images = torch.from_numpy(pixels.astype(np.uint8).reshape(count, *_SHAPE))
        return Images(images, torch.from_numpy(labels.astype(np.int64)))

    def _names(self, path: Path) -> tuple[str, ...]:
        given = read_pickle(path).get(self._files.class_names)
        listed = given if isinstance(given, (list, tuple)) else []
        names = [name.decode(errors="replace") if isinstance(name, bytes) else name for name in listed]
        if len(names) != self.num_classes or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"{path} does not name {self.num_classes} classes as {self._files.class_names!r}: take it out for the "
                "usual names"
            )
        return tuple(names)
