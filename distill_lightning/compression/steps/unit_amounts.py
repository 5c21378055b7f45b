"""How many channels, hidden units, neurons, heads or layers to remove: by a budget, or by sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.units import Family, Kept, UnitKind, choose_units, remove, score_units
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError


def bearable(
    piece: Workpiece, kind: UnitKind, families: Sequence[Family], sensitivity: Sensitivity, *, criterion: str
) -> dict[str, float]:
    """The amounts by family that a `Sensitivity` finds."""
    scores = score_units(piece, families, criterion)
    named = {family.name: family for family in families}

    def change(network: nn.Module, name: str, amount: float) -> None:
        kept = choose_units([named[name]], scores, amount, scope="layer")
        remove(network, kind=kind, families=[named[name]], kept=kept)

    return sensitivity.amounts(piece, {family.name: family.size for family in families}, change)


def limit_of(budget: str, network: nn.Module, example_inputs: Any) -> float:
    """The cost that ``"macs:0.5"`` leaves: a share of what the network costs now."""
    measure, share = parse_budget(budget)
    return share * _cost(measure, network, example_inputs)


def smallest_amount(
    piece: Workpiece,
    kind: UnitKind,
    families: Sequence[Family],
    chosen: Callable[[float], Kept],
    *,
    budget: str,
    limit: float,
) -> float:
    """The smallest share of units whose removal brings a network within a budget.

    The function ``chosen`` returns the units that stay at an amount. The workpiece is left as it is.
    """
    measure, _ = parse_budget(budget)
    total = sum(family.size for family in families)

    def fits(count: int) -> bool:
        small = copy_network(piece.network)
        remove(small, kind=kind, families=families, kept=chosen(count / total))
        return _cost(measure, small, piece.example_inputs) <= limit

    low, high = 0, total
    if not fits(high):
        raise InputError(
            f"budget {budget!r} cannot be met: with one {kind} left in each of {len(families)} layers the "
            "network is still larger: raise it, or prune more layers"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high / total


def parse_budget(text: str) -> tuple[str, float]:
    """Read ``"macs:0.5"`` or ``"params:0.5"``: what is measured, and which share may be left.

    Raises:
        InputError: the text is neither.
    """
    measure, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if measure not in ("macs", "params") or not 0 < value <= 1:
        raise InputError(f"budget must be a share of the cost such as 'macs:0.5' or 'params:0.5', got {text!r}")
    return measure, value


def _cost(measure: str, network: nn.Module, example_inputs: Any) -> int:
    return count_macs(network, example_inputs).dense if measure == "macs" else count_parameters(network).stored
