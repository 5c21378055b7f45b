"""Augmented views as pure functions: the same ``(seed, index, view)`` gives the same tensor, bit for bit.

Nothing here draws from a global random generator, so a view does not depend on the process, the number of workers, the
order of the batch or the device count. That is what lets a teacher's answer about a view be kept and used again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit reaches every output bit (Steele, Lea, Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniform_draws(seed: int, index: Tensor, view: Tensor, count: int) -> Tensor:
    """Random numbers that belong to a view of a sample.

    Args:
        seed: any integer.
        index: int64 ``(N,)``.
        view: int64 ``(N,)``.
        count: how many numbers each view gets.

    Returns:
        float64 ``(N, count)``, uniform on ``[0, 1)``.
    """
    key = _mix(np.asarray(seed % 2**64, dtype=np.uint64).reshape(1) + _GOLDEN)
    for part in (index, view):
        key = _mix(key ^ (part.numpy().astype(np.uint64) * _GOLDEN + np.uint64(1)))
    draws = _mix(key[:, None] ^ _mix(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN))
    return torch.from_numpy((draws >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def crop_and_flip(images: Tensor, draws: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Random crop after zero padding and random horizontal flip, each sample its own, the whole batch at once.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        draws: ``(N, 3)`` from `uniform_draws`: row offset, column offset, flip.
        padding: pixels of zeros on every side; the crop has the images' own size.
        flip: whether half of the views are mirrored.

    Returns:
        A new tensor of the same shape and dtype.
    """
    count, channels, height, width = images.shape
    offsets = (draws[:, :2] * (2 * padding + 1)).long()
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    if flip:
        columns = torch.where(draws[:, 2:3] < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    sample: tuple[Any, ...] = (torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None])
    return padded[(*sample, rows[:, None, :, None], columns[:, None, None, :])]
