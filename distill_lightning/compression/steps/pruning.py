"""What pruning of weights and of units has in common: how much by when, and rewinding to earlier weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, Self, get_args

from torch import Tensor, nn

from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.targets import Targets
from distill_lightning.compression.mask.lottery import copy_state, reinitialize
from distill_lightning.compression.mask.selection import Scope
from distill_lightning.compression.steps.base import TargetedStep, Work
from distill_lightning.compression.steps.schedules import Cubic, OneShot, Schedule, Threshold
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError
from distill_lightning.networks.weights import load_strictly

Level = float | dict[str, float]
"""A share of the units, or shares by path, or a threshold."""


def check_amounts(what: str, amount: float | Mapping[str, float]) -> list[float]:
    """The amounts, one or one for each pattern of layers, that are shares.

    Args:
        what: has them, for the message.
        amount: as it was given.

    Raises:
        InputError: one is no number, or outside ``[0, 1]``, or there is none.
    """
    amounts = list(amount.values()) if isinstance(amount, Mapping) else [amount]
    if any(isinstance(value, bool) or not isinstance(value, Real) for value in amounts):
        raise InputError(f"{what}: amount must be a number, or one for each pattern of layers, got {amount!r}")
    if not amounts or min(amounts) < 0 or max(amounts) > 1:
        raise InputError(f"{what}: amount must be between 0 and 1, got {amount}")
    return amounts


@dataclass(frozen=True, kw_only=True)
class Pruning(TargetedStep):
    """Prunes the least important units by a schedule; see also `TargetedStep`.

    Args:
        amount: total share of pruned units, including those that were pruned before, in ``[0, 1]``; or shares by
            patterns of layers (see `Targets`), where the first pattern that matches counts and layers without one are
            left alone. ``None`` if something else decides.
        scope: ``"global"``: the units of all layers compete; ``"layer"``: those within each layer; or a `Sensitivity`,
            which finds an amount for each layer. With a `Threshold` no units compete.
        schedule: how much is pruned by when; or a `Threshold` of the scores, which decides instead of an amount.
        rewind: for lottery tickets: after each pruning, the remaining weights are set back to their values at the
            beginning of this epoch (``"start"`` is the first), BatchNorm's statistics included, and the optimiser's
            state is cleared. ``"random"`` draws new weights, as a control.

    Raises:
        InputError: options that cannot be combined.
    """

    amount: float | dict[str, float] | None = None
    scope: Scope | Sensitivity = "global"
    schedule: Schedule | Threshold = OneShot()
    rewind: int | Literal["start", "random"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = [0.0] if self.amount is None else check_amounts(type(self).__name__, self.amount)
        rewind, by_threshold = self.rewind, isinstance(self.schedule, Threshold)
        if not isinstance(self.scope, Sensitivity):
            self.check_known(scope=get_args(Scope))
        self.refuse(
            (
                by_threshold and self.scope == "layer",
                "scope='layer' has no effect with a Threshold, under which units do not compete: leave it out",
            ),
            (
                rewind is not None and isinstance(self.schedule, Cubic | Threshold),
                "rewind needs OneShot or Iterative",
            ),
            (
                isinstance(rewind, bool) or (isinstance(rewind, str) and rewind not in ("start", "random")),
                f"rewind must be an epoch, 'start' or 'random', got {rewind!r}",
            ),
            (isinstance(rewind, int) and rewind < 0, f"rewind must be an epoch of at least 0, got {rewind!r}"),
        )
        if isinstance(self.schedule, Schedule) and self.amount is not None and not self.prunes_nothing:
            for amount in amounts:
                # Refuses an amount that it cannot reach.
                self.schedule.amount(amount, step=0, steps=1)

    def refuse_amounts(self, others: Mapping[str, bool]) -> None:
        """Refuse that nothing decides how much is pruned, or more than one thing.

        ``others`` says in words what else may decide, and whether it does.
        """
        deciding = {
            "an amount": self.amount is not None,
            **others,
            "a Threshold": isinstance(self.schedule, Threshold),
            "a Sensitivity": isinstance(self.scope, Sensitivity),
        }
        *first, last = deciding
        self.refuse((sum(deciding.values()) != 1, f"give exactly one of {', '.join(first)} and {last}"))

    @property
    def at_once(self) -> bool:
        """Whether everything is pruned when the phase begins."""
        return isinstance(self.schedule, OneShot)

    @property
    def competing(self) -> Scope:
        """Which units compete; layers with amounts of their own do not."""
        return "layer" if isinstance(self.scope, Sensitivity) else self.scope

    @property
    def named(self) -> Targets | None:
        """The layers that were named, by ``targets`` or by the amounts."""
        return list(self.amount) if isinstance(self.amount, dict) else self.targets

    @property
    def prunes_nothing(self) -> bool:
        """Whether the amounts are zero."""
        if isinstance(self.schedule, Threshold):
            return self.schedule.value == 0
        return not any(self.amount.values()) if isinstance(self.amount, dict) else self.amount == 0

    @property
    def rewinds_to(self) -> int | None:
        """The epoch of the lottery ticket."""
        if isinstance(self.rewind, int):
            return self.rewind
        return 0 if self.rewind == "start" else None

    def reason_to_train(self) -> str | None:
        """Schedules and lottery tickets need training."""
        if self.rewind is not None:
            return "a network that was rewound has to train again"
        if isinstance(self.schedule, Threshold):
            return "its Threshold rises while the network trains" if self.schedule.end > 0 else None
        return None if self.at_once else "its schedule prunes while the network trains"

    def at_random(self) -> Self:
        """The same step by random scores.

        Raises:
            InputError: it prunes by a threshold.
        """
        if isinstance(self.schedule, Threshold):
            raise InputError(
                f"the threshold is one of the criterion's scores, and with random scores {self.title} would prune a "
                "different amount"
            )
        return replace(self, criterion="random")  # type: ignore[call-arg]  # of every step below this one


class PruningWork(Work):
    """Prunes more whenever the schedule says so, and rewinds what is left."""

    step: Pruning

    def __init__(self, step: Pruning) -> None:
        super().__init__(step)
        # The amounts at the end of the phase, the current ones, and the network to rewind to.
        self.final: Level | None = step.amount
        self.now: Level | None = None
        self.snapshot: dict[str, Tensor] | None = None

    @abstractmethod
    def prune(self, piece: Workpiece, level: Level | None, *, more: bool) -> None:
        """Prune to a level.

        Args:
            piece: the workpiece.
            level: how much; ``None`` if the granularity fixes it.
            more: whether some units were pruned in this phase before.
        """

    def watch_epoch(self, piece: Workpiece, epoch: int) -> None:
        """Remember the network of the epoch to rewind to."""
        if epoch == self.step.rewinds_to:
            self.snapshot = copy_state(piece.network)

    def begin(self, piece: Workpiece) -> None:
        """Check that there is a network to rewind to.

        Raises:
            InputError: there is none.
        """
        if self.step.rewind not in (None, "random") and self.snapshot is None:
            raise InputError(
                f"{self.step.title}: epoch {self.step.rewind!r} did not begin before this phase: give an earlier rewind"
            )

    def finish(self, piece: Workpiece) -> None:
        """Forget the network to rewind to, which is as large as the network itself."""
        self.snapshot = None

    def state_dict(self) -> dict[str, Any]:
        """The amounts, and the network to rewind to."""
        return {"final": self.final, "now": self.now, "snapshot": self.snapshot}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def level(self, *, step: int, steps: int) -> Level | None:
        """How much is pruned after a step; ``None`` if the granularity fixes it."""
        schedule, final = self.step.schedule, self.final
        if isinstance(schedule, Threshold):
            return schedule.threshold(step=step, steps=steps)
        if isinstance(final, dict):
            return {path: schedule.amount(own, step=step, steps=steps) for path, own in final.items()}
        return None if final is None else schedule.amount(final, step=step, steps=steps)

    def advance(self, piece: Workpiece, level: Level | None) -> None:
        """Prune to a level, unless it is the current one."""
        reached = 1.0 if level is None else level
        if self.now == reached:
            return
        more = self.now is not None
        self.now = reached
        if any(reached.values()) if isinstance(reached, dict) else reached:
            self.prune(piece, level, more=more)
            if self.step.rewind is not None:
                self.go_back(piece, self.snapshot)

    def go_back(self, piece: Workpiece, state: Mapping[str, Tensor] | None) -> None:
        """Rewind what is left to a state of the current structure."""
        if self.step.rewind == "random":
            reinitialize(piece.network, seed=piece.seed + 1)
        else:
            load_strictly(piece.network, dict(state or {}), source="the network that rewind goes back to")
        piece.masks.project(piece.network)
        if piece.optimizer is not None:
            piece.optimizer.state.clear()
        piece.restart = True
        # BatchNorm's statistics have been rewound, too, and fit the current weights.
        piece.changed = False

    def earlier(self, piece: Workpiece) -> nn.Module:
        """A copy of the network with the weights to rewind to."""
        network = copy_network(piece.network)
        load_strictly(network, dict(self.snapshot or {}), source="the network that rewind goes back to")
        return network
