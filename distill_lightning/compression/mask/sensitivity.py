"""The sensitivity of each layer when it alone is changed, and the amounts for all layers that follow from it."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import cuda_devices
from distill_lightning.errors import InputError

Curves = Mapping[str, Mapping[float, float]]


def scan(
    network: nn.Module,
    layers: Sequence[str],
    levels: Sequence[float],
    *,
    change: Callable[[nn.Module, str, float], object],
    evaluate: Callable[[nn.Module], float],
) -> dict[str, dict[float, float]]:
    """Evaluate a network with one layer changed at a time, by every level.

    Each evaluation has its own copy of the network and begins with the same random state. The network and the random
    states of Python, numpy and PyTorch are left as they were, bit for bit. ::

        curves = scan(network, ["0.weight", "2.weight"], [0.3, 0.6, 0.9], change=change, evaluate=accuracy)
        amounts = amounts_within(curves, counts, dense=accuracy(network), max_drop=0.01)

    Args:
        network: the network, which is not changed.
        layers: names that ``change`` understands: of parameters, modules or groups of channels.
        levels: levels of the change, for example shares of weights to prune, or numbers of bits.
        change: changes the layer of a network by a level, in place: ``change(copy, layer, level)``.
        evaluate: returns the score of a network; larger is better. It has to set the mode it needs (``eval()``).

    Returns:
        The scores by layer and level, in the given order. `allocate_bits` takes ``{layer: {bits: dense - score}}``
        made of them.

    Raises:
        InputError: there is no layer or no level, or one is given twice.
    """
    for name, given in (("layers", list(layers)), ("levels", list(levels))):
        if not given or len(set(given)) != len(given):
            raise InputError(f"{name} of a sensitivity scan must be one or more, each given once, got {given}")
    curves: dict[str, dict[float, float]] = {}
    for layer in layers:
        curves[layer] = {}
        for level in levels:
            with _same_random_state(network):
                changed = copy_network(network)
                change(changed, layer, level)
                curves[layer][level] = float(evaluate(changed))
    return curves


def amounts_within(
    curves: Curves,
    counts: Mapping[str, int],
    *,
    dense: float,
    max_drop: float | None = None,
    target: float | None = None,
) -> dict[str, float]:
    """The largest level of each layer at which the score falls by no more than a drop that is the same for all.

    Layers are judged one at a time, so together they may lose more. A level whose score is NaN is never taken.

    Args:
        curves: scores by layer and level, from `scan`; a larger level must mean a stronger change.
        counts: number of weights by layer.
        dense: the unchanged network's score.
        max_drop: how much the score may fall for each layer.
        target: instead, the share of all weights (0 to 1) to prune: the smallest drop is used at which the levels, as
            shares of their layers' weights, reach it. Between two drops of the curves nothing changes, so the reached
            share may be larger.

    Returns:
        The level by layer; 0 where none is within the drop.

    Raises:
        InputError: the largest levels do not reach the target.
    """
    if target is None:
        return _within(curves, dense, max_drop or 0.0)
    scores = {score for levels in curves.values() for score in levels.values()}
    drops = sorted(dense - score for score in scores if not math.isnan(score))
    total = sum(counts.values())

    def reached(drop: float) -> float:
        return sum(counts[layer] * level for layer, level in _within(curves, dense, drop).items()) / max(total, 1)

    if reached(-float("inf")) >= target:
        return _within(curves, dense, -float("inf"))
    # A larger drop never allows less, so bisection over the drops finds the first one that is enough.
    place = bisect_left(drops, x=True, key=lambda drop: reached(drop) >= target)
    if place == len(drops):
        most = reached(float("inf"))
        raise InputError(f"target={target} is out of reach: the largest levels remove {most:.3g} of the weights")
    return _within(curves, dense, drops[place])


def _within(curves: Curves, dense: float, drop: float) -> dict[str, float]:
    return {
        layer: max((level for level, score in levels.items() if dense - score <= drop), default=0.0)
        for layer, levels in curves.items()
    }


@contextmanager
def _same_random_state(network: nn.Module) -> Iterator[None]:
    """Restore every random state."""
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002  # whatever evaluate draws from
    try:
        with torch.random.fork_rng(cuda_devices(network)):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)  # noqa: NPY002
