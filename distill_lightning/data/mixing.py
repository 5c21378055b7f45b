"""Inputs made of two inputs: Mixup, CutMix, and Cutout, which removes a part of one."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.errors import InputError


def mixup(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    r"""Mixup, :math:`\tilde x = \lambda x_1 + (1 - \lambda) x_2`, each row with its own :math:`\lambda`.

    Args:
        first: :math:`x_1`, ``(N, ...)``.
        second: :math:`x_2`, the same shape.
        share: :math:`\lambda` in ``[0, 1]``, ``(N,)``; where it is 1, the row is ``first``'s, bit for bit.

    Returns:
        ``(N, ...)``, of ``first``'s dtype.

    Raises:
        InputError: the inputs are whole numbers, which have nothing in between.

    Zhang, Cisse, Dauphin, Lopez-Paz: *mixup: Beyond Empirical Risk Minimization*, https://arxiv.org/abs/1710.09412
    """
    if not first.is_floating_point():
        raise InputError(f"Mixup needs inputs of a floating type, got {first.dtype}: convert them first")
    share = share.to(first.dtype).view(-1, *[1] * (first.ndim - 1))
    return share * first + (1 - share) * second


def cutmix(first: Tensor, second: Tensor, share: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    r"""CutMix: a rectangle of :math:`x_2` is put into :math:`x_1`, each row with its own.

    The rectangle has the image's proportions and the area :math:`1 - \lambda` of it, before its parts outside the image
    are cut off.

    Args:
        first: :math:`x_1`, images ``(N, C, H, W)``.
        second: :math:`x_2`, the same shape.
        share: :math:`\lambda` in ``[0, 1]``, ``(N,)``.
        centre: of the rectangle, in parts of height and width, ``(N, 2)``.

    Returns:
        The images, and the share ``(N,)`` of pixels that are still ``first``'s.

    Raises:
        InputError: the inputs are no images.

    Yun et al.: *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features*,
    https://arxiv.org/abs/1905.04899
    """
    side = (1 - share).clamp_min(0).sqrt()
    inside = _rectangle("CutMix", first, side[:, None].expand(-1, 2), centre)
    return torch.where(inside, second, first), 1 - inside.to(share.dtype).mean(dim=(1, 2, 3))


def cutout(images: Tensor, size: int, centre: Tensor) -> Tensor:
    """Cutout: a square of each image is set to zero, the mean of normalised pixels.

    Args:
        images: ``(N, C, H, W)``.
        size: pixels of the square's side; parts outside the image are cut off.
        centre: of the square, in parts of height and width, ``(N, 2)``.

    Returns:
        The images.

    Raises:
        InputError: the inputs are no images.

    DeVries, Taylor: *Improved Regularization of Convolutional Neural Networks with Cutout*,
    https://arxiv.org/abs/1708.04552
    """
    if images.ndim != 4:
        raise InputError(f"Cutout needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}")
    side = torch.stack([torch.full_like(centre[:, 0], size / length) for length in images.shape[2:]], dim=1)
    return images.masked_fill(_rectangle("Cutout", images, side, centre), 0)


def _rectangle(name: str, images: Tensor, side: Tensor, centre: Tensor) -> Tensor:
    """Where each row's rectangle lies, boolean ``(N, 1, H, W)``; ``side`` ``(N, 2)`` in parts of height and width."""
    if images.ndim != 4:
        raise InputError(f"{name} needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}")
    covered = []
    for axis, length in enumerate(images.shape[2:]):
        pixels = torch.arange(length, device=images.device)
        start = ((centre[:, axis] - side[:, axis] / 2) * length).round()[:, None]
        covered.append((pixels >= start) & (pixels < start + (side[:, axis] * length).round()[:, None]))
    rows, columns = covered
    return (rows[:, :, None] & columns[:, None, :])[:, None]
