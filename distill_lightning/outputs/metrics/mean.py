"""The state that most metrics share."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.outputs.metrics.exact import ExactMetric


class SampleMean(ExactMetric):
    """A mean over samples: their sum and their number.

    A metric's ``update`` adds to ``total`` and ``count``; `add` does so from a batch's mean.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.outputs.metrics.mean import SampleMean
        >>> class MeanSquare(SampleMean):
        ...     def update(self, values):
        ...         self.add(values.square().mean(), len(values))
        >>> metric = MeanSquare()
        >>> metric.update(tensor([1.0, 1.0, 1.0]))
        >>> metric.update(tensor([3.0]))
        >>> metric.compute()
        tensor(3.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, mean: Tensor, samples: int) -> None:
        """Add a batch by its mean.

        Args:
            mean: of the batch, a scalar.
            samples: how many it is the mean of. Over several processes a batch may have none; its mean is then NaN and
                does not count.
        """
        if samples:
            self.total += mean * samples
            self.count += samples

    def compute(self) -> Tensor:
        """The mean over everything added; NaN if that is nothing."""
        mean: Tensor = self.total / self.count
        return mean
