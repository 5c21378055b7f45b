"""What stops a run before wrong labels or broken numbers spoil it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.data.batch import IGNORED, Batch, first_tensor, spread
from distill_lightning.errors import InputError, NonFiniteError
from distill_lightning.layers.call import only_output
from distill_lightning.lightning_internals import has_trainer, scales_gradients
from distill_lightning.part import Part

FIRST = 2
"""Batches at the start of an epoch that a device is waited for."""

_EVERY = 50
"""Batches after which a device is asked whether all its losses were finite."""

STAGES = {"train": "training", "val": "validation", "test": "test"}

_SHOWN = 8
"""Samples that a message names."""


def with_targets(module: Any, batch: Batch, *, is_evaluated: bool = False) -> Batch:
    """A batch with targets in the type that losses and metrics need.

    Args:
        module: that reads them.
        batch: of a data module.
        is_evaluated: whether metrics are to read them, and not a loss.

    Raises:
        InputError: they are of a kind or shape that the module does not take.
    """
    if batch.target is None and (is_evaluated or module.reads_labels):
        does = "is evaluated on" if is_evaluated else "reads"
        raise InputError(f"{type(module).__name__} {does} labels, and the batch has none: give them")
    _check_kind(module, batch.target, is_evaluated=is_evaluated)
    if not isinstance(batch.target, Tensor):
        return batch
    target = module.output.as_target(batch.target)
    partner = None if batch.partner is None else with_targets(module, batch.partner)
    if target is batch.target and partner is batch.partner:
        return batch
    return batch.replace(target=target, partner=partner)


def _check_kind(module: Any, target: Any, *, is_evaluated: bool) -> None:
    can_be_classes = isinstance(target, Tensor) and not target.is_floating_point()
    if not (is_evaluated or module.reads_labels or can_be_classes):
        return
    # Metrics that the user gives may read distributions.
    needs_classes = is_evaluated and not module.has_own_metrics
    module.output.check_target(
        type(module).__name__, target, per_position=module.per_position, is_evaluated=needs_classes
    )


class Guard(Part):
    """Stops a run on labels that cannot be right, and on numbers that are not finite.

    Labels are looked at before a batch is used, losses and teachers' outputs after its step. On the CPU that is done
    with every batch. Any other device would have to be waited for: there, labels and teachers are looked at in an
    epoch's first two batches, and which loss was the first that is not finite is kept on the device and read after
    every 50 batches, before a validation and at the epoch's end.

    A step that a gradient scaler skips (``precision="16-mixed"``) does not stop the run unless every step of the epoch
    is skipped; the epoch's end reports how many were.
    """

    def __init__(self) -> None:
        self._is_new = False
        self._output: Tensor | None = None
        # Whether an output for positions could be read in one way alone; a later one may have as many positions as
        # there are classes.
        self._knows_layout = False
        self._forget()

    def _forget(self) -> None:
        # Number of the batch in which each scalar was first not finite, -1 for none, by the names that came together.
        self._first: dict[tuple[str, ...], Tensor] = {}
        self._skipped: Tensor | None = None
        self._batches, self._unread, self._number = 0, 0, 0
        # Of the batches that are not read yet, the samples' indices.
        self._samples: dict[int, Tensor | None] = {}
        self._batch: Batch | None = None

    # Labels

    def look(self, module: Any, batch: Any, number: int, stage: str) -> None:
        """Look at the labels of a batch that is on the module's device.

        Args:
            module: whose output tells what its labels may be.
            batch: of any data module.
            number: of the batch in its epoch.
            stage: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            InputError: a label that counts cannot be right; the message names the sample.
        """
        ready, who = module.read_batch(batch), type(module).__name__
        target, is_evaluated = ready.target, stage != "train"
        if self._is_new and not is_evaluated:
            self._watch(module, batch)
        _check_kind(module, target, is_evaluated=is_evaluated)
        if number == 0 and _teaches_nothing(module, ready):
            warnings.warn(
                f"{who}: no sample of {STAGES[stage]} batch 0 counts, so that it teaches nothing: for data without "
                f"labels let the target be None, and not {IGNORED}",
                stacklevel=2,
            )
        is_of_use = is_evaluated or module.reads_labels
        if not is_of_use or not isinstance(target, Tensor) or not _is_read(target, number):
            return
        wrong = module.output.wrong_targets(target)
        if ready.counted is not None:
            wrong = wrong & _like(ready.counted, wrong)
        if wrong.any():
            row = int(wrong.flatten(1).any(1).nonzero()[0]) if wrong.ndim > 1 else int(wrong.nonzero()[0])
            value = target[row][wrong[row]][0] if wrong.ndim > 1 else target[row]
            raise InputError(
                f"{who}: the label of sample {named(ready, [row])} in {STAGES[stage]} batch {number} is "
                f"{value.tolist()}, and labels must be {module.output.target_rule(target)}: mend the data module"
            )

    def look_at_output(self, module: Any, output: Tensor, number: int, stage: str) -> None:
        """Look at what counts of the student's output for a batch of an evaluation.

        Raises:
            InputError: the student seems to give probabilities in the place of logits.
            NonFiniteError: it is not finite.
        """
        if not _is_read(output, number):
            return
        who = f"{type(module).__name__}: the student ({type(module.student).__name__})"
        if module.output.broken(output).any():
            raise NonFiniteError(f"{who} gives nan or inf in {STAGES[stage]} batch {number}: {WAY_OUT}")
        if number < FIRST:
            module.output.check_values(who, output)

    def _watch(self, module: Any, batch: Any) -> None:
        """See in a training's first batch whether the student has the outputs that are needed."""
        self._is_new = False
        third = batch[2] if isinstance(batch, (tuple, list)) and len(batch) > 2 else None
        # Batches of names and entries that belong to none are left alone.
        if (
            isinstance(third, Tensor)
            and third.ndim == 1
            and not (third.is_floating_point() or hasattr(batch, "_fields"))
        ):
            warnings.warn(
                "the third entry of the batches is left out: if it is the samples' index, let the data module yield "
                "distill_lightning.Batch(input, target, index)",
                stacklevel=2,
            )
        # Neither compiled nor scripted code takes hooks that come and go; an evaluation looks at it.
        if module.compiles or isinstance(module.student, torch.jit.ScriptModule):
            return

        def check(network: nn.Module, _inputs: Any, output: Any) -> None:
            handle.remove()
            found = only_output(network, output)
            module.check_output("student", network, found.shape)
            # Its numbers are read after the step, which must not wait for them.
            self._output = found.detach()

        handle = module.student.register_forward_hook(check)

    def laid_out(self, module: Any, output: Tensor) -> Tensor:
        """The student's output with the numbers of each position last, see `outputs.Output.laid_out`.

        Raises:
            InputError: the first of them can be read in more than one way.
        """
        if output.ndim > 2 and not self._knows_layout:
            if needed := module.output.needs_layout(output.shape):
                raise InputError(
                    f"{type(module).__name__}: the student ({type(module.student).__name__}) gives "
                    f"{tuple(output.shape)}, which has {needed}"
                )
            self._knows_layout = True
        laid_out: Tensor = module.output.laid_out(output)
        return laid_out

    # Numbers

    def hold(self, module: Any, values: Tensor, names: Sequence[str], batch: Batch, number: int) -> None:
        """Note which of a batch's scalars are not finite, without waiting for the device.

        Args:
            module: that is trained; without a Trainer nothing is noted.
            values: the loss and its terms, ``(S,)``.
            names: of each.
            batch: that they are of.
            number: of the batch in its epoch.
        """
        if not has_trainer(module):
            return
        bad = ~values.isfinite()
        first = self._first.get(tuple(names))
        if first is None:
            first = torch.full_like(bad, -1, dtype=torch.int64)
        self._first[tuple(names)] = torch.where((first < 0) & bad, number, first)
        self._skipped = bad.any().long() + (0 if self._skipped is None else self._skipped)
        self._samples[number] = None if batch.key is None else batch.key.index
        self._batch, self._number = batch, number
        self._batches += 1
        self._unread += 1

    def batch_ends(self, module: Any) -> None:
        """Read what is not finite, where that takes no waiting or is due.

        Raises:
            InputError: a teacher, or in the first batch the student, seems to give probabilities for logits.
            NonFiniteError: something is not finite.
        """
        output, self._output = self._output, None
        if output is not None and output.device.type != "meta":
            who = f"{type(module).__name__}: the student ({type(module.student).__name__})"
            module.output.check_values(who, module.output.laid_out(output))
        if self._batch is None:
            return
        batch, self._batch = self._batch, None
        if _is_read(first_tensor(batch.input), self._number):
            self._look_at_teachers(module, batch)
            self._read(module, batch)
        elif self._unread >= _EVERY:
            self._read(module, batch)

    def validation_starts(self, module: Any) -> None:
        """Read what was not read yet before an evaluation blames the student for it."""
        self._read(module, None)

    def epoch_ends(self, module: Any) -> None:
        """Read what was not read yet, and tell of the steps that a gradient scaler has skipped."""
        self._read(module, None)
        skipped, batches = 0 if self._skipped is None else int(self._skipped), self._batches
        self._forget()
        if skipped == 0 or not scales_gradients(module.trainer):
            return
        told = f"{type(module).__name__}: the loss was not finite in {skipped} of {batches} batches of the epoch"
        if skipped == batches:
            raise NonFiniteError(f"{told}, and every step was skipped: {WAY_OUT}")
        warnings.warn(f"{told}, whose steps the gradient scaler has skipped", stacklevel=2)

    def fit_starts(self, module: Any) -> None:
        """An interrupted ``fit`` may have left something."""
        self._forget()
        self._is_new = True

    def epoch_starts(self, module: Any) -> None:
        """Batches are counted within an epoch."""
        self._forget()

    def _read(self, module: Any, batch: Batch | None) -> None:
        samples, self._samples, self._unread = self._samples, {}, 0
        if scales_gradients(module.trainer):
            return
        for names, first in self._first.items():
            numbers = first.tolist()
            bad = [(number, name) for number, name in zip(numbers, names, strict=True) if number >= 0]
            if bad:
                number, name = min(bad, key=lambda found: (found[0], found[1] == "loss"))
                index = samples.get(number)
                of = "" if index is None else f" (samples {_listed(index.tolist())})"
                raise NonFiniteError(
                    f"{type(module).__name__}: train/{name} is not finite in batch {number} of epoch "
                    f"{module.trainer.current_epoch + 1}{of}: {_reason(batch)}"
                )

    @staticmethod
    def _look_at_teachers(module: Any, batch: Batch) -> None:
        for who, output, broken in teachers_answers(module, batch):
            if broken.any():
                # With further inputs of each sample there are more rows than samples.
                bad = sorted({row % batch.size for row in broken.nonzero()[:, 0].tolist()})
                inputs = " (their inputs do, too)" if batch.broken_rows() else ""
                raise NonFiniteError(
                    f"{who} answers nan or inf for samples {named(batch, bad)}{inputs}: mend or replace it"
                )
            module.output.check_values(who, output)


def teachers_answers(module: Any, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What each teacher has answered to a batch: who it is, its output, and where this is not finite and counts."""
    for number, output in enumerate(getattr(module.teachers, "heard", ())):
        broken = module.output.broken(output)
        counted = module.output.counted(output[: batch.size], batch)
        if counted is not None:
            broken[: batch.size] &= counted
        yield f"{type(module).__name__}: teacher {number} ({type(module.teachers[number]).__name__})", output, broken


def check_loss(module: Any, loss: Tensor, batch: Batch | None, number: int) -> None:
    """Stop a training without a `Guard` on a loss that is not finite.

    On the CPU every batch is looked at; any other device is waited for in an epoch's first batches and after every 50:
    weights that a step has broken stay so.

    Args:
        module: that is trained.
        loss: of the batch.
        batch: that it is of; ``None``: of a kind that cannot be read.
        number: of the batch in its epoch.

    Raises:
        NonFiniteError: it is nan or infinite.
    """
    if (_is_read(loss, number) or number % _EVERY == 0) and has_trainer(module) and not loss.isfinite():
        raise NonFiniteError(
            f"{type(module).__name__}: train/loss is not finite in batch {number} of epoch "
            f"{module.trainer.current_epoch + 1}: {_reason(batch)}"
        )


def _teaches_nothing(module: Any, batch: Batch) -> bool:
    """Whether no sample of the first batch counts; a process may well have a share of these alone."""
    alone = has_trainer(module) and module.trainer.world_size == 1
    return alone and batch.counted is not None and _is_read(batch.counted, 0) and not bool(batch.counted.any())


def _like(counted: Tensor, wrong: Tensor) -> Tensor:
    """Which samples or positions count, in the shape of a mask of samples or of positions."""
    return spread(counted, wrong) if wrong.ndim >= counted.ndim else counted.flatten(1).any(1)


def _is_read(tensor: Tensor, number: int) -> bool:
    """Whether numbers of a batch are looked at: at once on the CPU, elsewhere of an epoch's first batches."""
    return tensor.device.type == "cpu" or (number < FIRST and tensor.device.type != "meta")


WAY_OUT = "lower the learning rate, or clip the gradients (Trainer(gradient_clip_val=1))"


def _reason(batch: Batch | None) -> str:
    """Why a loss is not finite, as far as its batch tells, and the way out."""
    if batch is None:
        return WAY_OUT
    rows = batch.broken_rows()
    if rows:
        return f"the inputs of samples {named(batch, rows)} hold nan or inf: mend them or leave them out"
    return f"the inputs are finite: {WAY_OUT}"


def named(batch: Batch, rows: Sequence[int]) -> str:
    """Samples by their index in the data set or, where the data module does not tell it, by their row."""
    if batch.key is None:
        return f"{_listed(rows)} of the batch"
    return _listed(batch.key.index[list(rows)].tolist())


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return shown if len(numbers) <= _SHOWN else f"{shown} and {len(numbers) - _SHOWN} more"
