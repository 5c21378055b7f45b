"""Comparisons of two scores, of two directions of gaze, and of two labellings."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide, wide_default


def gap_reduction(score: Tensor | float, baseline: Tensor | float, teacher: Tensor | float) -> Tensor:
    r"""The share of the gap between a baseline and the teacher that a student closes.

    .. math:: \frac{\mathrm{score} - \mathrm{baseline}}{\mathrm{teacher} - \mathrm{baseline}}

    The signs cancel, so accuracies and errors are treated alike. 0 is the baseline (standard distillation), 1 the
    teacher; worse than the baseline is negative, better than the teacher is above 1. Nothing is clipped.

    Args:
        score: the student's score, a number or a tensor of any shape.
        baseline: the same score of the baseline.
        teacher: the same score of the teacher.

    Returns:
        The share, in the common shape of the three; NaN where the teacher and the baseline are equal.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import gap_reduction
        >>> gap_reduction(0.75, 0.5, 1.0)
        tensor(0.5000)
        >>> gap_reduction(tensor([0.75, 1.25]), 0.5, 1.0)
        tensor([0.5000, 1.5000])

    Pouransari, Javaheripi, Sharma, Tuzel: *Extracurricular Learning: Knowledge Transfer Beyond Empirical Distribution*,
    https://arxiv.org/abs/2007.00051 reports such shares, without a formula.
    """
    # Python numbers are subtracted in double precision.
    score, baseline, teacher = (
        wide(value) if isinstance(value, Tensor) else value for value in (score, baseline, teacher)
    )
    gain = _as_tensor(score - baseline)
    gap = _as_tensor(teacher - baseline).to(gain.device)
    return (gain / gap).where(gap != 0, torch.nan)


def chance_agreement(first: Tensor, second: Tensor) -> Tensor:
    r"""The share of samples on which two labellings with the same class counts would agree if they were independent.

    .. math:: p_e = \frac{1}{N^2} \sum_k n_k m_k

    with :math:`n_k` and :math:`m_k` samples of class :math:`k` in the two. What always gives one class agrees no more
    often than this with any labels, however unequal their classes are.

    Args:
        first: classes, int64 ``(N,)``, not negative.
        second: classes, int64 ``(N,)``, not negative.

    Returns:
        A scalar in ``[0, 1]``, float32; NaN without samples.

    Raises:
        InputError: they are not ``(N,)`` both.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import chance_agreement
        >>> chance_agreement(tensor([0, 0, 0, 0]), tensor([0, 0, 0, 1]))
        tensor(0.7500)

    Cohen: *A Coefficient of Agreement for Nominal Scales*, Educational and Psychological Measurement 20, 1960.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"two labellings are (N,) both; got {tuple(first.shape)} and {tuple(second.shape)}")
    classes = int(max(first.max(), second.max())) + 1 if len(first) else 1
    shares = [wide(torch.bincount(one, minlength=classes).to(wide_default())) / len(one) for one in (first, second)]
    return (shares[0] * shares[1]).sum()


def gaze_angle(first: Tensor, second: Tensor) -> Tensor:
    r"""The angle between two directions of gaze, each given by pitch :math:`p` and yaw :math:`y` in radians.

    .. math:: v = (-\cos p \sin y, \; -\sin p, \; -\cos p \cos y), \qquad
        \mathrm{atan2}(\lVert v \times w \rVert, \; v \cdot w)

    This stays accurate where the directions nearly agree, whereas the arc cosine of a rounded product may be NaN there.

    Args:
        first: ``(N, 2)``.
        second: ``(N, 2)``.

    Returns:
        Radians in ``[0, pi]``, ``(N,)``.

    Raises:
        InputError: one of them is not ``(N, 2)``, or their ``N`` differ.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import gaze_angle
        >>> ahead, aside = tensor([[0.0, 0.0]]), tensor([[0.0, 0.5]])
        >>> gaze_angle(ahead, aside)
        tensor([0.5000])
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] != 2:
        raise InputError(
            f"gaze directions are (N, 2), pitch and yaw in radians; got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    one, other = _direction(first), _direction(second)
    return torch.atan2(torch.linalg.cross(one, other).norm(dim=1), (one * other).sum(dim=1))


def _direction(angles: Tensor) -> Tensor:
    """The unit vectors ``(N, 3)`` of pitch and yaw ``(N, 2)``."""
    pitch, yaw = wide(angles).unbind(dim=1)
    return -torch.stack([pitch.cos() * yaw.sin(), pitch.sin(), pitch.cos() * yaw.cos()], dim=1)


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=wide_default())
