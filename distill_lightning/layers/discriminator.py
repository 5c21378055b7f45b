"""The small network that tells a student's predictions from its teachers'."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import Tensor, nn

from distill_lightning.errors import InputError

DiscriminatorKind = Literal["official", "fixed"]

_SLOPE = 0.2
_FIXED_WIDTH = 16
# With fewer units in the last hidden layer, about half of the official network's initialisations have a dead output.
_ENOUGH_UNITS = 4


class Discriminator(nn.Module):
    r"""MEAL V2's discriminator: three linear layers ``K -> K // r -> (K // r) // r -> 2`` from one row of logits.

    The two outputs are the scores of "student" and "teacher" before the sigmoid; `functional.discriminator_loss` trains
    them. Linear layers compute what the 1x1 convolutions of the official code compute on ``(N, K, 1, 1)``.

    - ``"official"`` is the released network: a ReLU after every layer, **the outputs included**. Therefore no score
      is negative, the loss stays above ``ln(2) / 2 = 0.347``, and an output that is zero for every row is dead: it no
      longer learns (one dead output: 0.520 at best; both: 0.693). It has 127,047 parameters for ``K = 1000``. With few
      classes the widths vanish, about half of all initialisations have a dead output, and there is a warning.
    - ``"fixed"`` is this package's variant: LeakyReLU(0.2) between the layers, nothing after the last one, and at least
      16 units in each hidden layer.

    Args:
        num_classes: ``K``.
        kind: ``"official"`` or ``"fixed"``.
        reduction: ``r``, by which the width of each hidden layer is divided.

    Raises:
        InputError: an unknown kind, or a size below 1.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import Discriminator
        >>> discriminator = Discriminator(1000)
        >>> sum(parameter.numel() for parameter in discriminator.parameters())
        127047
        >>> discriminator(torch.zeros(4, 1000)).shape
        torch.Size([4, 2])

    Shen, Savvides: *MEAL V2*, https://arxiv.org/abs/2009.08453
    """

    def __init__(self, num_classes: int, *, kind: DiscriminatorKind = "official", reduction: int = 8) -> None:
        super().__init__()
        if kind not in ("official", "fixed"):
            raise InputError(f"Discriminator: kind must be 'official' or 'fixed', got {kind!r}")
        if num_classes < 1 or reduction < 1:
            raise InputError(
                f"Discriminator: num_classes and reduction must be at least 1, got {num_classes} and {reduction}"
            )
        self.kind = kind
        first, second = num_classes // reduction, num_classes // reduction // reduction
        if kind == "official" and second < _ENOUGH_UNITS:
            trouble = "its widths vanish (1 is used)" if second < 1 else "its outputs are often dead from the start"
            warnings.warn(
                f"Discriminator: with {num_classes} classes the official network's last hidden layer is {second} "
                f"wide: {trouble}; kind='fixed' (FixedDiscriminator() in MEALV2Module) has neither problem",
                stacklevel=2,
            )
        least = 1 if kind == "official" else _FIXED_WIDTH
        first, second = max(least, first), max(least, second)
        between = [nn.ReLU(), nn.ReLU()] if kind == "official" else [nn.LeakyReLU(_SLOPE), nn.LeakyReLU(_SLOPE)]
        self.layers = nn.Sequential(
            nn.Linear(num_classes, first), between[0], nn.Linear(first, second), between[1], nn.Linear(second, 2)
        )
        if kind == "official":
            self.layers.append(nn.ReLU())

    def extra_repr(self) -> str:
        """The kind, shown when the network is printed."""
        return f"kind={self.kind!r}"

    def forward(self, predictions: Tensor) -> Tensor:
        """Scores ``(N, 2)``, of student and teacher, for predictions ``(N, K)``."""
        scores: Tensor = self.layers(predictions)
        return scores
