"""The step that sets the least important weights to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from distill_lightning.compression.mask.selection import Granularity
from distill_lightning.compression.steps import weights
from distill_lightning.compression.steps.base import CHOSEN_IN_TRAINING, Order, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.pruning import Level, Pruning, PruningWork
from distill_lightning.compression.steps.schedules import Threshold
from distill_lightning.compression.steps.sensitivity import Sensitivity
from distill_lightning.compression.steps.workpiece import Workpiece

WeightCriterion = Literal["magnitude", "random", "random_obs", "gradient", "taylor", "obd", "obs", "obs_update", "snip"]


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Pruning):
    """Sets the least important weights to zero, where they stay: a packed file takes fewer bytes.

    ``amount``, ``scope``, ``schedule`` and ``rewind`` are those of `Pruning`, the rest those of `TargetedStep`.

    Args:
        criterion: the importance of a weight: ``"magnitude"``, ``"random"`` (the control), ``"gradient"``,
            ``"taylor"``, ``"obd"``, ``"snip"``, see `criteria`; ``"obs"`` within each `Linear` and `Conv2d`;
            ``"obs_update"``, which also adjusts the remaining weights to compensate for the pruned ones (SparseGPT);
            ``"random_obs"`` (the control of these two, for the same layers).
        granularity: ``"weight"``, ``"row"``, ``"block:4x8"``, or ``"2:4"``, which fixes the amount. The importance of a
            row or block is the mean over its weights, or their sum for criteria that estimate the loss.
        regrow: share of the pruned weights that return at each update of the schedule, those with the largest
            gradients; as many others are pruned instead.

    Raises:
        InputError: options that cannot be combined.
    """

    order = Order.MASKS

    criterion: WeightCriterion = "magnitude"
    granularity: str = "weight"
    regrow: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known(criterion=get_args(WeightCriterion))
        fixed = Granularity.parse(self.granularity).kind == "n:m"
        by_threshold = isinstance(self.schedule, Threshold)
        self.refuse_amounts({"a granularity such as '2:4'": fixed})
        self.refuse(
            (
                self.criterion == "obs_update" and by_threshold,
                "criterion 'obs_update' needs an amount, not a Threshold",
            ),
            (fixed and not self.at_once, f"granularity {self.granularity!r} needs OneShot"),
            (not 0 <= self.regrow < 1, f"regrow must be a share of the pruned weights, below 1, got {self.regrow}"),
            (
                self.regrow > 0 and (self.granularity != "weight" or by_threshold or self.at_once),
                "regrow needs granularity 'weight' and a schedule of several updates: Iterative or Cubic",
            ),
        )

    @property
    def title(self) -> str:
        """The class and what is pruned as a whole."""
        return "PruneWeights" if self.granularity == "weight" else f"PruneWeights {self.granularity}"

    def at_random(self) -> Self:
        """The same step by random scores, for the same weights.

        Raises:
            InputError: it prunes by a threshold.
        """
        drawn = super().at_random()
        return replace(drawn, criterion="random_obs") if self.criterion in weights.SWEPT else drawn

    def start(self) -> Work:
        """The work of this step in one run."""
        return _PruningWeights(self)


class _PruningWeights(PruningWork):
    step: PruneWeights

    def __init__(self, step: PruneWeights) -> None:
        super().__init__(step)
        self.paths: list[str] = []

    def rehearse(self, piece: Workpiece) -> bool:
        """Find what can be pruned."""
        if not self.step.prunes_nothing:
            _PruningWeights(self.step).find(piece)
        return True

    def find(self, piece: Workpiece) -> None:
        """Find what can be pruned.

        Raises:
            InputError: there is nothing, or most of the network's weights are something else.
        """
        step = self.step
        self.paths = weights.weight_paths(
            piece.network, step.targets, step.exclude, granularity=step.granularity, criterion=step.criterion
        )
        if isinstance(step.amount, dict):
            self.final = weights.amounts_by_path(piece.network, step.amount, self.paths)
            self.paths = list(self.final)
        rule = f"only {weights.prunable_layers(step.granularity, step.criterion)} are pruned so"
        check_coverage(piece, step, self.paths, targets=step.named, refuse=not step.exclude, rule=rule)

    def begin(self, piece: Workpiece) -> None:
        """Find what can be pruned, and prune the schedule's first amount."""
        super().begin(piece)
        step = self.step
        if step.prunes_nothing:
            return
        self.find(piece)
        if isinstance(step.scope, Sensitivity):
            self.final = weights.bearable(
                piece, self.paths, step.scope, criterion=step.criterion, granularity=step.granularity
            )
        self.advance(piece, self.level(step=0, steps=min(step.finetune_epochs, 1)))

    def in_training(self, piece: Workpiece) -> Mapping[str, str]:
        """All weights, under a threshold of scores that training changes."""
        return dict.fromkeys(self.paths, CHOSEN_IN_TRAINING) if isinstance(self.step.schedule, Threshold) else {}

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:
        """Prune more where the schedule says so."""
        if not self.step.prunes_nothing:
            self.advance(piece, self.level(step=step, steps=steps))

    def finish(self, piece: Workpiece) -> None:
        """Prune the rest."""
        if self.paths:
            self.advance(piece, self.level(step=1, steps=1))
        super().finish(piece)

    def prune(self, piece: Workpiece, level: Level | None, *, more: bool) -> None:
        """Add to the masks."""
        step = self.step
        weights.prune_weights(
            piece,
            self.paths,
            level,
            criterion=step.criterion,
            granularity=step.granularity,
            scope=step.competing,
            by_threshold=isinstance(step.schedule, Threshold),
            growing=step.regrow if more else 0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """The pruned weights, the amounts, and the network to rewind to."""
        return {**super().state_dict(), "paths": self.paths}
