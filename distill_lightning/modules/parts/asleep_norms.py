"""Statistics of BatchNorm that are to stay as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distill_lightning.layers import asleep
from distill_lightning.lightning_internals import trains
from distill_lightning.part import Part


class AsleepNorms(Part):
    """Puts back what `StochasticWeightAveraging` does to the BatchNorms in a module's frozen parts.

    After the last epoch it resets all statistics, to measure them under the averaged weights; those of a part in eval
    mode would stay at zero and one.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[_BatchNorm, dict[str, Tensor]]] = []

    def training_starts(self, module: Any) -> None:
        """Keep the statistics, of which there are few."""
        norms = [norm for norm in asleep(module) if isinstance(norm, _BatchNorm)]
        self._kept = [(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]

    def epoch_starts(self, module: Any) -> None:
        """Callbacks come first: by now the statistics are reset."""
        if trains(module.trainer):
            return
        for norm, buffers in self._kept:
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)

    def fit_ends(self, module: Any) -> None:
        """Let go of them."""
        self._kept = []
