"""A bound for the memory that is taken while a network is built by what a file says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distill_lightning.errors import InputError

# What a tensor costs at least, however small: a module of a million layers takes time and memory, too.
_LEAST = 2**16
_BY_SHAPE = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}
_BY_LENGTH = {torch.arange, torch.linspace, torch.randperm}


class Budget(TorchFunctionMode):
    """Refuse to make tensors of more bytes than there may be, before their memory is taken.

    Args:
        limit: bytes of all tensors that are made inside together; each counts at least 64 KiB.
        source: the file that gives the sizes, with which the message begins.
        way_out: the end of the message.

    Raises:
        InputError: inside, there would be more.

    Example:
        >>> from torch import nn
        >>> from distill_lightning import InputError
        >>> from distill_lightning.networks.budget import Budget
        >>> with Budget(2**20, source="network.dlpk", way_out="raise limit"):
        ...     small = nn.Linear(100, 100)
        >>> try:
        ...     with Budget(2**20, source="network.dlpk", way_out="raise limit"):
        ...         nn.Linear(100, 10**9)
        ... except InputError as error:
        ...     print(error)
        network.dlpk describes a network of more than 1,048,576 bytes: raise limit
    """

    def __init__(self, limit: int, *, source: str, way_out: str) -> None:
        super().__init__()
        self.limit, self.source, self.way_out = limit, source, way_out
        self.taken = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count what a call makes, then make it."""
        kwargs = kwargs or {}
        number = _elements(func, args, kwargs)
        if number is not None:
            own = args[0].itemsize if args and isinstance(args[0], Tensor) else torch.get_default_dtype().itemsize
            dtype = kwargs.get("dtype")
            self.taken += max(number * (own if dtype is None else dtype.itemsize), _LEAST)
            if self.taken > self.limit:
                raise InputError(f"{self.source} describes a network of more than {self.limit:,} bytes: {self.way_out}")
        return func(*args, **kwargs)


def bytes_of_tensors(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a state dict's tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _elements(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Of the tensor that a call makes; ``None``: it makes none from a size alone."""
    values = [*args, *kwargs.values()]
    if func in _BY_SHAPE:
        shape = next((value for value in values if isinstance(value, (tuple, list))), None)
        return math.prod(value for value in (values if shape is None else shape) if type(value) is int)
    if func in _BY_LENGTH:
        return max((value for value in values if type(value) is int), default=0)
    if func is torch.eye:
        sides = [value for value in args if type(value) is int]
        return math.prod(sides if len(sides) > 1 else sides * 2)
    return None
