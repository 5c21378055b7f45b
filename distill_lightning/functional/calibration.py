"""How well the confidence of predictions agrees with how often they are right."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide, wide_default

ECE_BINS = 15
"""Bins of the calibration error where no other number is given."""


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = ECE_BINS) -> Tensor:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert`.

    The bins are equally wide and closed on the right, ``((b - 1) / B, b / B]``; confidence 0 counts in the first bin
    and confidence 1 in the last.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``.
        bins: :math:`B`.

    Returns:
        A scalar in ``[0, 1]``; NaN for no samples.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import expected_calibration_error
        >>> confidence = tensor([0.95, 0.95, 0.65, 0.65])
        >>> correct = tensor([True, True, True, False])
        >>> expected_calibration_error(confidence, correct, bins=10)
        tensor(0.1000, dtype=torch.float64)

    Guo, Pleiss, Sun, Weinberger: *On Calibration of Modern Neural Networks*, https://arxiv.org/abs/1706.04599
    """
    return binned_calibration_error(*calibration_bins(confidence, correct, bins=bins))


def binned_calibration_error(counts: Tensor, confidences: Tensor, hits: Tensor) -> Tensor:
    """`expected_calibration_error` from `calibration_bins`, which can be summed over batches.

    Args:
        counts: number of samples in each bin, ``(bins,)``.
        confidences: sum of their confidences.
        hits: number of those that were right.

    Returns:
        A scalar in ``[0, 1]``; NaN for no samples.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import binned_calibration_error, calibration_bins
        >>> bins = calibration_bins(tensor([0.25, 0.75, 1.0]), tensor([0, 1, 1]), bins=2)
        >>> binned_calibration_error(*bins)
        tensor(0.1667, dtype=torch.float64)
    """
    return (hits - confidences).abs().sum() / counts.sum()


def calibration_bins(confidence: Tensor, correct: Tensor, *, bins: int = ECE_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, confidences and hits by bin: what a reliability diagram and the calibration error are computed from.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``.
        bins: number of equally wide bins, closed on the right.

    Returns:
        Three tensors ``(bins,)``: the number of samples, the sum of their confidences, the number of hits.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import calibration_bins
        >>> counts, confidences, hits = calibration_bins(tensor([0.25, 0.75, 1.0]), tensor([0, 1, 1]), bins=2)
        >>> counts.tolist(), confidences.tolist(), hits.tolist()
        ([1.0, 2.0], [0.25, 1.75], [0.0, 2.0])
    """
    # float64 keeps the inner edges exact; Apple's devices have none.
    exact = torch.float32 if confidence.device.type == "mps" else torch.float64
    confidence = confidence.to(exact)
    edges = torch.arange(1, bins, dtype=exact, device=confidence.device) / bins
    place = torch.bucketize(confidence, edges)
    empty = torch.zeros(bins, dtype=exact, device=confidence.device)
    counts = empty.index_add(0, place, torch.ones_like(confidence))
    return counts, empty.index_add(0, place, confidence), empty.index_add(0, place, correct.to(exact))


def risk_coverage(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    r"""The share of errors among the ``k`` most confident samples, for every ``k``.

    .. math:: \mathrm{coverage}_k = \frac{k}{N}, \qquad
        \mathrm{risk}_k = \frac{1}{k} \sum_{i=1}^{k} \mathbb{1}[\text{sample } i \text{ is wrong}]

    with the samples in order of decreasing confidence. Samples of equal confidence keep the order in which they come.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``; booleans, or 0 and 1.

    Returns:
        Coverage and risk, two float32 tensors ``(N,)`` in ``[0, 1]``.

    Raises:
        InputError: the two do not have the same shape ``(N,)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import risk_coverage
        >>> confidence = tensor([0.9, 0.8, 0.7, 0.6])
        >>> correct = tensor([True, True, False, True])
        >>> coverage, risk = risk_coverage(confidence, correct)
        >>> coverage
        tensor([0.2500, 0.5000, 0.7500, 1.0000])
        >>> risk
        tensor([0.0000, 0.0000, 0.3333, 0.2500])
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise InputError(
            "risk and coverage need confidence and correctness of the same shape (N,), "
            f"got {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    order = wide(confidence).argsort(descending=True, stable=True)
    # Integers until the division: nothing is rounded, however many samples there are.
    errors = (correct[order] == 0).cumsum(dim=0)
    ranks = torch.arange(1, len(errors) + 1, device=errors.device)
    exact = wide_default()
    return ranks.to(exact) / len(errors), errors.to(exact) / ranks


def area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    r"""AURC, the mean of the risks of `risk_coverage`, :math:`\frac{1}{N} \sum_{k=1}^{N} \mathrm{risk}_k`.

    It is small when there are few errors and the network is least confident about them. This is the definition of
    Self-KD's code, whose tables show it times 1000; others integrate with trapezoids.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``; booleans, or 0 and 1.

    Returns:
        A scalar in ``[0, 1]``; NaN for no samples.

    Raises:
        InputError: the two do not have the same shape ``(N,)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import area_under_risk_coverage
        >>> confidence = tensor([0.9, 0.8, 0.7, 0.6])
        >>> correct = tensor([True, True, False, True])
        >>> area_under_risk_coverage(confidence, correct)
        tensor(0.1458)

    Geifman, Uziel, El-Yaniv: *Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers*,
    https://arxiv.org/abs/1805.08206; Kim, Ji, Yoon, Hwang: *Self-Knowledge Distillation with Progressive Refinement of
    Targets*, https://arxiv.org/abs/2006.12000
    """
    return risk_coverage(confidence, correct)[1].mean()


def excess_area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    r"""E-AURC: how much AURC exceeds that of the best possible order of the same answers.

    .. math:: \mathrm{AURC} - \frac{1}{N} \sum_{j=1}^{e} \frac{j}{N - e + j}

    with ``e`` errors among the ``N`` samples; the subtracted mean is the AURC of the order in which every error comes
    after every right answer.

    Args:
        confidence: the largest probability of each sample, ``(N,)``.
        correct: whether that class was right, ``(N,)``; booleans, or 0 and 1.

    Returns:
        A scalar in ``[0, 1]``, 0 for the best order; NaN for no samples.

    Raises:
        InputError: the two do not have the same shape ``(N,)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import excess_area_under_risk_coverage
        >>> confidence = tensor([0.9, 0.8, 0.7, 0.6])
        >>> correct = tensor([True, True, False, True])
        >>> excess_area_under_risk_coverage(confidence, correct)
        tensor(0.0833)

    Geifman, Uziel, El-Yaniv: *Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers*,
    https://arxiv.org/abs/1805.08206
    """
    _, risk = risk_coverage(confidence, correct)
    # Correctness itself is the best possible confidence.
    _, best = risk_coverage(correct.float(), correct)
    return (risk - best).mean()


def brier_score(logits: Tensor, target: Tensor) -> Tensor:
    r"""Brier score: the squared distance between the probabilities and the one-hot label.

    .. math:: \frac{1}{N} \sum_i \sum_k \left( p_{ik} - \mathbb{1}[k = y_i] \right)^2,
        \qquad p = \mathrm{softmax}(z)

    Args:
        logits: ``(N, K)``.
        target: classes ``(N,)``, int64.

    Returns:
        A scalar in ``[0, 2]``: sum over the classes, mean over the samples; NaN for no samples.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import brier_score
        >>> brier_score(tensor([[0.0, 0.0], [10.0, -10.0]]), tensor([1, 0]))
        tensor(0.2500)

    Brier: *Verification of Forecasts Expressed in Terms of Probability*, Monthly Weather Review 78 (1950).
    """
    probs = F.softmax(wide(logits), dim=-1)
    return (probs - F.one_hot(target, logits.shape[-1])).square().sum(dim=-1).mean()


def interval_calibration(mean: Tensor, log_var: Tensor, target: Tensor, *, levels: int = 9) -> Tensor:
    r"""Calibration error of a Gaussian's central intervals: their share of the targets against their level.

    .. math:: \frac{1}{B} \sum_{b=1}^{B} \left| \mathrm{share}_b - p_b \right|, \qquad p_b = \frac{b}{B + 1}

    where the share is the fraction of all ``N * d`` targets that lie in the central interval of level ``p_b``, bounds
    included:
    :math:`|y - m| \le \sqrt 2 \, \mathrm{erf}^{-1}(p_b) \, e^{s / 2}`.

    Args:
        mean: :math:`m`, ``(N, d)``.
        log_var: :math:`s`, ``(N, d)``.
        target: :math:`y`, ``(N, d)``.
        levels: :math:`B`; 9 levels are 0.1, 0.2, ... 0.9.

    Returns:
        A scalar in ``[0, 0.5]``, 0 for perfect calibration; NaN for no samples.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import interval_calibration
        >>> mean, log_var = torch.zeros(4, 1), torch.zeros(4, 1)
        >>> target = torch.tensor([[0.1], [0.5], [1.0], [2.0]])
        >>> interval_calibration(mean, log_var, target, levels=3)
        tensor(0.)
        >>> interval_calibration(mean, log_var - 2, target, levels=3)
        tensor(0.2500)

    Kuleshov, Fenner, Ermon: *Accurate Uncertainties for Deep Learning Using Calibrated Regression*,
    https://arxiv.org/abs/1807.00263 (who compare quantiles, and square the difference).
    """
    return interval_error(interval_hits(mean, log_var, target, levels=levels), target.numel())


def interval_hits(mean: Tensor, log_var: Tensor, target: Tensor, *, levels: int = 9) -> Tensor:
    """How many targets lie in each central interval: what `interval_calibration` is computed from.

    Args:
        mean: ``(N, d)``.
        log_var: ``(N, d)``.
        target: ``(N, d)``.
        levels: number of intervals.

    Returns:
        int64 ``(levels,)``.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import interval_hits
        >>> mean, log_var = torch.zeros(4, 1), torch.zeros(4, 1)
        >>> target = torch.tensor([[0.1], [0.5], [1.0], [2.0]])
        >>> interval_hits(mean, log_var, target, levels=3)
        tensor([1, 2, 3])
    """
    if not mean.shape == log_var.shape == target.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (mean, log_var, target))
        raise InputError(
            f"interval calibration: means, log-variances and targets must have the same shape, got {shapes}"
        )
    distance = (wide(target) - wide(mean)).abs()
    # The bound is multiplied by the deviation: a distance of zero, divided by a deviation of zero, would be NaN.
    widths = _levels(levels, distance).erfinv() * math.sqrt(2)
    inside = distance.unsqueeze(-1) <= widths * torch.exp(wide(log_var) / 2).unsqueeze(-1)
    return inside.flatten(end_dim=-2).sum(dim=0)


def interval_error(hits: Tensor, total: Tensor | int) -> Tensor:
    """Mean absolute difference between each interval's share of the targets and its level, from `interval_hits`.

    Args:
        hits: ``(levels,)``.
        total: the number of targets that were looked at.

    Returns:
        A scalar.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import interval_error
        >>> interval_error(tensor([1, 2, 3]), 4)
        tensor(0.)
        >>> interval_error(tensor([1, 1, 1]), 4)
        tensor(0.2500)
    """
    shares = hits.to(torch.promote_types(hits.dtype, wide_default())) / total
    return (shares - _levels(len(hits), shares)).abs().mean()


def _levels(count: int, like: Tensor) -> Tensor:
    """``count`` evenly spaced levels between 0 and 1, made on the device."""
    return torch.arange(1, count + 1, dtype=like.dtype, device=like.device) / (count + 1)
