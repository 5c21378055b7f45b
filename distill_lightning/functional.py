"""Every formula of the package, as a pure function of tensors.

Shapes use the letters of `distill_lightning.batch`. Every function says how it reduces; none keeps state. Probabilities
and norms are computed in float32 (or wider), whatever autocast or the inputs say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.errors import InputError

Reduction = Literal["mean", "sum"]
Normalize = Literal["sample", "channel", "none"]


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: half precision underflows in probabilities and norms."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, https://arxiv.org/abs/1503.02531
    """
    _same_shape("softened_kl", student_logits, teacher_logits_or_probs)
    _positive("temperature", temperature)
    log_probs = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
    teacher = _wide(teacher_logits_or_probs)
    if from_logits:
        teacher_log_probs = F.log_softmax(teacher / temperature, dim=-1)
        divergence = F.kl_div(log_probs, teacher_log_probs, reduction="none", log_target=True)
    else:
        # kl_div reads 0 * log 0 as 0, so a teacher may give a class no mass at all.
        divergence = F.kl_div(log_probs, teacher, reduction="none")
    return divergence.sum(dim=-1).mean() * temperature**2


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    r"""Cross entropy to a distribution: :math:`-\frac{1}{N} \sum_i \sum_k q_{ik} \log p_{ik}`.

    Args:
        logits: ``(..., K)``.
        probs: the targets, ``(..., K)``.

    Returns:
        A scalar: sum over the classes, mean over everything else.

    Raises:
        InputError: the shapes differ.
    """
    _same_shape("soft_cross_entropy", logits, probs)
    return -(_wide(probs) * F.log_softmax(_wide(logits), dim=-1)).sum(dim=-1).mean()


def mean_probabilities(
    logits: Sequence[Tensor] | Tensor,
    *,
    temperature: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""An ensemble's prediction: the mean of the softmaxes, never the softmax of the mean.

    .. math:: q = \sum_m w_m \, \mathrm{softmax}(z_m / T), \qquad \sum_m w_m = 1

    Args:
        logits: ``(M, N, K)``, or a sequence of ``M`` tensors ``(N, K)``.
        temperature: :math:`T > 0`.
        weights: one non-negative number per member, divided by their sum; ``None`` weighs all alike.

    Returns:
        Probabilities ``(N, K)``.

    Raises:
        InputError: no member, a wrong number of weights, a negative weight, or a temperature that is not positive.
    """
    if len(logits) == 0:
        raise InputError("an ensemble needs at least one member, got none")
    stacked = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    _positive("temperature", temperature)
    return weighted_mean(F.softmax(_wide(stacked) / temperature, dim=-1), weights)


def weighted_mean(values: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Mean over the first dimension, ``(M, ...) -> (...)``, with `member_shares` as weights.

    Raises:
        InputError: the weights do not fit.
    """
    if weights is None:
        return values.mean(dim=0)
    # Python numbers, not a tensor of weights: nothing has to travel to the device, nothing has to be waited for.
    shares = member_shares(weights, len(values))
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(dim=0)


def member_shares(weights: Sequence[float] | None, members: int) -> list[float]:
    """Weights of an ensemble's members, divided by their sum; ``None`` weighs all alike.

    Raises:
        InputError: their number is not ``members``, one is negative, or all are zero.
    """
    values = [1.0] * members if weights is None else [float(weight) for weight in weights]
    if members == 0:
        raise InputError("an ensemble needs at least one member, got none")
    if len(values) != members:
        raise InputError(f"{len(values)} weights for {members} teachers: give one weight per teacher")
    if min(values) < 0 or not 0 < sum(values) < math.inf:
        raise InputError(f"teachers' weights must be finite, non-negative and not all zero, got {values}")
    return [value / sum(values) for value in values]


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
    independent feature maps after a ReLU are about ``0.8 / sqrt(D)`` apart, and never more than ``2 / sqrt(D)``: a
    weight of order 100 to 1000 belongs to it. With the sum, divide that weight by ``D``.

    Args:
        student: ``(N, ...)``, already translated.
        teacher: ``(N, ...)``, same shape.
        p: the exponent, 1 in the papers' experiments.
        reduction: ``"mean"`` over ``N`` and ``D``, or ``"sum"`` over ``D`` and mean over ``N``.
        normalize: ``"sample"`` over all ``D`` entries; ``"channel"`` over each channel's own map; ``"none"``.
        eps: the smallest norm that is divided by; a zero feature stays zero, its gradient is at most ``1 / eps`` times
            the loss's (finite in float32).

    Returns:
        A scalar.

    Raises:
        InputError: the shapes differ, or an option is unknown.

    Kim, Park, Kwak: *Paraphrasing Complex Network: Network Compression via Factor Transfer*,
    https://arxiv.org/abs/1802.04977; Park, Kwak: *FEED*, https://arxiv.org/abs/1909.10754
    """
    _same_shape("factor_distance", student, teacher)
    difference = (_unit(student, normalize, eps) - _unit(teacher, normalize, eps)).abs()
    per_sample = (difference if p == 1 else difference**p).flatten(1)
    if reduction == "mean":
        return per_sample.mean()
    if reduction == "sum":
        return per_sample.sum(dim=1).mean()
    raise InputError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> Tensor:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert`.

    The bins are equally wide and closed on the right, ``((b - 1) / B, b / B]``; confidence 0 counts in the first bin
    and confidence 1 in the last.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``.
        bins: :math:`B`.

    Returns:
        A scalar in ``[0, 1]``; NaN for no samples.

    Guo, Pleiss, Sun, Weinberger: *On Calibration of Modern Neural Networks*, https://arxiv.org/abs/1706.04599
    """
    counts, confidences, hits = calibration_bins(confidence, correct, bins=bins)
    return (hits - confidences).abs().sum() / counts.sum()


def calibration_bins(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """What a reliability diagram and the calibration error are made of.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``.
        bins: number of equally wide bins, closed on the right.

    Returns:
        Three tensors ``(bins,)``: the number of samples, the sum of their confidences, the number of hits.
    """
    # float64 keeps the inner edges exact; Apple's devices have none.
    wide = torch.float32 if confidence.device.type == "mps" else torch.float64
    confidence = confidence.to(wide)
    edges = torch.arange(1, bins, dtype=wide, device=confidence.device) / bins
    place = torch.bucketize(confidence, edges)
    empty = torch.zeros(bins, dtype=wide, device=confidence.device)
    counts = empty.index_add(0, place, torch.ones_like(confidence))
    return counts, empty.index_add(0, place, confidence), empty.index_add(0, place, correct.to(wide))


def _unit(feature: Tensor, normalize: Normalize, eps: float) -> Tensor:
    if normalize == "sample":
        return F.normalize(_wide(feature).flatten(1), dim=1, eps=eps)
    if normalize == "channel":
        if feature.ndim < 3:
            raise InputError(f"normalize='channel' needs (N, C, ...), got a feature of shape {tuple(feature.shape)}")
        return F.normalize(_wide(feature).flatten(2), dim=2, eps=eps)
    if normalize == "none":
        return _wide(feature)
    raise InputError(f"normalize must be 'sample', 'channel' or 'none', got {normalize!r}")


def _same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"{name}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape"
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name} must be positive, got {value}")
