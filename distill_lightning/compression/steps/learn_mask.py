"""The step that learns which weights are pruned while the network trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from distill_lightning.choices import Choice
from distill_lightning.compression.access.parameters import join_path, split_path
from distill_lightning.compression.mask import penalties
from distill_lightning.compression.mask.learned import (
    HardConcrete,
    LearnedMask,
    SoftThreshold,
    TopK,
    bake_masks,
    learn,
    learned,
    set_amount,
)
from distill_lightning.compression.mask.selection import Scope
from distill_lightning.compression.steps import weights
from distill_lightning.compression.steps.base import CHOSEN_IN_TRAINING, Order, Step, TargetedStep, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.prune_weights import PruneWeights
from distill_lightning.compression.steps.pruning import Level, check_amounts
from distill_lightning.compression.steps.schedules import Cubic, Schedule, Threshold
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError

_PAST = -1e9
"""The score of weights that were pruned before, below every other: they count towards the amount and stay pruned."""


class MaskRule(Choice):
    """How a mask is learned: what is trained beside the weights, and what it means for them."""

    no_control: ClassVar[str] = "{} fixes no amount that could be pruned at random"
    """Why no random choice can be compared with the step, whose title is put into the braces."""

    @property
    @abstractmethod
    def prunes_nothing(self) -> bool:
        """Whether no weight can ever be pruned, so that no mask is needed."""

    @abstractmethod
    def put_on(self, network: nn.Module, paths: Sequence[str]) -> Mapping[str, LearnedMask]:
        """Put the masks on the weights at some paths, in place."""

    @abstractmethod
    def set_level(self, network: nn.Module, final: Level | None, *, step: int, steps: int) -> None:
        """Set how much is pruned after ``step`` of ``steps`` steps."""

    @abstractmethod
    def penalty(self, network: nn.Module) -> Tensor | None:
        """What is added to the loss, a scalar with a graph."""

    def at_random(self, step: LearnMask) -> Step:
        """A step that prunes as much by random scores.

        Raises:
            InputError: no amount is fixed that could be drawn.
        """
        raise InputError(self.no_control.format(step.title))


@dataclass(frozen=True)
class Movement(MaskRule):
    """Movement pruning: an exact share is pruned, the weights with the lowest learned scores, see `TopK`.

    Args:
        amount: total share of pruned weights at the end, in ``[0, 1]``, or shares by patterns of layers, see `Pruning`.
        schedule: how much is pruned by when; it begins at 0, because before training all scores are equal.
        scope: ``"global"``: the weights of all layers compete; ``"layer"``: those within each layer.

    Raises:
        InputError: an amount outside ``[0, 1]``, a schedule that does not begin at 0, or an unknown scope.
    """

    amount: float | dict[str, float]
    schedule: Schedule = field(default=Cubic(), kw_only=True)
    scope: Scope = field(default="global", kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        check_amounts("Movement", self.amount)
        if self.schedule.amount(1.0, step=0, steps=1) > 0:
            raise InputError(
                "Movement needs a schedule that begins at 0, Cubic(initial=0): before training all scores are equal"
            )
        self.check_known(scope=get_args(Scope))

    @property
    def prunes_nothing(self) -> bool:
        """Whether all amounts are zero."""
        return not any(self.amount.values()) if isinstance(self.amount, dict) else self.amount == 0

    def put_on(self, network: nn.Module, paths: Sequence[str]) -> Mapping[str, TopK]:
        """Scores of zero."""
        return learn(network, paths, TopK)

    def set_level(self, network: nn.Module, final: Level | None, *, step: int, steps: int) -> None:
        """Set the shares; those of competing layers change with the scores."""
        if isinstance(final, dict):
            for path, mask in learned(network, TopK).items():
                mask.amount = self.schedule.amount(final[path], step=step, steps=steps)
            return
        set_amount(network, self.schedule.amount(final or 0.0, step=step, steps=steps), scope=self.scope)

    def penalty(self, network: nn.Module) -> Tensor | None:
        """There is none."""
        return None

    def at_random(self, step: LearnMask) -> Step:
        """The same schedule by random scores."""
        return PruneWeights(
            amount=self.amount,
            criterion="random",
            scope=self.scope,
            schedule=self.schedule,
            at=step.at,
            targets=step.targets,
            exclude=step.exclude,
            finetune_epochs=step.finetune_epochs,
        )


@dataclass(frozen=True)
class SoftMovement(MaskRule):
    """Soft movement pruning: a weight stays while the sigmoid of its score exceeds a threshold, see `SoftThreshold`.

    Args:
        threshold: the threshold of the sigmoids.
        penalty_weight: weight of the mean sigmoid in the loss, which pushes the scores down.

    Raises:
        InputError: a weight that is negative or not finite, or a threshold above 1.
    """

    no_control = "the threshold is one of the learned scores, and with random scores {} would prune a different amount"

    threshold: Threshold = Threshold(0.1)
    penalty_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.penalty_weight < 0:
            raise InputError(f"SoftMovement: penalty_weight must not be negative, got {self.penalty_weight}")
        if self.threshold.value > 1:
            raise InputError(f"SoftMovement: no sigmoid exceeds a threshold above 1, got {self.threshold.value}")

    @property
    def prunes_nothing(self) -> bool:
        """Whether the threshold is zero."""
        return self.threshold.value == 0

    def put_on(self, network: nn.Module, paths: Sequence[str]) -> Mapping[str, SoftThreshold]:
        """Scores of zero, whose sigmoids are one half."""
        return learn(network, paths, SoftThreshold, amount=0.0)

    def set_level(self, network: nn.Module, final: Level | None, *, step: int, steps: int) -> None:
        """Set the threshold."""
        for mask in learned(network, SoftThreshold).values():
            mask.amount = self.threshold.threshold(step=step, steps=steps)

    def penalty(self, network: nn.Module) -> Tensor | None:
        """The weighted mean of the sigmoids."""
        return self.penalty_weight * penalties.soft_movement(network)


@dataclass(frozen=True)
class L0(MaskRule):
    """L0 regularisation: random gates, whose expected number that is open is added to the loss, see `HardConcrete`.

    Args:
        weight: weight of the expected number of open gates in the loss; with 0 there are no gates.
        per: what has a gate: ``"weight"``, or ``"row"``, an index of the first dimension.

    Raises:
        InputError: a weight that is negative or not finite, or an unknown ``per``.
    """

    no_control = "the gates of {} fix no amount to draw: prune with PruneWeights instead"

    weight: float
    per: Literal["weight", "row"] = field(default="weight", kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.weight < 0:
            raise InputError(f"L0: weight must not be negative, got {self.weight}")
        self.check_known(per=("weight", "row"))

    @property
    def prunes_nothing(self) -> bool:
        """Whether the gates would have no weight in the loss."""
        return self.weight == 0

    def put_on(self, network: nn.Module, paths: Sequence[str]) -> Mapping[str, HardConcrete]:
        """Gates that are open with probability 0.9."""
        return learn(network, paths, HardConcrete, per=self.per)

    def set_level(self, network: nn.Module, final: Level | None, *, step: int, steps: int) -> None:
        """Leave the gates as they are: training decides what they let through."""

    def penalty(self, network: nn.Module) -> Tensor | None:
        """The weighted number of open gates."""
        return self.weight * penalties.l0(network)


@dataclass(frozen=True)
class LearnMask(TargetedStep):
    """Learns in its phase which weights are pruned; they are zero at its end. See also `TargetedStep`.

    ::

        {class_path: LearnMask, init_args: {mask: {class_path: Movement, init_args: {amount: 0.9}}, finetune_epochs: 5}}

    Args:
        mask: `Movement`, `SoftMovement` or `L0`.
    """

    order = Order.MASKS

    mask: MaskRule = field(kw_only=False)

    @property
    def title(self) -> str:
        """The class and the rule."""
        return f"LearnMask {type(self.mask).__name__}"

    @property
    def gives_other_parameters(self) -> bool:
        """True: the scores."""
        return True

    @property
    def changes_at_end(self) -> bool:
        """True: the scores are removed."""
        return True

    def reason_to_train(self) -> str | None:
        """Learning is training."""
        return "a mask is learned while the network trains"

    def at_random(self) -> Step:
        """A step that prunes as much by random scores."""
        return self.mask.at_random(self)

    def start(self) -> Work:
        """The work of this step in one run."""
        return _LearningMask(self)


class _LearningMask(Work):
    step: LearnMask

    def __init__(self, step: LearnMask) -> None:
        super().__init__(step)
        self.rule = step.mask
        self.paths: list[str] = []
        self.final: Level | None = None

    def rehearse(self, piece: Workpiece) -> bool:
        """Find what can have a mask."""
        if not self.rule.prunes_nothing:
            _LearningMask(self.step).find(piece)
        return True

    def find(self, piece: Workpiece) -> None:
        """Find what can have a mask.

        Raises:
            InputError: there is nothing, or most of the network's weights are something else.
        """
        step, amount = self.step, getattr(self.rule, "amount", None)
        self.paths = weights.weight_paths(piece.network, step.targets, step.exclude)
        self.final = amount
        if isinstance(amount, dict):
            self.final = weights.amounts_by_path(piece.network, amount, self.paths)
            self.paths = list(self.final)
        named = list(amount) if isinstance(amount, dict) else step.targets
        check_coverage(piece, step, self.paths, targets=named, refuse=not step.exclude)

    def begin(self, piece: Workpiece) -> None:
        """Put the masks on; those of before are kept under the new paths."""
        if self.rule.prunes_nothing:
            return
        self.find(piece)
        put = self.rule.put_on(piece.network, self.paths)
        self.paths = list(put)
        for path, mask in put.items():
            before = piece.masks.kept.get(path)
            if before is not None and isinstance(mask, TopK | SoftThreshold):
                mask.scores.data.masked_fill_(~before.to(mask.scores.device), _PAST)
            piece.rename_mask(path, _inner(path))
        self._set_level(piece, step=0, steps=1)

    def in_training(self, piece: Workpiece) -> Mapping[str, str]:
        """All weights with a mask, unless an amount is given."""
        return {} if isinstance(self.rule, Movement) else dict.fromkeys(self.paths, CHOSEN_IN_TRAINING)

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:
        """Prune more where the schedule says so."""
        self._set_level(piece, step=step, steps=steps)

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """That of the rule."""
        return self.rule.penalty(piece.network) if self.paths else None

    def finish(self, piece: Workpiece) -> None:
        """Make the weights plain parameters again, and keep their zeros."""
        if not self.paths:
            return
        self._set_level(piece, step=1, steps=1)
        masks = bake_masks(piece.network)
        for path in self.paths:
            piece.rename_mask(_inner(path), path)
            before = piece.masks.kept.get(path)
            if before is not None:
                masks.kept[path] = masks.kept[path] & before.to(masks.kept[path].device)
        piece.prune(masks)
        # What was random in training is not any more.
        piece.changed = piece.changed or isinstance(self.rule, L0)

    def state_dict(self) -> dict[str, Any]:
        """The weights and the amounts."""
        return {"paths": self.paths, "final": self.final}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.paths, self.final = list(state["paths"]), state["final"]

    def _set_level(self, piece: Workpiece, *, step: int, steps: int) -> None:
        if self.paths:
            self.rule.set_level(piece.network, self.final, step=step, steps=steps)


def _inner(path: str) -> str:
    """Where a parameter is while a parametrization computes the weight from it."""
    module, name = split_path(path)
    return join_path(module, f"parametrizations.{name}.original")
