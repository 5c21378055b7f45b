"""Learned pruning: parametrizations whose mask is a function of scores that gradient descent learns.

A parametrization multiplies the weight inside the layer, so optimisers, moving averages and checkpoints see the dense
weight and the scores; `bake` replaces both by the pruned weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils import parametrize

from distill_lightning.compression.masks import Masks, lowest
from distill_lightning.compression.parameters import parameters_of, split_path
from distill_lightning.compression.selection import Scope, choose
from distill_lightning.errors import InputError
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


class TopK(nn.Module):
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

    def __init__(self, weight: Tensor, *, amount: float = 0.0) -> None:
        super().__init__()
        _check_amount("TopK", amount)
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.amount = amount

    def kept(self) -> Tensor:
        """Where weights stay: bool, in the weight's shape."""
        pruned = lowest(wide(self.scores.detach()).flatten(), round(self.amount * self.scores.numel()))
        return ~pruned.view_as(self.scores)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, with zeros where it is pruned."""
        return cast("Tensor", _Masked.apply(weight, self.scores, self.kept()))


class SoftThreshold(nn.Module):
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

    def __init__(self, weight: Tensor, *, amount: float = 0.1, initial: float = 0.0) -> None:
        super().__init__()
        _check_amount("SoftThreshold", amount)
        self.scores = nn.Parameter(torch.full_like(weight, initial))
        self.amount = amount

    def kept(self) -> Tensor:
        """Where weights stay: bool, in the weight's shape."""
        return self.scores.detach().sigmoid() > self.amount

    def penalty(self) -> Tensor:
        """The mean sigmoid of the scores, a scalar."""
        return self.scores.sigmoid().mean()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, with zeros where it is pruned."""
        return cast("Tensor", _Masked.apply(weight, self.scores, self.kept()))


class HardConcrete(nn.Module):
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

    TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # the paper's beta, gamma and zeta

    def __init__(self, weight: Tensor, *, per: Literal["weight", "row"] = "weight", initial: float = 0.9) -> None:
        super().__init__()
        if per not in ("weight", "row"):
            raise InputError(f"HardConcrete: per must be 'weight' or 'row', got {per!r}")
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


Learned = TopK | SoftThreshold | HardConcrete
Kind = Literal["hard", "soft", "l0"]
_KINDS: dict[str, type[Learned]] = {"hard": TopK, "soft": SoftThreshold, "l0": HardConcrete}


def learn(network: nn.Module, paths: Iterable[str], *, kind: Kind, **options: Any) -> dict[str, Learned]:
    """Put a learned mask on parameters, in place. Make a new optimiser afterwards, which includes their scores.

    Args:
        network: the network whose layers are parametrized; its parameter ``"a.weight"`` becomes
            ``"a.parametrizations.weight.original"``.
        paths: paths of the parameters.
        kind: ``"hard"`` (`TopK`), ``"soft"`` (`SoftThreshold`) or ``"l0"`` (`HardConcrete`).
        options: the class's other arguments.

    Returns:
        The learned masks by path.

    Raises:
        InputError: a path names no parameter or a tied one, or the kind is unknown.
    """
    if kind not in _KINDS:
        raise InputError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    weights = parameters_of(network, paths)
    places = Counter(id(own) for module in network.modules() for own in module.parameters(recurse=False))
    for path, weight in weights.items():
        if places[id(weight)] > 1:
            raise InputError(
                f"{path!r} is a tied weight, and a learned mask sees only one of its uses: exclude its layers"
            )
    put = {}
    for path, weight in weights.items():
        module, name = split_path(path)
        put[path] = _KINDS[kind](weight.detach(), **options)
        parametrize.register_parametrization(network.get_submodule(module), name, put[path])
    return put


def learned(network: nn.Module) -> dict[str, Learned]:
    """The learned masks of a network, by the path of the parameter without them."""
    return {
        f"{prefix}.{name}" if prefix else name: mask
        for prefix, module in network.named_modules()
        for name, mask in _of(module)
    }


def set_amount(network: nn.Module, amount: float, *, scope: Scope = "layer") -> None:
    """Set the amount of the network's `TopK` masks.

    Args:
        network: a network with `TopK` masks.
        amount: share of the weights, in ``[0, 1]``.
        scope: ``"layer"``: this share in each layer; ``"global"``: in each layer the share of its weights that are
            among the lowest scores of all layers now.

    Raises:
        InputError: there is no `TopK`, or the amount is outside ``[0, 1]``.
    """
    masks = {path: mask for path, mask in learned(network).items() if isinstance(mask, TopK)}
    if not masks:
        raise InputError(
            f"{type(network).__name__} has no movement pruning whose amount could be set: call learn(...) first"
        )
    scores = {path: mask.scores.detach().flatten() for path, mask in masks.items()}
    for path, kept in choose(scores, amount, scope=scope).items():
        masks[path].amount = 1 - int(kept.sum()) / kept.numel()


def bake(network: nn.Module) -> Masks:
    """Replace all learned masks, in place, by plain parameters with zeros, bit for bit as in eval mode.

    Returns:
        Masks of the parameters that were pruned.
    """
    kept = {}
    masks = learned(network)
    for path, mask in masks.items():
        module, name = split_path(path)
        layer = network.get_submodule(module)
        mask.eval()
        shape = getattr(layer, name).shape
        kept[path] = mask.kept().expand(shape)
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return Masks(kept)


def describe(module: nn.Module) -> dict[str, Any]:
    """The kind and options of one layer's learned masks, by parameter name, in plain values for `rebuild`."""
    found = {}
    for name, mask in _of(module):
        kind = next(kind for kind, known in _KINDS.items() if type(mask) is known)
        found[name] = {"kind": kind} | (
            {"per": mask.per} if isinstance(mask, HardConcrete) else {"amount": mask.amount}
        )
    return found


def rebuild(layer: nn.Module, description: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put the described masks on a layer, in place, so that the state dict of the described layer fits.

    Args:
        layer: a layer of the same sizes, without masks.
        description: what `describe` returned.

    Returns:
        The layer.

    Raises:
        InputError: the layer has no such parameter, or the description is invalid.
    """
    for name, options in description.items():
        if options.get("kind") not in _KINDS:
            raise InputError(f"the description of {name!r} names no kind of learned mask: {dict(options)}")
        learn(layer, [name], **dict(options))
    return layer


def _check_amount(name: str, amount: float) -> None:
    if not 0 <= amount <= 1:
        raise InputError(f"{name}: amount must be between 0 and 1, got {amount}")


def _of(module: nn.Module) -> Iterator[tuple[str, Learned]]:
    if not parametrize.is_parametrized(module):
        return
    for name, chain in cast("nn.ModuleDict", module.parametrizations).items():
        for mask in cast("Iterable[nn.Module]", chain):
            if isinstance(mask, TopK | SoftThreshold | HardConcrete):
                yield name, mask
