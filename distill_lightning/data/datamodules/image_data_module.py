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
        val_size: number of validation images; ``None``: all that are for validation alone.
        test_size: number of test images; ``None``: all.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: an option is out of range.
    """

    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    def __init__(self, *, val_size: int | None, test_size: int | None = None, **options: Unpack[ViewOptions]) -> None:
        super().__init__(val_size=val_size, test_size=test_size, **options)

    def split(self, rest: int, test: int, val: int | None = None) -> dict[str, Tensor]:
        """Which samples belong to ``"train"``, ``"val"`` and ``"test"``, as their places in what was read.

        ``"rest"`` are the training samples that ``subset`` leaves out, see `UnlabelledSampler`.

        Args:
            rest: number of samples for training, and for validation where no others are for that.
            test: number of samples for test.
            val: number of samples for validation alone; ``None``: there are none.

        Raises:
            InputError: a split is larger than the data, or it is not said how large it is to be.
        """
        name = type(self).__name__
        if val is None and self.val_size is None:
            raise InputError(f"{name}: give val_size, the number of training images to be drawn for validation")
        drawn = self.val_size or 0 if val is None else 0
        available = rest - drawn
        if available < 1:
            raise InputError(f"{name}: val_size={self.val_size} leaves none of {rest} images to train on")
        if self.subset is not None and self.subset > available:
            left = f" that val_size={self.val_size} leaves" if drawn else ""
            raise InputError(f"{name}: subset={self.subset} is larger than the {available} training images{left}")
        for what, size, count in (("val", self.val_size, val), ("test", self.test_size, test)):
            if count is not None and size is not None and size > count:
                whole = {"val": "validation", "test": "test"}[what]
                raise InputError(f"{name}: {what}_size={size} is larger than the {count} {whole} images")
        order = torch.randperm(rest, generator=torch.Generator().manual_seed(self.seed))
        return {
            "train": order[drawn:][: self.subset],
            "rest": order[drawn:][available if self.subset is None else self.subset :],
            "val": order[:drawn] if val is None else torch.arange(self.val_size or val),
            "test": torch.arange(self.test_size or test),
        }
