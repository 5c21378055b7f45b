"""The step that prunes: weights become zeros, or channels, units, heads and layers are removed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor

from distill_lightning.compression import movement, penalties
from distill_lightning.compression.lottery import Snapshot, reinitialize
from distill_lightning.compression.parameters import split_path
from distill_lightning.compression.recipe import copy_network
from distill_lightning.compression.schedules import Cubic, OneShot, Schedule, Threshold
from distill_lightning.compression.selection import Scope
from distill_lightning.compression.steps import learned_masks, unit_amounts, units, weights
from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.pruning_options import LEARNED, Criterion, check_options
from distill_lightning.compression.steps.sensitivity_scope import Sensitivity
from distill_lightning.compression.targets import Targets
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError
from distill_lightning.networks.weights import load_strictly

Level = float | dict[str, float]
"""A share of the units, or shares by path, or a threshold."""


class Prune(Step):
    """Prunes the least important weights or units.

    Weights, rows, blocks and n of m become zeros and stay zeros, which saves bytes of a packed file. Channels, hidden
    units, neurons, heads and layers are removed from the tensors, which also saves time and multiply-accumulates. They
    are removed when the phase begins or, if the schedule continues, zeroed as whole groups and removed when it ends.

    Args:
        amount: total share of pruned units, including those that were pruned before, in ``[0, 1]``; or shares by
            patterns of layers (see `Targets`), where the first pattern that matches counts and layers without one are
            left alone. ``None`` if the ``granularity`` (``"2:4"``), the ``budget`` or a `Threshold` decides.
        criterion: the importance of a unit: ``"magnitude"``, ``"random"`` (the control), ``"gradient"``, ``"taylor"``,
            ``"obd"``, ``"snip"``, see `criteria`; ``"obs"`` within each `Linear` and `Conv2d`; ``"obs_update"``, which
            also adjusts the remaining weights to compensate for the pruned ones (SparseGPT); ``"bn_scale"`` for
            channels; for weights also ``"movement"``, learned in the phase, and ``"soft_movement"``, whose `Threshold`
            applies to the sigmoids of the scores. A unit's importance is the mean over the weights that are removed
            with it, or their sum for criteria that estimate the loss. With ``"magnitude"``, channels and similar units
            compete by their importance relative to that of their layer, because weights of larger layers are smaller.
        granularity: ``"weight"``, ``"row"``, ``"block:4x8"``, ``"2:4"``, or ``"channel"``, ``"hidden_unit"``,
            ``"neuron"`` (of Transformers' feed-forward layers), ``"head"``, ``"layer"`` (of Transformer encoders).
        scope: ``"global"``: the units of all layers compete; ``"layer"``: those within each layer; or a `Sensitivity`,
            which finds an amount for each layer. With a `Threshold` no units compete.
        schedule: ``None`` for `OneShot`, for `Cubic` with ``"movement"``, and for ``Threshold(0.1)`` with
            ``"soft_movement"``.
        budget: instead of the amount for channels and similar units, ``"macs:0.5"`` or ``"params:0.5"``: the smallest
            amount that leaves at most this share of what the step found. (Half of the channels leave about a quarter of
            both.)
        round_to: the remaining channels of each layer are a multiple of this number, so a little less than the amount
            is pruned.
        rewind: for lottery tickets: after each pruning, the remaining weights are set back to their values at the
            beginning of this epoch (``"start"`` is the first), BatchNorm's statistics included, and the optimiser's
            state is cleared. ``"random"`` draws new weights, as a control.
        regrow: share of the pruned weights that return at each update of the schedule, those with the largest
            gradients; as many others are pruned instead.
        penalty_weight: weight of the mean sigmoid of soft movement's scores in the loss; ``None`` for 1.
        backend: what finds the channels that belong together: ``"own"``, or ``"torch_pruning"`` if it is installed; for
            granularity ``"channel"``.
        at: see `Step`.
        targets: see `Step`; for channels and similar units, the layers after which groups are named, the first ones
            that make them.
        exclude: see `Step`.
        finetune_epochs: see `Step`.

    Raises:
        InputError: options that cannot be combined.
    """

    def __init__(
        self,
        *,
        amount: float | dict[str, float] | None = None,
        criterion: Criterion = "magnitude",
        granularity: str = "weight",
        scope: Scope | Sensitivity = "global",
        schedule: Schedule | Threshold | None = None,
        budget: str | None = None,
        round_to: int = 1,
        rewind: int | Literal["start", "random"] | None = None,
        regrow: float = 0.0,
        penalty_weight: float | None = None,
        backend: units.Backend = "own",
        at: At | None = None,
        targets: Targets | None = None,
        exclude: Targets = (),
        finetune_epochs: int = 0,
    ) -> None:
        super().__init__(at=at, targets=targets, exclude=exclude, finetune_epochs=finetune_epochs)
        if schedule is None:
            schedule = Cubic() if criterion == "movement" else OneShot()
            schedule = Threshold(0.1) if criterion == "soft_movement" else schedule
        check_options(
            amount=amount,
            criterion=criterion,
            granularity=granularity,
            scope=scope,
            schedule=schedule,
            budget=budget,
            round_to=round_to,
            rewind=rewind,
            regrow=regrow,
            penalty_weight=penalty_weight,
            backend=backend,
        )
        self.amount, self.criterion, self.granularity = amount, criterion, granularity
        # Layers with their own amounts do not compete, whatever the scope.
        self.scope: Scope = "layer" if isinstance(scope, Sensitivity) else scope
        self.sensitivity = scope if isinstance(scope, Sensitivity) else None
        self.schedule, self.budget, self.round_to = schedule, budget, round_to
        self.rewind, self.regrow, self.backend = rewind, regrow, backend
        self.penalty_weight = 1.0 if penalty_weight is None else penalty_weight
        self.kind = next((kind for kind in units.UNITS if kind == granularity), None)
        if budget is not None:
            unit_amounts.parse_budget(budget)
        self._paths: list[str] = []
        self._places: learned_masks.Places = {}
        self._final: Level | None = amount
        self._now: Level | None = None
        self._kept: units.Kept | None = None
        self._limit: float | None = None
        self._snapshot: dict[str, Tensor] | None = None
        # Not saved: a resumed run finds the same ones.
        self._found: list[units.Family] | None = None

    def __repr__(self) -> str:
        return f"Prune {self.granularity}"

    @property
    def order(self) -> Order:
        """Masks for weights, structure for units."""
        return Order.MASKS if self.kind is None else Order.STRUCTURE

    @property
    def rewinds_to(self) -> int | None:
        """The epoch of the lottery ticket."""
        if isinstance(self.rewind, int):
            return self.rewind
        return 0 if self.rewind == "start" else None

    @property
    def gives_other_parameters(self) -> bool:
        """True if units are removed or scores are learned."""
        return super().gives_other_parameters or self.criterion in LEARNED

    @property
    def changes_at_end(self) -> bool:
        """True if the schedule removes units at the end, or if scores are learned."""
        return self.criterion in LEARNED or (self.kind is not None and not isinstance(self.schedule, OneShot))

    def reason_to_train(self) -> str | None:
        """Learned scores, schedules and lottery tickets need training."""
        if self.criterion in LEARNED:
            return f"criterion {self.criterion!r} is learned while the network trains"
        if self.rewind is not None:
            return "a network that was rewound has to train again"
        if isinstance(self.schedule, Threshold):
            return "its Threshold rises while the network trains" if self.schedule.end > 0 else None
        return None if isinstance(self.schedule, OneShot) else "its schedule prunes while the network trains"

    def watch_epoch(self, piece: Workpiece, epoch: int) -> None:
        """Remember the network of the epoch to rewind to."""
        if epoch == self.rewinds_to:
            self._snapshot = Snapshot(piece.network).state_dict()

    def begin(self, piece: Workpiece) -> None:
        """Find what can be pruned, and prune the schedule's first amount."""
        self._forget()
        if self.rewind not in (None, "random") and self._snapshot is None:
            raise InputError(f"Prune: epoch {self.rewind!r} did not begin before this phase: give an earlier rewind")
        if self._is_off():
            return
        if self.kind is not None:
            self._begin_units(piece, self.kind)
            return
        self._paths = weights.weight_paths(
            piece.network, self.targets, self.exclude, granularity=self.granularity, criterion=self.criterion
        )
        if isinstance(self.amount, dict):
            layers = {path: split_path(path)[0] for path in self._paths}
            own = weights.per_layer(piece.network, self.amount, list(layers.values()))
            self._final = {path: own[layer] for path, layer in layers.items() if layer in own}
            self._paths = list(self._final)
        check_coverage(piece, self, self._paths, targets=self._asked(), refuse=not self.exclude)
        if self.sensitivity is not None:
            self._final = weights.bearable(
                piece, self._paths, self.sensitivity, criterion=self.criterion, granularity=self.granularity
            )
        if self.criterion in LEARNED:
            kind: movement.Kind = "hard" if self.criterion == "movement" else "soft"
            self._places = learned_masks.put_on(piece, self._paths, kind, amount=0.0)
        self._go_on(piece, self._level(step=0, steps=min(self.finetune_epochs, 1)))

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:
        """Prune more where the schedule says so."""
        if self.kind is not None and isinstance(self.schedule, OneShot):
            return  # they have been removed
        if not self._is_off():
            self._go_on(piece, self._level(step=step, steps=steps))

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """The penalty on soft movement's scores."""
        if self.criterion != "soft_movement" or not self._paths:
            return None
        return self.penalty_weight * penalties.soft_movement(piece.network)

    def finish(self, piece: Workpiece) -> None:
        """Prune the rest; learned masks become plain ones, and masked units are removed."""
        if self.kind is not None:
            self._finish_units(piece, self.kind)
        elif self._paths:
            self._go_on(piece, self._level(step=1, steps=1))
            if self.criterion in LEARNED:
                learned_masks.take_off(piece, self._paths, self._places)
        self._forget()
        self._snapshot = None

    def state_dict(self) -> dict[str, Any]:
        """The pruned layers, the current amount, and the network to rewind to."""
        names = ("paths", "places", "final", "now", "kept", "limit", "snapshot")
        return {name: getattr(self, f"_{name}") for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._found = None
        for name, value in state.items():
            setattr(self, f"_{name}", value)

    def _forget(self) -> None:
        self._paths, self._final, self._now, self._kept, self._limit = [], self.amount, None, None, None
        self._places, self._found = {}, None

    def _is_off(self) -> bool:
        """Whether nothing is pruned at all."""
        if isinstance(self.schedule, Threshold):
            return self.schedule.value == 0
        return not any(self.amount.values()) if isinstance(self.amount, dict) else self.amount == 0

    def _asked(self) -> Targets | None:
        """The layers that were named."""
        return list(self.amount) if isinstance(self.amount, dict) else self.targets

    def _level(self, *, step: int, steps: int) -> Level | None:
        """How much is pruned after a step; ``None`` if the granularity fixes it."""
        schedule, final = self.schedule, self._final
        if isinstance(schedule, Threshold):
            return schedule.threshold(step=step, steps=steps)
        if isinstance(final, dict):
            return {path: schedule.amount(own, step=step, steps=steps) for path, own in final.items()}
        return None if final is None else schedule.amount(final, step=step, steps=steps)

    def _go_on(self, piece: Workpiece, level: Level | None) -> None:
        """Prune to a level, unless it is the current one."""
        # The shares of competing layers change with learned scores.
        moving = self.criterion == "movement" and self.scope == "global"
        if self._now == (1.0 if level is None else level) and not moving:
            return
        grows = self._now is not None
        self._now = 1.0 if level is None else level
        if not (any(self._now.values()) if isinstance(self._now, dict) else self._now):
            return
        if self.kind is not None:
            self._mask_units(piece, self.kind)
        elif self.criterion in LEARNED:
            learned_masks.set_amount(piece.network, self._paths, self._now, scope=self.scope)
        elif isinstance(self.schedule, Threshold):
            threshold = cast("float", level)
            weights.prune_below(piece, self._paths, threshold, criterion=self.criterion, granularity=self.granularity)
        else:
            weights.prune_weights(
                piece,
                self._paths,
                level,
                criterion=self.criterion,
                granularity=self.granularity,
                scope=self.scope,
                growing=self.regrow if grows else 0.0,
            )
        if self.rewind is not None and self.criterion not in LEARNED:
            self._go_back(piece, self._snapshot)

    def _go_back(self, piece: Workpiece, state: Mapping[str, Tensor] | None) -> None:
        """Rewind what is left to a state of the current structure."""
        if self.rewind == "random":
            reinitialize(piece.network, seed=piece.seed + 1)
        else:
            load_strictly(piece.network, dict(state or {}), source="the network that rewind goes back to")
        piece.masks.project(piece.network)
        if piece.optimizer is not None:
            piece.optimizer.state.clear()
        piece.restart = True
        # BatchNorm's statistics have been rewound, too, and fit the current weights.
        piece.changed = False

    # Units that are removed.

    def _begin_units(self, piece: Workpiece, kind: units.UnitKind) -> None:
        shown = units.on_copy(piece, kind)
        families = self._families(shown, kind)
        names = units.parameter_names(shown.network, families)
        check_coverage(shown, self, names, targets=self._asked(), refuse=kind == "channel" and not self.exclude)
        if self.budget is not None:
            self._limit = unit_amounts.limit_of(self.budget, piece.network, piece.example_inputs)
            self._final = self._smallest(shown, kind, families)
        if self.sensitivity is not None:
            self._final = unit_amounts.bearable(shown, kind, families, self.sensitivity, criterion=self.criterion)
        if isinstance(self.schedule, OneShot):
            self._now = self._level(step=0, steps=0)
            self._leave(piece, kind, families, self._choose(shown, families, self._now))
            return
        if kind == "head":
            self._convert(piece)
        self._go_on(piece, self._level(step=0, steps=1))

    def _finish_units(self, piece: Workpiece, kind: units.UnitKind) -> None:
        if isinstance(self.schedule, OneShot) or self._is_off():
            return
        families = self._families(piece, kind)
        if self.budget is not None:
            # Other units are pruned than those with which the amount was found.
            self._final = self._smallest(piece, kind, families)
        self._go_on(piece, self._level(step=1, steps=1))
        if self._kept is not None:
            self._leave(piece, kind, families, self._kept)

    def _families(self, piece: Workpiece, kind: units.UnitKind) -> list[units.Family]:
        if self._found is not None:
            return self._found
        families = units.find_families(
            piece.network,
            kind,
            piece.example_inputs,
            targets=self.targets,
            exclude=self.exclude,
            backend=self.backend,
        )
        if isinstance(self.amount, dict):
            self._final = dict(weights.per_layer(piece.network, self.amount, [family.name for family in families]))
            families = [family for family in families if family.name in self._final]
        self._found = families
        return families

    def _choose(self, piece: Workpiece, families: list[units.Family], level: Level | None) -> units.Kept:
        scores = units.score_units(piece, families, self.criterion)
        return self._chosen(families, scores, level)

    def _chosen(self, families: list[units.Family], scores: Mapping[str, Tensor], level: Level | None) -> units.Kept:
        return units.choose_units(
            families,
            scores,
            level,
            scope=self.scope,
            by_threshold=isinstance(self.schedule, Threshold),
            relative=self.criterion == "magnitude",
            round_to=self.round_to,
            kept=self._kept,
        )

    def _smallest(self, piece: Workpiece, kind: units.UnitKind, families: list[units.Family]) -> float:
        scores = units.score_units(piece, families, self.criterion)
        chosen = partial(self._chosen, families, scores)
        limit = self._limit or 0.0
        return unit_amounts.smallest_amount(piece, kind, families, chosen, budget=self.budget or "", limit=limit)

    def _mask_units(self, piece: Workpiece, kind: units.UnitKind) -> None:
        families = self._families(piece, kind)
        self._kept = self._choose(piece, families, self._now)
        masks = units.unit_masks(piece.network, families, self._kept)
        for name, mask in masks.kept.items():
            before = piece.masks.kept.get(name)
            masks.kept[name] = mask if before is None else mask & before.to(mask.device)
        piece.prune(masks)

    def _convert(self, piece: Workpiece) -> None:
        """Convert attention so that it can lose heads, also in the network to rewind to."""
        act = partial(units.prepare, kind="head")
        if self._snapshot is not None:
            shadow = copy_network(piece.network)
            load_strictly(shadow, self._snapshot, source="the network that rewind goes back to")
            self._snapshot = Snapshot(act(shadow)).state_dict()
        units.change(piece, act)
        piece.changed = False

    def _leave(self, piece: Workpiece, kind: units.UnitKind, families: list[units.Family], kept: units.Kept) -> None:
        if all(len(kept[family.name]) == family.size for family in families):
            return
        act = partial(units.remove, kind=kind, families=families, kept=kept)
        at_once = isinstance(self.schedule, OneShot)
        before = copy_network(piece.network) if self._snapshot is not None and at_once else None
        units.change(piece, act)
        if self.rewind is not None and at_once:
            if before is not None and self._snapshot is not None:
                load_strictly(before, self._snapshot, source="the network that rewind goes back to")
                act(before)
            self._go_back(piece, None if before is None else before.state_dict())
