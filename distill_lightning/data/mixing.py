"""Inputs made of two inputs: Mixup, CutMix, and Cutout, which removes a part of one."""

from __future__ import annotations

from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor

from distill_lightning.data.batch import map_tensors, spread
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide

_QUANTILES = 4096


def beta_quantiles(alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha) at equally spaced levels from 0 to 1, a table for `beta_shares`.

    A table, because no device has the inverse of the distribution function as an operation.

    Args:
        alpha: positive and finite.

    Returns:
        float32 ``(4097,)``, on the host.

    Example:
        >>> from distill_lightning.data.mixing import beta_quantiles
        >>> beta_quantiles(0.5)[[0, 1024, 2048, 4096]]
        tensor([0.0000, 0.1464, 0.5000, 1.0000])
    """
    levels = torch.linspace(0, 1, _QUANTILES + 1, dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, levels.numpy())).float()


def beta_shares(quantiles: Tensor, levels: Tensor) -> Tensor:
    """Numbers of the distribution that a table of `beta_quantiles` describes.

    Args:
        quantiles: ``(4097,)``.
        levels: uniform on ``[0, 1)``, ``(N,)``.

    Returns:
        ``(N,)``, interpolated between the quantiles, in float32 or wider.

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import beta_quantiles, beta_shares
        >>> beta_shares(beta_quantiles(0.5), torch.tensor([0.25, 0.5]))
        tensor([0.1464, 0.5000])
    """
    place = levels * _QUANTILES
    below = place.long()
    quantiles = wide(quantiles)
    return torch.lerp(quantiles[below], quantiles[below + 1], (place - below).to(quantiles.dtype))


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

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import mixup
        >>> mixup(torch.tensor([[8.0, 0.0]]), torch.tensor([[4.0, 2.0]]), torch.tensor([0.25]))
        tensor([[5.0000, 1.5000]])
    """
    if not first.is_floating_point():
        raise InputError(f"Mixup needs inputs of a floating type, got {first.dtype}: convert them first")
    share = spread(share.to(first.dtype), first)
    # A product with 0 does not vanish beside an infinity or NaN.
    return torch.where(share == 1, first, share * first + (1 - share) * second)


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
        InputError: the inputs are not images.

    Yun et al.: *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features*,
    https://arxiv.org/abs/1905.04899

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import cutmix
        >>> first, second = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
        >>> images, share = cutmix(first, second, torch.tensor([0.75]), torch.tensor([[0.5, 0.5]]))
        >>> images[0, 0]
        tensor([[0., 0., 0., 0.],
                [0., 1., 1., 0.],
                [0., 1., 1., 0.],
                [0., 0., 0., 0.]])
        >>> share
        tensor([0.7500])
    """
    side = (1 - share).clamp_min(0).sqrt()
    inside = _rectangle("CutMix", first, side[:, None].expand(-1, 2), centre)
    return torch.where(inside, second, first), 1 - inside.to(share.dtype).mean(dim=(1, 2, 3))


def mixup_inputs(first: Any, second: Any, share: Tensor) -> Any:
    """`mixup` of inputs of several tensors, all by the same shares.

    Args:
        first: a tensor ``(N, ...)``, or a dict, tuple or list of such.
        second: of the same structure.
        share: the part of the first in each row, ``(N,)``.

    Returns:
        Inputs of the same structure.

    Raises:
        InputError: a tensor holds whole numbers, or the structures differ.

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import mixup_inputs
        >>> first = {"image": torch.zeros(1, 2), "pose": torch.ones(1, 1)}
        >>> second = {"image": torch.ones(1, 2), "pose": torch.zeros(1, 1)}
        >>> mixup_inputs(first, second, torch.tensor([0.25]))
        {'image': tensor([[0.7500, 0.7500]]), 'pose': tensor([[0.2500]])}
    """
    return map_tensors(lambda one, other: mixup(one, other, share), first, second)


def cutmix_inputs(first: Any, second: Any, share: Tensor, centre: Tensor) -> tuple[Any, Tensor]:
    """`cutmix` of inputs of several tensors: images get the same rectangle, what is not an image is mixed linearly.

    Args:
        first: a tensor ``(N, ...)``, or a dict, tuple or list of such.
        second: of the same structure.
        share: the part of the first that is wanted in each row, ``(N,)``.
        centre: of the rectangles, in parts of height and width, ``(N, 2)``.

    Returns:
        Inputs of the same structure, and the share ``(N,)`` of the first that is in them: that of the first image's
        pixels.

    Raises:
        InputError: none of them is an image ``(N, C, H, W)``, another tensor holds whole numbers, or the structures
            differ.

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import cutmix_inputs
        >>> first = {"image": torch.zeros(1, 1, 4, 4), "pose": torch.zeros(1, 2)}
        >>> second = {"image": torch.ones(1, 1, 4, 4), "pose": torch.ones(1, 2)}
        >>> inputs, share = cutmix_inputs(first, second, torch.tensor([0.75]), torch.tensor([[0.5, 0.5]]))
        >>> inputs["pose"], share
        (tensor([[0.2500, 0.2500]]), tensor([0.7500]))
    """
    shares: list[Tensor] = []

    def put(one: Tensor, other: Tensor) -> Tensor:
        if one.ndim != 4:
            return one
        # Where the first image is whole, so are the others, whose pixels may be smaller.
        wanted = share.masked_fill(shares[0] == 1, 1) if shares else share
        image, left = cutmix(one, other, wanted, centre)
        shares.append(left)
        return image

    images = map_tensors(put, first, second)
    if not shares:
        raise InputError("CutMix needs images (N, C, H, W) among the inputs: use Mixup for others")
    left = shares[0]
    return map_tensors(lambda one, other: one if one.ndim == 4 else mixup(one, other, left), images, second), left


def cutout(images: Tensor, size: int, centre: Tensor) -> Tensor:
    """Cutout: a square of each image is set to zero, the mean of normalised pixels.

    Args:
        images: ``(N, C, H, W)``.
        size: pixels of the square's side; parts outside the image are cut off.
        centre: of the square, in parts of height and width, ``(N, 2)``.

    Returns:
        The images.

    Raises:
        InputError: the inputs are not images.

    DeVries, Taylor: *Improved Regularization of Convolutional Neural Networks with Cutout*,
    https://arxiv.org/abs/1708.04552

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import cutout
        >>> cutout(torch.ones(1, 1, 4, 4), 2, torch.tensor([[0.25, 0.25]]))[0, 0]
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.],
                [1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    if images.ndim != 4:
        raise InputError(f"Cutout needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}: leave it out")
    side = torch.stack([torch.full_like(centre[:, 0], size / length) for length in images.shape[2:]], dim=1)
    return images.masked_fill(_rectangle("Cutout", images, side, centre), 0)


def cutout_inputs(inputs: Any, size: int, centre: Tensor) -> Any:
    """`cutout` of inputs of several tensors: images get the same square, what is not an image stays as it is.

    Args:
        inputs: a tensor ``(N, ...)``, or a dict, tuple or list of such.
        size: pixels of the square's side.
        centre: of the squares, in parts of height and width, ``(N, 2)``.

    Returns:
        Inputs of the same structure.

    Raises:
        InputError: none of them is an image ``(N, C, H, W)``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.mixing import cutout_inputs
        >>> inputs = {"image": torch.ones(1, 1, 4, 4), "pose": torch.ones(1, 2)}
        >>> cut = cutout_inputs(inputs, 2, torch.tensor([[0.25, 0.25]]))
        >>> cut["image"].sum(), cut["pose"]
        (tensor(12.), tensor([[1., 1.]]))
    """
    images: list[Tensor] = []

    def cut(values: Tensor) -> Tensor:
        if values.ndim != 4:
            return values
        images.append(cutout(values, size, centre))
        return images[-1]

    made = map_tensors(cut, inputs)
    if not images:
        raise InputError("Cutout needs images (N, C, H, W) among the inputs: leave it out for others")
    return made


def _rectangle(name: str, images: Tensor, side: Tensor, centre: Tensor) -> Tensor:
    """Where each row's rectangle lies, boolean ``(N, 1, H, W)``; ``side`` ``(N, 2)`` in parts of height and width."""
    if images.ndim != 4:
        raise InputError(
            f"{name} needs images (N, C, H, W), got inputs of shape {tuple(images.shape)}: leave it out, or use Mixup"
        )
    covered = []
    for axis, length in enumerate(images.shape[2:]):
        pixels = torch.arange(length, device=images.device)
        start = ((centre[:, axis] - side[:, axis] / 2) * length).round()[:, None]
        covered.append((pixels >= start) & (pixels < start + (side[:, axis] * length).round()[:, None]))
    rows, columns = covered
    return (rows[:, :, None] & columns[:, None, :])[:, None]
