"""scikit-learn's digits: real images inside a wheel."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from distill_lightning.data.datamodules.in_memory import Images, InMemoryImageDataModule
from distill_lightning.errors import InputError


class DigitsDataModule(InMemoryImageDataModule):
    """Handwritten digits, 1,797 grey images of 8x8 pixels, 10 classes; no download.

    The images are shuffled by ``seed``; the first ``test_size`` are for test, the next ``val_size`` for validation, the
    rest for training. Alpaydin, Kaynak: *Optical Recognition of Handwritten Digits*, UCI, as in
    `sklearn.datasets.load_digits`.

    Args:
        subset: number of training images, drawn by ``seed``; ``None``: all that the other splits leave.
        val_size: number of validation images.
        test_size: number of test images.
        image_size: rows and columns; other than 8 enlarges the images bilinearly, once.
        batch_size: samples per batch and process.
        padding: pixels of zeros around a training image that its random crop may take in.
        views: number of different views of a training image; ``None``: a new one every epoch.
        partners: whether each training view comes with another image to be mixed with, see `Batch`.
        seed: of the split and of the views.
        order_seed: of the order of the training images; ``None``: ``seed``.
        num_workers: worker processes of the loaders.

    Raises:
        InputError: a size that is not positive, or, from ``setup``, one that is larger than the data.
    """

    num_classes = 10
    class_names = tuple("0123456789")
    mean = 0.305
    std = 0.318

    def __init__(
        self,
        *,
        subset: int | None = None,
        val_size: int = 297,
        test_size: int = 500,
        image_size: int = 16,
        batch_size: int = 64,
        padding: int = 1,
        views: int | None = None,
        partners: bool = False,
        seed: int = 0,
        order_seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            subset=subset,
            val_size=val_size,
            test_size=test_size,
            batch_size=batch_size,
            padding=padding,
            views=views,
            partners=partners,
            seed=seed,
            order_seed=order_seed,
            num_workers=num_workers,
        )
        if image_size < 1:
            raise InputError(f"image_size must be at least 1, got {image_size}")
        if test_size is None:
            raise InputError("DigitsDataModule has no test files of its own: test_size must be a number")
        self.test_count = test_size
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
        if self.test_count >= len(order):
            raise InputError(f"test_size={self.test_count} leaves none of {len(order)} digits to train on")
        return every.take(order[self.test_count :]), every.take(order[: self.test_count])
