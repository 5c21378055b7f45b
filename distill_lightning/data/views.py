"""Augmented views as pure functions: the same ``(seed, index, view)`` gives the same tensor, bit for bit.

Nothing here draws from a global random generator, so a view does not depend on the process, the number of workers, the
order of the batch or the device count. That is what lets a teacher's answer about a view be kept and used again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Raised whenever the same seed, index and view would give other numbers or another image than before.
VIEWS_VERSION = 1

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(number: int) -> int:
    """The same 64 bits as PyTorch's signed integers hold them."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; that of signed integers would copy the sign."""
    shifted: Tensor = (state >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser: every input bit reaches every output bit (Steele, Lea, Flood, OOPSLA 2014).

    PyTorch's int64 wraps around like unsigned arithmetic modulo 2 ** 64, on every device.
    """
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shifted(state, 31)


def uniform_draws(seed: int, index: Tensor, view: Tensor, count: int, *, first: int | Tensor = 0) -> Tensor:
    """Random numbers that belong to a view of a sample, computed on the device that the tensors are on.

    Args:
        seed: any integer.
        index: int64 ``(N,)``.
        view: int64 ``(N,)``.
        count: how many numbers each view gets.
        first: how many of a view's numbers are passed over: an integer, or one per row ``(N,)``.

    Returns:
        float64 ``(N, count)`` (float32 on Apple's devices), uniform on ``[0, 1)``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.views import uniform_draws
        >>> uniform_draws(0, torch.tensor([3, 4]), torch.zeros(2, dtype=torch.int64), 2)
        tensor([[0.7122, 0.2167],
                [0.4035, 0.0044]], dtype=torch.float64)
    """
    key = _mix(torch.full_like(index, _signed(seed + _GOLDEN)))
    for part in (index, view):
        key = _mix(key ^ (part * _signed(_GOLDEN) + 1))
    skipped = first[:, None] if isinstance(first, Tensor) else first
    numbers = torch.arange(1, count + 1, device=index.device) + skipped
    draws = _mix(key[:, None] ^ _mix(numbers * _signed(_GOLDEN)))
    if index.device.type == "mps":
        return _shifted(draws, 40).float() * 2.0**-24
    return _shifted(draws, 11).double() * 2.0**-53


class Draws:
    """A stream of random numbers for every row of a batch, a function of ``(seed, index, view)`` alone.

    Each call goes on where the last one stopped. What a row gets does not depend on the other rows, so one process and
    several, or a resumed and an uninterrupted run, draw the same.

    Args:
        seed: any integer.
        index: which sample each row is, int64 ``(N,)``.
        view: which view of it, int64 ``(N,)``.
        copy: number of the row among the copies of one view, int64 ``(N,)``; ``None``: there is one each.

    Example:
        >>> import torch
        >>> from distill_lightning.data.views import Draws
        >>> draws = Draws(0, torch.tensor([3, 4]), torch.zeros(2, dtype=torch.int64))
        >>> draws.uniform(1)
        tensor([[0.7122],
                [0.4035]], dtype=torch.float64)
        >>> draws.uniform(1)
        tensor([[0.2167],
                [0.0044]], dtype=torch.float64)
        >>> draws.normal(3).shape, draws.order().shape
        (torch.Size([2, 3]), torch.Size([2]))
    """

    def __init__(self, seed: int, index: Tensor, view: Tensor, *, copy: Tensor | None = None) -> None:
        self.seed, self.index, self.view = seed, index, view
        # The copies' streams lie far apart.
        self._next: int | Tensor = 0 if copy is None else copy * 2**32

    def __len__(self) -> int:
        return len(self.index)

    def uniform(self, count: int) -> Tensor:
        """``(N, count)`` numbers, uniform on ``[0, 1)``, float64 (float32 on Apple's devices)."""
        draws = uniform_draws(self.seed, self.index, self.view, count, first=self._next)
        self._next = self._next + count
        return draws

    def normal(self, count: int) -> Tensor:
        """``(N, count)`` numbers of a standard normal distribution, float32."""
        draws = self.uniform(count)
        # Half a step inside (-1, 1), at whose ends the quantiles are infinite; added last, or it would be rounded off.
        inner = 2 * draws - 1 + torch.finfo(draws.dtype).eps / 2
        return (math.sqrt(2) * torch.erfinv(inner)).float()

    def order(self, size: int | None = None) -> Tensor:
        """A permutation of the rows, int64 ``(N,)``: that of one draw each, so it depends on which rows there are.

        Args:
            size: permute every ``size`` rows among themselves, counting from 0 in each such group; ``None``: all.
        """
        groups = torch.split(self.uniform(1)[:, 0], size or max(len(self), 1))
        return torch.cat([keys.argsort(stable=True) for keys in groups])


def crop_and_flip(images: Tensor, draws: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Random crop after zero padding and random horizontal flip, each sample its own, the whole batch at once.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        draws: ``(N, 3)`` from `uniform_draws`: row offset, column offset, flip.
        padding: pixels of zeros on every side; the crop has the images' own size.
        flip: whether half of the views are mirrored.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> import torch
        >>> from distill_lightning.data.views import crop_and_flip
        >>> image = torch.arange(9).view(1, 1, 3, 3)
        >>> crop_and_flip(image, torch.tensor([[0.0, 0.5, 0.9]]), padding=1, flip=False)[0, 0]
        tensor([[0, 0, 0],
                [0, 1, 2],
                [3, 4, 5]])
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


class Box(NamedTuple):
    """A part of an image, in pixels.

    Example:
        >>> from distill_lightning.data.views import Box
        >>> Box(top=1, left=1, height=6, width=6).height
        6
    """

    top: int
    left: int
    height: int
    width: int


_CROP_TRIALS = 10
CROP_DRAWS = 4 * _CROP_TRIALS
"""How many draws `random_box` may need."""


def random_box(
    height: int, width: int, draws: Sequence[float], *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The part of an image that a random resized crop takes, distributed as torchvision's ``RandomResizedCrop``.

    A part of the area, uniform in ``scale``, and a ratio of width to height, log-uniform in ``ratio``, are drawn until
    such a box fits, at most ten times; where it lies is uniform. If none fits: the largest central box whose ratio is
    in ``ratio``.

    In Python's own floats, one image at a time: in a vectorised exponential the last bit could depend on the place in
    the batch, and rounding make another box of it.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        draws: `CROP_DRAWS` numbers, uniform on ``[0, 1)``; each trial has four: area, ratio, top, left.
        scale: smallest and largest part of the area.
        ratio: smallest and largest ratio of width to height.

    Example:
        >>> from distill_lightning.data.views import CROP_DRAWS, random_box
        >>> random_box(8, 8, [0.5] * CROP_DRAWS, scale=(0.25, 1.0), ratio=(0.75, 4 / 3))
        Box(top=1, left=1, height=6, width=6)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for trial in range(_CROP_TRIALS):
        part, shape, down, right = draws[4 * trial : 4 * trial + 4]
        area = height * width * (scale[0] + (scale[1] - scale[0]) * part)
        drawn = math.exp(low + (high - low) * shape)
        rows, columns = round(math.sqrt(area / drawn)), round(math.sqrt(area * drawn))
        if 0 < rows <= height and 0 < columns <= width:
            return Box(int(down * (height - rows + 1)), int(right * (width - columns + 1)), rows, columns)
    rows = min(height, max(1, round(width / ratio[0])))
    columns = min(width, max(1, round(height * ratio[1])))
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)
