"""What the image sets share: a split by number."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.data.datamodules.view_data_module import ViewDataModule
from distill_lightning.errors import InputError


class ImageDataModule(ViewDataModule):
    """Base of the image sets, which are split by number; the test images are never part of training or validation.

    A subclass sets ``class_names`` besides what a `ViewDataModule` needs. Validation images are drawn by ``seed`` from
    the training files, test images are the first ones.

    Args:
        val_size: number of validation images.
        test_size: number of test images; ``None``: all.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: an option is out of range.
    """

    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    def __init__(self, *, val_size: int, test_size: int | None = None, **options: Unpack[ViewOptions]) -> None:
        super().__init__(val_size=val_size, test_size=test_size, **options)

    def split(self, rest: int, test: int) -> dict[str, Tensor]:
        """Which samples belong to ``"train"``, ``"val"`` and ``"test"``, as their places in what was read.

        Args:
            rest: number of samples for training and validation.
            test: number of samples for test.

        Raises:
            InputError: a split is larger than the data.
        """
        name = type(self).__name__
        available = rest - self.val_size
        if available < 1:
            raise InputError(f"{name}: val_size={self.val_size} leaves none of {rest} images to train on")
        if self.subset is not None and self.subset > available:
            raise InputError(
                f"{name}: subset={self.subset} is larger than the {available} training images that "
                f"val_size={self.val_size} leaves"
            )
        if self.test_size is not None and self.test_size > test:
            raise InputError(f"{name}: test_size={self.test_size} is larger than the {test} test images")
        order = torch.randperm(rest, generator=torch.Generator().manual_seed(self.seed))
        return {
            "train": order[self.val_size :][: self.subset],
            "val": order[: self.val_size],
            "test": torch.arange(self.test_size or test),
        }
