"""Large image sets: folders of image files, decoded and augmented by the loader's workers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill_lightning.data.augmentation import ColorJitter, Lighting, RandAugment
from distill_lightning.data.datamodules.image_data_module import ImageDataModule
from distill_lightning.data.datamodules.image_file import SUFFIXES, decode
from distill_lightning.data.datamodules.image_files import Files, ImageFiles
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.errors import InputError, check_one_of

# Damaged files that a warning names.
_SHOWN = 100


class ImageFolderDataModule(ImageDataModule):
    """A large image set in folders, such as ImageNet: one folder of image files per class.

    ::

        data_dir/train/<class>/**/image.jpg     for training
        data_dir/val/<class>/**/image.jpg       for validation
        data_dir/test/<class>/**/image.jpg      for test

    The classes are the sorted names of the folders under ``train``. **Where there is no** ``test``, as with ImageNet's
    public images, those under ``val`` are the test set and never pick an epoch. The validation images are then drawn
    from ``train``, as they are where there is no ``val``. Hidden files and folders are passed over, and
    files whose names do not end in ``.jpeg``, ``.jpg``, ``.jfif``, ``.png``, ``.webp``, ``.gif``, ``.bmp``, ``.tif``,
    ``.tiff``, ``.pbm``, ``.pgm`` or ``.ppm``, in capitals or not.

    A view is a function of ``(seed, sample index, view number)`` alone: torchvision's ``RandomResizedCrop`` and a flip,
    with bilinear interpolation and antialiasing; then, where they are given, ``randaugment``, ``color_jitter`` and
    ``lighting``, in this order. ``color_jitter=ColorJitter(), lighting=Lighting()`` is Self-KD's recipe for ImageNet.
    MEAL V2 reads ``image_size=224`` and ``resize_size=256``, or 380 and 434, without any of them.

    All images become RGB with 8 bits: grey ones, palettes and CMYK JPEGs are converted, transparency is dropped, 16
    bits lose the lower 8, and of an animation or several pages the first counts; levels of PGM and PPM files are
    stretched so that their largest is white. TIFF files of other numbers than unsigned ones of at most 16 bits are
    refused. The orientation that JPEG, PNG and TIFF files tell is followed; that of WebP files is not.

    With ``views_per_load=R`` an image is decoded once for ``R`` of its views, which follow one another in a batch; an
    epoch then reads the views ``e * R`` to ``e * R + R - 1``, modulo ``views``, and is ``R`` times as long. Shen, Xing:
    *A Fast Knowledge Distillation Framework for Visual Recognition*, ECCV 2022. ``R`` epochs of the usual length read
    the same; the batches hold fewer different images. Partners are decoded for each view.

    Args:
        data_dir: the folder with ``train`` and ``val``, ``test``, or both.
        image_size: rows and columns of what the networks read.
        resize_size: length of the shorter side of an image in validation and test, of which the centre is taken.
        crop_scale: smallest and largest part of an image's area that a training view shows.
        crop_ratio: smallest and largest ratio of width to height of that part.
        flip: whether half of the training views are mirrored.
        val_size: number of validation images, drawn by ``seed`` from ``train`` or, where there is a ``test``, from
            ``val``; ``None``: all under ``val``.
        test_size: number of test images, drawn by ``seed``; ``None``: all.
        mean: of red, green and blue in ``[0, 1]``; the networks read ``(pixel / 255 - mean) / std``.
        std: of red, green and blue, in the same unit.
        color_jitter: how colours of training views are changed at random; ``None``: not at all.
        lighting: noise along the principal components of colours, of training views; ``None``: none.
        randaugment: operations that are drawn for every training view; ``None``: none.
        on_damaged: what becomes of an image that cannot be decoded: ``"error"`` stops the run; with ``"skip"`` a view
            of the mean colour takes its place and does not count (``Batch.counted``): it is in no loss and no metric,
            prediction leaves it out, and it is no one's partner. At the end each process warns of such files that it
            has met, with their number and paths; `skipped` tells them, too, and `check` finds them before.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`. A worker
            decodes a few hundred images per second.

    Raises:
        InputError: an option is out of range, ``train`` has no class folders, or ``val_size`` is missing; from
            ``setup``: a split is larger than the data, a class folder is empty or has a link to a folder above, or
            another folder has a class that ``train`` has not; from a loader: an image cannot be decoded.
    """

    num_classes: int
    default_workers = None

    def __init__(
        self,
        *,
        data_dir: str | Path,
        image_size: int = 224,
        resize_size: int = 256,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        val_size: int | None = None,
        test_size: int | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        color_jitter: ColorJitter | None = None,
        lighting: Lighting | None = None,
        randaugment: RandAugment | None = None,
        on_damaged: Literal["error", "skip"] = "error",
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
        check_one_of("on_damaged", on_damaged, ("error", "skip"))
        self.on_damaged = on_damaged
        self.data_dir = Path(data_dir)
        self.image_size, self.resize_size = image_size, resize_size
        # As floats, because a store compares them, as they are written, with those of another run.
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.crop_ratio = (float(crop_ratio[0]), float(crop_ratio[1]))
        self.flip = flip
        self.color_jitter, self.lighting, self.randaugment = color_jitter, lighting, randaugment
        self.mean = (float(mean[0]), float(mean[1]), float(mean[2]))
        self.std = (float(std[0]), float(std[1]), float(std[2]))
        self.class_names = _class_names(self.data_dir / "train")
        has_val, has_test = ((self.data_dir / part).is_dir() for part in ("val", "test"))
        self._folders = {"train": "train", "test": "test" if has_test else "val"}
        if has_val and has_test:
            self._folders["val"] = "val"
        elif val_size is None:
            raise InputError(
                f"{self.data_dir} has not both val and test, so the validation images are drawn from train: give "
                "val_size, the number of them"
            )
        self.num_classes = len(self.class_names)
        self.input_shape = (3, image_size, image_size)
        self._splits: dict[str, Files] = {}
        self._damaged: dict[str, Tensor] = {}
        self._told: set[str] = set()

    def setup(self, stage: str | None = None) -> None:
        """List the files and split them; a second call does nothing."""
        if self._splits:
            return
        read = {split: self._files(folder) for split, folder in self._folders.items()}
        chosen = self.split(*(len(read[split].targets) for split in ("train", "test", "val") if split in read))
        self._splits = {split: read.get(split, read["train"]).take(index) for split, index in chosen.items()}
        if self.on_damaged == "skip":
            # Shared, because workers decode the images; and a Trainer may have switched on the inference mode, whose
            # tensors cannot be written to in a training that follows.
            with torch.inference_mode(mode=False):
                for split, files in self._splits.items():
                    noted = torch.zeros(len(files.targets), dtype=torch.bool)
                    self._damaged[split] = noted.share_memory_()  # type: ignore[no-untyped-call]

    def split(self, rest: int, test: int, val: int | None = None) -> dict[str, Tensor]:
        """As `ImageDataModule.split`, but all images are drawn: the files are in the order of their classes."""
        chosen = super().split(rest, test, val)
        for split, count, size in (("test", test, self.test_size), ("val", val, self.val_size)):
            if count is not None:
                drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[:size]
                chosen[split] = drawn.sort().values
        return chosen

    def teardown(self, stage: str | None = None) -> None:
        """Tell which damaged images were skipped."""
        fresh = [path for path in self.skipped() if path not in self._told]
        if fresh:
            self._told.update(fresh)
            number = f"{len(fresh):,} damaged image{'s' if len(fresh) > 1 else ''}"
            shown = "".join(f"\n  {path}" for path in fresh[:_SHOWN])
            more = f"\n  and {len(fresh) - _SHOWN:,} more, which skipped() tells" if len(fresh) > _SHOWN else ""
            warnings.warn(
                f"ImageFolderDataModule has skipped {number} below {self.data_dir}:{shown}{more}", stacklevel=2
            )

    def skipped(self) -> list[str]:
        """Paths below ``data_dir`` of the damaged images that were met, and skipped, so far."""
        return [
            os.fsdecode(path)
            for split, damaged in self._damaged.items()
            for path in self._splits[split].paths[damaged.numpy()].tolist()
        ]

    def check(self) -> list[str]:
        """Decode every image of the three splits once, in ``num_workers`` processes, ahead of any training.

        Returns:
            A line for each image that cannot be decoded: its path, what is wrong, and what to do. Empty: all is well.

        Example:
            >>> for line in ImageFolderDataModule(data_dir="flowers", val_size=500).check():  # doctest: +SKIP
            ...     print(line)
            flowers/train/rose/17.jpg cannot be decoded (Premature end of JPEG file): mend it, or take it out ...
        """
        self.setup()
        paths = np.concatenate([files.paths for split, files in self._splits.items() if split != "rest"])
        found = DataLoader(_Faults(self.data_dir, paths), batch_size=None, num_workers=self.num_workers)
        return [fault for fault in found if fault]

    def dataset(self, split: str, *, augment: bool = False) -> ImageFiles:
        """One split, ``"train"``, ``"val"``, ``"test"``, or ``"rest"``: the training images that ``subset`` leaves out.

        Without ``augment`` every view is the plain image.
        """
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
            color_jitter=self.color_jitter,
            lighting=self.lighting,
            randaugment=self.randaugment,
            seed=self.seed,
            partners=self.partners and augment,
            damaged=self._damaged.get(split),
        )

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


class _Faults(Dataset[str]):
    """What is wrong with each of some image files, in one line; empty: nothing."""

    def __init__(self, folder: Path, paths: NDArray[np.bytes_]) -> None:
        self.folder, self.paths = folder, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> str:
        try:
            decode(self.folder / os.fsdecode(self.paths[number]))
        except InputError as error:
            return str(error)
        return ""


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not there: data_dir must have train and val, each with one folder per class; ImageNet is at "
            "https://image-net.org"
        )
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders: sort its images into one folder per class")
    return tuple(names)


def _images_below(folder: str, *, called: str) -> list[str]:
    """Paths of the images in a folder and the folders in it, sorted, each beginning with what the folder is called.

    Raises:
        InputError: a link in it leads back to a folder above.
    """
    found = []
    above = {folder: frozenset({_identity(Path(folder).parent)})}
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        before, own = above.pop(where), _identity(where)
        if own in before:
            raise InputError(
                f"{where} is a link back to a folder that it is in, whose images would count again: remove it"
            )
        above |= {f"{where}{os.sep}{name}": before | {own} for name in folders}
        # Not Path objects: of a million files they would take half a minute.
        place = called + where[len(folder) :].replace(os.sep, "/")
        found += [f"{place}/{name}" for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _identity(folder: str | Path) -> tuple[int, int]:
    """What a folder and the links to it have in common."""
    state = Path(folder).stat()
    return state.st_dev, state.st_ino
