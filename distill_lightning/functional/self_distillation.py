"""Formulas of self-distillation, in which a network's own past prediction is a part of its target."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.functional.common import positive, wide, wide_default


def hard_targets(target: Tensor, num_classes: int, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Classes as distributions, :math:`(1 - \epsilon) \, y + \epsilon / K` with the one-hot :math:`y`.

    Args:
        target: class indices ``(N,)``, or ``(N, T)`` where each position has one.
        num_classes: ``K``.
        label_smoothing: :math:`\epsilon` in ``[0, 1)``; with 0 the rows are exactly one-hot.

    Returns:
        float32 ``(N, K)``, or ``(N, T, K)``.

    Raises:
        InputError: ``label_smoothing`` is out of range.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import hard_targets
        >>> hard_targets(tensor([0, 2]), 4)
        tensor([[1., 0., 0., 0.],
                [0., 0., 1., 0.]])
        >>> hard_targets(tensor([0, 2]), 4, label_smoothing=0.2)
        tensor([[0.8500, 0.0500, 0.0500, 0.0500],
                [0.0500, 0.0500, 0.8500, 0.0500]])
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    rest = label_smoothing / num_classes
    rows = torch.full((*target.shape, num_classes), rest, dtype=wide_default(), device=target.device)
    return rows.scatter_(-1, target.long()[..., None], 1 - label_smoothing + rest)


def progressive_targets(hard: Tensor, past: Tensor, alpha: float) -> Tensor:
    r"""Self-KD's target, :math:`q = (1 - \alpha) \, y + \alpha \, s`.

    Args:
        hard: the labels :math:`y` as distributions, ``(..., K)``.
        past: the past prediction :math:`s`, probabilities ``(..., K)``.
        alpha: :math:`\alpha` in ``[0, 1]``.

    Returns:
        Probabilities ``(..., K)``, in float32 or wider.

    Raises:
        InputError: the shapes differ or ``alpha`` is out of range.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import progressive_targets
        >>> hard, past = tensor([[0.0, 1.0]]), tensor([[0.5, 0.5]])
        >>> progressive_targets(hard, past, alpha=0.5)
        tensor([[0.2500, 0.7500]])

    Kim, Ji, Yoon, Hwang: *Self-Knowledge Distillation with Progressive Refinement of Targets*,
    https://arxiv.org/abs/2006.12000
    """
    if hard.shape != past.shape:
        raise InputError(
            f"progressive_targets: hard {tuple(hard.shape)} and past {tuple(past.shape)} must have the same shape"
        )
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1], got {alpha}")
    return (1 - alpha) * wide(hard) + alpha * wide(past)


def soften(probs: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Probabilities at another temperature, :math:`\mathrm{softmax}(\log p / T)`.

    Args:
        probs: ``(..., K)``, computed at temperature 1; zeros stay zeros.
        temperature: :math:`T > 0`; 1 returns the probabilities as they are.

    Returns:
        Probabilities ``(..., K)``, in float32 or wider.

    Raises:
        InputError: the temperature is not positive.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import soften
        >>> probs = tensor([[0.9, 0.1]])
        >>> soften(probs, temperature=2.0)
        tensor([[0.7500, 0.2500]])
    """
    positive("temperature", temperature)
    probs = wide(probs)
    return probs if temperature == 1 else (probs.log() / temperature).softmax(dim=-1)
