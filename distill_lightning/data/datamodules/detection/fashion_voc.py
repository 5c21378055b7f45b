"""A detection set for any machine, written as a folder in VOC's layout."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack
from xml.etree import ElementTree as ET

from PIL import Image

from distill_lightning.data.datamodules.detection.augmentation import DetectionAugmentation
from distill_lightning.data.datamodules.detection.scenes import SCENES_VERSION, SPLITS, FashionVOC, Scene
from distill_lightning.data.datamodules.detection.voc import VOCDetectionDataModule
from distill_lightning.data.datamodules.options import LoadingOptions
from distill_lightning.errors import InputError, refusing, refusing_to_write

_SET = "VOC2007"
_TOLD = "fashion_voc.json"
_QUALITY = 92


def write_fashion_voc(folder: str | Path, pictures: FashionVOC = FashionVOC()) -> None:
    """Write pictures and annotations as a folder in VOC's layout, whole or not at all.

    ::

        folder/VOC2007/JPEGImages/train_000000.jpg            grey
        folder/VOC2007/Annotations/train_000000.xml           size; name, difficult and bndbox of each object
        folder/VOC2007/ImageSets/Main/{train,val,test}.txt
        folder/fashion_voc.json                               the options

    A folder that is there with the same options is left as it is.

    Args:
        folder: the folder.
        pictures: what is drawn, and how much of it.

    Raises:
        InputError: the folder is there with other options, or is another one; it cannot be written; or Fashion-MNIST is
            missing or damaged.

    Example:
        >>> import tempfile
        >>> from distill_lightning import FashionVOC, VOCDetectionDataModule, write_fashion_voc
        >>> folder = tempfile.mkdtemp() + "/digits"
        >>> write_fashion_voc(folder, FashionVOC(items="digits", images=(4, 1, 2), size=64, item_size=(16, 24)))
        >>> len(VOCDetectionDataModule(data_dir=folder, class_names=list("0123456789")).dataset("train"))
        4
    """
    folder = Path(folder)
    if _is_written(folder, pictures):
        return
    partial = folder.with_name(f"{folder.name}.partial.{os.getpid()}")
    with refusing_to_write(f"write_fashion_voc: {folder}"):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(partial, pictures)
            # Another process may have been faster.
            if not _is_written(folder, pictures):
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_written(folder: Path, pictures: FashionVOC) -> bool:
    """Whether a folder has been written with these options."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    told = folder / _TOLD
    if not told.is_file():
        raise InputError(f"{folder} is there, and was not written by FashionVOC: give another folder")
    with refusing(f"{told} is damaged, remove {folder}", ValueError, TypeError, AttributeError):
        known = dict(json.loads(told.read_text()))
    options = _options(pictures)
    other = [
        f"{name}={known.get(name)!r}, not {value!r}" for name, value in options.items() if known.get(name) != value
    ]
    if other:
        raise InputError(f"{folder} was written with {'; '.join(other)}: remove it, or give another folder")
    return True


def _options(pictures: FashionVOC) -> dict[str, Any]:
    """What the pictures depend on, as JSON gives it back."""
    options = {name: value for name, value in asdict(pictures).items() if name != "items_dir"}
    return dict(json.loads(json.dumps({"version": SCENES_VERSION, **options})))


def _write(folder: Path, pictures: FashionVOC) -> None:
    images, annotations, lists = (folder / _SET / part for part in ("JPEGImages", "Annotations", "ImageSets/Main"))
    for part in (images, annotations, lists):
        part.mkdir(parents=True)
    for split, count in zip(SPLITS, pictures.images, strict=True):
        names = [f"{split}_{number:06}" for number in range(count)]
        for name, scene in zip(names, pictures.scenes(split, range(count)), strict=True):
            Image.fromarray(scene.pixels).save(images / f"{name}.jpg", quality=_QUALITY)
            tree = _annotation(f"{name}.jpg", scene, pictures)
            ET.indent(tree, "\t")
            (annotations / f"{name}.xml").write_text(ET.tostring(tree, encoding="unicode") + "\n")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / _TOLD).write_text(json.dumps(_options(pictures), indent=1) + "\n")


def _annotation(filename: str, scene: Scene, pictures: FashionVOC) -> ET.Element:
    height, width = scene.pixels.shape
    root = _element("annotation", folder=_SET, filename=filename)
    root.append(_element("size", width=width, height=height, depth=1))
    for item, (label, hidden) in enumerate(zip(scene.classes, scene.hidden, strict=True)):
        left, top, right, bottom = scene.box(item)
        name = pictures.class_names[label]
        found = _element("object", name=name, truncated=0, difficult=int(hidden > pictures.difficult))
        # Counted from 1, the last pixel included.
        found.append(_element("bndbox", xmin=left + 1, ymin=top + 1, xmax=right, ymax=bottom))
        root.append(found)
    return root


def _element(tag: str, **texts: object) -> ET.Element:
    """An element with others of some text in it."""
    element = ET.Element(tag)
    for name, text in texts.items():
        ET.SubElement(element, name).text = str(text)
    return element


class FashionVOCDataModule(VOCDetectionDataModule):
    """Detection of the items on `FashionVOC`'s pictures, which are written into a folder when it is not there yet.

    Args:
        data_dir: the folder.
        pictures: what is drawn, and how much of it.
        keep_difficult: whether items that are mostly hidden are trained on; see `VOCDetectionDataModule`.
        channels: 3, or 1; the pictures are grey.
        augmentation: of the training images.
        val_size: number of validation images, the first ones; ``None``: all.
        test_size: number of test images, the first ones; ``None``: all.
        options: how samples are chosen, ordered and loaded; see `LoadingOptions`. ``batch_size`` is 8 by default.

    Raises:
        InputError: as `write_fashion_voc` and `VOCDetectionDataModule`, from ``prepare_data`` or ``setup``.

    Example:
        >>> import tempfile
        >>> from distill_lightning import FashionVOC, FashionVOCDataModule
        >>> pictures = FashionVOC(items="digits", images=(4, 1, 2), size=64, item_size=(16, 24))
        >>> data = FashionVOCDataModule(data_dir=tempfile.mkdtemp() + "/digits", pictures=pictures, batch_size=2)
        >>> len(data.train_dataloader())
        2
    """

    # Small pictures are decoded faster than workers start.
    default_workers = 0

    def __init__(
        self,
        *,
        data_dir: str | Path = "data/fashion_voc",
        pictures: FashionVOC = FashionVOC(),
        keep_difficult: bool = False,
        channels: int = 3,
        augmentation: DetectionAugmentation = DetectionAugmentation(),
        val_size: int | None = None,
        test_size: int | None = None,
        **options: Unpack[LoadingOptions],
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            class_names=list(pictures.class_names),
            keep_difficult=keep_difficult,
            channels=channels,
            augmentation=augmentation,
            val_size=val_size,
            test_size=test_size,
            **options,
        )
        self.pictures = pictures

    def prepare_data(self) -> None:
        """Write the folder, if it is not there."""
        write_fashion_voc(self.data_dir, self.pictures)

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations, of a folder that is written if it is not there; a second call does nothing."""
        if not self._splits:
            self.prepare_data()
        super().setup(stage)
