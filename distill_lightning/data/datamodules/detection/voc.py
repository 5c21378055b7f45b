"""Detection on folders in the layout of Pascal VOC."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Unpack

from pytorch_lightning.utilities import rank_zero_warn
from torchvision import datasets

from distill_lightning.data.datamodules.detection.annotation import Annotation, read_annotation
from distill_lightning.data.datamodules.detection.augmentation import DetectionAugmentation
from distill_lightning.data.datamodules.detection.files import AnnotatedFile, AnnotatedFiles, DetectionFiles
from distill_lightning.data.datamodules.image_data_module import ImageDataModule
from distill_lightning.data.datamodules.image_file import SUFFIXES
from distill_lightning.data.datamodules.options import LoadingOptions
from distill_lightning.errors import InputError, check_one_of, refusing

# Boxes that a warning names.
_SHOWN = 10
# Those of Pascal VOC, for sets that are not there yet.
_CLASS_NAMES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep
    sofa train tvmonitor
"""
# The splits that torchvision can fetch.
_KNOWN = re.compile(r"VOC20(07|08|09|10|11|12)/(train|trainval|val)|VOC2007/test")


class _Image(NamedTuple):
    """An image of a split: the folder of its set, its name without the suffix, and the file and line that list it."""

    folder: Path
    name: str
    line: str


class VOCDetectionDataModule(ImageDataModule):
    """Detection on one or several sets in the layout of Pascal VOC; yields `DetectionBatch`.

    ::

        data_dir/[VOCdevkit/][VOC2007/]JPEGImages/000005.jpg           an image, JPEG or of another kind
        data_dir/[VOCdevkit/][VOC2007/]Annotations/000005.xml          its size, and the objects on it
        data_dir/[VOCdevkit/][VOC2007/]ImageSets/Main/train.txt        a split: a name such as 000005 a line

    ``data_dir`` is such a folder, or one that holds several. A split's name, ``trainval``, means the files of that name
    in all of them; ``VOC2007/trainval`` that of one. So the usual training on VOC07+12 and test on VOC07 is
    ``train="trainval", val=None, val_size=500, test="VOC2007/test"``. No image may be in two splits. With
    ``download=True`` each split is named with its set: ``train=["VOC2007/trainval", "VOC2012/trainval"]``.

    Labels run from 1 in the order of ``class_names``; 0 is the background. Boxes are in pixels from the image's left
    upper corner: VOC's ``xmin, ymin, xmax, ymax``, which are counted from 1 and include the last pixel, become
    ``xmin - 1, ymin - 1, xmax, ymax`` (see `read_annotation`). A box without an area is left out, and said so once. An
    image without objects is kept.

    Args:
        data_dir: the folder.
        download: fetch the sets that the splits name, with torchvision into ``data_dir``, where a split is missing. The
            classes are Pascal VOC's, unless ``class_names`` are given.
        train: name of the training split, or several.
        val: name of the validation split, or several; ``None``: ``val_size`` images are drawn from the training split
            by ``seed``.
        test: name of the test split, or several.
        class_names: of all classes, in the order of their labels; ``None``: the sorted names of the training files.
        keep_difficult: whether objects marked as difficult are trained on. In validation and test they are always
            there, with ``difficult=True``, for VOC's rule that such an object is neither found nor missed.
        channels: 3, or 1 for grey images.
        augmentation: of the training images; see `DetectionAugmentation`.
        on_damaged: ``"error"``: a box outside the image, by more than a pixel, or upside down is an error;
            ``"mend"``: it is cut off at the image's edge, or left out where nothing remains, and said so once.
        val_size: number of validation images, the first ones, or to be drawn; ``None``: all.
        test_size: number of test images, the first ones; ``None``: all.
        options: how samples are chosen, ordered and loaded; see `LoadingOptions`. ``batch_size`` is 8 by default,
            because images are large and a detector keeps much of each.

    Attributes:
        faults: a line for each box that was left out or cut off.

    Raises:
        InputError: an option is out of range, or ``data_dir`` holds no such folder; where the files are read (here if
            ``class_names`` are not given, else in ``setup``): a split is missing, no text, empty, larger than the data
            or shares an image with another; an image or annotation is missing; an annotation cannot be used or has a
            class that is not known; from a loader: an image cannot be decoded, or is not as large as its annotation
            says.

    Everingham et al.: *The PASCAL Visual Object Classes Challenge: A Retrospective*,
    https://doi.org/10.1007/s11263-014-0733-5

    Example:
        >>> data = VOCDetectionDataModule(data_dir="data/bccd", batch_size=4)  # doctest: +SKIP
        >>> data.class_names  # doctest: +SKIP
        ('Platelets', 'RBC', 'WBC')
    """

    task = "detection"
    input_shape = None  # type: ignore[assignment]  # images of unlike sizes
    num_classes: int
    default_workers: int | None = None

    def __init__(
        self,
        *,
        data_dir: str | Path,
        download: bool = False,
        train: str | list[str] = "train",
        val: str | list[str] | None = "val",
        test: str | list[str] = "test",
        class_names: list[str] | None = None,
        keep_difficult: bool = False,
        channels: int = 3,
        augmentation: DetectionAugmentation = DetectionAugmentation(),
        on_damaged: Literal["error", "mend"] = "error",
        val_size: int | None = None,
        test_size: int | None = None,
        **options: Unpack[LoadingOptions],
    ) -> None:
        options.setdefault("batch_size", 8)
        super().__init__(
            val_size=val_size, test_size=test_size, views=None, views_per_load=1, partners=False, **options
        )
        check_one_of("on_damaged", on_damaged, ("error", "mend"))
        if channels not in (1, 3):
            raise InputError(f"channels must be 1 or 3, got {channels}")
        is_string = isinstance(class_names, str)
        if class_names is not None and (is_string or not class_names or len(set(class_names)) < len(class_names)):
            raise InputError(f"class_names must be a list of at least one name, and each once, got {class_names!r}")
        self.data_dir, self.download = Path(data_dir), download
        self.in_channels = self.channels = channels
        self.keep_difficult, self.augmentation, self.on_damaged = keep_difficult, augmentation, on_damaged
        self.faults: list[str] = []
        given = {"train": train, "val": val, "test": test}
        self._names = {split: [name] if isinstance(name, str) else name for split, name in given.items() if name}
        self._read: dict[str, AnnotatedFiles] = {}
        self._splits: dict[str, AnnotatedFiles] = {}
        unknown = [name for names in self._names.values() for name in names if download and not _KNOWN.fullmatch(name)]
        if unknown:
            raise InputError(
                f"download=True: torchvision cannot fetch the split {unknown[0]!r}: name it with its set, as in "
                "'VOC2007/trainval' (the test images of VOC2007 alone are public)"
            )
        if class_names is not None:
            self.class_names = tuple(class_names)
        elif download:
            self.class_names = tuple(_CLASS_NAMES.split())
        else:
            self._read_files()
        self.num_classes = len(self.class_names)

    def prepare_data(self) -> None:
        """Download the sets, where that was asked for and a split is missing.

        Raises:
            InputError: the download failed.
        """
        for name in (name for names in self._names.values() for name in names if self.download):
            chosen, _, split = name.partition("/")
            folders = [folder for folder in _folders(self.data_dir) if folder.name == chosen]
            if not any((folder / f"ImageSets/Main/{split}.txt").is_file() for folder in folders):
                year = chosen.removeprefix("VOC")
                with refusing(f"{self.data_dir}: the download failed", OSError, RuntimeError):
                    datasets.VOCDetection(str(self.data_dir), year=year, image_set=split, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations and split them; a second call does nothing."""
        if self._splits:
            return
        if not self._read:
            self._read_files()
        read = self._read
        chosen = self.split(*(len(read[split].paths) for split in ("train", "test", "val") if split in read))
        self._splits = {split: read.get(split, read["train"]).take(index) for split, index in chosen.items()}
        if not self.keep_difficult:
            self._splits["train"] = self._splits["train"].without_difficult()

    def dataset(self, split: str, *, augment: bool = False) -> DetectionFiles:
        """One split, ``"train"``, ``"val"`` or ``"test"``; without ``augment`` every view is the plain image."""
        self.setup()
        return DetectionFiles(
            self.data_dir,
            self._splits[split],
            channels=self.channels,
            augmentation=self.augmentation if augment else None,
            seed=self.seed,
        )

    def file_names(self, split: str) -> list[str]:
        """The image files of a split, below ``data_dir``; the number of each is its ``image_id``."""
        dataset = self.dataset(split)
        return [dataset.file_name(place) for place in range(len(dataset))]

    def _read_files(self) -> None:
        """Read which images there are, and their annotations; those of training tell the classes."""
        images = self._images()
        found = {
            split: [(image, self._annotation(image)) for image in listed.values()] for split, listed in images.items()
        }
        if not hasattr(self, "class_names"):
            self.class_names = tuple(sorted({name for _, annotation in found["train"] for name in annotation.names}))
            if not self.class_names:
                raise InputError(f"{self.data_dir}: no training image has an object: give class_names")
        labels = {name: label for label, name in enumerate(self.class_names, start=1)}
        for split, several in found.items():
            self._read[split] = AnnotatedFiles.of(
                [self._file(image, annotation, labels) for image, annotation in several]
            )
        self.faults = [fault for several in found.values() for _, annotation in several for fault in annotation.faults]
        if self.faults:
            shown = "".join(f"\n  {fault}" for fault in self.faults[:_SHOWN])
            more = f"\n  and {len(self.faults) - _SHOWN:,} more, which are in faults" * (len(self.faults) > _SHOWN)
            cut = sum(len(annotation.cut) for several in found.values() for _, annotation in several)
            ways = {0: "left out", len(self.faults): "cut off at the image's edge"}
            did = ways.get(cut, " or ".join(ways.values()))
            number = f"{len(self.faults):,} box{'es' if len(self.faults) > 1 else ''}"
            rank_zero_warn(f"{type(self).__name__}: {number} in {self.data_dir} {did}:{shown}{more}")

    def _images(self) -> dict[str, dict[str, _Image]]:
        """The images of each split by set and name, in the order of the files that list them."""
        folders = _folders(self.data_dir)
        if not folders:
            raise InputError(
                f"{self.data_dir} holds no folder in VOC's layout, with Annotations, ImageSets/Main and JPEGImages: "
                "give data_dir, one of them or the folder they are in; Pascal VOC is at "
                "http://host.robots.ox.ac.uk/pascal/VOC, and download=True fetches it"
            )
        found: dict[str, dict[str, _Image]] = {}
        for split, names in self._names.items():
            own = found[split] = {}
            for image in (image for name in names for image in _listed(self.data_dir, folders, split, name)):
                key = f"{image.folder.name}/{image.name}"
                twice = next((other for other in found if key in found[other]), None)
                if twice is not None:
                    if twice == split:
                        raise InputError(
                            f"{image.line}: {image.name} is listed twice in {split}, first in {own[key].line}: take "
                            "one of the lines out"
                        )
                    raise InputError(
                        f"{image.line}: {image.name} is already in {twice} ({found[twice][key].line}): an image may be "
                        "in one split alone; with val=null and val_size, images are drawn from the training split"
                    )
                own[key] = image
            if not own:
                raise InputError(f"{self.data_dir}: {split} ({', '.join(names)}) has no image: give another split")
        return found

    def _annotation(self, image: _Image) -> Annotation:
        path = image.folder / "Annotations" / f"{image.name}.xml"
        if not path.is_file():
            if re.fullmatch(r"\S+\s+(-1|0|1)", image.name):
                raise InputError(
                    f"{image.line}: {image.name!r} is an image and whether a class is on it: give the split itself, "
                    "train='train' for example, not the list of one of its classes"
                )
            raise InputError(f"{image.line}: {image.name} has no annotation {path}: add it, or take the line out")
        return read_annotation(path, mend=self.on_damaged == "mend")

    def _file(self, image: _Image, annotation: Annotation, labels: Mapping[str, int]) -> AnnotatedFile:
        named = zip(annotation.numbers, annotation.names, strict=True)
        unknown = [f"object {number} ({name})" for number, name in named if name not in labels]
        if unknown:
            raise InputError(
                f"{image.folder / 'Annotations' / image.name}.xml: {unknown[0]} is none of the classes "
                f"{', '.join(labels)}: mend it, or give class_names"
            )
        return AnnotatedFile(
            _image_file(image).relative_to(self.data_dir).as_posix(),
            (annotation.width, annotation.height),
            annotation.boxes,
            [labels[name] for name in annotation.names],
            annotation.difficult,
        )


def _folders(data_dir: Path) -> list[Path]:
    """The folders in VOC's layout in a folder, or itself; torchvision unpacks VOC2011 two folders deeper."""
    if (data_dir / "ImageSets").is_dir():
        return [data_dir]
    inside = [data_dir, data_dir / "VOCdevkit", data_dir / "TrainVal/VOCdevkit"]
    return sorted(entry.parent for folder in inside if folder.is_dir() for entry in folder.glob("*/ImageSets"))


def _listed(data_dir: Path, folders: Sequence[Path], split: str, name: str) -> list[_Image]:
    """The images that the files of a split's name list."""
    chosen, _, part = name.rpartition("/")
    lists = [
        (folder, folder / "ImageSets" / "Main" / f"{part}.txt")
        for folder in folders
        if not chosen or folder.name == chosen
    ]
    present = [(folder, path) for folder, path in lists if path.is_file()]
    if not present:
        wanted = f"{', '.join(str(path) for _, path in lists)} is not there" if lists else f"no folder {chosen}"
        raise InputError(
            f"{data_dir}: {split}={name!r}: {wanted}: give {split}, the name of a split that is there (where the test "
            "set is not public, test='val' with val=null and val_size)"
        )
    return [
        _Image(folder, line.strip(), f"{path}:{number}")
        for folder, path in present
        for number, line in enumerate(_text(path).splitlines(), start=1)
        if line.strip()
    ]


def _text(path: Path) -> str:
    with refusing(f"{path} is no text in UTF-8, save it so", OSError, ValueError):
        return path.read_text(encoding="utf-8-sig")


def _image_file(image: _Image) -> Path:
    """The image's file, of whichever kind it is."""
    folder = image.folder / "JPEGImages"
    for suffix in (".jpg", *SUFFIXES, *map(str.upper, SUFFIXES)):
        path = folder / f"{image.name}{suffix}"
        if path.is_file():
            return path
    raise InputError(f"{image.line}: there is no image {folder / image.name}.jpg: add it, or take the line out")
