"""Fashion-MNIST from Debian's package, a folder, or torchvision's download."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from distill_lightning.data.augmentation import RandAugment
from distill_lightning.data.datamodules.in_memory import Images, InMemoryImageDataModule
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.errors import InputError, refusing

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class FashionMNISTDataModule(InMemoryImageDataModule):
    """Zalando's articles: 60,000 training and 10,000 test images, grey, 28x28 pixels, 10 classes.

    The validation images are drawn by ``seed`` from the training files; the test files are for test alone. Xiao, Rasul,
    Vollgraf: *Fashion-MNIST*, https://arxiv.org/abs/1708.07747

    Args:
        data_dir: folder with the four IDX files, packed (``.gz``) or not, or torchvision's root folder; ``None``: where
            the Debian package ``dataset-fashion-mnist`` puts them.
        download: fetch the files with torchvision into ``data_dir`` where they are missing.
        val_size: number of validation images; 0: none, and nothing is validated.
        test_size: number of test images, the first ones; ``None``: all 10,000.
        padding: pixels of zeros around a training image that its random crop may take in.
        flip: whether half of the training views are mirrored.
        cutout: side in pixels of a square of the mean colour in every training view; 0: none.
        randaugment: operations that are drawn for every training view; ``None``: none.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: a size that is not positive; from ``setup``: a missing or damaged file, or a size that is larger
            than the data.
    """

    num_classes = 10
    input_shape = (1, 28, 28)
    class_names = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    mean = 0.286
    std = 0.353

    def __init__(
        self,
        *,
        data_dir: str | Path | None = None,
        download: bool = False,
        val_size: int = 5000,
        test_size: int | None = None,
        padding: int = 2,
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
        if download and data_dir is None:
            raise InputError("download=True needs data_dir, the folder to download into")
        self.data_dir = DEBIAN_FOLDER if data_dir is None else Path(data_dir)
        self.download = download

    def prepare_data(self) -> None:
        """Download the files, where that was asked for."""
        if self.download:
            with refusing(f"{self.data_dir}: the download failed", OSError, RuntimeError):
                datasets.FashionMNIST(str(self.data_dir), download=True)

    def read(self) -> tuple[Images, Images]:
        """The training files' images and the test files'."""
        return self._pair("train"), self._pair("t10k")

    def _pair(self, part: str) -> Images:
        images = read_idx(self._find(f"{part}-images-idx3-ubyte"))
        targets = read_idx(self._find(f"{part}-labels-idx1-ubyte")).long()
        if images.shape[1:] != self.input_shape[1:] or targets.shape != images.shape[:1]:
            raise InputError(
                f"{self.data_dir}: the {part} files hold images {tuple(images.shape)} and labels "
                f"{tuple(targets.shape)}, not (N, 28, 28) and (N,): these are not Fashion-MNIST's files"
            )
        if len(targets) and int(targets.max()) >= len(self.class_names):
            raise InputError(
                f"{self.data_dir}: the {part} labels go up to {int(targets.max())}, not 9: these are not "
                "Fashion-MNIST's files"
            )
        return Images(images[:, None], targets)

    def _find(self, name: str) -> Path:
        folders = (self.data_dir, self.data_dir / "FashionMNIST" / "raw")
        for path in (folder / f"{name}{packed}" for folder in folders for packed in (".gz", "")):
            if path.is_file():
                return path
        raise InputError(
            f"no {name}.gz in {self.data_dir}: apt-get install dataset-fashion-mnist, or give data_dir, "
            "or data_dir with download=True"
        )


def read_idx(path: Path, *, limit: int = 2**28) -> Tensor:
    """Read an IDX file of bytes, packed with gzip or not: two zero bytes, type 8, rank, sizes (big-endian), data.

    Args:
        path: the file.
        limit: largest number of bytes; of a packed file, unpacked.

    Raises:
        InputError: the file is damaged, larger than the limit, or holds something else.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # In pieces: a packed file does not say how much it holds.
            content = b"".join(_pieces(path, file, limit))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): fetch it again") from error
    rank = content[3] if len(content) > 3 else 0
    start = 4 + 4 * rank
    if content[:3] != b"\x00\x00\x08" or len(content) < start:
        raise InputError(f"{path} is not an IDX file of bytes: fetch it again")
    shape = np.frombuffer(content, dtype=">u4", count=rank, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"{path} is damaged: {len(content) - start} bytes of data for shape {tuple(shape)}: fetch it again"
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())


def _pieces(path: Path, file: Any, limit: int) -> Iterator[bytes]:
    total = 0
    while piece := file.read(2**20):
        total += len(piece)
        if total > limit:
            raise InputError(
                f"{path} holds more than {limit:,} bytes: it is not one of Fashion-MNIST's files; others are read with "
                "a larger limit of read_idx"
            )
        yield piece
