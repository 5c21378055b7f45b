"""Formulas of diagonal Gaussians, given by mean and log-variance, both ``(N, d)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.functional.predictions import weighted_mean

LOG_VAR_BOUNDS = (-10.0, 10.0)


def split_gaussian(output: Tensor, *, bounds: tuple[float, float] = LOG_VAR_BOUNDS) -> tuple[Tensor, Tensor]:
    """Split a network's output ``(N, 2 d)`` into means and log-variances, both ``(N, d)``, in float32 or wider.

    Args:
        output: the means, then the log-variances.
        bounds: the interval that the log-variances are clamped to; outside it their gradient is zero.

    Raises:
        InputError: an odd number of columns.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import split_gaussian
        >>> mean, log_var = split_gaussian(tensor([[0.5, 20.0]]))
        >>> mean, log_var
        (tensor([[0.5000]]), tensor([[10.]]))
    """
    if output.ndim != 2 or output.shape[1] % 2:
        raise InputError(f"a Gaussian's parameters are (N, 2 d), means and log-variances; got {tuple(output.shape)}")
    mean, log_var = wide(output).chunk(2, dim=1)
    return mean, log_var.clamp(*bounds)


def join_gaussian(mean: Tensor, log_var: Tensor) -> Tensor:
    """Join means and log-variances, both ``(N, d)``, to a network's output ``(N, 2 d)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import join_gaussian
        >>> join_gaussian(tensor([[0.5]]), tensor([[-1.0]]))
        tensor([[ 0.5000, -1.0000]])
    """
    return torch.cat([mean, log_var], dim=1)


def gaussian_nll(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    r"""Negative log-likelihood of a diagonal Gaussian, in nats.

    .. math:: \frac{1}{N} \sum_i \sum_j \tfrac12 \left[ s_{ij} + (y_{ij} - m_{ij})^2 e^{-s_{ij}} + \log 2\pi \right]

    Args:
        mean: :math:`m`, ``(N, d)``.
        log_var: :math:`s`, ``(N, d)``.
        target: :math:`y`, ``(N, d)``.

    Returns:
        A scalar: **sum over the targets, mean over the samples**.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import gaussian_nll
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> gaussian_nll(zero, zero, zero)
        tensor(0.9189)
        >>> gaussian_nll(zero, zero, one)
        tensor(1.4189)

    Nix, Weigend: *Estimating the Mean and Variance of the Target Probability Distribution*, ICNN 1994.
    """
    return gaussian_nll_rows(mean, log_var, target).mean()


def gaussian_nll_rows(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """`gaussian_nll` of every sample by itself, ``(N,)``: sum over the targets.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import gaussian_nll_rows
        >>> mean, log_var = torch.zeros(2, 1), torch.zeros(2, 1)
        >>> gaussian_nll_rows(mean, log_var, torch.tensor([[0.0], [1.0]]))
        tensor([0.9189, 1.4189])
    """
    _same_shapes("gaussian_nll", mean, log_var, target)
    mean, log_var, target = wide(mean), wide(log_var), wide(target)
    nll = (log_var + (target - mean) ** 2 * torch.exp(-log_var) + math.log(2 * math.pi)) / 2
    return nll.sum(dim=1)


def gaussian_kl(teacher_mean: Tensor, teacher_log_var: Tensor, student_mean: Tensor, student_log_var: Tensor) -> Tensor:
    r"""Forward divergence of diagonal Gaussians, :math:`\mathrm{KL}(q_T \,\|\, q_S)`, in nats.

    .. math:: \frac{1}{N} \sum_i \sum_j \tfrac12 \left[ s^S_{ij} - s^T_{ij} + e^{s^T_{ij} - s^S_{ij}}
        + (m^T_{ij} - m^S_{ij})^2 e^{-s^S_{ij}} - 1 \right]

    Where the student's mean is off by ``D``, the best student variance is the teacher's plus ``D ** 2``: the student
    widens where it cannot follow.

    Args:
        teacher_mean: ``(N, d)``.
        teacher_log_var: ``(N, d)``.
        student_mean: ``(N, d)``.
        student_log_var: ``(N, d)``.

    Returns:
        A scalar: **sum over the targets, mean over the samples**.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import gaussian_kl
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> gaussian_kl(zero, zero, one, zero)
        tensor(0.5000)
    """
    return gaussian_kl_rows(teacher_mean, teacher_log_var, student_mean, student_log_var).mean()


def gaussian_kl_rows(
    teacher_mean: Tensor, teacher_log_var: Tensor, student_mean: Tensor, student_log_var: Tensor
) -> Tensor:
    """`gaussian_kl` of each sample, ``(N,)``: sum over the targets.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import gaussian_kl_rows
        >>> mean, log_var = torch.zeros(2, 1), torch.zeros(2, 1)
        >>> gaussian_kl_rows(mean, log_var, torch.tensor([[0.0], [1.0]]), log_var)
        tensor([0.0000, 0.5000])
    """
    _same_shapes("gaussian_kl", teacher_mean, teacher_log_var, student_mean, student_log_var)
    teacher_mean, teacher_log_var = wide(teacher_mean), wide(teacher_log_var)
    student_mean, student_log_var = wide(student_mean), wide(student_log_var)
    gain = teacher_log_var - student_log_var
    offset = (teacher_mean - student_mean) ** 2 * torch.exp(-student_log_var)
    return ((torch.expm1(gain) - gain + offset) / 2).sum(dim=1)


def collapse_mixture(
    means: Tensor, variances: Tensor, *, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    r"""The Gaussian with an ensemble's mean and variance.

    .. math:: m = \sum_k w_k m_k, \qquad v = \sum_k w_k \left( v_k + (m_k - m)^2 \right), \qquad \sum_k w_k = 1

    The variance is the mean of the members' variances plus the **population** variance of their means. The forward
    divergence from this Gaussian has the same gradient as the mean of the divergences from the individual members.

    Args:
        means: ``(M, N, d)``.
        variances: ``(M, N, d)``, not their logarithms.
        weights: one non-negative number per member, divided by their sum; ``None`` weights all equally.

    Returns:
        Mean and variance, both ``(N, d)``.

    Raises:
        InputError: the shapes differ, or the weights are not valid.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import collapse_mixture
        >>> means, variances = tensor([[[0.0]], [[2.0]]]), tensor([[[1.0]], [[1.0]]])
        >>> collapse_mixture(means, variances)
        (tensor([[1.]]), tensor([[2.]]))
    """
    _same_shapes("collapse_mixture", means, variances)
    means, variances = wide(means), wide(variances)
    mean = weighted_mean(means, weights)
    return mean, weighted_mean(variances + (means - mean) ** 2, weights)


def _same_shapes(name: str, first: Tensor, *others: Tensor) -> None:
    if any(other.shape != first.shape for other in others):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (first, *others))
        raise InputError(f"{name}: means, log-variances and targets must have the same shape, got {shapes}")
