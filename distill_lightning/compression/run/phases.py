"""When each step's phase begins and ends, and checks of the order of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from distill_lightning.compression.access.targets import check_patterns
from distill_lightning.compression.steps.base import Order, Step
from distill_lightning.errors import InputError
from distill_lightning.layers import unwrapped
from distill_lightning.layers.wrappers import is_compiled

_REASONS = {
    (Order.MASKS, Order.STRUCTURE): (
        "masks belong to weights, which a step that shrinks, factors or ties layers replaces"
    ),
    (Order.VALUES, Order.STRUCTURE): "shared or quantized weights cannot be shrunk, factored or tied",
    (Order.VALUES, Order.MASKS): (
        "weights that are shared or quantized have no values of their own to prune or to regularise"
    ),
}


_EPOCHS = "max_epochs of a Trainer, epochs of a Compressor"


class Phase(NamedTuple):
    """A step and the epochs of its phase, from ``begin`` to ``end``, which are equal if there is no training in it."""

    number: int
    step: Step
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The name in the report: ``"2 Quantize"``."""
        return f"{self.number} {self.step.title}"


def step_of(number: int, step: Step) -> str:
    """A step of a list in messages: ``"step 2 (Quantize)"``."""
    return f"step {number} ({step.title})"


def plan(steps: Sequence[Step], *, epochs: int, dense_epochs: int = 0) -> list[Phase]:
    """Plan the phases of some steps.

    Args:
        steps: the steps in their order.
        epochs: epochs of the whole training; with 0 there is none, and all steps are done at once.
        dense_epochs: epochs of ordinary training before the first step, if that has no ``at``.

    Raises:
        InputError: the order makes no sense, phases overlap, a phase is not over after ``epochs``, or a step needs
            training and gets none.
    """
    check_order(steps)
    if dense_epochs < 0:
        raise InputError(f"dense_epochs must not be negative, got {dense_epochs}")
    if dense_epochs > epochs:
        raise InputError(f"dense_epochs={dense_epochs} of {epochs} epochs: train for more ({_EPOCHS})")
    phases: list[Phase] = []
    now = dense_epochs
    for number, step in enumerate(steps, start=1):
        begin = _begin(step, now, epochs)
        if begin < now and phases:
            raise InputError(
                f"{step_of(number, step)} begins at epoch {begin}, and {step_of(number - 1, steps[number - 2])} ends "
                f"at {now}: give it a later at, or leave at out"
            )
        end = begin + step.finetune_epochs
        if end > epochs:
            raise InputError(
                f"{step_of(number, step)} lasts from epoch {begin} to {end}, and the training ends at {epochs}: "
                f"train for {end} epochs ({_EPOCHS})"
            )
        reason = step.reason_to_train()
        if reason is not None and not step.finetune_epochs:
            raise InputError(f"{step_of(number, step)}: {reason}: give it finetune_epochs")
        phases.append(Phase(number, step, begin, end))
        _check_rewind(phases)
        now = end
    return phases


def _check_rewind(phases: Sequence[Phase]) -> None:
    """Refuse that the last phase rewinds to a network with other parameters than it then has."""
    last = phases[-1]
    epoch = last.step.rewinds_to
    if epoch is None:
        return
    for phase in phases[:-1]:
        if not phase.step.gives_other_parameters:
            continue
        until = phase.end if phase.step.changes_at_end else phase.begin
        # Scores of masks exist only in their phase; changes of the structure remain.
        since = phase.begin + 1 if phase.step.order is Order.MASKS else 0
        if since <= epoch <= until:
            raise InputError(
                f"{step_of(last.number, last.step)} goes back to the network of epoch {epoch}, which has other "
                f"parameters than it will find, by {step_of(phase.number, phase.step)}: give it rewind={until + 1} or "
                "later, or 'random'"
            )


def check_order(steps: Sequence[Step]) -> None:
    """Refuse an order of steps that makes no sense.

    Raises:
        InputError: the order makes no sense, for a reason that the message gives.
    """
    last: tuple[int, Step] | None = None
    for number, step in enumerate(steps, start=1):
        before, after = None if last is None else last[1].order, step.latest_after
        if last is not None and before is not None and after is not None and after < before:
            reason = _REASONS.get((before, after), "encoding comes last, because it changes no weight")
            raise InputError(f"{step_of(number, step)} cannot come after {step_of(*last)}: {reason}; swap them")
        if step.order is not None:
            last = number, step


def check_network(network: nn.Module) -> None:
    """Refuse a network whose layers have other names than their own, or no weights yet.

    Raises:
        InputError: `torch.compile` has compiled it or a part of it, or it has lazy layers that have seen no input.
    """
    for path, module in network.named_modules():
        what = path or type(unwrapped(network)).__name__
        if is_compiled(module):
            raise InputError(
                f"{what} is compiled by torch.compile, and compression changes what was compiled: compress the network "
                "without it, and compile the result"
            )
        if any(is_lazy(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise InputError(
                f"{what} ({type(module).__name__}) has no weights before it has seen an input: run the network once on "
                "example inputs, then compress it"
            )


def check_targets(network: nn.Module, steps: Sequence[Step]) -> None:
    """Refuse patterns that match nothing and layers that cannot be worked on, as far as the layers are known.

    Raises:
        InputError: a pattern matches no part of the network, or a step refuses its layers.
    """
    for number, step in enumerate(steps, start=1):
        try:
            check_patterns(network, step.targets or (), "targets")
            check_patterns(network, step.exclude, "exclude")
            step.check_layers(network)
        except InputError as error:
            raise InputError(f"{step_of(number, step)}: {error}") from error
        if step.gives_other_parameters:
            return


def _begin(step: Step, now: int, epochs: int) -> int:
    if step.at is None:
        return now
    if step.at == "start":
        return 0
    if step.at == "end":
        return epochs
    if isinstance(step.at, float):
        return round(step.at * epochs)
    return int(step.at)
