"""The step that trains with a penalty on weights, so that many of them become small enough to prune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from distill_lightning.compression.mask import penalties
from distill_lightning.compression.steps import units, weights
from distill_lightning.compression.steps.base import CHOSEN_IN_TRAINING, Order, Step, TargetedStep, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.prune_units import PruneUnits
from distill_lightning.compression.steps.prune_weights import PruneWeights
from distill_lightning.compression.steps.schedules import Threshold
from distill_lightning.compression.steps.unit_trials import convert
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError

PenaltyKind = Literal["l1", "group_lasso", "bn_gamma"]

_GRANULARITIES = {
    "l1": ["weight"],
    "group_lasso": ["row", *(kind for kind in units.UNITS if kind != "layer")],
    "bn_gamma": ["channel"],
}


@dataclass(frozen=True, kw_only=True)
class Regularise(TargetedStep):
    """Adds a penalty to the loss during its phase, and optionally prunes what the penalty has made small.

    With ``"bn_gamma"`` the ``targets`` only limit what is pruned, while the penalty covers every BatchNorm. See also
    `TargetedStep`; for random gates see `L0`.

    Args:
        penalty: ``"l1"``: the sum of absolute weights; ``"group_lasso"``: the sum of the norms of rows or other units;
            ``"bn_gamma"``: the sum of BatchNorm's absolute scales (Network Slimming). See `penalties`.
        weight: weight of the penalty in the loss.
        threshold: at the end of the phase everything less important is pruned, as by `PruneWeights` and `PruneUnits`
            with a `Threshold`: weights, rows or units by their mean absolute weight, channels by BatchNorm's scale.
            ``None`` prunes nothing; another step may.
        granularity: for ``"group_lasso"``: ``"row"``, ``"channel"``, ``"hidden_unit"``, ``"neuron"`` or ``"head"``;
            ``None`` for the first.

    Raises:
        InputError: options that cannot be combined, or a negative weight or threshold.
    """

    penalty: PenaltyKind
    weight: float
    threshold: float | None = None
    granularity: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known(penalty=get_args(PenaltyKind))
        allowed = _GRANULARITIES[self.penalty]
        self.refuse(
            (self.weight < 0, f"weight must not be negative, got {self.weight}"),
            (
                self.threshold is not None and self.threshold < 0,
                f"threshold must not be negative, got {self.threshold}",
            ),
            (
                self.granularity is not None and self.granularity not in allowed,
                f"penalty {self.penalty!r} needs granularity {' or '.join(allowed)}, got {self.granularity!r}",
            ),
        )

    @property
    def title(self) -> str:
        """The class and the penalty."""
        return f"Regularise {self.penalty}"

    @property
    def per(self) -> str:
        """What the penalty is summed over."""
        return self.granularity or _GRANULARITIES[self.penalty][0]

    @property
    def unit(self) -> units.UnitKind | None:
        """The kind of units; ``None`` for weights and rows."""
        return next((kind for kind in units.UNITS if kind == self.per), None)

    @property
    def order(self) -> Order | None:
        """The order of the pruning at the end."""
        pruning = self.pruning()
        return None if pruning is None else pruning.order

    @property
    def latest_after(self) -> Order:
        """A penalty needs weights that are parameters, or BatchNorm's scales, which are never shared."""
        if self.unit == "head":
            return Order.STRUCTURE  # attention is converted
        return self.order or (Order.VALUES if self.penalty == "bn_gamma" else Order.MASKS)

    @property
    def gives_other_parameters(self) -> bool:
        """True if units are removed at the end, and for converted attention."""
        return super().gives_other_parameters or self.unit == "head"

    @property
    def changes_at_end(self) -> bool:
        """True if units are removed at the end."""
        return self.threshold is not None

    def reason_to_train(self) -> str | None:
        """A penalty has no effect without training."""
        return "a penalty has an effect only while the network trains"

    def at_random(self) -> Step | None:
        """``None`` without a threshold.

        Raises:
            InputError: it prunes by its own penalty.
        """
        if self.threshold is None:
            return None
        raise InputError(
            f"{self.title} prunes by its own penalty, for which there is no amount to draw: give it no threshold and "
            "a step that prunes after it"
        )

    def pruning(self) -> PruneWeights | PruneUnits | None:
        """The step that prunes what is below the threshold; ``None`` without a threshold."""
        if self.threshold is None:
            return None
        schedule = Threshold(self.threshold)
        if self.unit is None:
            return PruneWeights(schedule=schedule, granularity=self.per, targets=self.targets, exclude=self.exclude)
        return PruneUnits(
            unit=self.unit,
            criterion="bn_scale" if self.penalty == "bn_gamma" else "magnitude",
            schedule=schedule,
            targets=self.targets,
            exclude=self.exclude,
        )

    def start(self) -> Work:
        """The work of this step in one run."""
        return _Regularising(self)


class _Regularising(Work):
    step: Regularise

    def __init__(self, step: Regularise) -> None:
        super().__init__(step)
        self.paths: list[str] = []
        self._families: list[units.Family] | None = None

    def rehearse(self, piece: Workpiece) -> bool:
        """Find the weights or units of the penalty."""
        if self.step.unit is None or self.step.unit == "head" or self.step.weight:
            _Regularising(self.step).begin(piece)
        pruning = self.step.pruning()
        return pruning is None or pruning.start().rehearse(piece)

    def begin(self, piece: Workpiece) -> None:
        """Find the weights or units of the penalty."""
        step = self.step
        if not step.weight:
            return
        if step.unit == "head":
            convert(piece, step.title)
            piece.changed = False
        if step.penalty == "bn_gamma":
            penalties.bn_gamma(piece.network)
        elif step.unit is not None:
            self._found(piece, step.unit)
        else:
            self.paths = weights.weight_paths(piece.network, step.targets, step.exclude)
            check_coverage(piece, step, self.paths, targets=step.targets, refuse=not step.exclude)

    def in_training(self, piece: Workpiece) -> Mapping[str, str]:
        """What has the penalty, and what is pruned by its threshold."""
        step, why = self.step, CHOSEN_IN_TRAINING if self.step.threshold else "trained with a penalty"
        if not step.weight and not step.threshold:
            return {}
        if step.unit is not None and (step.threshold or step.penalty != "bn_gamma"):
            return {family.name: why for family in self._found(units.on_copy(piece, step.unit), step.unit)}
        return dict.fromkeys(weights.weight_paths(piece.network, step.targets, step.exclude), why)

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """The weighted penalty."""
        told = self.step
        if not told.weight:
            return None
        if told.penalty == "l1":
            value = penalties.l1(piece.network, self.paths)
        elif told.penalty == "bn_gamma":
            value = penalties.bn_gamma(piece.network)
        elif told.unit is None:
            value = penalties.group_lasso(piece.network, self.paths)
        else:
            value = units.group_norms(piece.network, self._found(piece, told.unit))
        return told.weight * value

    def finish(self, piece: Workpiece) -> None:
        """Prune what is below the threshold."""
        pruning = self.step.pruning()
        if pruning is not None:
            work = pruning.start()
            work.begin(piece)
            work.finish(piece)

    def state_dict(self) -> dict[str, Any]:
        """The weights of the penalty."""
        return {"paths": self.paths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.paths, self._families = list(state["paths"]), None

    def _found(self, piece: Workpiece, unit: units.UnitKind) -> list[units.Family]:
        """The units, which are found once per phase and again after resuming."""
        if self._families is None:
            self._families = units.find_families(piece, unit, targets=self.step.targets, exclude=self.step.exclude)
        return self._families
