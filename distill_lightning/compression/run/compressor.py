"""Compression of a network in any training loop: a list of steps, each with its phase of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from distill_lightning.choices import is_plain, plain
from distill_lightning.compression.access.calibration import Loss
from distill_lightning.compression.access.computed import computed_in, original_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.old_hooks import refuse_old_hooks
from distill_lightning.compression.access.parameters import cuda_devices, split_path
from distill_lightning.compression.access.snapshots import taken_back
from distill_lightning.compression.file.artefact import write_artefact
from distill_lightning.compression.mask.masks import Masks
from distill_lightning.compression.run.batch_norm import recalibrate
from distill_lightning.compression.run.phases import Phase, check_network, check_order, check_targets, plan, step_of
from distill_lightning.compression.steps.base import Order, Step
from distill_lightning.compression.steps.trial import check_runs
from distill_lightning.compression.steps.workpiece import Workpiece, cross_entropy
from distill_lightning.errors import InputError

Moment = str
"""``"dense"``: before the first step; ``"before"`` and ``"after"`` the fine-tuning of a phase."""


class Compressor:
    """Compresses a network in place, in plain PyTorch.

    Without training::

        Compressor(network, [Quantize(weight_bits=4), Encode("huffman")], images).apply()

    In your own training loop::

        compressor = Compressor(network, steps, images, epochs=30, batches=calibration)
        for epoch in range(30):
            if compressor.begin_epoch(epoch, steps_per_epoch=len(loader), optimizer=optimizer):
                optimizer = SGD(network.parameters(), lr=0.1)      # new parameters, or a new start
            for inputs, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(network(inputs), targets).backward()
                compressor.before_optimizer_step()
                optimizer.step()
                compressor.after_optimizer_step(optimizer)
        compressor.finish()

    Args:
        network: compressed in place; it stays the same object.
        steps: the steps, in this order; see `Step`.
        example_inputs: a tensor ``(N, ...)`` that the network takes, or a tuple of its arguments.
        batches: calibration data from the training set, pairs of inputs and targets, or a function that draws them.
            Criteria and ranges that depend on data need them, and so does BatchNorm.
        loss: a function of the network's output and the targets, a mean over the samples.
        epochs: epochs of the training; 0 if there is none.
        dense_epochs: epochs of ordinary training before the first step, if that has no ``at``.
        bn_batches: number of calibration batches over which BatchNorm's statistics are measured anew after each step
            that has changed something; 0 leaves them as they are.
        seed: seed of everything that is drawn.
        watch: called at each moment (see `Moment`), with the moment and the phase.

    Raises:
        InputError: the order makes no sense, or phases overlap or do not fit into ``epochs``, see `plan`; ``targets``
            match no layer, as far as no earlier step can give the network other layers; or the network is compiled, or
            has lazy layers that have seen no input.
    """

    def __init__(
        self,
        network: nn.Module,
        steps: Sequence[Step],
        example_inputs: Any,
        *,
        batches: Iterable[tuple[Any, Any]] | Callable[[], Sequence[tuple[Any, Any]]] | None = None,
        loss: Loss = cross_entropy,
        epochs: int = 0,
        dense_epochs: int = 0,
        bn_batches: int = 50,
        seed: int = 0,
        watch: Callable[[Moment, Phase | None], None] | None = None,
    ) -> None:
        if bn_batches < 0:
            raise InputError(f"bn_batches must not be negative, got {bn_batches}")
        self.steps = list(steps)
        self.trains = epochs > 0
        self.phases = (
            plan(self.steps, epochs=epochs, dense_epochs=dense_epochs) if self.trains else _at_once(self.steps)
        )
        check_network(network)
        check_targets(network, self.steps)
        refuse_old_hooks(network)
        draw = batches if callable(batches) or batches is None else _kept(batches)
        self.piece = Workpiece(network, example_inputs, seed=seed, draw=draw, loss=loss)
        self.works = [phase.step.start() for phase in self.phases]
        self.bn_batches = bn_batches
        self.watch = watch
        self.dense = copy_network(network)
        # Phases that have begun and that are over; optimiser steps of the last one, done and in total.
        self._begun = self._finished = 0
        self._rehearsed = False
        self._step = self._steps = 0

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self.piece.network

    @property
    def masks(self) -> Masks:
        """Masks of the pruned weights."""
        return self.piece.masks

    @property
    def pruned(self) -> int:
        """Number of weights that are held at zero, by masks, learned masks or shared values."""
        return sum(zeros for zeros, _ in self._held().values())

    @property
    def sparsity(self) -> float:
        """Their share in the weights of which some are held at zero, in ``[0, 1]``; 0 without any."""
        return self.pruned / max(sum(total for _, total in self._held().values()), 1)

    def sparsities(self) -> dict[str, float]:
        """The share of each of these weights, by its path in the network as it was built."""
        return {path: zeros / max(total, 1) for path, (zeros, total) in self._held().items()}

    def _held(self) -> dict[str, tuple[int, int]]:
        """How many entries of each weight are held at zero, and how many it has."""
        held = {
            path.replace("parametrizations.", "").removesuffix(".original"): (int((~mask).sum()), mask.numel())
            for path, mask in self.masks.kept.items()
        }
        for path, entry in computed_in(self.network).items():
            # A learned mask holds at zero what earlier masks did, too.
            zeros = entry.pruned()
            if zeros > held.get(path, (0, 0))[0]:
                layer, name = split_path(path)
                held[path] = zeros, entry.size_of(original_of(self.network.get_submodule(layer), name))
        return held

    @property
    def phase(self) -> Phase | None:
        """The current phase, if there is one."""
        return self.phases[self._begun - 1] if self._begun > self._finished else None

    @property
    def waiting(self) -> list[Phase]:
        """The phases that have not begun yet."""
        return self.phases[self._begun :]

    def apply(self) -> nn.Module:
        """Run all steps, one after the other, without training.

        Returns:
            The network.

        Raises:
            InputError: the Compressor was made for a training, a step needs training, or it cannot change the network
                so that it still returns what it must; the network is then as before this step.
        """
        if self.trains:
            raise InputError("this Compressor was made for a training: leave epochs out to apply it without one")
        return self.finish()

    def begin_epoch(self, epoch: int, *, steps_per_epoch: int, optimizer: Optimizer | None = None) -> bool:
        """End the phases that are over, and begin those that are due.

        Args:
            epoch: the epoch that begins now, from 0.
            steps_per_epoch: optimiser steps of one epoch.
            optimizer: the optimiser in use; its state of weights that are now pruned becomes zero.

        Returns:
            Whether a new optimiser is needed, because the network has other parameters now or its training starts
            again.

        Raises:
            InputError: a step cannot change the network; in the first epoch also for steps to come. The network is as
                it was before the step.
        """
        self.piece.optimizer = optimizer
        self._rehearse()
        before = list(self.network.parameters())
        for work in self.works[self._begun :]:
            work.watch_epoch(self.piece, epoch)
        self._advance(epoch)
        phase = self.phase
        if phase is not None:
            self._steps = (phase.end - phase.begin) * steps_per_epoch
        # From a step that began or ended now, or continued in the epoch before.
        restart, self.piece.restart = self.piece.restart, False
        return restart or not has_parameters(self.network, before)

    def is_due(self, epoch: int) -> bool:
        """Whether a phase begins or ends at the beginning of an epoch."""
        over = self.phase is not None and self.phase.end <= epoch
        return over or (self._begun < len(self.phases) and self.phases[self._begun].begin <= epoch)

    def penalty(self) -> Tensor | None:
        """What the current phase adds to the loss, a scalar with a graph, or ``None``."""
        if self.phase is None:
            return None
        return self.works[self._begun - 1].penalty(self.piece, step=self._step, steps=self._steps)

    def before_optimizer_step(self) -> Tensor | None:
        """Add the penalty's gradient to those of the parameters, and set the gradients of pruned weights to zero.

        Returns:
            The penalty, if there is one.
        """
        penalty = self.penalty()
        if penalty is not None:
            parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    # In this order, because the gradient of an embedding may be sparse.
                    parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        self.masks.project_gradients(self.network)
        return None if penalty is None else penalty.detach()

    def after_optimizer_step(self, optimizer: Optimizer | None = None) -> None:
        """Update the phase's step, and keep pruned weights at zero.

        Args:
            optimizer: see `begin_epoch`.
        """
        self._step += 1
        if self.phase is not None and self._step <= self._steps:
            self.piece.optimizer = optimizer
            self.works[self._begun - 1].update(self.piece, step=self._step, steps=self._steps)
            self.piece.forget_batches()
        self.masks.project(self.network)

    def project(self) -> None:
        """Set pruned weights to zero after something else, weight averaging for example, has written to them."""
        self.masks.project(self.network)

    def finish(self) -> nn.Module:
        """End the last phase, and run the remaining steps.

        Returns:
            The network.
        """
        self.piece.optimizer = None
        self._advance(None)
        self.project()
        return self.network

    def write(self, path: Path | str) -> int:
        """Write the network to one packed file, see `write_artefact`, with the coding that the steps ask for.

        Args:
            path: path of the file; an existing one is replaced.

        Returns:
            The file's bytes.

        Raises:
            InputError: the file cannot be written.
        """
        return write_artefact(self.network, path, coding=self.piece.coding)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs besides the network's structure and weights, as tensors and plain values."""
        return {
            "phases": [phase.name for phase in self.phases],
            "options": [_options_of(step) for step in self.steps],
            "begun": self._begun,
            "finished": self._finished,
            "step": self._step,
            "steps": self._steps,
            "masks": self.masks.state_dict(),
            "coding": self.piece.coding,
            "notes": list(self.piece.notes),
            "details": self.piece.details,
            "restart": self.piece.restart,
            "works": {number: work.state_dict() for number, work in enumerate(self.works) if number >= self._finished},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another Compressor stopped, whose structure and weights the network already has.

        Raises:
            InputError: the other one had other steps, or steps with other options.
        """
        names = [phase.name for phase in self.phases]
        if state["phases"] != names:
            made = f"with the steps {', '.join(state['phases'])}" if state["phases"] else "without steps"
            raise InputError(
                f"the checkpoint was made {made}, and this is {', '.join(names) or 'no step'}: give the steps that it "
                "was made with"
            )
        own = [_options_of(step) for step in self.steps]
        # A state of before knows the titles only.
        for phase, theirs, ours in zip(names, state.get("options", own), own, strict=True):
            for option, made, here in _differences(theirs, ours):
                raise InputError(
                    f"the checkpoint's step {phase} has {option}={made}, and this one {option}={here}: give the steps "
                    "that it was made with"
                )
        self._begun, self._finished = state["begun"], state["finished"]
        self._step, self._steps = state["step"], state["steps"]
        self.masks.load_state_dict(state["masks"])
        self.piece.coding, self.piece.notes = state["coding"], list(state["notes"])
        self.piece.details, self.piece.restart = state["details"], state["restart"]
        for number, told in state["works"].items():
            self.works[number].load_state_dict(told)

    def _advance(self, epoch: int | None) -> None:
        """End and begin phases up to that of an epoch; ``None`` for all of them."""
        while True:
            phase = self.phase
            following = self.phases[self._begun] if self._begun < len(self.phases) else None
            if phase is not None:
                # Training may continue after the last phase, but not in it.
                if epoch is not None and epoch < phase.end:
                    return
                self._change(self.works[self._begun - 1].finish, phase.step)
                self._finished += 1
                self._tell("after", phase)
            elif following is not None and (epoch is None or following.begin <= epoch):
                if self._begun == 0:
                    self._tell("dense", None)
                self._step = self._steps = 0
                self._begun += 1
                self._change(self.works[self._begun - 1].begin, following.step)
                self._tell("before", following)
            else:
                return

    def _rehearse(self) -> None:
        """Let the steps refuse before the first epoch what they would refuse later, after training for nothing."""
        if self._rehearsed or self._begun:
            return
        self._rehearsed = True
        piece = Workpiece(
            copy_network(self.network), self.piece.example_inputs, seed=self.piece.seed, loss=self.piece.loss
        )
        with torch.random.fork_rng(devices=cuda_devices(self.network)):
            for work in self.works:
                if not work.rehearse(piece):
                    break

    def _change(self, act: Callable[[Workpiece], None], step: Step) -> None:
        piece = self.piece
        piece.changed = False
        masks, untried = dict(piece.masks.kept), step.order is Order.STRUCTURE and not step.tries_itself
        before = copy_network(piece.network) if untried else None
        # Draws here must not shift the random numbers of the training.
        with torch.random.fork_rng(devices=cuda_devices(piece.network)):
            torch.manual_seed(piece.seed + self._begun)
            try:
                with taken_back(piece.network):
                    act(piece)
                    if before is not None and piece.changed:
                        check_runs(piece, step.title, before)
            except BaseException:
                piece.masks.load_state_dict(masks)
                raise
            if piece.changed and step.recalibrates and self.bn_batches:
                self._recalibrate(piece)
        piece.forget_batches()

    def _recalibrate(self, piece: Workpiece) -> None:
        if piece.draw is not None:
            batches = piece.batches("BatchNorm")
            recalibrate(piece.network, [inputs for inputs, _ in batches], limit=self.bn_batches)
        elif any(isinstance(module, _BatchNorm) and module.track_running_stats for module in piece.network.modules()):
            piece.note("BatchNorm's statistics are the old ones: give batches of training inputs to measure them anew")

    def _tell(self, moment: Moment, phase: Phase | None) -> None:
        if self.watch is not None:
            self.watch(moment, phase)


def _at_once(steps: Sequence[Step]) -> list[Phase]:
    """Phases without training."""
    for number, step in enumerate(steps, start=1):
        reason = step.reason_to_train()
        if reason is not None:
            raise InputError(f"{step_of(number, step)}: {reason}: give the Compressor epochs, and train")
    check_order(steps)
    return [Phase(number, step, 0, 0) for number, step in enumerate(steps, start=1)]


def _options_of(step: Step) -> dict[str, Any]:
    """The options of a step, as a checkpoint can hold them; without those, of steps from elsewhere, that it cannot."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(step) if dataclasses.is_dataclass(step) else ()
    values = {field.name: getattr(step, field.name) for field in fields}
    return {name: plain(value) for name, value in values.items() if is_plain(value)}


def _differences(made: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The options that differ, by their names within choices, and what the message shows of both values."""
    for name in [*made, *(name for name in here if name not in made)]:
        one: Any = made.get(name)
        other: Any = here.get(name)
        if one == other:
            continue
        kinds = [value.get("class_path") if isinstance(value, Mapping) else None for value in (one, other)]
        if kinds[0] is not None and kinds[0] == kinds[1]:
            yield from _differences(one["init_args"], other["init_args"], f"{prefix}{name}.")
            continue
        shown = [
            repr(value) if kind is None else f"{kind.rpartition('.')[2]}(...)"
            for value, kind in zip((one, other), kinds, strict=True)
        ]
        yield f"{prefix}{name}", shown[0], shown[1]


def _kept(batches: Iterable[tuple[Any, Any]]) -> Callable[[], Sequence[tuple[Any, Any]]]:
    known = list(batches)
    return lambda: known


def has_parameters(network: nn.Module, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a network has these parameters, in this order, and no others."""
    # Compares the parameters themselves: a new one may have the id of one that is gone.
    own = list(network.parameters())
    return len(own) == len(parameters) and all(one is other for one, other in zip(own, parameters, strict=True))
