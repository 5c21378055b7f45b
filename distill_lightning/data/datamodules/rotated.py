"""A regression whose answer is sometimes truly uncertain: by what angle was this image turned?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.data.datamodules.digits import DigitsDataModule
from distill_lightning.data.datamodules.fashion_mnist import FashionMNISTDataModule
from distill_lightning.data.datamodules.in_memory import Images, InMemoryImageDataModule
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.data.views import uniform_draws
from distill_lightning.errors import InputError

# Keeps the angles' random numbers apart from those of the crops.
_STREAM = 0x524F54


class _Rotated(InMemoryImageDataModule):
    """Turns the images of another data module, each by one angle of its own, which becomes its target."""

    num_targets = 1

    def _turn_by(self, max_angle: float) -> None:
        if not 0 < max_angle <= 180:
            raise InputError(f"max_angle is in degrees, above 0 and up to 180, got {max_angle}")
        self.max_angle = max_angle
        self.num_classes = None

    def samples(self, images: Images, index: Tensor, *, part: int) -> Images:
        """The images at ``index``, turned; an image's angle depends on the seed and its place in what was read."""
        draws = uniform_draws(self.seed + _STREAM, index, torch.full_like(index, part), 1)[:, 0]
        angles = ((2 * draws - 1) * math.radians(self.max_angle)).float()
        return Images(rotate(images.images[index], angles), angles[:, None])


class RotatedFashionMNISTDataModule(_Rotated, FashionMNISTDataModule):
    """Fashion-MNIST, every image turned counter-clockwise by an angle, uniform on ``[-max_angle, max_angle]``.

    The target is that angle in **radians**, ``(N, 1)``; ``num_targets`` is 1. An item that looks alike after a turn (a
    square bag) leaves its angle truly uncertain. Every image has one angle, the same in every epoch.

    Args:
        max_angle: in degrees.
        data_dir: folder with the four IDX files, packed (``.gz``) or not, or torchvision's root folder; ``None``: where
            the Debian package ``dataset-fashion-mnist`` puts them.
        download: fetch the files with torchvision into ``data_dir`` where they are missing.
        val_size: number of validation images; 0: none, and nothing is validated.
        test_size: number of test images, the first ones; ``None``: all 10,000.
        padding: pixels of zeros around a training image that its random crop may take in.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: a size that is not positive, an angle out of range; from ``setup``: as `FashionMNISTDataModule`.
    """

    def __init__(
        self,
        *,
        max_angle: float = 90.0,
        data_dir: str | Path | None = None,
        download: bool = False,
        val_size: int = 5000,
        test_size: int | None = None,
        padding: int = 0,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            download=download,
            val_size=val_size,
            test_size=test_size,
            padding=padding,
            # A mirrored image would be turned the other way, and RandAugment turns images itself.
            flip=False,
            cutout=0,
            randaugment=None,
            **options,
        )
        self._turn_by(max_angle)


class RotatedDigitsDataModule(_Rotated, DigitsDataModule):
    """scikit-learn's digits, every image turned counter-clockwise by an angle, uniform on ``[-max_angle, max_angle]``.

    The target is that angle in **radians**, ``(N, 1)``; ``num_targets`` is 1. A zero or an eight leaves it truly
    uncertain. Every image has one angle, the same in every epoch.

    Args:
        max_angle: in degrees.
        val_size: number of validation images; 0: none, and nothing is validated.
        test_size: number of test images.
        image_size: rows and columns.
        padding: pixels of zeros around a training image that its random crop may take in.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: a size that is not positive, an angle out of range; from ``setup``: as `DigitsDataModule`.
    """

    def __init__(
        self,
        *,
        max_angle: float = 90.0,
        val_size: int = 297,
        test_size: int = 500,
        image_size: int = 16,
        padding: int = 0,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(
            val_size=val_size,
            test_size=test_size,
            image_size=image_size,
            padding=padding,
            cutout=0,
            # It turns images itself.
            randaugment=None,
            **options,
        )
        self._turn_by(max_angle)


def rotate(images: Tensor, angles: Tensor) -> Tensor:
    """Turn images about their centres, bilinearly, with zeros where nothing was.

    Args:
        images: uint8 ``(N, C, H, W)``.
        angles: counter-clockwise, in radians, ``(N,)``.

    Returns:
        uint8 ``(N, C, H, W)``.
    """
    height, width = images.shape[2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # affine_grid says where each pixel comes from, in parts of the half height and width, the rows downwards.
    maps = torch.stack(
        [
            torch.stack([cos, -sin * height / width, zero], dim=1),
            torch.stack([sin * width / height, cos, zero], dim=1),
        ],
        dim=1,
    )
    parts = []
    for part, matrices in zip(torch.split(images, 4096), torch.split(maps, 4096), strict=True):
        grid = F.affine_grid(matrices, [*part.shape], align_corners=False)
        parts.append(F.grid_sample(part.float(), grid, align_corners=False).round().to(torch.uint8))
    return torch.cat(parts)
