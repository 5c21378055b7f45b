"""MEAL V2's discriminator: which network, what it is shown, how it trains."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.choices import Choice
from distill_lightning.errors import InputError, check_finite
from distill_lightning.functional.common import positive
from distill_lightning.layers import Discriminator, dry_forward
from distill_lightning.modules.options import LRSchedulerCallable
from distill_lightning.part import Part

Shown = Literal["logits", "probabilities", "log_probabilities"]
Mode = Literal["cooperative", "adversarial", "detached"]

# Turns the run's seed into another one: the student was drawn from the seed itself.
_OTHER_SEED = 0x5EED


class Adversary(Choice):
    """The discriminator of `MEALV2Module`, or none.

    Attributes:
        shown: what it is shown: ``"logits"``, or ``"probabilities"`` or ``"log_probabilities"`` at the temperature.
        mode: ``"cooperative"``, ``"adversarial"``, or ``"detached"``: it watches, and the student does not feel it.
        weight: of its loss.
        lr: its own learning rate, which the module's ``lr_scheduler`` leaves alone; ``None``: the student's.
        lr_scheduler: makes a schedule for its rate alone.
    """

    shown: Shown
    mode: Mode
    weight: float
    lr: float | None
    lr_scheduler: LRSchedulerCallable | None

    @abstractmethod
    def make(self, num_classes: int) -> nn.Module | None:
        """The network, from rows of ``K`` predictions to two scores; ``None``: there is none."""

    @property
    def has_own_group(self) -> bool:
        """Whether its parameters are a parameter group of their own."""
        return self.lr is not None or self.lr_scheduler is not None

    def __post_init__(self) -> None:
        """Check the options."""
        name = type(self).__name__
        for key, value, known in (
            ("shown", self.shown, get_args(Shown)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in known:
                raise InputError(f"{name}: {key} must be one of {', '.join(known)}, got {value!r}")
        check_finite(f"{name}: weight", self.weight)
        if not self.weight > 0:
            raise InputError(f"{name}: weight must be positive, got {self.weight}: NoDiscriminator() has none")
        if self.lr is not None:
            positive(f"{name}: lr", self.lr)


@dataclass(frozen=True)
class NoDiscriminator(Adversary):
    """The student follows the ensemble's prediction alone."""

    shown = "probabilities"
    mode = "detached"
    weight = 0.0
    lr = None
    lr_scheduler = None

    def __post_init__(self) -> None:
        """There are no options."""

    def make(self, num_classes: int) -> nn.Module | None:
        """There is no network."""
        return None


@dataclass(frozen=True)
class OfficialDiscriminator(Adversary):
    r"""The released network, see `layers.Discriminator`; with few classes its outputs are often dead.

    Args:
        shown: what it is shown: ``"logits"``, the student's and the teachers' mean ones, or ``"probabilities"`` or
            ``"log_probabilities"`` at the temperature, the student's and the ensemble's.
        mode: ``"cooperative"``, as released; ``"adversarial"``, against the student; or ``"detached"``: it watches,
            and the student does not feel it.
        weight: :math:`\gamma`, positive.
        lr: its own learning rate, which the module's ``lr_scheduler`` leaves alone; ``None``: it has the student's
            rate, and, without a schedule of its own, the student's schedule.
        lr_scheduler: makes a schedule for its rate alone; ``None`` with an ``lr``: constant. `OneCycle` here needs
            `OneCycle` (or nothing) as the module's ``lr_scheduler``.

    Raises:
        InputError: an option is out of range.
    """

    shown: Shown = "logits"
    mode: Mode = "cooperative"
    weight: float = 1.0
    lr: float | None = None
    lr_scheduler: LRSchedulerCallable | None = None

    def make(self, num_classes: int) -> nn.Module | None:
        """A `layers.Discriminator` of the official kind."""
        return _drawn(num_classes, "official")


@dataclass(frozen=True)
class FixedDiscriminator(Adversary):
    """A network that does not die, for fewer than 256 classes, see `layers.Discriminator`.

    Args:
        shown: see `OfficialDiscriminator`.
        mode: see `OfficialDiscriminator`.
        weight: see `OfficialDiscriminator`.
        lr: see `OfficialDiscriminator`.
        lr_scheduler: see `OfficialDiscriminator`.

    Raises:
        InputError: an option is out of range.
    """

    shown: Shown = "logits"
    mode: Mode = "cooperative"
    weight: float = 1.0
    lr: float | None = None
    lr_scheduler: LRSchedulerCallable | None = None

    def make(self, num_classes: int) -> nn.Module | None:
        """A `layers.Discriminator` of the fixed kind."""
        return _drawn(num_classes, "fixed")


@dataclass(frozen=True)
class OwnDiscriminator(Adversary):
    """Any network, which `load_from_checkpoint` must be given again.

    Args:
        network: from predictions ``(N, K)`` to scores ``(N, 2)``, of "student" and of "teacher".
        shown: see `OfficialDiscriminator`.
        mode: see `OfficialDiscriminator`.
        weight: see `OfficialDiscriminator`.
        lr: see `OfficialDiscriminator`.
        lr_scheduler: see `OfficialDiscriminator`.

    Raises:
        InputError: an option is out of range, or the network does not fit.
    """

    network: nn.Module
    shown: Shown = "logits"
    mode: Mode = "cooperative"
    weight: float = 1.0
    lr: float | None = None
    lr_scheduler: LRSchedulerCallable | None = None

    def make(self, num_classes: int) -> nn.Module | None:
        """The network."""
        who = f"discriminator ({type(self.network).__name__})"
        try:
            shape = tuple(dry_forward(self.network, (num_classes,)).shape)
        except InputError as error:
            raise InputError(f"{who} does not take rows of {num_classes} logits: build it for (N, K)") from error
        if shape != (1, 2):
            raise InputError(f"{who} makes {shape} of one row of logits: it must give two scores, (N, 2)")
        return self.network


def _drawn(num_classes: int, kind: Literal["official", "fixed"]) -> Discriminator:
    """A discriminator drawn without touching the random state that the rest of the run draws from."""
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would seed the GPUs', too.
        torch.default_generator.manual_seed(torch.initial_seed() ^ _OTHER_SEED)
        return Discriminator(num_classes, kind=kind)


def discriminator_term(
    discriminator: nn.Module, mode: Mode, student: Tensor, teacher: Tensor, counted: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The discriminator's loss for the student's and the teachers' predictions ``(N, K)``, one batch of both.

    Args:
        discriminator: from rows of predictions to two scores.
        mode: see `Adversary`.
        student: the student's predictions.
        teacher: the teachers'.
        counted: which samples count, bool ``(N,)``; ``None``: all.

    Returns:
        The loss; the scalars ``discriminator_accuracy`` and, of a network that can die, ``discriminator_dead``; and of
        such a network whether each of its two outputs was other than zero, bool ``(2,)``, else ``None``.

    Raises:
        InputError: the mode is unknown.
    """
    if mode == "adversarial":
        student = functional.reverse_gradient(student)
    elif mode == "detached":
        student = student.detach()
    elif mode != "cooperative":
        raise InputError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    # Networks give half precision or float32, whatever the discriminator's weights are.
    dtype = next(discriminator.parameters(), student).dtype
    scores = discriminator(torch.cat([student.to(dtype), teacher.to(dtype)]))
    of_student, of_teacher = scores.chunk(2)
    both = None if counted is None else torch.cat([counted, counted])
    alive = None
    with torch.no_grad():
        margin = torch.cat([of_student[:, 0] - of_student[:, 1], of_teacher[:, 1] - of_teacher[:, 0]])
        # A tie is half right: so chance is 0.5, and a dead discriminator is at chance.
        observed = {"discriminator_accuracy": functional.counted_mean((1 + margin.sign()) / 2, both)}
        if not (isinstance(discriminator, Discriminator) and discriminator.kind == "fixed"):
            observed["discriminator_dead"] = functional.counted_mean((scores == 0).float().mean(dim=1), both)
            nonzero = scores != 0
            alive = (nonzero if both is None else nonzero & both[:, None]).any(dim=0)
    return functional.discriminator_loss(of_student, of_teacher, counted), observed, alive


class Liveness(Part):
    """Warns once, after an epoch, of an output of the discriminator that was zero for every row of it."""

    def __init__(self) -> None:
        # No buffer: DDP would overwrite what a process has seen with what the first one has.
        self._alive: Tensor | None = None
        self._has_warned = False

    def see(self, alive: Tensor) -> None:
        """Add a batch: whether each of the two outputs was other than zero, bool ``(2,)``."""
        if not self._has_warned:
            self._alive = alive if self._alive is None else self._alive | alive

    def epoch_ends(self, module: Any) -> None:
        """Warn; a step would have to wait for the device."""
        if self._alive is None:
            return
        # Every process has seen rows of its own.
        alive = module.trainer.strategy.reduce(self._alive.float(), reduce_op="sum").tolist()
        self._alive = None
        dead = [name for name, seen in zip(("'student'", "'teacher'"), alive, strict=True) if not seen]
        if dead:
            self._has_warned = True
            rank_zero_warn(
                f"MEALV2Module: the discriminator's output for {' and '.join(dead)} was zero for every row of the "
                "epoch: it is dead and learns no more; use FixedDiscriminator(), or another seed"
            )
