"""Large image sets: folders of image files, decoded and augmented by the loader's workers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules.image_data_module import ImageDataModule
from distill_lightning.data.datamodules.image_file import SUFFIXES, decode
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.data.views import CROP_DRAWS, random_box, uniform_draws
from distill_lightning.errors import InputError


class Files(NamedTuple):
    """Image files below a folder: their paths as bytes, in one array ``(N,)``, and their classes ``(N,)`` as int64.

    Not a list of strings, of which every worker process would in time make its own copy, by counting references.
    """

    paths: NDArray[np.bytes_]
    targets: Tensor

    def take(self, index: Tensor) -> Files:
        """The files at ``index``."""
        return Files(self.paths[index.numpy()], self.targets[index])


class ImageFiles(ViewDataset):
    """Images in files, each decoded when it is asked for; their views depend on nothing but their keys.

    Rows of a batch that follow one another and are views of one image share its decoding. With ``augment`` a view is a
    random part of the image (`distill_lightning.data.views.random_box`), resized to a square, mirrored or not. Without,
    every view is the plain image: its shorter side resized, and the centre of that.

    Args:
        folder: where the files' paths begin.
        files: the samples.
        image_size: rows and columns of a view.
        resize_size: length of the shorter side of a plain image, of which the centre is taken.
        mean: of each channel, in ``[0, 1]``; views are ``(pixel / 255 - mean) / std`` in float32.
        std: of each channel, in the same unit.
        augment: whether views are random.
        crop_scale: smallest and largest part of an image's area that a random view shows.
        crop_ratio: smallest and largest ratio of width to height of that part.
        flip: whether half of the random views are mirrored.
        seed: of the views and the partners.
        partners: whether each view comes with another sample in the same view, drawn from the view's own key.
    """

    depends_on = ("mean", "std", "seed", "image_size", "crop_scale", "crop_ratio", "flip", "partners")

    def __init__(
        self,
        folder: str | Path,
        files: Files,
        *,
        image_size: int,
        resize_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        augment: bool = False,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        seed: int = 0,
        partners: bool = False,
    ) -> None:
        super().__init__(seed=seed, partners=partners)
        self.folder, self.files = Path(folder), files
        self.image_size, self.resize_size = image_size, resize_size
        self.mean, self.std = mean, std
        self.augment, self.crop_scale, self.crop_ratio, self.flip = augment, crop_scale, crop_ratio, flip

    def __len__(self) -> int:
        return len(self.files.targets)

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these views, both ``(N,)``.

        Raises:
            InputError: a file cannot be decoded.
        """
        draws = uniform_draws(self.seed, index, view, 1 + CROP_DRAWS).tolist() if self.augment else []
        pixels = torch.empty(len(index), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for sample, rows in itertools.groupby(range(len(index)), key=index.tolist().__getitem__):
            image = decode(self.folder / os.fsdecode(self.files.paths[sample]))
            for row in rows:
                pixels[row] = self._random(image, draws[row]) if self.augment else self._plain(image)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        inputs = pixels.to(torch.float32).div_(255).sub_(mean).div_(std)
        return Batch(inputs, self.files.targets[index], index, view)

    def _random(self, image: Tensor, draws: list[float]) -> Tensor:
        height, width = image.shape[1:]
        box = random_box(height, width, draws[1:], scale=self.crop_scale, ratio=self.crop_ratio)
        part: Tensor = transforms.resized_crop(image, *box, [self.image_size, self.image_size], antialias=True)
        return part.flip(2) if self.flip and draws[0] < 0.5 else part

    def _plain(self, image: Tensor) -> Tensor:
        resized = transforms.resize(image, [self.resize_size], antialias=True)
        centre: Tensor = transforms.center_crop(resized, [self.image_size, self.image_size])
        return centre


class ImageFolderDataModule(ImageDataModule):
    """A large image set in folders, such as ImageNet: one folder of image files per class.

    ::

        data_dir/train/<class>/**/image.jpg     for training and validation
        data_dir/val/<class>/**/image.jpg       for test; ImageNet's public validation images

    The classes are the sorted names of the folders under ``train``. The images under ``val`` are the **test** set and
    never pick an epoch: the validation images are drawn from ``train``. Hidden files and folders are passed over, and
    files whose names do not end in ``.jpeg``, ``.jpg``, ``.jfif``, ``.png``, ``.webp``, ``.gif``, ``.bmp``, ``.tif``,
    ``.tiff``, ``.pbm``, ``.pgm`` or ``.ppm``, in capitals or not.

    A view is a function of ``(seed, sample index, view number)`` alone: torchvision's ``RandomResizedCrop`` and a flip,
    with bilinear interpolation and antialiasing. All images become RGB with 8 bits: grey ones, palettes and CMYK JPEGs
    are converted, transparency is dropped, 16 bits lose the lower 8, and of an animation or several pages the first
    counts; levels of PGM and PPM files are stretched so that their largest is white. TIFF files of other numbers than
    unsigned ones of at most 16 bits are refused. The orientation that JPEG, PNG and TIFF files tell is followed; that
    of WebP files is not.

    With ``views_per_load=R`` an image is decoded once for ``R`` of its views, which follow one another in a batch; an
    epoch then reads the views ``e * R`` to ``e * R + R - 1``, modulo ``views``, and is ``R`` times as long. Shen, Xing:
    *A Fast Knowledge Distillation Framework for Visual Recognition*, ECCV 2022. ``R`` epochs of the usual length read
    the same; the batches hold fewer different images. Partners are decoded for each view.

    Args:
        data_dir: the folder with ``train`` and ``val``.
        image_size: rows and columns of what the networks read.
        resize_size: length of the shorter side of an image in validation and test, of which the centre is taken.
        crop_scale: smallest and largest part of an image's area that a training view shows.
        crop_ratio: smallest and largest ratio of width to height of that part.
        flip: whether half of the training views are mirrored.
        val_size: number of validation images, drawn by ``seed`` from ``train``.
        test_size: number of test images, drawn by ``seed`` from ``val``; ``None``: all.
        mean: of red, green and blue in ``[0, 1]``; the networks read ``(pixel / 255 - mean) / std``.
        std: of red, green and blue, in the same unit.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`. A worker
            decodes some hundreds of images a second.

    Raises:
        InputError: an option is out of range, or ``train`` has no class folders; from ``setup``: a split is larger than
            the data, a class folder is empty, or ``val`` has a class that ``train`` has not; from a loader: an image
            cannot be decoded.
    """

    num_classes: int
    default_workers = 4

    def __init__(
        self,
        *,
        data_dir: str | Path,
        image_size: int = 224,
        resize_size: int = 256,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        val_size: int,
        test_size: int | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(val_size=val_size, test_size=test_size, **options)
        if not 1 <= image_size <= resize_size:
            raise InputError(
                f"image_size={image_size} and resize_size={resize_size}: the image is cut out of the resized one, so "
                "the first must be at least 1 and at most the second"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(
                f"crop_scale must be two ascending parts of an area, above 0 and up to 1, got {crop_scale}"
            )
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise InputError(f"crop_ratio must be two ascending ratios above 0, got {crop_ratio}")
        if min(std) <= 0:
            raise InputError(f"std must be above 0 in every channel, got {std}")
        self.data_dir = Path(data_dir)
        self.image_size, self.resize_size = image_size, resize_size
        # As floats, because a store compares them, as they are written, with those of another run.
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.crop_ratio = (float(crop_ratio[0]), float(crop_ratio[1]))
        self.flip = flip
        self.mean = (float(mean[0]), float(mean[1]), float(mean[2]))
        self.std = (float(std[0]), float(std[1]), float(std[2]))
        self.class_names = _class_names(self.data_dir / "train")
        self.num_classes = len(self.class_names)
        self.input_shape = (3, image_size, image_size)
        self._splits: dict[str, Files] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the files and split them; a second call does nothing."""
        if self._splits:
            return
        rest, test = (self._files(part) for part in ("train", "val"))
        chosen = self.split(len(rest.targets), len(test.targets))
        self._splits = {name: (test if name == "test" else rest).take(index) for name, index in chosen.items()}

    def split(self, rest: int, test: int) -> dict[str, Tensor]:
        """As `ImageDataModule.split`, but the test images are drawn: the files are in the order of their classes."""
        drawn = torch.randperm(test, generator=torch.Generator().manual_seed(self.seed))[: self.test_size]
        return super().split(rest, test) | {"test": drawn.sort().values}

    def dataset(self, split: str, *, augment: bool = False) -> ImageFiles:
        """One split, ``"train"``, ``"val"`` or ``"test"``; without ``augment`` every view is the plain image."""
        self.setup()
        return ImageFiles(
            self.data_dir,
            self._splits[split],
            image_size=self.image_size,
            resize_size=self.resize_size,
            mean=self.mean,
            std=self.std,
            augment=augment,
            crop_scale=self.crop_scale,
            crop_ratio=self.crop_ratio,
            flip=self.flip,
            seed=self.seed,
            partners=self.partners and augment,
        )

    def describe_samples(self) -> Iterator[bytes]:
        """Path, size in bytes and class of the training images; what is in them is not read."""
        files = self._splits["train"]
        for path, target in zip(files.paths.tolist(), files.targets.tolist(), strict=True):
            yield b"%s\0%d %d\n" % (path, (self.data_dir / os.fsdecode(path)).stat().st_size, target)

    def _files(self, part: str) -> Files:
        """The images below a folder, ordered by class and then by path."""
        names = _class_names(self.data_dir / part)
        unknown = sorted(set(names) - set(self.class_names))
        if unknown:
            raise InputError(
                f"{self.data_dir / part / unknown[0]} is a class that {self.data_dir / 'train'} does not have: take it "
                "out, or add it there"
            )
        paths: list[bytes] = []
        targets: list[int] = []
        for name in names:
            found = _images_below(str(self.data_dir / part / name), called=f"{part}/{name}")
            if not found:
                raise InputError(
                    f"{self.data_dir / part / name} holds no images ({', '.join(SUFFIXES)}): fill it, or take it out"
                )
            paths += [os.fsencode(path) for path in found]
            targets += [self.class_names.index(name)] * len(found)
        return Files(np.array(paths, dtype=np.bytes_), torch.tensor(targets))


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not there: data_dir must have train and val, each with one folder per class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders: sort its images into one folder per class")
    return tuple(names)


def _images_below(folder: str, *, called: str) -> list[str]:
    """Paths of the images in a folder and the folders in it, sorted, each beginning with what the folder is called."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # Not Path objects: of a million files they would take half a minute.
        place = called + where[len(folder) :].replace(os.sep, "/")
        found += [f"{place}/{name}" for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)
