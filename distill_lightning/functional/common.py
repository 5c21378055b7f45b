"""Conversions and checks that the formulas share."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.errors import InputError, check_finite


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: half precision underflows in probabilities and norms.

    Example:
        >>> import torch
        >>> from distill_lightning.functional.common import wide
        >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype, wide(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide_default() -> torch.dtype:
    """PyTorch's default type, but no narrower than float32: that of what is made of integers and Python numbers.

    In a step under ``precision="bf16-true"`` the default type is bfloat16.

    Example:
        >>> from distill_lightning.functional.common import wide_default
        >>> wide_default()
        torch.float32
    """
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors of different shapes.

    Raises:
        InputError: the shapes differ; the message begins with ``name``.

    Example:
        >>> import torch
        >>> from distill_lightning.functional.common import same_shape
        >>> same_shape("loss", torch.zeros(2, 3), torch.zeros(2, 4))
        Traceback (most recent call last):
        distill_lightning.errors.InputError: loss: student (2, 3) and teacher (2, 4) must have the same shape
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"{name}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape"
        )


def positive(name: str, value: float) -> None:
    """Refuse zero, negative numbers, infinity and NaN.

    Raises:
        InputError: ``value`` is not positive and finite; the message begins with ``name``.

    Example:
        >>> from distill_lightning.functional.common import positive
        >>> positive("temperature", 0.0)
        Traceback (most recent call last):
        distill_lightning.errors.InputError: temperature must be positive, got 0.0
    """
    check_finite(name, value)
    if not value > 0:
        raise InputError(f"{name} must be positive, got {value}")
