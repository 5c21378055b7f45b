"""The tensors of a network's output, in a structure or out of it, and how far they are from others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distill_lightning.errors import InputError


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a network's output, in the order of an ONNX file; ``None`` is left out."""
    if isinstance(output, Tensor):
        return (output,)
    if output is None:
        return ()
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        raise InputError(f"outputs must be tensors, or tuples, lists and dicts of tensors, got {type(output).__name__}")
    return tuple(tensor for part in output for tensor in outputs_of(part))


def in_structure(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Tensors in the structure in which `outputs_of` has found them."""
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, Mapping):
        return {key: in_structure(part, tensors) for key, part in like.items()}
    if isinstance(like, (tuple, list)):
        parts = [in_structure(part, tensors) for part in like]
        return like._make(parts) if hasattr(like, "_make") else tuple(parts)
    return None


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape; infinity and NaN equal themselves and nothing else.

    Example:
        >>> import torch
        >>> from distill_lightning.compression.access.outputs import largest_difference
        >>> one = torch.tensor([1.0, float("nan"), -float("inf")])
        >>> largest_difference(one, one.clone()), largest_difference(one, torch.tensor([1.5, 0.0, 0.0]))
        (0.0, inf)
    """
    apart = (one != other) & ~(one.isnan() & other.isnan())
    gaps = (one.double() - other.double()).abs()[apart].nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(gaps.max()) if len(gaps) else 0.0


def scale_of(outputs: Iterable[Tensor]) -> float:
    """What a tolerance for outputs is relative to: the largest finite absolute entry of all, at least 1."""
    entries = torch.cat([torch.ones(1, dtype=torch.float64), *(output.double().flatten().cpu() for output in outputs)])
    return float(entries[entries.isfinite()].abs().max())
