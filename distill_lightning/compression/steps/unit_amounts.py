"""How many channels, hidden units, neurons, heads or layers go: by a budget, or by what each layer can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from distill_lightning.compression.macs import count_macs
from distill_lightning.compression.measure import count_parameters
from distill_lightning.compression.recipe import copy_network
from distill_lightning.compression.steps.sensitivity_scope import Sensitivity
from distill_lightning.compression.steps.units import Family, Kept, UnitKind, choose_units, remove, score_units
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError


def bearable(
    piece: Workpiece, kind: UnitKind, families: Sequence[Family], sensitivity: Sensitivity, *, criterion: str
) -> dict[str, float]:
    """Amounts by family that a `Sensitivity` finds.

    Raises:
        InputError: as `score_units` and `Sensitivity.amounts`.
    """
    scores = score_units(piece, families, criterion)
    named = {family.name: family for family in families}

    def change(network: nn.Module, name: str, amount: float) -> None:
        kept = choose_units([named[name]], scores, amount, scope="layer")
        remove(network, kind=kind, families=[named[name]], kept=kept)

    return sensitivity.amounts(piece, {family.name: family.size for family in families}, change)


def limit_of(budget: str, network: nn.Module, example_inputs: Any) -> float:
    """How much may be left by ``"macs:0.5"``: a share of what a network costs now.

    Args:
        budget: see `parse_budget`.
        network: as it is now.
        example_inputs: that multiply-accumulates are counted for.
    """
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
    """The smallest share of the units without which a network is within a budget.

    Args:
        piece: whose network it is; left as it is.
        kind: of the units.
        families: of units.
        chosen: which units stay of an amount.
        budget: see `parse_budget`.
        limit: from `limit_of`.

    Raises:
        InputError: no share is enough.
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
            f"Prune: budget {budget!r} cannot be met: with one {kind} left in each of {len(families)} layers the "
            "network is larger; raise it, or prune more layers"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high / total


def parse_budget(text: str) -> tuple[str, float]:
    """Of ``"macs:0.5"`` or ``"params:0.5"`` what is measured and which share may be left.

    Raises:
        InputError: another text.
    """
    measure, _, share = text.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if measure not in ("macs", "params") or not 0 < value <= 1:
        raise InputError(f"budget must be such as 'macs:0.5' or 'params:0.5', a share of what there is, got {text!r}")
    return measure, value


def _cost(measure: str, network: nn.Module, example_inputs: Any) -> int:
    return count_macs(network, example_inputs).dense if measure == "macs" else count_parameters(network).stored
