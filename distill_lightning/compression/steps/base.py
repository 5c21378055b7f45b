"""The base of all compression steps: when, where and for how long."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, ClassVar, Literal

from torch import Tensor

from distill_lightning.compression.targets import Targets
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError

At = int | float | Literal["start", "end"]
"""An epoch, a fraction of all epochs, the beginning of the first epoch, or the end of the last one."""


class Order(IntEnum):
    """The order of steps: smaller values come first, and equal ones may come in any order."""

    STRUCTURE = 1
    MASKS = 2
    VALUES = 3
    STORAGE = 4


class Step(ABC):
    """One entry of the list of steps: a plain description, while the network and all results are in the `Workpiece`.

    A step's phase begins at ``at`` and lasts ``finetune_epochs``, during which the network trains under the step.
    `begin` is called first, then `update` after every optimiser step of the phase, and `finish` at its end.

    Args:
        at: when the phase begins: an epoch, a fraction of all epochs, ``"start"`` or ``"end"``; ``None``: when the
            previous phase ends.
        targets: the layers to work on, see `targets.Targets`; ``None`` for all that the step can work on.
        exclude: layers to leave out, see `targets.Targets`.
        finetune_epochs: epochs of training in the phase.

    Raises:
        InputError: an invalid ``at``, or negative epochs.
    """

    recalibrates: ClassVar[bool] = True
    """Whether BatchNorm's statistics are measured anew after the step has changed something."""

    def __init__(
        self,
        *,
        at: At | None = None,
        targets: Targets | None = None,
        exclude: Targets = (),
        finetune_epochs: int = 0,
    ) -> None:
        name = type(self).__name__
        wrong = isinstance(at, bool) or (isinstance(at, str) and at not in ("start", "end"))
        if wrong or (isinstance(at, int | float) and (at < 0 or (isinstance(at, float) and at > 1))):
            raise InputError(f"{name}: at is an epoch, a fraction of all epochs, 'start' or 'end', got {at!r}")
        if finetune_epochs < 0:
            raise InputError(f"{name}: finetune_epochs must not be negative, got {finetune_epochs}")
        if at == "end" and finetune_epochs:
            raise InputError(f"{name}: nothing is trained after at='end': leave finetune_epochs out")
        self.at, self.targets, self.exclude, self.finetune_epochs = at, targets, exclude, finetune_epochs

    def __repr__(self) -> str:
        return type(self).__name__

    @property
    def order(self) -> Order | None:
        """The step's place in the order of steps; ``None`` for any. Usually a class attribute."""
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

    def watch_epoch(self, piece: Workpiece, epoch: int) -> None:  # noqa: B027  (most have nothing to do)
        """Called at the beginning of every epoch up to that in which the phase begins. Does nothing here."""

    @abstractmethod
    def begin(self, piece: Workpiece) -> None:
        """Called before the phase's first training step."""

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:  # noqa: B027  (most have nothing to do)
        """Called after optimiser step ``step`` (from 1) of the phase's ``steps``. Does nothing here."""

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """What is added to the loss after ``step`` steps (from 0), a scalar with a graph. Here ``None``."""
        return None

    def finish(self, piece: Workpiece) -> None:  # noqa: B027  (most have nothing to do)
        """Called after the phase's last training step. Does nothing here."""

    def reason_to_train(self) -> str | None:
        """Why the step needs ``finetune_epochs``; ``None`` if it does not."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of a phase that waits or has begun: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (most have nothing to do)
        """Load what `state_dict` returned."""
