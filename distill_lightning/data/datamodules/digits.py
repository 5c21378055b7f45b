"""scikit-learn's digits: real images inside a wheel."""

from __future__ import annotations

from typing import Unpack

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from distill_lightning.data.augmentation import RandAugment
from distill_lightning.data.datamodules.in_memory import Images, InMemoryImageDataModule
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.errors import InputError


class DigitsDataModule(InMemoryImageDataModule):
    """Handwritten digits, 1,797 grey images of 8x8 pixels, 10 classes; no download.

    The images are shuffled by ``seed``; the first ``test_size`` are for test. The validation images are drawn by
    ``seed`` from the rest, and what remains is for training. Alpaydin, Kaynak: *Optical Recognition of Handwritten
    Digits*, UCI, as in `sklearn.datasets.load_digits`.

    Args:
        val_size: number of validation images; 0: none, and nothing is validated.
        test_size: number of test images.
        image_size: rows and columns; other than 8 enlarges the images bilinearly, once.
        padding: pixels of zeros around a training image that its random crop may take in.
        cutout: side in pixels of a square of the mean colour in every training view; 0: none.
        randaugment: operations that are drawn for every training view; ``None``: none.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: a size that is not positive, or, from ``setup``, one that is larger than the data.

    Example:
        >>> from distill_lightning import DigitsDataModule
        >>> data = DigitsDataModule(batch_size=8)
        >>> len(data.dataset("train"))
        1000
        >>> next(iter(data.val_dataloader())).input.shape
        torch.Size([8, 1, 16, 16])
    """

    test_size: int  # required: there is no separate test set
    num_classes = 10
    class_names = tuple("0123456789")
    mean = 0.305
    std = 0.318

    def __init__(
        self,
        *,
        val_size: int = 297,
        test_size: int = 500,
        image_size: int = 16,
        padding: int = 1,
        cutout: int = 0,
        randaugment: RandAugment | None = None,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(
            val_size=val_size,
            test_size=test_size,
            padding=padding,
            # A mirrored digit is not a digit.
            flip=False,
            cutout=cutout,
            randaugment=randaugment,
            **options,
        )
        if image_size < 1:
            raise InputError(f"image_size must be at least 1, got {image_size}")
        if test_size is None:
            raise InputError("DigitsDataModule has no test files of its own: test_size must be a number")
        self.image_size = image_size
        self.input_shape = (1, image_size, image_size)

    def read(self) -> tuple[Images, Images]:
        """The shuffled images: all but the first ``test_size``, and these."""
        data = load_digits()
        pixels = torch.from_numpy(data.images)[:, None] * (255 / 16)
        if self.image_size != 8:
            pixels = F.interpolate(pixels, size=self.input_shape[1:], mode="bilinear", align_corners=False)
        every = Images(pixels.round().to(torch.uint8), torch.from_numpy(data.target).long())
        order = torch.randperm(len(every.targets), generator=torch.Generator().manual_seed(self.seed))
        if self.test_size >= len(order):
            raise InputError(f"test_size={self.test_size} leaves none of {len(order)} digits to train on")
        return every.take(order[self.test_size :]), every.take(order[: self.test_size])
