"""What `FEEDModule` needs and what knows nothing of it: its arguments' rules, and the shapes of features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from distill_lightning.errors import InputError


def refuse_negative(**weights: Sequence[float]) -> None:
    """Refuse weights below zero."""
    for name, values in weights.items():
        wrong = [value for value in values if not value >= 0]
        if wrong:
            raise InputError(f"{name} cannot be negative, got {wrong[0]}")


def refuse_unused(feature_loss: str, **given: bool) -> None:
    """Refuse what was given although the loss does not use it."""
    for name, is_given in given.items():
        if is_given:
            raise InputError(f"FEED: feature_loss={feature_loss!r} does not use {name}: leave it out")


def one_each(count: int, name: str, values: Any) -> list[Any]:
    """One value for all teachers, or a sequence with one value each."""
    one = isinstance(values, str) or not isinstance(values, Iterable)
    each = [values] * count if one else list(values)
    if len(each) != count:
        raise InputError(f"FEED: {len(each)} {name} for {count} teachers: give one each")
    return each


def sites(shape: Sequence[int]) -> Sequence[int]:
    """Where a feature has values: rows and columns of ``(N, C, H, W)``, the length of ``(N, L, C)``, nothing else."""
    return shape[2:] if len(shape) == 4 else shape[1:-1]


def width(shape: Sequence[int]) -> int:
    """Channels of a feature: the second dimension of ``(N, C, H, W)``, the last of ``(N, C)`` or ``(N, L, C)``."""
    return shape[1] if len(shape) == 4 else shape[-1]


def resized(feature: Tensor, size: Sequence[int]) -> Tensor:
    """A feature map at another size: averages where it is smaller, else bilinear."""
    height, width = size
    if height <= feature.shape[2] and width <= feature.shape[3]:
        return F.adaptive_avg_pool2d(feature, (height, width))
    return F.interpolate(feature, size=(height, width), mode="bilinear", align_corners=False)
