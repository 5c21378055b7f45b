"""Learned pruning: parametrizations whose mask is a function of scores that gradient descent learns.

A parametrization multiplies the weight inside the layer, so optimisers, moving averages and checkpoints see the dense
weight and the scores; `bake` replaces both by the pruned weight.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from distill_lightning.compression.access.computed import ComputedWeight, bake_layer, compute, computed_in
from distill_lightning.compression.access.parameters import names_of_parameters, parameters_of, split_path
from distill_lightning.compression.mask.masks import Masks, lowest
from distill_lightning.compression.mask.selection import Scope, choose
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.functional.common import wide


class _Masked(torch.autograd.Function):
    """The masked weight; the scores get the gradient of the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, kept: Tensor) -> Tensor:  # noqa: ARG004  # for its gradient
        ctx.save_for_backward(weight, kept)
        return weight.masked_fill(~kept, 0)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, kept = cast("Any", ctx).saved_tensors
        return grads[0].masked_fill(~kept, 0), grads[0] * weight, None


class LearnedMask(ComputedWeight):
    """A weight of which some entries are held at zero, as scores that are trained beside it decide."""

    @abstractmethod
    def kept(self) -> Tensor:
        """Where weights stay in eval mode: bool, in a shape that broadcasts to the weight's."""

    def describe(self) -> dict[str, Any]:
        """Nothing besides the family."""
        return {}

    @classmethod
    def from_description(cls, weight: Tensor, told: Mapping[str, Any]) -> Self:
        """A mask whose scores are still to be loaded."""
        return cls(weight.detach(), **told)


class _ScoredMask(LearnedMask):
    """A mask of scores, one for each weight, and an amount that is compared with them."""

    def __init__(self, weight: Tensor, *, amount: float, initial: float = 0.0) -> None:
        super().__init__()
        if not 0 <= amount <= 1:
            raise InputError(f"{type(self).__name__}: amount must be between 0 and 1, got {amount}")
        self.scores = nn.Parameter(torch.full_like(weight, initial))
        self.amount = amount

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, with zeros where it is pruned."""
        return cast("Tensor", _Masked.apply(weight, self.scores, self.kept()))

    def describe(self) -> dict[str, Any]:
        """The current amount."""
        return {"amount": self.amount}

    def pruned(self) -> int:
        """The number of weights that are held at zero."""
        return int((~self.kept()).sum())


class TopK(_ScoredMask):
    """Movement pruning: an exact number of weights stays, those with the highest learned scores.

    A score falls where the weight moves towards zero. Pruned weights have score gradients, too, so that they can
    return; they have no gradient of their own.

    Sanh, Wolf, Rush: *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, https://arxiv.org/abs/2005.07683

    Args:
        weight: the weight to prune; the scores have its shape and start at zero. Of equal scores the first are pruned.
        amount: share of pruned weights, in ``[0, 1]``; meant to be raised during training.

    Raises:
        InputError: an amount outside ``[0, 1]``.
    """

    family = "movement"

    def __init__(self, weight: Tensor, *, amount: float = 0.0) -> None:
        super().__init__(weight, amount=amount)

    def kept(self) -> Tensor:
        """Where weights stay: bool, in the weight's shape."""
        pruned = lowest(wide(self.scores.detach()).flatten(), round(self.amount * self.scores.numel()))
        return ~pruned.view_as(self.scores)


class SoftThreshold(_ScoredMask):
    """Soft movement pruning: a weight stays while the sigmoid of its learned score exceeds a threshold.

    Their number follows from `penalty`, which pushes the scores down.

    Sanh, Wolf, Rush: *Movement Pruning: Adaptive Sparsity by Fine-Tuning*, https://arxiv.org/abs/2005.07683

    Args:
        weight: the weight to prune.
        amount: the threshold, in ``[0, 1]``.
        initial: the score with which all weights start; its sigmoid should exceed the threshold.

    Raises:
        InputError: an amount outside ``[0, 1]``.
    """

    family = "soft_movement"

    def __init__(self, weight: Tensor, *, amount: float = 0.1, initial: float = 0.0) -> None:
        super().__init__(weight, amount=amount, initial=initial)

    def kept(self) -> Tensor:
        """Where weights stay: bool, in the weight's shape."""
        return self.scores.detach().sigmoid() > self.amount

    def penalty(self) -> Tensor:
        """The mean sigmoid of the scores, a scalar."""
        return self.scores.sigmoid().mean()


class HardConcrete(LearnedMask):
    r"""L0 regularisation: random gates on weights or rows, which can be exactly zero or one and still have gradients.

    In train mode a gate is a stretched and clamped sample of the concrete distribution, in eval mode its centre.

    Louizos, Welling, Kingma: *Learning Sparse Neural Networks through L0 Regularization*,
    https://arxiv.org/abs/1712.01312

    Args:
        weight: the weight to gate.
        per: ``"weight"``, or ``"row"``: one gate for each index of the first dimension.
        initial: the initial probability that a gate is open, in ``(0, 1)``.

    Raises:
        InputError: an option is unknown, or the probability is not between 0 and 1.
    """

    family = "l0"
    TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # the paper's beta, gamma and zeta

    def __init__(self, weight: Tensor, *, per: Literal["weight", "row"] = "weight", initial: float = 0.9) -> None:
        super().__init__()
        check_one_of("HardConcrete: per", per, ("weight", "row"))
        if not 0 < initial < 1:
            raise InputError(f"HardConcrete: initial is a probability, between 0 and 1, got {initial}")
        self.per = per
        shape = weight.shape if per == "weight" else (len(weight), *[1] * (weight.ndim - 1))
        self.size = weight.numel() // math.prod(shape)
        location = math.log(initial / (1 - initial)) + self._shift()
        self.location = nn.Parameter(weight.new_full(shape, location))

    def open_probability(self) -> Tensor:
        """The probability that a gate is not zero, in the gates' shape."""
        return (self.location - self._shift()).sigmoid()

    def kept(self) -> Tensor:
        """Where the gates are not zero in eval mode: bool, in the gates' shape."""
        return self._stretched(self.location.detach().sigmoid()) > 0

    def describe(self) -> dict[str, Any]:
        """What has a gate."""
        return {"per": self.per}

    def pruned(self) -> int:
        """The number of weights whose gates are zero in eval mode."""
        return self.size * int((~self.kept()).sum())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight times its gates."""
        if not self.training:
            return weight * self._stretched(self.location.sigmoid())
        # A uniform number of exactly 0 would have an infinite logit.
        uniform = torch.empty_like(self.location).uniform_(1e-6, 1 - 1e-6)
        sample = ((uniform.logit() + self.location) / self.TEMPERATURE).sigmoid()
        return weight * self._stretched(sample)

    def _stretched(self, gate: Tensor) -> Tensor:
        return (gate * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def _shift(self) -> float:
        """The location at which a gate is zero with probability one half."""
        return self.TEMPERATURE * math.log(-self.LOW / self.HIGH)


Mask = TypeVar("Mask", bound=LearnedMask)


def learn(network: nn.Module, paths: Iterable[str], mask: type[Mask], **options: Any) -> dict[str, Mask]:
    """Put a learned mask on parameters, in place. Make a new optimiser afterwards, which includes their scores.

    The parameter ``"a.weight"`` becomes ``"a.parametrizations.weight.original"``. The options are arguments of the
    masks' class besides the weight.
    """
    weights = parameters_of(network, paths)
    names = names_of_parameters(network)
    for path, weight in weights.items():
        if len(names[weight]) > 1:
            raise InputError(
                f"{path!r} is a tied weight, and a learned mask sees only one of its uses: exclude its layers"
            )
    put = {path: mask(weight.detach(), **options) for path, weight in weights.items()}
    for path, entry in put.items():
        module, name = split_path(path)
        compute(network.get_submodule(module), name, entry)
    return put


def learned(network: nn.Module, mask: type[Mask]) -> dict[str, Mask]:
    """The learned masks of a class in a network, by the path of the parameter without them."""
    return {path: entry for path, entry in computed_in(network).items() if isinstance(entry, mask)}


def set_amount(network: nn.Module, amount: float, *, scope: Scope = "layer") -> None:
    """Set the amount of the network's `TopK` masks.

    With scope ``"global"`` it is in each layer the share of its weights that are among the lowest scores of all layers
    now.
    """
    masks = learned(network, TopK)
    if not masks:
        raise InputError(
            f"{type(network).__name__} has no movement pruning whose amount could be set: use LearnMask(Movement(...))"
        )
    scores = {path: mask.scores.detach().flatten() for path, mask in masks.items()}
    for path, kept in choose(scores, amount, scope=scope).items():
        masks[path].amount = 1 - int(kept.sum()) / kept.numel()


def bake_masks(network: nn.Module) -> Masks:
    """Replace all learned masks, in place, by plain parameters with zeros, bit for bit as in eval mode.

    Returns:
        Masks of the parameters that were pruned.
    """
    kept = {}
    for path, mask in learned(network, LearnedMask).items():  # type: ignore[type-abstract]
        module, name = split_path(path)
        layer = network.get_submodule(module)
        kept[path] = mask.kept().expand(getattr(layer, name).shape)
        bake_layer(layer, [name])
    return Masks(kept)
