"""Training on without the batches whose numbers are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError, NonFiniteError, check_one_of
from distill_lightning.lightning_internals import has_trainer, trains
from distill_lightning.modules.parts.guard import named, teachers_answers
from distill_lightning.part import Part


class Skipping(Part):
    """With ``nonfinite="skip"``, goes on without the batches whose loss, term or teacher's answer is nan or infinite.

    Such a batch leaves no trace: it adds nothing to gradients that are accumulated and to the means of the epoch, what
    its forward changed in buffers (BatchNorm's statistics) is put back, and if there is nothing else to learn from, the
    optimiser makes no step, so that its state and the parameters stay as they are to the last bit. The Trainer counts
    the step, and a schedule goes on. Where several processes train, what one of them skips all of them skip. The number
    of an epoch's skipped batches is logged as ``train/skipped_batches`` and told with a warning that names the first;
    an epoch of nothing else stops the run, and so does a `TeacherStore`, which would keep the answers.

    Whether a batch is skipped must be known before its gradient, so each step waits for the device.

    Args:
        nonfinite: ``"stop"``, with which this does nothing, or ``"skip"``.

    Raises:
        InputError: another value; in training: an optimiser that computes the loss several times in a step.
    """

    def __init__(self, nonfinite: str) -> None:
        check_one_of("nonfinite", nonfinite, ("stop", "skip"))
        self.is_on = nonfinite == "skip"
        self._buffers: list[Tensor] = []
        # Batches since the last step that were not skipped.
        self._learnt = 0
        self._forget()

    def _forget(self) -> None:
        self._batches = self._skipped = 0
        self._first = ""

    def training_starts(self, module: Any) -> None:
        """Look at the optimiser."""
        self._learnt = 0
        if self.is_on and any(isinstance(optimizer, LBFGS) for optimizer in module.trainer.optimizers):
            raise InputError(
                f"{type(module).__name__}: nonfinite='skip' needs an optimiser that computes the loss once in a step, "
                "and LBFGS does so several times: take another, or leave nonfinite out"
            )

    def epoch_starts(self, module: Any) -> None:
        """Batches are counted within an epoch."""
        self._forget()

    def batch_starts(self, module: Any) -> None:
        """Keep what a forward changes."""
        self._learnt += 1
        if self.is_on:
            self._batches += 1
            self._buffers = [buffer.clone() for buffer in module.buffers()]

    @torch.no_grad()
    def skips(self, module: Any, values: Mapping[str, Tensor], batch: Batch, number: int) -> bool:
        """Whether a batch is to be skipped; if so, what its forward has changed is put back.

        Args:
            module: that is trained; without a Trainer nothing is skipped.
            values: the loss and its terms, scalars by name.
            batch: that they are of.
            number: of the batch in its epoch.
        """
        if not self.is_on or not has_trainer(module):
            return False
        broken = {f"train/{name}": ~value.isfinite() for name, value in values.items()}
        broken |= {who: rows.any() for who, _, rows in teachers_answers(module, batch)}
        flags = torch.stack(list(broken.values()))
        # A batch is what all processes make a step by together.
        if not module.trainer.strategy.reduce(flags.any().float(), reduce_op="sum"):
            return False
        self._skipped += 1
        self._learnt -= 1
        if not self._first:
            what = [name for name, bad in zip(broken, flags.tolist(), strict=True) if bad]
            of = "" if batch.key is None else f" (samples {named(batch, range(batch.size))})"
            # The loss is broken whenever a term is; in another process neither need be.
            self._first = f"{what[-1] if what else 'another process'} in batch {number}{of}"
        for buffer, kept in zip(module.buffers(), self._buffers, strict=True):
            buffer.copy_(kept)
        return True

    def closure(self, module: Any, closure: Callable[[], Any]) -> Callable[[], Any] | None:
        """What the optimiser is to call in its step; ``None``: it makes none, and the closure has been called."""
        if not trains(module.trainer):
            closure()
            return None
        if not self.is_on:
            return closure
        result = closure()
        learnt, self._learnt = self._learnt, 0
        return (lambda: result) if learnt else None

    def epoch_ends(self, module: Any) -> None:
        """Log and tell how many batches were skipped.

        Raises:
            NonFiniteError: all of them.
        """
        if not self.is_on:
            return
        skipped, batches, first = self._skipped, self._batches, self._first
        self._forget()
        self._buffers = []
        module.log("train/skipped_batches", float(skipped), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        if not skipped:
            return
        told = (
            f"{type(module).__name__}: {skipped} of {batches} batches of epoch {module.trainer.current_epoch + 1} were "
            f"skipped because of nan or inf, the first for {first}"
        )
        if skipped == batches:
            raise NonFiniteError(f"{told}: mend the data or the teachers, or lower the learning rate")
        warnings.warn(told, stacklevel=2)


def nothing_to_learn(module: Any) -> Tensor:
    """A loss without a gradient."""
    if module.trainer.world_size == 1:
        return torch.zeros((), device=module.device, requires_grad=True)
    # The backward pass also adds up what the processes have accumulated each on its own.
    return torch.stack([(0 * parameter).sum() for parameter in module.parameters() if parameter.requires_grad]).sum()
