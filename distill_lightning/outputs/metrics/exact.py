"""Metrics that keep their sums in float32 or wider, whatever the networks around them are converted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from distill_lightning.functional.common import wide


class ExactMetric(Metric):
    """A metric that no conversion to half precision rounds; `Metric.set_dtype` alone still does.

    torchmetrics ignores ``half()`` and ``bfloat16()``, but not ``to(torch.bfloat16)``, which is how Lightning converts
    a module for ``precision="bf16-true"``: a sum in bfloat16 stops growing after a few hundred samples.

    Example:
        >>> import torch
        >>> from distill_lightning.outputs.metrics import Accuracy
        >>> metric = Accuracy().to(torch.bfloat16)
        >>> metric.total.dtype
        torch.float32
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _widen_type(self)

    def add_state(self, name: str, default: Tensor | list[Any], *args: Any, **kwargs: Any) -> None:
        """Add a state as torchmetrics does, in float32 where PyTorch's default type is a half precision."""
        super().add_state(name, _exact(default, default), *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> nn.Module:
        if self._dtype_convert:
            return super()._apply(fn, exclude_state)
        with exact_metrics(self):
            return super()._apply(fn, exclude_state)


@contextmanager
def exact_metrics(module: nn.Module) -> Iterator[None]:
    """Let a conversion move the metrics in a module, of whatever class, and leave their numbers in float32 or wider.

    Args:
        module: that is converted inside this context.

    Example:
        >>> import torch
        >>> from torchmetrics import MeanSquaredError
        >>> from distill_lightning.outputs.metrics.exact import exact_metrics
        >>> metric = MeanSquaredError()
        >>> with exact_metrics(metric):
        ...     metric = metric.to(torch.bfloat16)
        >>> metric.sum_squared_error.dtype
        torch.float32
    """
    before = [(child, _numbers(child)) for child in module.modules() if isinstance(child, Metric)]
    yield
    for metric, numbers in before:
        for name, value in numbers.items():
            vars(metric)[name] = _exact(value, vars(metric)[name])
        # What it computed before has been rounded with the module.
        metric._computed = None  # noqa: SLF001
        _widen_type(metric)


def _numbers(metric: Metric) -> dict[str, Any]:
    """What a metric has counted; containers are copied, because a conversion writes into them."""
    states = {**metric.metric_state, "_defaults": metric._defaults}  # noqa: SLF001
    return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in states.items()}


def _exact(before: Any, after: Any) -> Any:
    """A converted value, in the type that it had before if it is too narrow now, but never in half precision."""
    if isinstance(after, Tensor):
        return wide(before).to(after.device) if _is_narrow(after) else after
    if isinstance(after, dict):
        return {name: _exact(before[name], value) for name, value in after.items()}
    if isinstance(after, list):
        return [_exact(old, new) for old, new in zip(before, after, strict=True)]
    return after


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _widen_type(metric: Metric) -> None:
    """A metric's own type is that of the numbers which it makes of nothing, and of Python's."""
    if metric.dtype.itemsize < 4 and metric.dtype.is_floating_point:
        metric._dtype = torch.float32  # noqa: SLF001
