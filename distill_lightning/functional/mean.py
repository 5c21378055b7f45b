"""Means over what counts."""

from __future__ import annotations

from torch import Tensor


def counted_mean(rows: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Mean over the samples, or positions, that count: :math:`\sum_i c_i \ell_i / \sum_i c_i`.

    Args:
        rows: one number for each, ``(N,)`` or ``(N, T)``.
        counted: :math:`c`, bool, the same shape; ``None``: all count.

    Returns:
        A scalar, 0 where nothing counts.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import counted_mean
        >>> counted_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    if counted is None:
        return rows.mean()
    # What does not count may be infinite or NaN, which a product with 0 would keep.
    return rows.masked_fill(~counted, 0).sum() / counted.sum().clamp_min(1)


def zero_uncounted(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Targets with 0 for the samples that do not count: NaN there would turn their gradient into NaN, and not 0.

    Args:
        values: ``(N, ...)``.
        counted: which samples count, bool ``(N,)``; ``None``: all.

    Returns:
        ``(N, ...)``.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import zero_uncounted
        >>> zero_uncounted(torch.tensor([[1.0], [float("nan")]]), torch.tensor([True, False]))
        tensor([[1.],
                [0.]])
    """
    if counted is None:
        return values
    return values.masked_fill(~counted.view(*counted.shape, *[1] * (values.ndim - counted.ndim)), 0)
