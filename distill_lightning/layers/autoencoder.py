"""The two halves of a small variational autoencoder for images, whose decoder is a generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill_lightning.errors import InputError, check_finite


class ImageEncoder(nn.Sequential):
    """Two strided convolutions and a linear layer: images ``(N, C, H, W)`` to a Gaussian over codes ``(N, 2 L)``.

    Args:
        input_shape: ``(C, H, W)``.
        latent_dim: ``L``, length of a code.
        width: channels of the first convolution.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import ImageEncoder
        >>> encoder = ImageEncoder((1, 28, 28), latent_dim=8)
        >>> encoder(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 16])
    """

    def __init__(self, input_shape: Sequence[int], latent_dim: int, *, width: int = 32) -> None:
        channels, rows, columns = input_shape
        super().__init__(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * math.ceil(rows / 4) * math.ceil(columns / 4), 2 * latent_dim),
        )


class ImageDecoder(nn.Module):
    """Codes ``(N, L)`` to images ``(N, C, H, W)`` in a range: a linear layer, two upsampling convolutions, one more.

    Args:
        input_shape: ``(C, H, W)`` of the images that it generates.
        latent_dim: ``L``.
        output_range: the smallest and the largest value of a pixel in the data module's images: ``(0 - mean) / std``
            and ``(1 - mean) / std``.
        width: channels of the last hidden layer.

    Raises:
        InputError: a size that is not positive, or an ``output_range`` that is not an interval.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import ImageDecoder
        >>> decoder = ImageDecoder((1, 28, 28), latent_dim=8, output_range=(-1, 1))
        >>> decoder(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self, input_shape: Sequence[int], latent_dim: int, *, output_range: tuple[float, float], width: int = 32
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(*input_shape, latent_dim, width) < 1:
            raise InputError(f"ImageDecoder: sizes must be positive, got {tuple(input_shape)}, {latent_dim}, {width}")
        check_finite("ImageDecoder: output_range", *output_range)
        if not output_range[0] < output_range[1]:
            raise InputError(f"ImageDecoder: output_range must be (smallest, largest), got {output_range}")
        channels, self.rows, self.columns = input_shape
        self.latent_dim = latent_dim
        self.low, self.high = map(float, output_range)
        coarse = (2 * width, math.ceil(self.rows / 4), math.ceil(self.columns / 4))
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, math.prod(coarse)),
            nn.ReLU(),
            nn.Unflatten(1, coarse),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` within ``output_range``, for codes ``(N, L)``."""
        pixels = self.layers(codes)[:, :, : self.rows, : self.columns]
        return self.low + (self.high - self.low) * torch.sigmoid(pixels)
