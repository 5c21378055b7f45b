"""How many channels, hidden units, neurons, heads or layers to remove: by a budget, or by sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from distill_lightning.compression.access.calibration import each_tensor, inputs_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.costs.latency import Clocks, compare_latency
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.units import Family, Kept, UnitKind, choose_units, remove, score_units
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError

Measure = Literal["macs", "params", "latency"]


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


@dataclass(frozen=True)
class UnitBudget:
    """What may be left of a cost.

    Args:
        measure: ``"macs"``, ``"params"`` or ``"latency"``.
        share: how much of it may be left, above 0 and at most 1.
    """

    measure: Measure
    share: float

    @classmethod
    def parse(cls, text: str) -> UnitBudget:
        """Read ``"macs:0.5"``, ``"params:0.5"`` or ``"latency:0.5"``.

        Raises:
            InputError: the text is none of them.
        """
        measure, _, share = text.partition(":")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if measure not in ("macs", "params", "latency") or not 0 < value <= 1:
            raise InputError(
                f"budget must be a share of the cost such as 'macs:0.5', 'params:0.5' or 'latency:0.5', got {text!r}"
            )
        return cls(cast("Measure", measure), value)

    def __str__(self) -> str:
        return f"{self.measure}:{self.share}"

    def limit(self, network: nn.Module, example_inputs: Any) -> float:
        """The cost that it leaves: a share of what the network costs now. Time is a share of the network's own."""
        return self.share * (1.0 if self.measure == "latency" else _count(self.measure, network, example_inputs))


def smallest_amount(
    piece: Workpiece,
    kind: UnitKind,
    families: Sequence[Family],
    chosen: Callable[[float], Kept],
    *,
    budget: UnitBudget,
    limit: float,
    before: nn.Module,
) -> tuple[float, float]:
    """The smallest share of units whose removal brings a network within a budget, by bisection.

    Args:
        piece: the workpiece; it is left as it is.
        kind: kind of the units.
        families: the families of units.
        chosen: returns the units that stay at an amount.
        budget: what may be left.
        limit: the cost that it leaves, see `UnitBudget.limit`.
        before: the network whose time is the whole time.

    Returns:
        The share, and what the network then costs: a number, or for time the share of it.

    Raises:
        InputError: even without all the units that can leave, the network costs more.
    """
    total = sum(family.size for family in families)
    costs: dict[int, float] = {}

    def fits(count: int) -> bool:
        small = copy_network(piece.network)
        remove(small, kind=kind, families=families, kept=chosen(count / total))
        if budget.measure != "latency":
            costs[count] = _count(budget.measure, small, piece.example_inputs)
        elif count:
            costs[count] = time_share(before, small, piece.example_inputs, clocks=piece.clocks)
        else:
            costs[count] = 1.0  # of a network and itself, the clock would say a little more or less
        return costs[count] <= limit

    # What has left so far stays away: a smaller amount would be the same one.
    low, high = total - sum(map(len, chosen(0.0).values())), total
    if not fits(high):
        left = f"still takes {costs[high]:.2f} of the time" if budget.measure == "latency" else "is still larger"
        raise InputError(
            f"budget {str(budget)!r} cannot be met: with one {kind} left in each of {len(families)} layers the "
            f"network {left}: raise it, or prune more layers"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high / total, costs[high]


def time_share(before: nn.Module, after: nn.Module, example_inputs: Any, *, clocks: Clocks | None = None) -> float:
    """The time of a network as a share of another one's, measured in turns as in a report.

    Both run on the CPU in eval mode with one thread, and what counts is the thread's processor time. They are left as
    they were.
    """
    inputs = each_tensor(Tensor.cpu, inputs_of(example_inputs))
    first, second = (copy_network(one).cpu().eval() for one in (before, after))
    # Only the ratio is read, not its interval.
    found = compare_latency(lambda: first(*inputs), lambda: second(*inputs), clocks=clocks, resamples=1)
    return found.ratio.value


def _count(measure: Measure, network: nn.Module, example_inputs: Any) -> int:
    return count_macs(network, example_inputs).dense if measure == "macs" else count_parameters(network).stored
