"""Augmentation of images and their boxes, as a function of a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from distill_lightning.choices import Choice
from distill_lightning.errors import InputError

# What a view is filled with where there was no image.
_GREY = 128
# Pixels that a box must have on each side to be kept.
_SMALLEST = 1.0


@dataclass(frozen=True)
class DetectionAugmentation(Choice):
    """What is done at random to the training images of a detection, one after the other as they stand here.

    The transforms are those of `torchvision.transforms.v2`, their ranges its defaults, which are SSD's. Boxes go with
    the image, are cut off at its edges, and left out where less than a pixel remains. What is drawn is a function of
    the data module's seed, the image and the view alone.

    Args:
        photometric: probability of each distortion of brightness, contrast, saturation, hue and order of the channels.
        zoom_out: probability that the image becomes a part, of at least a quarter of height and width, of a larger grey
            one.
        iou_crop: probability of a random part of the image, of which boxes are kept whose centres are in it.
        flip: probability that the image is mirrored.
        sizes: lengths in pixels of the shorter side, one of which is drawn; empty: images are not resized.
        max_size: upper bound of the longer side of a resized image; ``None``: none.

    Raises:
        InputError: a probability outside [0, 1], a size without pixels, or ``max_size`` without ``sizes``.

    Liu et al.: *SSD: Single Shot MultiBox Detector*, https://arxiv.org/abs/1512.02325

    Example:
        >>> import torch
        >>> from distill_lightning.data.datamodules import DetectionAugmentation
        >>> image, boxes = torch.zeros(3, 10, 20, dtype=torch.uint8), torch.tensor([[1.0, 2.0, 4.0, 6.0]])
        >>> image, boxes, kept = DetectionAugmentation(flip=1.0)(image, boxes, seed=0)
        >>> boxes
        tensor([[16.,  2., 19.,  6.]])
    """

    photometric: float = 0.0
    zoom_out: float = 0.0
    iou_crop: float = 0.0
    flip: float = 0.5
    sizes: tuple[int, ...] = ()
    max_size: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_numbers()
        for name in ("photometric", "zoom_out", "iou_crop", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"DetectionAugmentation: {name} must be in [0, 1], got {getattr(self, name)}")
        if any(size < 1 for size in (*self.sizes, self.max_size or 1)):
            raise InputError(
                f"DetectionAugmentation: sizes and max_size must be at least 1, got {self.sizes} and {self.max_size}"
            )
        if self.max_size is not None and not self.sizes:
            raise InputError("DetectionAugmentation: max_size bounds the resizing to sizes: give these, too")

    def __call__(self, image: Tensor, boxes: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """A random view of an image.

        Args:
            image: uint8 ``(C, H, W)``.
            boxes: left, top, right and bottom in pixels, float32 ``(M, 4)``.
            seed: of what is drawn.

        Returns:
            The view, uint8 ``(C, H', W')``; its boxes, float32 ``(M', 4)``; and which boxes were kept, bool ``(M,)``.
        """
        kept = torch.ones(len(boxes), dtype=torch.bool)
        view: Any = tv_tensors.Image(image)
        held: Any = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:])
        with _drawing_from(seed):
            for transform in self._transforms(has_boxes=len(boxes) > 0):
                view, held = transform(view, held)
        height, width = view.shape[1:]
        found = held.as_subclass(Tensor)
        found = torch.stack([found[:, side].clamp(0, (width, height)[side % 2]) for side in range(4)], dim=1)
        kept = (found[:, 2:] - found[:, :2] >= _SMALLEST).all(dim=1)
        return view.as_subclass(Tensor), found[kept], kept

    def _transforms(self, *, has_boxes: bool) -> list[v2.Transform]:
        chosen = [
            v2.RandomPhotometricDistort(p=self.photometric) if self.photometric else None,
            v2.RandomZoomOut(fill=_GREY, p=self.zoom_out) if self.zoom_out else None,
            # Without boxes, no part of an image overlaps with one.
            v2.RandomApply([v2.RandomIoUCrop()], p=self.iou_crop) if self.iou_crop and has_boxes else None,
            v2.RandomHorizontalFlip(self.flip) if self.flip else None,
            v2.RandomShortestSize(list(self.sizes), self.max_size) if self.sizes else None,
        ]
        return [transform for transform in chosen if transform is not None]


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Let PyTorch draw from a seed, and go on afterwards as if nothing had been drawn."""
    before = torch.get_rng_state()
    try:
        # torch.manual_seed would seed the GPUs, too.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(before)
