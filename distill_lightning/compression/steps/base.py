"""What every compression step has: when, where, and for how long."""

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
"""An epoch, a fraction of all epochs, the first epoch's beginning, or the last one's end."""


class Order(IntEnum):
    """What has to come before what; equal ones may stand in any order."""

    STRUCTURE = 1
    MASKS = 2
    VALUES = 3
    STORAGE = 4


class Step(ABC):
    """One entry of the list of steps, a plain description: what it has learned on the way is in the `Workpiece`.

    A step's phase begins where ``at`` says and lasts ``finetune_epochs``, in which the network trains under it. In turn
    are called `begin`, then `update` after every optimiser step of the phase, and `finish` at its end.

    Args:
        at: when the phase begins: an epoch, a fraction of all epochs, ``"start"`` or ``"end"``; ``None``: when the
            phase before ends.
        targets: which layers, see `targets.Targets`; ``None``: all that it can work on.
        exclude: layers to leave out of these.
        finetune_epochs: epochs of training in the phase.

    Raises:
        InputError: an ``at`` that is none of these, or negative epochs.
    """

    recalibrates: ClassVar[bool] = True
    """Whether BatchNorm's statistics are measured anew after it has changed something."""

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
        """What it does, which decides where it may stand; ``None``: anywhere. Mostly a class attribute."""
        return None

    @property
    def latest_after(self) -> Order | None:
        """The last of what it can come after; ``None``: anything."""
        return self.order

    @property
    def rewinds_to(self) -> int | None:
        """The epoch whose network it goes back to; ``None``: to none."""
        return None

    @property
    def gives_other_parameters(self) -> bool:
        """Whether the network has other parameters from then on, or for a while."""
        return self.order in (Order.STRUCTURE, Order.VALUES)

    @property
    def changes_at_end(self) -> bool:
        """Whether it gives the network other parameters when its phase ends, not only when it begins."""
        return False

    def watch_epoch(self, piece: Workpiece, epoch: int) -> None:  # noqa: B027  (most have nothing to do)
        """See the network at the beginning of every epoch until the phase begins, of that one, too. Here: nothing."""

    @abstractmethod
    def begin(self, piece: Workpiece) -> None:
        """Do what is to be done before the phase's first training step."""

    def update(self, piece: Workpiece, *, step: int, steps: int) -> None:  # noqa: B027  (most have nothing to do)
        """Go on, after ``step`` of the phase's ``steps`` optimiser steps (from 1). Here: nothing."""

    def penalty(self, piece: Workpiece, *, step: int, steps: int) -> Tensor | None:
        """What is added to the loss after ``step`` steps (from 0), a scalar with a graph. Here: nothing."""
        return None

    def finish(self, piece: Workpiece) -> None:  # noqa: B027  (likewise)
        """Do what is to be done after the phase's last training step. Here: nothing."""

    def reason_to_train(self) -> str | None:
        """Why the step is of no use without ``finetune_epochs``; ``None``: it is."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know of a phase that waits or is under way: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (likewise)
        """Take what `state_dict` gave."""
