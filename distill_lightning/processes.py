"""Processes: what they may use, and how they communicate, tensors on unsupported devices included."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import distributed as dist


def usable_cpus() -> int:
    """Number of CPUs that this process may run on; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_alone() -> bool:
    """Whether no process group is initialised."""
    return not (dist.is_available() and dist.is_initialized())


def all_reduce(tensor: Tensor, operation: Any) -> None:
    """Reduce a tensor in place over all processes."""
    _through_the_backend(tensor, lambda sent: dist.all_reduce(sent, operation))


def broadcast(tensor: Tensor) -> None:
    """Copy the first process's tensor to all processes, in place."""
    _through_the_backend(tensor, lambda sent: dist.broadcast(sent, src=0))


def gathered(value: Any) -> list[Any]:
    """Plain values of all processes, in their order."""
    if is_alone():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _through_the_backend(tensor: Tensor, communicate: Callable[[Tensor], Any]) -> None:
    # NCCL takes only tensors on the GPU.
    sent = tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor
    communicate(sent)
    if sent is not tensor:
        tensor.copy_(sent)
