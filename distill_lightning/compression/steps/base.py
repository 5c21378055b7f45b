"""The base of all compression steps: when, where and for how long; and the work of a step in a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from distill_lightning.choices import Choice
from distill_lightning.compression.access.targets import Targets
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError

At = int | float | Literal["start", "end"]
"""An epoch, a fraction of all epochs, the beginning of the first epoch, or the end of the last one."""


class Order(IntEnum):
    """The order of steps: smaller values come first, and equal ones may come in any order."""

    STRUCTURE = 1
    MASKS = 2
    VALUES = 3
    STORAGE = 4


CHOSEN_IN_TRAINING = "how much is pruned is chosen in training"
"""What `Work.in_training` says of layers without an amount that is known before."""


class Work:
    """The work of one step in one run. A step's phase begins and ends; between, the network trains under the step.

    This class does what `Step.act` says when the phase begins; a step that does more has a class below it, which its
    `start` makes.

    Args:
        step: the description.
    """

    def __init__(self, step: Step) -> None:
        self.step = step

    def watch_epoch(self, piece: Workpiece, epoch: int) -> None:
        """Called at the beginning of every epoch up to that in which the phase begins."""

    def rehearse(self, piece: Workpiece) -> bool:
        """Called before the first epoch, to refuse now what would be refused when the phase begins or ends.

        Args:
            piece: a workpiece with a copy of the network and without calibration data; the copy has gone through the
                earlier steps' rehearsals.

        Returns:
            Whether the copy now has the structure that this step leaves; otherwise the following steps are not
            rehearsed.

        Raises:
            InputError: the step cannot work on this network.
        """
        return not self.step.gives_other_parameters

    def explain(self, piece: Workpiece) -> None:
        """Called by `preview` before `begin`, to say in ``piece.left`` why layers cannot be changed."""

    def in_training(self, piece: Workpiece) -> Mapping[str, str]:
        """Called by `preview` after `begin`: what only the training decides, by path of the layer or weight."""
        return {}

    def begin(self, piece: Workpiece) -> None:
        """Called before the phase's first training step."""
        self.step.act(piece)

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:
        """Called after optimiser step ``step`` (from 1) of the phase's ``steps``."""

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """What is added to the loss after ``step`` steps (from 0), a scalar with a graph; ``None`` for nothing."""
        return None

    def finish(self, piece: Workpiece) -> None:
        """Called after the phase's last training step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of a phase that waits or has begun: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""


class Step(Choice):
    """One entry of the list of steps: a description of plain values, which is never changed and may be shared.

    Steps are frozen dataclasses; most extend `TrainedStep`. A step that does everything when its phase begins defines
    `act`, any other one a `Work` and a `start` that makes it::

        @dataclass(frozen=True, kw_only=True)
        class ClampWeights(TrainedStep):
            limit: float = 1.0

            def act(self, piece: Workpiece) -> None:
                with torch.no_grad():
                    for parameter in piece.network.parameters():
                        parameter.clamp_(-self.limit, self.limit)
                piece.changed = True
    """

    tries_itself: ClassVar[bool] = False
    """Whether the step runs the network itself after a change of its structure, see `try_change`."""
    recalibrates: ClassVar[bool] = True
    """Whether BatchNorm's statistics are measured anew after the step has changed something."""

    at: At | None
    targets: Targets | None = None
    exclude: Targets = ()
    finetune_epochs: int = 0

    @classmethod
    def does_something(cls) -> bool:
        """Whether the class says what the step does, which a base of steps leaves to others."""
        return cls.act is not Step.act or cls.start is not Step.start

    def start(self) -> Work:
        """The work of this step in one run."""
        return Work(self)

    def act(self, piece: Workpiece) -> None:
        """Called when the phase begins, unless the step has a `Work` of its own."""
        raise NotImplementedError(f"{type(self).__name__} defines neither act nor start")

    @property
    def title(self) -> str:
        """The step in the report and in messages."""
        return type(self).__name__

    @property
    def order(self) -> Order | None:
        """The step's place in the order of steps; ``None`` for any."""
        return None

    @property
    def latest_after(self) -> Order | None:
        """The last kind of step that may come before this one; ``None`` for any."""
        return self.order

    @property
    def rewinds_to(self) -> int | None:
        """The epoch to whose network the step rewinds; ``None`` for none."""
        return None

    @property
    def gives_other_parameters(self) -> bool:
        """Whether the step gives the network other parameters, for good or during its phase."""
        return self.order in (Order.STRUCTURE, Order.VALUES)

    @property
    def changes_at_end(self) -> bool:
        """Whether the step gives the network other parameters also when its phase ends, not only when it begins."""
        return False

    def reason_to_train(self) -> str | None:
        """Why the step needs ``finetune_epochs``; ``None`` if it does not."""
        return None

    def at_random(self) -> Step | None:
        """The same step with random choices of what is pruned, as a control; ``None`` if it prunes nothing.

        Raises:
            InputError: it prunes, but in a way that no random choice can be compared with.
        """
        return None

    def check_at(self) -> None:
        """Refuse an ``at`` that is none.

        Raises:
            InputError: it is none.
        """
        at = self.at
        word = isinstance(at, bool) or (isinstance(at, str) and at not in ("start", "end"))
        number = isinstance(at, int | float) and (at < 0 or (isinstance(at, float) and at > 1))
        self.refuse((word or number, f"at is an epoch, a fraction of all epochs, 'start' or 'end', got {at!r}"))

    def check_layers(self, network: nn.Module) -> None:
        """Refuse what can be seen of a network's layers before anything is trained, as far as they are known by then.

        Raises:
            InputError: the step cannot work on them.
        """

    def refuse(self, *cases: tuple[bool, str]) -> None:
        """Refuse the first case that applies.

        Args:
            cases: whether each applies, and what is wrong then.

        Raises:
            InputError: one applies.
        """
        for wrong, reason in cases:
            if wrong:
                raise InputError(f"{type(self).__name__}: {reason}")


@dataclass(frozen=True, kw_only=True)
class TrainedStep(Step):
    """A step in whose phase the network can be trained.

    Args:
        at: when the phase begins: an epoch, a fraction of all epochs, ``"start"`` or ``"end"``; ``None``: when the
            previous phase ends.
        finetune_epochs: epochs of training in the phase.

    Raises:
        InputError: an invalid ``at``, negative epochs, or any number that is not finite or, of a count, no integer.
    """

    at: At | None = None
    finetune_epochs: int = 0

    def __post_init__(self) -> None:
        self.refuse((not self.does_something(), "it is a base of steps, and does nothing: define act or start"))
        # A comparison with NaN is false, so it would pass all checks of ranges.
        self.check_numbers()
        self.check_at()
        self.refuse(
            (self.finetune_epochs < 0, f"finetune_epochs must not be negative, got {self.finetune_epochs}"),
            (
                self.at == "end" and self.finetune_epochs > 0,
                "nothing is trained after at='end': leave finetune_epochs out",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class TargetedStep(TrainedStep):
    """A step that works on the layers which it is given; see also `TrainedStep`.

    Args:
        targets: the layers to work on, see `targets.Targets`; ``None`` for all that the step can work on.
        exclude: layers to leave out, see `targets.Targets`.
    """

    targets: Targets | None = None
    exclude: Targets = ()
