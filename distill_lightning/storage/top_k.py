"""The largest probabilities of a row, and what they leave spread evenly over the other classes."""

from __future__ import annotations

import torch
from torch import Tensor


def class_dtype(num_classes: int) -> torch.dtype:
    """The smallest integer type that holds every class index; indexing needs a cast to int64."""
    return torch.int16 if num_classes <= 2**15 else torch.int32


def largest(probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest probabilities of each row ``(..., K)`` and their classes, both ``(..., top_k)``."""
    values, classes = probs.topk(top_k, dim=-1)
    return values, classes.to(class_dtype(probs.shape[-1]))


def spread_rest(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Rows ``(..., K)`` of what `largest` kept; the rest of each row's mass is spread evenly over its other classes."""
    top_k = values.shape[-1]
    rest = (1 - values.sum(dim=-1, keepdim=True)).clamp_min(0) / max(num_classes - top_k, 1)
    return rest.repeat_interleave(num_classes, dim=-1).scatter_(-1, classes.long(), values)
