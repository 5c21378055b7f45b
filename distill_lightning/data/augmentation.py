"""What data modules do to training images besides cropping and mirroring them, each a choice with its own options.

What becomes of a view is a function of its image and of the random numbers that belong to it; the data module draws
these from ``(seed, index, view)``. A whole batch is changed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from distill_lightning.choices import Choice
from distill_lightning.data import image_operations as operations
from distill_lightning.errors import InputError

# The largest magnitude of RandAugment, and by what part of their size it moves images.
_STRONGEST, _FAR = 30, 150 / 331

# The principal components of ImageNet's colours, a column each, and their scales; rows are red, green and blue.
_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_SCALES = (0.2175, 0.0188, 0.0045)
_NORMAL = NormalDist()

# By their names in the paper, in torchvision's order: what becomes of images by a level in [0, 1] and a sign each.
_OPERATIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "Identity": lambda images, _level, _sign: images,
    "ShearX": lambda images, level, sign: operations.shear_x(images, sign * (0.3 * level)),
    "ShearY": lambda images, level, sign: operations.shear_y(images, sign * (0.3 * level)),
    "TranslateX": lambda images, level, sign: operations.translate_x(images, sign * (_FAR * images.shape[3] * level)),
    "TranslateY": lambda images, level, sign: operations.translate_y(images, sign * (_FAR * images.shape[2] * level)),
    "Rotate": lambda images, level, sign: operations.rotate(images, sign * (30 * level)),
    "Brightness": lambda images, level, sign: operations.brightness(images, 1 + sign * (0.9 * level)),
    "Color": lambda images, level, sign: operations.saturation(images, 1 + sign * (0.9 * level)),
    "Contrast": lambda images, level, sign: operations.contrast(images, 1 + sign * (0.9 * level)),
    "Sharpness": lambda images, level, sign: operations.sharpness(images, 1 + sign * (0.9 * level)),
    "Posterize": lambda images, level, _sign: operations.posterize(images, 8 - round(4 * level)),
    "Solarize": lambda images, level, _sign: operations.solarize(images, 255 * (1 - level)),
    "AutoContrast": lambda images, _level, _sign: operations.autocontrast(images),
    "Equalize": lambda images, _level, _sign: operations.equalize(images),
}


@dataclass(frozen=True)
class RandAugment(Choice):
    """RandAugment: several operations one after the other, each drawn from fourteen, all of the same magnitude.

    The operations are those of torchvision's ``RandAugment`` with its 31 magnitudes, nearest-neighbour sampling and
    uncovered pixels in black: identity, shears, translations, rotation, brightness, colour, contrast, sharpness,
    posterisation, solarisation, automatic contrast and equalisation. Those that have a direction go either way.

    Args:
        operations: how many are applied to each view.
        magnitude: of every operation, from 0 to 30.

    Raises:
        InputError: an option is out of range.

    Cubuk, Zoph, Shlens, Le: *RandAugment: Practical Automated Data Augmentation with a Reduced Search Space*,
    https://arxiv.org/abs/1909.13719

    Example:
        >>> import torch
        >>> from distill_lightning import RandAugment
        >>> augment = RandAugment(operations=1, magnitude=30)
        >>> solarized = torch.tensor([[11.5 / 14, 0.0]])
        >>> augment(torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3), solarized).flatten()
        tensor([255, 155,   0], dtype=torch.uint8)
    """

    operations: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_numbers()
        if self.operations < 1:
            raise InputError(f"RandAugment: operations must be at least 1, got {self.operations}")
        if not 0 <= self.magnitude <= _STRONGEST:
            raise InputError(f"RandAugment: magnitude must be from 0 to {_STRONGEST}, got {self.magnitude}")

    @property
    def draws(self) -> int:
        """How many numbers each view needs."""
        return 2 * self.operations

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """The changed images.

        Args:
            images: uint8 ``(N, C, H, W)``, grey or red, green and blue.
            draws: uniform on ``[0, 1)``, ``(N, 2 * operations)``; for each operation which one it is, and which way.
        """
        images = images.clone()
        for which, way in zip(draws[:, ::2].T, draws[:, 1::2].T, strict=True):
            drawn, sign = (which * len(_OPERATIONS)).long(), 1 - 2 * (way >= 0.5).double()
            for number, operation in enumerate(_OPERATIONS.values()):
                rows = (drawn == number).nonzero()[:, 0]
                if len(rows):
                    images[rows] = operation(images[rows], self.magnitude / _STRONGEST, sign[rows])
        return images


@dataclass(frozen=True)
class ColorJitter(Choice):
    """Colour jitter: brightness, contrast, saturation and hue are changed, each at random, in a random order.

    A factor is uniform on ``[max(0, 1 - b), 1 + b]``, that of the hue's shift on ``[-hue, hue]``, as in torchvision's
    ``ColorJitter``. The defaults are those of Self-KD's recipe for ImageNet.

    Args:
        brightness: how far the factor of the brightness may be from 1; 0 leaves it.
        contrast: the same of the contrast.
        saturation: the same of the saturation.
        hue: how far colours may be turned, as a fraction of the colour circle, up to 0.5.

    Raises:
        InputError: an option is out of range.

    Howard: *Some Improvements on Deep Convolutional Neural Network Based Image Classification*,
    https://arxiv.org/abs/1312.5402

    Example:
        >>> import torch
        >>> from distill_lightning import ColorJitter
        >>> jitter = ColorJitter(brightness=0.5, contrast=0.0, saturation=0.0)
        >>> jitter(torch.full((1, 3, 1, 1), 100, dtype=torch.uint8), torch.full((1, 8), 0.75)).flatten()
        tensor([125, 125, 125], dtype=torch.uint8)
    """

    draws: ClassVar[int] = 8
    """How many numbers each view needs."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_numbers()
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise InputError(f"ColorJitter: {name} cannot be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise InputError(f"ColorJitter: hue must be in [0, 0.5], got {self.hue}")

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """The changed images.

        Args:
            images: uint8 ``(N, C, H, W)``, grey or red, green and blue.
            draws: uniform on ``[0, 1)``, ``(N, 8)``: a factor for each of the four, and a key by which they are sorted.
        """
        images, factors = images.clone(), draws[:, :4].double()
        for step in draws[:, 4:].argsort(dim=1, stable=True).unbind(dim=1):
            for number, (change, low, high) in enumerate(self._changes):
                rows = (step == number).nonzero()[:, 0]
                if len(rows) and low < high:
                    images[rows] = change(images[rows], low + (high - low) * factors[rows, number])
        return images

    @property
    def _changes(self) -> tuple[tuple[Callable[[Tensor, Tensor], Tensor], float, float], ...]:
        """What is changed, and the smallest and largest amount."""
        return (
            (operations.brightness, max(0.0, 1 - self.brightness), 1 + self.brightness),
            (operations.contrast, max(0.0, 1 - self.contrast), 1 + self.contrast),
            (operations.saturation, max(0.0, 1 - self.saturation), 1 + self.saturation),
            (operations.hue, -self.hue, self.hue),
        )


@dataclass(frozen=True)
class Lighting(Choice):
    r"""PCA lighting: noise along the principal components of ImageNet's colours, the same for all pixels of a view.

    .. math:: x + \sum_{k=1}^3 \alpha_k \lambda_k p_k, \qquad \alpha_k \sim \mathcal{N}(0, \text{std}^2)

    with the principal components :math:`p_k` and their scales :math:`\lambda_k`, as they are commonly given for pixels
    in ``[0, 1]``.

    Args:
        std: standard deviation of each component's share; 0.1 in the paper and in Self-KD's recipe for ImageNet.

    Raises:
        InputError: ``std`` is not positive.

    Krizhevsky, Sutskever, Hinton: *ImageNet Classification with Deep Convolutional Neural Networks*, NeurIPS 2012

    Example:
        >>> import torch
        >>> from distill_lightning import Lighting
        >>> Lighting(std=0.1)(torch.full((1, 3, 1, 1), 0.5), torch.tensor([[0.9, 0.5, 0.5]])).flatten()
        tensor([0.4842, 0.4838, 0.4837])
    """

    draws: ClassVar[int] = 3
    """How many numbers each view needs."""

    std: float = 0.1

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_numbers()
        if self.std <= 0:
            raise InputError(f"Lighting: std must be positive, got {self.std}: leave the option out for none")

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """The changed images; they are neither rounded nor kept within ``[0, 1]``.

        Args:
            images: red, green and blue in ``[0, 1]``, float32 ``(N, 3, H, W)``.
            draws: uniform on ``[0, 1)``, ``(N, 3)``, one for each component.
        """
        # Half a step above 0, where the quantile is infinite; by Python, as no vectorised function is the same
        # everywhere in a batch.
        shares = [[_NORMAL.inv_cdf(min(number + 2.0**-54, 1 - 2.0**-53)) for number in row] for row in draws.tolist()]
        scaled = self.std * draws.new_tensor(shares).double() * torch.tensor(_SCALES, dtype=torch.float64)
        noise = (scaled[:, None] * torch.tensor(_COMPONENTS, dtype=torch.float64)).sum(dim=2)
        return images + noise.float()[:, :, None, None]
