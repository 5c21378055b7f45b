"""Files in the formats that the data sets are published in, small, and as lightning-bolts' data modules read them."""

import io
import pickle
import struct
from typing import ClassVar

import numpy as np
import torchvision
from PIL import Image
from pl_bolts.datamodules import CIFAR10DataModule, FashionMNISTDataModule, VOCDetectionDataModule

CIFAR_FILES = {f"data_batch_{number}": 16 for number in range(1, 6)} | {"test_batch": 20}
FASHION_PARTS = {"train": 80, "t10k": 20}
VOC_IMAGES = {"train": 4, "val": 2}


def seen(count, shape, *, seed):
    """Images of noise ``(count, *shape)`` and their classes: of class ``k``, the ``k``-th of ten columns is bright."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    pixels = draw.integers(0, 100, (count, *shape), dtype=np.uint8)
    width = shape[-1] // 10
    for image, label in zip(pixels, labels, strict=True):
        image[..., width * label : width * (label + 1)] += 150
    return pixels, labels


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which Python 3 reads in the encoding that it is told."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def _pickled(content):
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def write_cifar10(folder):
    """``cifar-10-batches-py``, a pickled dict each, as its authors wrote them with Python 2."""
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for seed, (name, count) in enumerate(CIFAR_FILES.items()):
        pixels, labels = seen(count, (3, 32, 32), seed=seed)
        names = [f"{name}_{number}.png".encode() for number in range(count)]
        content = {
            b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": pixels.reshape(count, -1),
            b"filenames": names,
        }  # fmt: skip
        (place / name).write_bytes(_pickled(content))
    (place / "batches.meta").write_bytes(_pickled({b"label_names": [b"one"] * 10}))
    return folder


class WrittenCIFAR10(torchvision.datasets.CIFAR10):
    """torchvision's, for files that have other checksums than the published ones."""

    train_list: ClassVar = [[name, None] for name in CIFAR_FILES if name != "test_batch"]
    test_list: ClassVar = [["test_batch", None]]
    meta: ClassVar = {**torchvision.datasets.CIFAR10.meta, "md5": None}


class WrittenCIFAR10DataModule(CIFAR10DataModule):
    """lightning-bolts', of such files."""

    dataset_cls = WrittenCIFAR10


def cifar10(folder, **options):
    return WrittenCIFAR10DataModule(str(folder), batch_size=16, pin_memory=False, **options)


def write_fashion_mnist(folder):
    """Four files in the IDX format: two zero bytes, type, rank, sizes as big-endian 32-bit numbers, data."""
    place = folder / "FashionMNIST" / "raw"
    place.mkdir(parents=True)
    for part, count in FASHION_PARTS.items():
        for kind, values in zip(("images-idx3", "labels-idx1"), seen(count, (28, 28), seed=count), strict=True):
            head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (place / f"{part}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return folder


def fashion_mnist(folder, **options):
    return FashionMNISTDataModule(str(folder), batch_size=16, pin_memory=False, **options)


def write_voc(folder):
    """``VOCdevkit/VOC2012``: a white sheep or cow on each image, or both."""
    place = folder / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (place / part).mkdir(parents=True)
    number = 0
    for split, count in VOC_IMAGES.items():
        names = [f"2012_{number + further:06}" for further in range(count)]
        number += count
        (place / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            _write_voc_image(place, name)
    return folder


def _write_voc_image(place, name):
    pixels = np.full((32, 40, 3), 60, dtype=np.uint8)
    objects = ""
    for kind, left in [("sheep", 4), ("cow", 22)][: 1 + int(name[-1]) % 2]:
        pixels[8:24, left : left + 14] = 255
        corners = {"xmin": left + 1, "ymin": 9, "xmax": left + 14, "ymax": 24}
        box = "".join(f"<{side}>{value}</{side}>" for side, value in corners.items())
        objects += f"<object><name>{kind}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
    Image.fromarray(pixels).save(place / "JPEGImages" / f"{name}.jpg")
    (place / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"
    )


class WrittenVOCDataModule(VOCDetectionDataModule):
    """lightning-bolts', which would download anew what lies there."""

    def prepare_data(self):
        pass


def voc(folder, **options):
    return WrittenVOCDataModule(str(folder), batch_size=2, pin_memory=False, **options)


class ForegroundVOCDataModule(WrittenVOCDataModule):
    """Without the background among the classes."""

    num_classes = 20
