"""The step that trains with a penalty on weights, so that many of them become small enough to prune."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from distill_lightning.compression import penalties
from distill_lightning.compression.schedules import Threshold
from distill_lightning.compression.steps import learned_masks, units, weights
from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.prune import Prune
from distill_lightning.compression.targets import Targets
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError

PenaltyKind = Literal["l1", "group_lasso", "bn_gamma", "l0"]


class Regularise(Step):
    """Adds a penalty to the loss during its phase, and optionally prunes what the penalty has made small.

    Args:
        penalty: ``"l1"``: the sum of absolute weights; ``"group_lasso"``: the sum of the norms of rows or other units;
            ``"bn_gamma"``: the sum of BatchNorm's absolute scales (Network Slimming); ``"l0"``: the expected number of
            weights whose random gates are open. These gates exist during the phase, and weights with closed gates are
            pruned at its end. See `penalties`.
        weight: weight of the penalty in the loss.
        threshold: at the end of the phase everything less important is pruned, as by `Prune` with a `Threshold`:
            weights, rows or units by their mean absolute weight, channels by BatchNorm's scale. ``None`` prunes
            nothing; a `Prune` may follow.
        granularity: for ``"group_lasso"``: ``"row"``, ``"channel"``, ``"hidden_unit"``, ``"neuron"`` or ``"head"``; for
            ``"l0"``: ``"weight"`` or ``"row"``. ``None`` for the first.
        at: see `Step`.
        targets: see `Step`; for ``"bn_gamma"`` they only limit what is pruned, the penalty covers every BatchNorm.
        exclude: see `Step`.
        finetune_epochs: epochs of training with the penalty.

    Raises:
        InputError: options that cannot be combined, or a negative weight.
    """

    def __init__(
        self,
        *,
        penalty: PenaltyKind,
        weight: float,
        threshold: float | None = None,
        granularity: str | None = None,
        at: At | None = None,
        targets: Targets | None = None,
        exclude: Targets = (),
        finetune_epochs: int = 0,
    ) -> None:
        super().__init__(at=at, targets=targets, exclude=exclude, finetune_epochs=finetune_epochs)
        allowed = {
            "l1": ["weight"],
            "group_lasso": ["row", *(kind for kind in units.UNITS if kind != "layer")],
            "bn_gamma": ["channel"],
            "l0": ["weight", "row"],
        }
        if penalty not in allowed:
            raise InputError(f"Regularise: penalty must be one of {', '.join(allowed)}, got {penalty!r}")
        if weight < 0:
            raise InputError(f"Regularise: weight must not be negative, got {weight}")
        if granularity is not None and granularity not in allowed[penalty]:
            raise InputError(
                f"Regularise: penalty {penalty!r} needs granularity {' or '.join(allowed[penalty])}, "
                f"got {granularity!r}"
            )
        if threshold is not None and penalty == "l0":
            raise InputError("Regularise: the gates of penalty 'l0' decide what is pruned: leave threshold out")
        self.kind, self.weight, self.threshold = penalty, weight, threshold
        self.granularity = granularity or allowed[penalty][0]
        self.unit = next((kind for kind in units.UNITS if kind == self.granularity), None)
        # Makes the Prune now, so that wrong options are refused early.
        self._prune = None if threshold is None else self._pruning(threshold)
        self._paths: list[str] = []
        self._places: learned_masks.Places = {}
        self._families: list[units.Family] | None = None

    def __repr__(self) -> str:
        return f"Regularise {self.kind}"

    @property
    def order(self) -> Order | None:
        """The order of the pruning at the end."""
        if self.kind == "l0":
            return Order.MASKS
        return None if self._prune is None else self._prune.order

    @property
    def latest_after(self) -> Order:
        """A penalty needs weights that are parameters, or BatchNorm's scales, which are never shared."""
        if self.unit == "head":
            return Order.STRUCTURE  # attention is converted
        return self.order or (Order.VALUES if self.kind == "bn_gamma" else Order.MASKS)

    @property
    def gives_other_parameters(self) -> bool:
        """True if units are removed at the end, and for gates and converted attention."""
        return super().gives_other_parameters or self.kind == "l0" or self.unit == "head"

    @property
    def changes_at_end(self) -> bool:
        """True if units or gates are removed at the end."""
        return self.kind == "l0" or self._prune is not None

    def reason_to_train(self) -> str | None:
        """A penalty has no effect without training."""
        return "a penalty has an effect only while the network trains"

    def begin(self, piece: Workpiece) -> None:
        """Find the weights or units of the penalty."""
        self._paths, self._families = [], None
        if not self.weight:
            return
        if self.unit == "head":
            units.change(piece, partial(units.prepare, kind=self.unit))
            piece.changed = False
        if self.kind == "bn_gamma":
            penalties.bn_gamma(piece.network)
        elif self.unit is not None:
            self._found(piece)
        else:
            self._paths = weights.weight_paths(piece.network, self.targets, self.exclude)
            check_coverage(piece, self, self._paths, targets=self.targets, refuse=not self.exclude)
        if self.kind == "l0":
            self._places = learned_masks.put_on(piece, self._paths, "l0", per=self.granularity)

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """The weighted penalty."""
        if not self.weight:
            return None
        if self.kind == "l1":
            value = penalties.l1(piece.network, self._paths)
        elif self.kind == "l0":
            value = penalties.l0(piece.network)
        elif self.kind == "bn_gamma":
            value = penalties.bn_gamma(piece.network)
        elif self.unit is None:
            value = penalties.group_lasso(piece.network, self._paths)
        else:
            value = units.group_norms(piece.network, self._found(piece))
        return self.weight * value

    def finish(self, piece: Workpiece) -> None:
        """Remove the gates, and prune what is below the threshold."""
        if self.weight and self.kind == "l0":
            learned_masks.take_off(piece, self._paths, self._places)
            # In training, its gates were random.
            piece.changed = True
        if self._prune is not None:
            self._prune.begin(piece)
            self._prune.finish(piece)
        self._paths, self._families = [], None

    def state_dict(self) -> dict[str, Any]:
        """The weights or units of the penalty."""
        return {"paths": self._paths, "places": self._places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._paths, self._places, self._families = list(state["paths"]), dict(state["places"]), None

    def _pruning(self, threshold: float) -> Prune:
        return Prune(
            schedule=Threshold(threshold),
            criterion="bn_scale" if self.kind == "bn_gamma" else "magnitude",
            granularity=self.granularity,
            targets=self.targets,
            exclude=self.exclude,
        )

    def _found(self, piece: Workpiece) -> list[units.Family]:
        """The units, which are found once per phase and again after resuming."""
        if self._families is None and self.unit is not None:
            self._families = units.find_families(
                piece.network,
                self.unit,
                piece.example_inputs,
                targets=self.targets,
                exclude=self.exclude,
                backend="own",
            )
        return self._families or []
