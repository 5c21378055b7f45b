"""Formulas of predicted classes: divergences, cross entropies, ensembles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.errors import InputError
from distill_lightning.functional.common import positive, same_shape, wide

Direction = Literal["forward", "reverse"]


def softened_kl(
    student_logits: Tensor,
    teacher_logits_or_probs: Tensor,
    *,
    temperature: float = 1.0,
    from_logits: bool = True,
) -> Tensor:
    r"""Hinton's distillation term.

    .. math:: T^2 \cdot \frac{1}{N} \sum_{i} \sum_{k} q_{ik} \, (\log q_{ik} - \log p_{ik}),
        \qquad p = \mathrm{softmax}(s / T)

    where :math:`q` is ``softmax(teacher_logits / T)``, or the given probabilities as they are (then they must already
    be softened with the same temperature).

    Args:
        student_logits: ``(..., K)``.
        teacher_logits_or_probs: ``(..., K)``.
        temperature: :math:`T > 0`.
        from_logits: whether the teacher's tensor holds logits; otherwise probabilities, zeros allowed.

    Returns:
        A scalar: **sum over the classes, mean over everything else, times** ``T ** 2``.

    Raises:
        InputError: the shapes differ or the temperature is not positive.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import softened_kl
        >>> student, teacher = tensor([[0.0, 0.0]]), tensor([[2.0, 0.0]])
        >>> softened_kl(student, teacher, temperature=2.0)
        tensor(0.4438)
        >>> softened_kl(student, tensor([[0.9, 0.1]]), from_logits=False)
        tensor(0.3681)

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, https://arxiv.org/abs/1503.02531
    """
    return softened_kl_rows(
        student_logits, teacher_logits_or_probs, temperature=temperature, from_logits=from_logits
    ).mean()


def softened_kl_rows(
    student_logits: Tensor,
    teacher_logits_or_probs: Tensor,
    *,
    temperature: float = 1.0,
    from_logits: bool = True,
    direction: Direction = "forward",
) -> Tensor:
    r"""`softened_kl` of each sample.

    Args:
        student_logits: ``(..., K)``.
        teacher_logits_or_probs: ``(..., K)``.
        temperature: :math:`T > 0`.
        from_logits: whether the teacher's tensor holds logits; otherwise probabilities, zeros allowed.
        direction: ``"forward"``: :math:`\mathrm{KL}(q \,\|\, p)`, the teacher first, as in `softened_kl`;
            ``"reverse"``: :math:`\mathrm{KL}(p \,\|\, q)`.

    Returns:
        ``(...)``: sum over the classes, times ``T ** 2``.

    Raises:
        InputError: the shapes differ, the temperature is not positive, or the direction is unknown.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import softened_kl_rows
        >>> student, teacher = tensor([[0.0, 0.0], [1.0, 3.0]]), tensor([[2.0, 0.0], [1.0, 3.0]])
        >>> softened_kl_rows(student, teacher)
        tensor([0.3278, 0.0000])
        >>> softened_kl_rows(student, teacher, direction="reverse")
        tensor([0.4338, 0.0000])
    """
    same_shape("softened_kl", student_logits, teacher_logits_or_probs)
    positive("temperature", temperature)
    log_probs = F.log_softmax(wide(student_logits) / temperature, dim=-1)
    teacher = wide(teacher_logits_or_probs)
    if direction == "reverse":
        # A class to which the teacher gives no mass at all costs much, but not infinitely much.
        tiny = torch.finfo(teacher.dtype).tiny
        teacher_log_probs = (
            F.log_softmax(teacher / temperature, dim=-1) if from_logits else teacher.clamp_min(tiny).log()
        )
        divergence = F.kl_div(teacher_log_probs, log_probs, reduction="none", log_target=True)
    elif direction != "forward":
        raise InputError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    elif from_logits:
        teacher_log_probs = F.log_softmax(teacher / temperature, dim=-1)
        divergence = F.kl_div(log_probs, teacher_log_probs, reduction="none", log_target=True)
    else:
        # kl_div reads 0 * log 0 as 0, so a teacher may give a class no mass at all.
        divergence = F.kl_div(log_probs, teacher, reduction="none")
    return divergence.sum(dim=-1) * temperature**2


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    r"""Cross entropy with distributions as targets: :math:`-\frac{1}{N} \sum_i \sum_k q_{ik} \log p_{ik}`.

    Args:
        logits: ``(..., K)``.
        probs: the targets, ``(..., K)``.

    Returns:
        A scalar: sum over the classes, mean over everything else.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import soft_cross_entropy
        >>> soft_cross_entropy(tensor([[0.0, 0.0], [2.0, 0.0]]), tensor([[0.5, 0.5], [0.9, 0.1]]))
        tensor(0.5100)
    """
    return soft_cross_entropy_rows(logits, probs).mean()


def soft_cross_entropy_rows(logits: Tensor, probs: Tensor) -> Tensor:
    """`soft_cross_entropy` of every sample by itself, ``(...)``: sum over the classes.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import soft_cross_entropy_rows
        >>> soft_cross_entropy_rows(tensor([[0.0, 0.0], [2.0, 0.0]]), tensor([[0.5, 0.5], [0.9, 0.1]]))
        tensor([0.6931, 0.3269])
    """
    same_shape("soft_cross_entropy", logits, probs)
    return -(wide(probs) * F.log_softmax(wide(logits), dim=-1)).sum(dim=-1)


def by_position(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Make every position of every sample a sample of its own; logits ``(N, K)`` and their targets stay as they are.

    Args:
        logits: ``(N, T, K)``, with any number of dimensions in the place of ``T``.
        target: for each position a class, ``(N, T)``, or a distribution, ``(N, T, K)``.

    Returns:
        ``(N * T, K)``, and ``(N * T,)`` or ``(N * T, K)``.

    Raises:
        InputError: the target does not begin with ``(N, T)``.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import by_position
        >>> logits, target = by_position(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64))
        >>> logits.shape, target.shape
        (torch.Size([6, 5]), torch.Size([6]))
    """
    places = logits.ndim - 1
    if places < 1 or logits.shape[:places] != target.shape[:places]:
        raise InputError(
            f"logits of shape {tuple(logits.shape)} need a target for each position, {tuple(logits.shape[:-1])}, got "
            f"{tuple(target.shape)}: choose a network that predicts what the data's targets are"
        )
    return logits.flatten(0, places - 1), target.flatten(0, places - 1)


def mean_probabilities(
    logits: Sequence[Tensor] | Tensor,
    *,
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""An ensemble's prediction: the mean of the softmaxes, never the softmax of the mean.

    .. math:: q = \sum_m w_m \, \mathrm{softmax}(z_m / T), \qquad \sum_m w_m = 1

    Args:
        logits: ``(M, N, K)`` or ``(M, ..., K)``, or a sequence of ``M`` tensors ``(N, K)``.
        temperature: :math:`T > 0`.
        weights: one non-negative number per member, divided by their sum; ``None`` weights all equally.

    Returns:
        Probabilities ``(N, K)`` or ``(..., K)``.

    Raises:
        InputError: no member, a wrong number of weights, a negative weight, or a temperature that is not positive.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import mean_probabilities
        >>> logits = tensor([[[0.0, 0.0]], [[100.0, 0.0]]])  # two members, one sample
        >>> mean_probabilities(logits)
        tensor([[0.7500, 0.2500]])
        >>> mean_probabilities(logits, weights=[3, 1])
        tensor([[0.6250, 0.3750]])
    """
    if len(logits) == 0:
        raise InputError("an ensemble needs at least one member, got none")
    stacked = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    positive("temperature", temperature)
    return weighted_mean(F.softmax(wide(stacked) / temperature, dim=-1), weights)


def weighted_mean(values: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Mean over the first dimension, ``(M, ...) -> (...)``, with `member_shares` as weights.

    Raises:
        InputError: the weights are not valid.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import weighted_mean
        >>> weighted_mean(tensor([1.0, 4.0]))
        tensor(2.5000)
        >>> weighted_mean(tensor([1.0, 4.0]), weights=[2, 1])
        tensor(2.)
    """
    if weights is None and len(values) > 0:
        return values.mean(dim=0)
    # Python numbers instead of a tensor of weights: nothing is copied to the device, and nothing waits for it.
    shares = member_shares(weights, len(values))
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(dim=0)


def member_shares(weights: Sequence[float] | None, members: int) -> list[float]:
    """Weights of an ensemble's members, divided by their sum; ``None`` weights all equally.

    Raises:
        InputError: there are not ``members`` of them, one is negative, or all are zero.

    Example:
        >>> from distill_lightning.functional import member_shares
        >>> member_shares([1, 3], 2)
        [0.25, 0.75]
        >>> member_shares(None, 2)
        [0.5, 0.5]
    """
    values = [1.0] * members if weights is None else [float(weight) for weight in weights]
    if members == 0:
        raise InputError("an ensemble needs at least one member, got none")
    if len(values) != members:
        raise InputError(f"{len(values)} weights for {members} teachers: give one weight per teacher")
    if min(values) < 0 or not 0 < sum(values) < math.inf:
        raise InputError(f"teachers' weights must be finite, non-negative and not all zero, got {values}")
    return [value / sum(values) for value in values]
