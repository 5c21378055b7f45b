"""Plans for factoring: full ranks, spectra and costs of a layer under a method, and the ranks that a rule chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distill_lightning.compression.factor.convolutions import (
    ConvMethod,
    LayerCost,
    chain_cost,
    chain_stages,
    chain_unfoldings,
    dense_stages,
    fit_chain_ranks,
    full_ranks,
)
from distill_lightning.compression.factor.decompositions import exact, fit_train_ranks
from distill_lightning.compression.factor.layers import balanced_factors, covering_factors, train_matrix
from distill_lightning.compression.factor.ranks import (
    RankRule,
    budget_ranks,
    energy_rank,
    evbmf_rank,
    fraction_ranks,
    number_ranks,
)
from distill_lightning.errors import InputError


class Plan(NamedTuple):
    """How a method would factor a layer, before the ranks are known."""

    full: list[int]
    dense: LayerCost
    unfoldings: Callable[[], list[Tensor]]
    cost: Callable[[list[int]], LayerCost]
    fit: Callable[[list[int]], list[int]]
    describe: Callable[[list[int]], dict[str, Any]]


def plan_of(layer: nn.Module, method: str, input_size: Sequence[int] | None, parts: int) -> Plan:
    """The plan of a linear layer, a convolution or an embedding."""
    if type(layer) is nn.Conv2d:
        return _plan_conv(layer, "svd_channel" if method == "svd" else method, input_size)
    if type(layer) not in (nn.Linear, nn.Embedding):
        known = isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding | nn.RNNBase)
        more = " (a subclass may compute something else)" if known else ""
        raise InputError(f"{kind_of(layer)} cannot be factored{more}: Linear, Conv2d, Embedding, LSTM, GRU and RNN can")
    if method not in ("svd", "tt"):
        raise InputError(f"method {method!r} is not for {kind_of(layer)}: use svd or tt")
    dense = cast("nn.Linear | nn.Embedding", layer)
    return _plan_svd(dense) if method == "svd" else _plan_train(dense, parts)


def _plan_conv(layer: nn.Conv2d, method: str, input_size: Sequence[int] | None) -> Plan:
    chosen = cast("ConvMethod", method)
    chain_stages(layer, chosen, [1] * {"tucker2": 2, "tt": 3}.get(method, 1))  # refuses groups and unknown methods
    return Plan(
        full=full_ranks(layer, chosen),
        dense=chain_cost(dense_stages(layer), input_size),
        unfoldings=lambda: chain_unfoldings(layer.weight, chosen),
        cost=lambda ranks: chain_cost(chain_stages(layer, chosen, ranks), input_size),
        fit=lambda ranks: fit_chain_ranks(layer, chosen, ranks),
        describe=lambda ranks: {"kind": "conv_chain", "method": method, "ranks": ranks},
    )


def _plan_svd(layer: nn.Linear | nn.Embedding) -> Plan:
    rows, columns = layer.weight.shape
    linear = isinstance(layer, nn.Linear)
    return Plan(
        full=[min(rows, columns)],
        dense=LayerCost(rows * columns, rows * columns if linear else 0),
        unfoldings=lambda: [exact(layer.weight)],
        # Looking up a row of factors costs D R multiply-accumulates; a dense lookup costs none.
        cost=lambda ranks: LayerCost(ranks[0] * (rows + columns), ranks[0] * (rows + columns if linear else columns)),
        fit=list,
        describe=lambda ranks: {"kind": "low_rank_linear" if linear else "low_rank_embedding", "rank": ranks[0]},
    )


def _plan_train(layer: nn.Linear | nn.Embedding, parts: int) -> Plan:
    linear = isinstance(layer, nn.Linear)
    rows, columns = layer.weight.shape
    # Large row digits are paired with small column digits, so that the cores have similar sizes.
    row_shape = balanced_factors(rows, parts) if linear else covering_factors(rows, parts)
    column_shape = balanced_factors(columns, parts)[::-1]
    sizes = [row * column for row, column in zip(row_shape, column_shape, strict=True)]
    names = ("out_shape", "in_shape") if linear else ("row_shape", "column_shape")
    kind = "tt_linear" if linear else "tt_embedding"

    def unfoldings() -> list[Tensor]:
        paired = train_matrix(exact(layer.weight), row_shape, column_shape)
        return [paired.flatten(0, at).reshape(math.prod(sizes[: at + 1]), -1) for at in range(parts - 1)]

    def cost(ranks: list[int]) -> LayerCost:
        edges = [1, *ranks, 1]
        cores = [edges[at] * sizes[at] * edges[at + 1] for at in range(parts)]
        # When core k is applied, there are the output digits before it and the input digits after it.
        spread = [math.prod(row_shape[:at]) * math.prod(column_shape[at + 1 :]) for at in range(parts)]
        return LayerCost(sum(cores), sum(c * s for c, s in zip(cores, spread, strict=True)) if linear else 0)

    return Plan(
        full=fit_train_ranks(sizes, [math.prod(sizes)] * (parts - 1)),
        dense=LayerCost(rows * columns, rows * columns if linear else 0),
        unfoldings=unfoldings,
        cost=cost,
        fit=lambda ranks: fit_train_ranks(sizes, ranks),
        describe=lambda ranks: {"kind": kind, names[0]: row_shape, names[1]: column_shape, "ranks": ranks},
    )


def chosen_ranks(rule: RankRule, plan: Plan) -> list[int]:
    """The ranks that a rule chooses; `Plan.fit` may still lower some.

    Raises:
        InputError: the budget is below rank 1, or the method has no singular values.
    """
    if rule.kind == "number":
        return number_ranks(plan.full, int(rule.value))
    if rule.kind == "fraction":
        return fraction_ranks(plan.full, rule.value)
    if rule.kind == "params":
        return budget_ranks(plan.full, rule.value * plan.dense.weights, cost=lambda r: plan.cost(plan.fit(r)).weights)
    if rule.kind == "macs":
        return budget_ranks(plan.full, rule.value * plan.dense.macs, cost=lambda r: plan.cost(plan.fit(r)).macs)
    matrices = plan.unfoldings()
    spectra = [torch.linalg.svdvals(matrix) for matrix in matrices]
    if rule.kind == "energy":
        return [energy_rank(spectrum, rule.value) for spectrum in spectra]
    return [
        max(1, evbmf_rank(spectrum, (matrix.shape[0], matrix.shape[1])))
        for spectrum, matrix in zip(spectra, matrices, strict=True)
    ]


def plan_matrix(weight: Tensor) -> Plan:
    """The plan of one recurrent weight, which is stored as two factors."""
    rows, columns = weight.shape
    return Plan(
        full=[min(rows, columns)],
        dense=LayerCost(rows * columns, 0),
        unfoldings=lambda: [exact(weight)],
        cost=lambda ranks: LayerCost(ranks[0] * (rows + columns), 0),
        fit=list,
        describe=lambda ranks: {"ranks": ranks},
    )


def without_macs(layer: nn.Module) -> str:
    """The way out if multiply-accumulates cannot be a budget."""
    if isinstance(layer, nn.Conv2d):
        return "give input_size=(H, W) of its input"
    if isinstance(layer, nn.Embedding):
        return "a lookup has no multiply-accumulates to save, use params:..."
    return "its factors save bytes but no multiply-accumulates, use params:..."


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, for messages."""
    return type(module).__name__
