"""Amounts for each layer, from how much the network suffers when only that layer is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from distill_lightning.choices import Choice
from distill_lightning.compression.access.calibration import calibrating, inputs_of
from distill_lightning.compression.mask.sensitivity import amounts_within, scan
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Choice):
    """A scope of pruning: each layer is pruned as much as it tolerates alone, by the loss on the calibration data.

    Args:
        max_drop: how much the loss may rise when only one layer is pruned.
        target: instead, the share of all units to prune; the smallest rise is used at which the levels reach it, so a
            little more may be pruned.
        levels: the amounts that are tried, rising, in ``[0, 1]``.

    Raises:
        InputError: not exactly one of ``max_drop`` and ``target``, a target outside ``[0, 1]``, or levels that do
            not rise.
    """

    max_drop: float | None = None
    target: float | None = None
    levels: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __post_init__(self) -> None:
        self.check_numbers()
        if (self.max_drop is None) == (self.target is None):
            raise InputError("Sensitivity: give either max_drop or target")
        if self.target is not None and not 0 <= self.target <= 1:
            raise InputError(f"Sensitivity: target must be between 0 and 1, got {self.target}")
        levels = list(self.levels)
        rising = all(low < high for low, high in pairwise(levels))
        if not levels or not rising or levels[0] < 0 or levels[-1] > 1:
            raise InputError(f"Sensitivity: levels must be rising amounts between 0 and 1, got {levels}")

    def amounts(
        self, piece: Workpiece, counts: Mapping[str, int], change: Callable[[nn.Module, str, float], object]
    ) -> dict[str, float]:
        """Find the amount of each layer.

        Args:
            piece: the workpiece with the network; it is left as it is.
            counts: number of units by name of the layer.
            change: prunes one layer of a copy to an amount, in place.

        Raises:
            InputError: there is no calibration data, the loss on it is not finite, or the target is out of reach.
        """
        batches = piece.batches("scope Sensitivity")

        def evaluate(network: nn.Module) -> float:
            with calibrating(network), torch.no_grad():
                losses = [float(piece.loss(network(*inputs_of(inputs)), targets)) for inputs, targets in batches]
            return -sum(losses) / len(losses)

        dense = evaluate(piece.network)
        if not math.isfinite(dense):
            raise InputError(
                f"scope Sensitivity: the loss on the calibration data is {-dense}: check the data and the network"
            )
        curves = scan(piece.network, list(counts), self.levels, change=change, evaluate=evaluate)
        for name, curve in curves.items():
            losses = [-score for score in curve.values()]
            piece.record("sensitivity", name, {"levels": list(self.levels), "losses": losses, "dense": -dense})
        return amounts_within(curves, counts, dense=dense, max_drop=self.max_drop, target=self.target)
