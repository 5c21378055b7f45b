"""The batch of a detection: images of unlike sizes, and the boxes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError


@dataclass
class DetectionBatch(Batch):
    """A batch of images and their boxes, as torchvision's detectors read them.

    Attributes:
        input: a list of ``N`` images, float ``(C, H, W)`` in ``[0, 1]``; heights and widths may differ.
        target: a list of ``N`` dicts; ``None`` where nobody looks at boxes. Each has ``boxes``, float32 ``(M, 4)`` as
            left, top, right and bottom in pixels, and ``labels``, int64 ``(M,)`` from 1 to ``C``, because 0 is the
            background. It may have ``difficult``, bool ``(M,)``: objects that an evaluation leaves out, as VOC does;
            ``image_id``, an int64 scalar; and whatever else a detector reads, ``masks`` for example. An image without
            objects has boxes ``(0, 4)``.
        counted: which images count in metrics, bool ``(N,)``; ``None``: all. One that only fills up a process's share
            does not.

    Example:
        >>> import torch
        >>> from distill_lightning import DetectionBatch
        >>> target = {"boxes": torch.tensor([[1.0, 2.0, 4.0, 6.0]]), "labels": torch.tensor([1])}
        >>> batch = DetectionBatch([torch.zeros(3, 8, 8)], [target])
        >>> batch.size, batch.count
        (1, 1)
    """

    @property
    def size(self) -> int:
        """Number of images, ``N``."""
        return len(self.input)

    def broken_rows(self) -> list[int]:
        """The images that hold nan or infinity; the device is waited for."""
        return [row for row, image in enumerate(self.input) if not image.isfinite().all()]

    @classmethod
    def of(cls, batch: Any) -> DetectionBatch:
        """Read a `DetectionBatch`, or images and perhaps targets, as torchvision's reference code collates them.

        Images alone may be a list of ``(C, H, W)`` or a tensor ``(N, C, H, W)``.

        Raises:
            InputError: it is neither.

        Example:
            >>> import torch
            >>> from distill_lightning import DetectionBatch
            >>> target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            >>> DetectionBatch.of(((torch.zeros(3, 8, 8), torch.zeros(3, 6, 9)), (target, target))).size
            2
        """
        if isinstance(batch, cls):
            return batch
        read = Batch(batch) if _are_images(batch) else Batch.of(batch)
        images, targets = read.input, read.target
        if not isinstance(images, (Tensor, Sequence)) or not all(_is_image(image) for image in images):
            raise InputError(
                f"the images of a detection must be a list of tensors (C, H, W), got {type(images).__name__}: let the "
                "data module yield DetectionBatch(images, targets), or collate by lambda samples: tuple(zip(*samples))"
            )
        if targets is not None and not (_are_targets(targets) and len(targets) == len(images)):
            raise InputError(
                f"the targets of a detection must be a list of {len(images)} dicts with boxes and labels, got "
                f"{type(targets).__name__}: let the data module yield DetectionBatch(images, targets)"
            )
        return cls(list(images), None if targets is None else list(targets), index=read.index, counted=read.counted)


def _is_image(image: Any) -> bool:
    return isinstance(image, torch.Tensor) and image.ndim == 3


def _are_images(batch: Any) -> bool:
    is_list = isinstance(batch, (list, tuple)) and bool(batch)
    return all(map(_is_image, batch)) if is_list else isinstance(batch, Tensor) and batch.ndim == 4


def _are_targets(targets: Any) -> bool:
    return isinstance(targets, Sequence) and all(
        isinstance(target, dict) and {"boxes", "labels"} <= target.keys() for target in targets
    )
