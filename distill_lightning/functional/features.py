"""Distances between feature maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import same_shape, wide

Reduction = Literal["mean", "sum"]
Normalize = Literal["sample", "channel", "none"]


def factor_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    p: float = 1,
    reduction: Reduction = "mean",
    normalize: Normalize = "sample",
    eps: float = 1e-6,
) -> Tensor:
    r"""The feature distance of Factor Transfer and FEED.

    .. math:: \sum_d \left| u(a)_d - u(b)_d \right|^p, \qquad u(z) = \frac{z}{\max(\lVert z \rVert_2, \epsilon)}

    Each sample is flattened to its ``D`` entries and normalised over all of them, in float32. With the mean, two
    independent feature maps after a ReLU are about ``0.8 / sqrt(D)`` apart, and never more than ``2 / sqrt(D)``: use a
    weight between about 100 and 1000. With the sum, divide that weight by ``D``.

    Args:
        student: ``(N, ...)``, already translated.
        teacher: ``(N, ...)``, same shape.
        p: the exponent, 1 in the papers' experiments.
        reduction: ``"mean"`` over ``N`` and ``D``, or ``"sum"`` over ``D`` and mean over ``N``.
        normalize: ``"sample"`` over all ``D`` entries; ``"channel"`` over each channel's own map; ``"none"``.
        eps: the lower limit of the norm in the division; a zero feature stays zero, and its gradient is at most
            ``1 / eps`` times that of the loss (finite in float32).

    Returns:
        A scalar.

    Raises:
        InputError: the shapes differ, or an option is unknown.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import factor_distance
        >>> student, teacher = tensor([[3.0, 4.0]]), tensor([[0.0, 2.0]])
        >>> factor_distance(student, teacher)
        tensor(0.4000)
        >>> factor_distance(student, teacher, reduction="sum")
        tensor(0.8000)

    Kim, Park, Kwak: *Paraphrasing Complex Network: Network Compression via Factor Transfer*,
    https://arxiv.org/abs/1802.04977; Park, Kwak: *FEED*, https://arxiv.org/abs/1909.10754
    """
    same_shape("factor_distance", student, teacher)
    difference = (
        unit_feature(student, normalize=normalize, eps=eps) - unit_feature(teacher, normalize=normalize, eps=eps)
    ).abs()
    check_finite("p", p)
    return _reduced(difference if p == 1 else difference**p, reduction)


def hint_distance(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""The feature distance of FitNets: the squared error of the features as they are.

    .. math:: \sum_d (a_d - b_d)^2

    The paper's loss is half the sum, ``0.5 * hint_distance(..., reduction="sum")``. Nothing is normalised: the value
    grows with the square of the features' scale.

    Args:
        student: ``(N, ...)``, already translated.
        teacher: ``(N, ...)``, same shape.
        reduction: ``"mean"`` over ``N`` and ``D``, or ``"sum"`` over ``D`` and mean over ``N``.

    Returns:
        A scalar, computed in float32.

    Raises:
        InputError: the shapes differ, or the reduction is unknown.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import hint_distance
        >>> student, teacher = tensor([[3.0, 4.0]]), tensor([[0.0, 2.0]])
        >>> hint_distance(student, teacher)
        tensor(6.5000)
        >>> hint_distance(student, teacher, reduction="sum")
        tensor(13.)

    Romero, Ballas, Kahou, Chassang, Gatta, Bengio: *FitNets: Hints for Thin Deep Nets*,
    https://arxiv.org/abs/1412.6550
    """
    same_shape("hint_distance", student, teacher)
    return _reduced((wide(student) - wide(teacher)).square(), reduction)


def attention_distance(
    student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean", eps: float = 1e-12
) -> Tensor:
    r"""The feature distance of attention transfer: where in the image two networks are active, not in which channel.

    .. math:: \sum_{h,w} \left( u(Q_a)_{hw} - u(Q_b)_{hw} \right)^2, \qquad Q_z = \frac{1}{C} \sum_c z_c^2, \qquad
        u(Q) = \frac{Q}{\max(\lVert Q \rVert_2, \epsilon)}

    A map has no channels, so the networks may have different numbers of them. The mean is the official code's
    reduction, with a weight of about 1000 (the paper's :math:`\beta`); with the sum, divide that weight by ``H * W``.
    The sum is at most 2.

    Args:
        student: ``(N, C_S, H, W)``, or with other dimensions after the channels.
        teacher: ``(N, C_T, H, W)``, the same shape except for the channels.
        reduction: ``"mean"`` over ``N``, ``H`` and ``W``, or ``"sum"`` over ``H`` and ``W`` and mean over ``N``.
        eps: the lower limit of a map's norm in the division. A map holds the feature's squares: the default takes
            effect where the feature's own norm is below about ``1e-6``.

    Returns:
        A scalar, computed in float32.

    Raises:
        InputError: the shapes differ in more than the channels, or the reduction is unknown.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import attention_distance
        >>> student = tensor([[[[1.0, 0.0]]]])  # one channel of 1x2
        >>> teacher = tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]])  # two channels of 1x2
        >>> attention_distance(student, teacher, reduction="sum")
        tensor(2.)

    Zagoruyko, Komodakis: *Paying More Attention to Attention*, https://arxiv.org/abs/1612.03928
    """
    if student.ndim < 3 or _without_channels(student) != _without_channels(teacher):
        raise InputError(
            f"attention_distance: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be "
            "(N, C, H, W) and equal except for C: tap layers of the same spatial size, or resize one"
        )
    return _reduced((_attention(student, eps) - _attention(teacher, eps)).square(), reduction)


def unit_feature(feature: Tensor, *, normalize: Normalize = "sample", eps: float = 1e-6) -> Tensor:
    """A feature map divided by its norm, in float32; what `factor_distance` compares.

    Args:
        feature: ``(N, ...)``.
        normalize: ``"sample"`` over all ``D`` entries; ``"channel"`` over each channel's own map; ``"none"``.
        eps: the lower limit of the norm in the division.

    Returns:
        ``(N, D)``; for ``"channel"`` ``(N, C, D / C)``; for ``"none"`` the shape of ``feature``.

    Raises:
        InputError: ``normalize`` is unknown, or is ``"channel"`` although there are no channels.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import unit_feature
        >>> unit_feature(tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    if normalize == "sample":
        return F.normalize(wide(feature).flatten(1), dim=1, eps=eps)
    if normalize == "channel":
        if feature.ndim < 3:
            raise InputError(f"normalize='channel' needs (N, C, ...), got a feature of shape {tuple(feature.shape)}")
        return F.normalize(wide(feature).flatten(2), dim=2, eps=eps)
    if normalize == "none":
        return wide(feature)
    raise InputError(f"normalize must be 'sample', 'channel' or 'none', got {normalize!r}")


def _attention(feature: Tensor, eps: float) -> Tensor:
    """The normalised map of each sample, ``(N, H * W)``."""
    return F.normalize(wide(feature).square().mean(dim=1).flatten(1), dim=1, eps=eps)


def _without_channels(feature: Tensor) -> torch.Size:
    return feature.shape[:1] + feature.shape[2:]


def _reduced(distances: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return distances.mean()
    if reduction == "sum":
        return distances.flatten(1).sum(dim=1).mean()
    raise InputError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
