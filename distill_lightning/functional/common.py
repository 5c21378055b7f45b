"""Conversions and checks that the formulas share."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.errors import InputError


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: half precision underflows in probabilities and norms."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors of different shapes."""
    if student.shape != teacher.shape:
        raise InputError(
            f"{name}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape"
        )


def positive(name: str, value: float) -> None:
    """Refuse zero, negative numbers and NaN."""
    if not value > 0:
        raise InputError(f"{name} must be positive, got {value}")
