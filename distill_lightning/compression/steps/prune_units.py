"""The step that removes channels, hidden units, neurons, heads or layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from distill_lightning.compression.access.calibration import inputs_of
from distill_lightning.compression.mask.lottery import copy_state
from distill_lightning.compression.shrink.attention import check_attention
from distill_lightning.compression.shrink.channels import fixed_channels
from distill_lightning.compression.steps import unit_amounts, units, weights
from distill_lightning.compression.steps.base import CHOSEN_IN_TRAINING, Order, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.pruning import Level, Pruning, PruningWork
from distill_lightning.compression.steps.schedules import OneShot, Threshold
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.unit_trials import convert, try_removal
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.structure.changes import note_amount

UnitCriterion = Literal["magnitude", "random", "gradient", "taylor", "obd", "snip", "bn_scale"]


@dataclass(frozen=True, kw_only=True)
class PruneUnits(Pruning):
    """Removes the least important units from the tensors, which also saves time and multiply-accumulates.

    They are removed when the phase begins or, if the schedule continues, zeroed as whole groups and removed when it
    ends. ``amount``, ``scope``, ``schedule`` and ``rewind`` are those of `Pruning`, the rest those of `TargetedStep`;
    ``targets`` names the first layer of each group, the one that makes its channels.

    Args:
        unit: ``"channel"``, ``"hidden_unit"``, ``"neuron"`` (of Transformers' feed-forward layers), ``"head"`` or
            ``"layer"`` (of Transformer encoders).
        criterion: the importance of a unit: ``"magnitude"``, ``"random"`` (the control), ``"gradient"``, ``"taylor"``,
            ``"obd"``, ``"snip"``, see `criteria`; or BatchNorm's scale of a channel, ``"bn_scale"``. It is the mean
            over the weights that are removed with the unit, or their sum for criteria that estimate the loss. With
            ``"magnitude"``, units compete by their importance relative to that of their layer, because weights of
            larger layers are smaller.
        budget: instead of the amount, ``"macs:0.5"``, ``"params:0.5"`` or ``"latency:0.5"``: the smallest amount that
            leaves at most this share of what the step found, by bisection. (Half of the channels leave about a quarter
            of the first two.) The time is measured when the phase begins, on the example inputs, in turns with the
            network as it was found, on the CPU with one thread; each amount that is tried takes 120 forward passes.
            Time differs between machines, so the amount that was found stands in the notes of the report and in the
            network's structure: given as ``amount``, it has the same result everywhere.
        round_to: the remaining channels of each layer are a multiple of this number, so a little less than the amount
            is pruned.

    Raises:
        InputError: options that cannot be combined.
    """

    order = Order.STRUCTURE
    tries_itself = True

    unit: units.UnitKind
    criterion: UnitCriterion = "magnitude"
    budget: str | None = None
    round_to: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known(unit=units.UNITS, criterion=get_args(UnitCriterion))
        self.refuse_amounts({"a budget": self.budget is not None})
        channel = self.unit == "channel"
        self.refuse(
            (
                self.criterion == "bn_scale" and not channel,
                "criterion='bn_scale' scores BatchNorm's channels: set unit='channel'",
            ),
            (self.unit == "layer" and not self.at_once, "unit 'layer' needs OneShot: no mask skips a layer"),
            (self.round_to < 1, f"round_to must be at least 1, got {self.round_to}"),
            (self.round_to > 1 and not channel, "round_to rounds numbers of channels: set unit='channel'"),
            (
                self.rewind is not None and self.budget is not None and not self.at_once,
                "rewind with a budget needs OneShot",
            ),
        )
        if self.budget is not None:
            unit_amounts.UnitBudget.parse(self.budget)

    @property
    def title(self) -> str:
        """The class and the kind of units."""
        return f"PruneUnits {self.unit}"

    @property
    def changes_at_end(self) -> bool:
        """True if the schedule continues."""
        return not self.at_once

    def check_layers(self, network: nn.Module) -> None:
        """Refuse hooks that would not fit what replaces attention."""
        if self.unit == "head":
            check_attention(network)

    def start(self) -> Work:
        """The work of this step in one run."""
        return PruningUnits(self)


class PruningUnits(PruningWork):
    """The work of `PruneUnits`."""

    step: PruneUnits

    def __init__(self, step: PruneUnits) -> None:
        super().__init__(step)
        self.budget = None if step.budget is None else unit_amounts.UnitBudget.parse(step.budget)
        # The units that stay so far, the cost that the budget leaves, the one that the amount has, and the families;
        # the last are not saved, because a resumed run finds the same ones.
        self.kept: units.Kept | None = None
        self.limit: float | None = None
        self.cost: float | None = None
        self._found: list[units.Family] | None = None

    def rehearse(self, piece: Workpiece) -> bool:
        """Find the units, and remove as many of them, or half if that is not known, by their magnitude."""
        step = self.step
        if step.prunes_nothing:
            return True
        amount = 0.5 if step.amount is None else step.amount
        criterion: UnitCriterion = "bn_scale" if step.criterion == "bn_scale" else "magnitude"
        scope = "layer" if isinstance(step.scope, Sensitivity) else step.scope
        plain = replace(
            step, amount=amount, budget=None, criterion=criterion, scope=scope, schedule=OneShot(), rewind=None
        )
        PruningUnits(plain).begin(piece)
        return True

    def explain(self, piece: Workpiece) -> None:
        """Say why layers keep all of their units."""
        piece.left |= self._fixed(piece)

    def _fixed(self, piece: Workpiece) -> dict[str, str]:
        if self.step.unit != "channel":
            return units.left_alone(piece.network, self.step.unit)
        return fixed_channels(piece.network, inputs_of(piece.example_inputs))

    def begin(self, piece: Workpiece) -> None:
        """Find the units, and remove them or mask the schedule's first amount."""
        super().begin(piece)
        step = self.step
        if step.prunes_nothing:
            return
        for path, reason in units.left_alone(piece.network, step.unit).items():
            piece.leave(path, reason)
        shown = units.on_copy(piece, step.unit)
        families = self._families(shown)
        names = units.parameter_names(shown.network, families)
        # Of a Transformer's weights the heads are the smaller part, and of a network its channels are nearly all.
        check_coverage(
            shown, step, names, targets=step.named, refuse=step.unit == "channel" and not step.exclude,
            why=self._fixed(piece), rule=f"it has no {step.unit}s that could leave it",
        )  # fmt: skip
        if self.budget is not None:
            self.limit = self.budget.limit(piece.network, piece.example_inputs)
            self._find_amount(shown, families, self.budget, before=piece.network)
        if isinstance(step.scope, Sensitivity):
            self.final = unit_amounts.bearable(shown, step.unit, families, step.scope, criterion=step.criterion)
        if step.at_once:
            self.now = self.level(step=0, steps=0)
            self._remove(piece, families, self._choose(shown, families, self.now))
            return
        if step.unit == "head":
            self._convert(piece)
        self.advance(piece, self.level(step=0, steps=1))

    def in_training(self, piece: Workpiece) -> Mapping[str, str]:
        """All units, under a threshold of scores that training changes."""
        if not isinstance(self.step.schedule, Threshold):
            return {}
        return {family.name: CHOSEN_IN_TRAINING for family in self._found or ()}

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:
        """Mask more where the schedule says so."""
        if not self.step.at_once and not self.step.prunes_nothing:
            self.advance(piece, self.level(step=step, steps=steps))

    def finish(self, piece: Workpiece) -> None:
        """Remove what is masked."""
        if not self.step.at_once and not self.step.prunes_nothing:
            self._remove_masked(piece)
        super().finish(piece)

    def _remove_masked(self, piece: Workpiece) -> None:
        families = self._families(piece)
        if self.budget is not None and self.budget.measure != "latency":
            # Other units are pruned than those with which the amount was found. Time is not measured again: with
            # the amount in place of the budget, training has to see the same units go.
            self._find_amount(piece, families, self.budget, before=piece.network)
        self.advance(piece, self.level(step=1, steps=1))
        if self.kept is not None:
            self._remove(piece, families, self.kept)

    def prune(self, piece: Workpiece, level: Level | None, *, more: bool) -> None:
        """Mask all weights of the units, whose tensors are cut when the phase ends."""
        families = self._families(piece)
        self.kept = self._choose(piece, families, level)
        masks = units.unit_masks(piece.network, families, self.kept)
        for name, mask in masks.kept.items():
            before = piece.masks.kept.get(name)
            masks.kept[name] = mask if before is None else mask & before.to(mask.device)
        piece.prune(masks)

    def state_dict(self) -> dict[str, Any]:
        """The units that stay, the amounts and the budget, and the network to rewind to."""
        return {**super().state_dict(), "kept": self.kept, "limit": self.limit, "cost": self.cost}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state)
        self._found = None

    def _families(self, piece: Workpiece) -> list[units.Family]:
        if self._found is not None:
            return self._found
        step = self.step
        families = units.find_families(piece, step.unit, targets=step.targets, exclude=step.exclude)
        if isinstance(step.amount, dict):
            self.final = weights.per_layer(piece.network, step.amount, [family.name for family in families])
            families = [family for family in families if family.name in self.final]
        self._found = families
        return families

    def _choose(self, piece: Workpiece, families: list[units.Family], level: Level | None) -> units.Kept:
        return self._chosen(families, units.score_units(piece, families, self.step.criterion), level)

    def _chosen(self, families: list[units.Family], scores: Mapping[str, Tensor], level: Level | None) -> units.Kept:
        return units.choose_units(
            families,
            scores,
            level,
            scope=self.step.competing,
            by_threshold=isinstance(self.step.schedule, Threshold),
            relative=self.step.criterion == "magnitude",
            round_to=self.step.round_to,
            kept=self.kept,
        )

    def _find_amount(
        self, piece: Workpiece, families: list[units.Family], budget: unit_amounts.UnitBudget, *, before: nn.Module
    ) -> None:
        chosen = partial(self._chosen, families, units.score_units(piece, families, self.step.criterion))
        self.final, self.cost = unit_amounts.smallest_amount(
            piece, self.step.unit, families, chosen, budget=budget, limit=self.limit or 0.0, before=before
        )

    def _convert(self, piece: Workpiece) -> None:
        """Convert attention so that it can lose heads, also in the network to rewind to."""
        if self.snapshot is not None:
            self.snapshot = copy_state(units.prepare(self.earlier(piece), "head"))
        convert(piece, self.step.title)
        piece.changed = False

    def _tell_amount(self, piece: Workpiece, budget: unit_amounts.UnitBudget) -> None:
        told = f"{self.step.title}: amount={self.final} is the smallest within the budget {str(budget)!r}"
        if budget.measure == "latency":
            told += f" ({self.cost:.2f} of the time here): given in its place, it has the same result on any machine"
        piece.note(told)

    def _remove(self, piece: Workpiece, families: list[units.Family], kept: units.Kept) -> None:
        if self.budget is not None:
            self._tell_amount(piece, self.budget)
        removed = units.removed(self.step.unit, families, kept)
        if not removed:
            return
        try_removal(piece, self.step.title, kind=self.step.unit, families=families, kept=kept)
        piece.removed += removed
        act = partial(units.remove, kind=self.step.unit, families=families, kept=kept)
        rewinds = self.step.rewind is not None and self.step.at_once
        before = self.earlier(piece) if rewinds and self.snapshot is not None else None
        units.change(piece, act)
        if self.budget is not None:
            note_amount(piece.network, self.step.title, budget=str(self.budget), amount=cast("float", self.final))
        if rewinds:
            if before is not None:
                act(before)
            self.go_back(piece, None if before is None else before.state_dict())
