"""Pruning of single weights, rows, blocks and n of m: how they are found, scored and pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.parameters import join_path, parameter_of, split_path
from distill_lightning.compression.access.targets import Targets, match_layers
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.mask import criteria, second_order
from distill_lightning.compression.mask.masks import Masks, regrow
from distill_lightning.compression.mask.selection import Amount, Granularity, Reduce, Scope, select, select_below
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.workpiece import Workpiece

Scorer = Callable[[Workpiece, Sequence[str]], dict[str, Tensor]]
"""A function that scores the parameters at some paths, in their shapes."""


def _by_loss(criterion: Callable[..., dict[str, Tensor]]) -> Scorer:
    """A scorer that needs calibration data and the loss."""

    def score(piece: Workpiece, paths: Sequence[str]) -> dict[str, Tensor]:
        name = f"criterion {criterion.__name__!r}"
        return criterion(piece.network, paths, piece.batches(name), piece.loss)

    return score


def _obs(piece: Workpiece, paths: Sequence[str]) -> dict[str, Tensor]:
    return second_order.obs(piece.network, paths, piece.batches("criterion 'obs'"))


SCORERS: dict[str, Scorer] = {
    "magnitude": lambda piece, paths: criteria.magnitude(piece.network, paths),
    "random": lambda piece, paths: criteria.random(piece.network, paths, seed=piece.seed),
    "random_obs": lambda piece, paths: criteria.random(piece.network, paths, seed=piece.seed),
    "gradient": _by_loss(criteria.gradient),
    "taylor": _by_loss(criteria.taylor),
    "obd": _by_loss(criteria.obd),
    "snip": _by_loss(criteria.snip),
    "obs": _obs,
    "obs_update": _obs,
}
REDUCE: dict[str, Reduce] = dict.fromkeys(("taylor", "obd", "snip", "obs", "obs_update"), "sum")
"""Criteria that estimate the change of the loss, whose scores are summed; other scores are averaged."""
SWEPT = ("obs", "obs_update", "random_obs")
"""Criteria for layers whose inputs can be observed, and their control."""


def weight_paths(
    network: nn.Module,
    targets: Targets | None,
    exclude: Targets,
    *,
    granularity: str = "weight",
    criterion: str = "magnitude",
) -> list[str]:
    """The weights that can be pruned: no biases, no norms, no computed weights; tied ones once.

    For n:m, layers are left out whose inputs are not a multiple of m; for criteria of single layers, all but `Linear`
    and `Conv2d`.
    """
    unit = Granularity.parse(granularity)
    # PyTorch's attention uses the weight of its output projection without calling it.
    silent = {module.out_proj for module in network.modules() if isinstance(module, nn.MultiheadAttention)}

    def fits(layer: nn.Module) -> bool:
        names = _prunable(layer)
        if criterion in SWEPT and (layer in silent or not isinstance(layer, nn.Linear | nn.Conv2d)):
            return False
        return bool(names) and (unit.kind != "n:m" or all(_divides(layer, name, unit) for name in names))

    what = prunable_layers(granularity, criterion)
    paths: dict[int, str] = {}
    for layer in match_layers(network, targets, exclude, fits=fits, what=what):
        for name in _prunable(network.get_submodule(layer)):
            path = join_path(layer, name)
            paths.setdefault(id(parameter_of(network, path)), path)
    return list(paths.values())


def prunable_layers(granularity: str = "weight", criterion: str = "magnitude") -> str:
    """The layers of `weight_paths`, in words."""
    unit = Granularity.parse(granularity)
    if unit.kind == "n:m":
        return f"layers whose inputs are a multiple of {unit.second}"
    if criterion in SWEPT:
        return "Linear and Conv2d layers that run as modules"
    return "linear, convolutional, recurrent, attention and embedding layers"


def per_layer(network: nn.Module, patterns: Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Amounts by path of the layer from amounts by pattern, where the first pattern that matches counts.

    A pattern that matches none of the layers is refused; a layer that none matches is left out.
    """
    known = {network.get_submodule(path) for path in layers}
    amounts: dict[str, float] = {}
    for pattern, amount in patterns.items():
        for path in match_layers(
            network, pattern, fits=lambda layer: layer in known, what="layers to prune", argument="amount"
        ):
            if path in layers:
                amounts.setdefault(path, amount)
    return amounts


def amounts_by_path(network: nn.Module, patterns: Mapping[str, float], paths: Sequence[str]) -> dict[str, float]:
    """`per_layer` for weights: amounts by path of the weight, of those whose layer a pattern matches."""
    layers = {path: split_path(path)[0] for path in paths}
    own = per_layer(network, patterns, list(layers.values()))
    return {path: own[layer] for path, layer in layers.items() if layer in own}


def prune_weights(
    piece: Workpiece,
    paths: Sequence[str],
    amount: Amount | None,
    *,
    criterion: str,
    granularity: str,
    scope: Scope,
    by_threshold: bool = False,
    growing: float = 0.0,
) -> None:
    """Prune to a share of the weights; weights pruned before count and, except for ``growing``, stay pruned.

    ``growing`` is the share of the weights pruned before that return, while others are pruned instead. With
    ``by_threshold`` the amount is a threshold of the scores: what is below it is pruned, whatever its share.
    """
    scores, reduce = SCORERS[criterion](piece, paths), REDUCE.get(criterion, "mean")
    if by_threshold:
        threshold = cast("float", amount)
        piece.prune(select_below(scores, threshold, granularity=granularity, reduce=reduce, previous=piece.masks))
        return
    before = Masks({path: mask for path, mask in piece.masks.kept.items() if path in scores})

    def chosen(shares: Amount | None, some: Mapping[str, Tensor]) -> Masks:
        return select(some, shares, granularity=granularity, scope=scope, reduce=reduce, previous=before)

    if growing and before.pruned and amount is not None:
        each = isinstance(amount, Mapping) or scope == "layer"
        masks = _regrown(piece, scores, amount, each=each, growing=growing, before=before, chosen=chosen)
    else:
        masks = chosen(amount, scores)
    if criterion == "obs_update":
        batches = piece.batches("criterion 'obs_update'")
        own = amount if isinstance(amount, float | int) and scope == "layer" else None
        kind = Granularity.parse(granularity).kind
        if (kind == "n:m" or (kind == "weight" and own is not None)) and not before.pruned:
            # Chosen in every block of columns, from weights that have been adjusted until then.
            masks = second_order.prune_layers(piece.network, paths, batches, amount=own, granularity=granularity)
        else:
            second_order.prune_layers(piece.network, paths, batches, masks=masks)
    piece.prune(masks)


def bearable(
    piece: Workpiece, paths: Sequence[str], sensitivity: Sensitivity, *, criterion: str, granularity: str
) -> dict[str, float]:
    """The amounts by path that a `Sensitivity` finds."""
    scores = SCORERS[criterion](piece, paths)
    reduce = REDUCE.get(criterion, "mean")

    def change(network: nn.Module, path: str, amount: float) -> None:
        select({path: scores[path]}, amount, granularity=granularity, reduce=reduce).project(network)

    return sensitivity.amounts(piece, {path: score.numel() for path, score in scores.items()}, change)


def _regrown(
    piece: Workpiece,
    scores: Mapping[str, Tensor],
    amount: Amount,
    *,
    each: bool,
    growing: float,
    before: Masks,
    chosen: Callable[[Amount, Mapping[str, Tensor]], Masks],
) -> Masks:
    """Masks of the amount, in which some weights that were pruned before replace others."""
    # By the gradient, because a pruned weight has no magnitude.
    promise = criteria.gradient(piece.network, list(scores), piece.batches("regrow"), piece.loss)
    kept: dict[str, Tensor] = {}
    for pool in [[path] for path in scores] if each else [list(scores)]:
        own = Masks({path: before.kept[path] for path in pool if path in before.kept})
        share = amount[pool[0]] if isinstance(amount, Mapping) else amount
        total = sum(scores[path].numel() for path in pool)
        # As many more are pruned as return, so that the amount is exact; each parameter keeps a weight.
        count = min(round(growing * own.pruned), total - len(pool) - round(share * total))
        if count <= 0 or not own.pruned:
            kept |= chosen(dict.fromkeys(pool, share) if each else share, _those(scores, pool)).kept
            continue
        back = regrow(own, _those(promise, own.kept), count / own.pruned)
        more = (round(share * total) + count) / total
        gone = chosen(dict.fromkeys(pool, more) if each else more, _those(scores, pool))
        for path, mask in gone.kept.items():
            here = own.kept.get(path, torch.ones_like(mask)).to(mask.device)
            kept[path] = mask | (back.kept[path].to(mask.device) & ~here) if path in back.kept else mask
    return Masks(kept)


def _those(tensors: Mapping[str, Tensor], paths: Sequence[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: tensors[path] for path in paths}


def _prunable(layer: nn.Module) -> list[str]:
    """Names of a layer's weights that are parameters, not computed."""
    return [name for name in weight_names(layer) if not parametrize.is_parametrized(layer, name)]


def _divides(layer: nn.Module, name: str, unit: Granularity) -> bool:
    weight = layer.get_parameter(name)
    return weight.ndim >= 2 and weight.shape[1] % unit.second == 0
