"""Means over an epoch, without what a `log` in every step costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_lightning.lightning_internals import is_last_batch
from distill_lightning.part import Part


class _Sums(NamedTuple):
    values: Tensor
    samples: int


class RunningMeans(Part):
    """Means of scalars over an epoch's batches, each batch counted by its samples; logged under ``train/``.

    The sums stay on the device, in one tensor that a step adds to: `LightningModule.log` takes a tenth of a millisecond
    for each scalar and step, which for a small network is more than the scalar itself.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.modules.parts.means import RunningMeans
        >>> means = RunningMeans()
        >>> means.add({"ce": tensor(1.0)}, samples=3)
        tensor([1.])
        >>> means.add({"ce": tensor(5.0)}, samples=1)
        tensor([5.])
        >>> list(means.means())
        [('ce', tensor(2.), 4)]
    """

    def __init__(self) -> None:
        # By the names that came together; there is more than one such set only where a term comes or goes.
        self._sums: dict[tuple[str, ...], _Sums] = {}

    def add(self, values: Mapping[str, Tensor], samples: int) -> Tensor:
        """Count the scalars of a batch of so many samples; no graph is kept.

        Returns:
            The scalars, ``(S,)``.
        """
        names = tuple(values)
        new = torch.stack([value.detach().float() for value in values.values()])
        before = self._sums.get(names)
        if before is None:
            self._sums[names] = _Sums(new * samples, samples)
        else:
            before.values.add_(new, alpha=samples)
            self._sums[names] = _Sums(before.values, before.samples + samples)
        return new

    def means(self) -> Iterator[tuple[str, Tensor, int]]:
        """Name, mean and number of samples of each scalar, over the batches that had it."""
        totals: dict[str, tuple[Tensor, int]] = {}
        for names, (values, samples) in self._sums.items():
            for name, value in zip(names, values.unbind(), strict=True):
                total, counted = totals.get(name, (torch.zeros_like(value), 0))
                totals[name] = (total + value, counted + samples)
        for name, (total, counted) in totals.items():
            yield name, total / counted, counted

    def forget(self) -> None:
        """Drop the sums."""
        self._sums = {}

    def fit_starts(self, module: Any) -> None:
        """An interrupted ``fit`` may have left some."""
        self.forget()

    def epoch_starts(self, module: Any) -> None:
        """Each epoch has means of its own."""
        self.forget()

    def batch_ends(self, module: Any) -> None:
        """Log with the last batch, because callbacks read the means at the end of the epoch, before the module."""
        trainer = module.trainer
        if is_last_batch(trainer) or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._log(module)

    def epoch_ends(self, module: Any) -> None:
        """Log those of an epoch that has ended in another way than with its last batch."""
        self._log(module)

    def _log(self, module: Any) -> None:
        for name, mean, samples in self.means():
            module.log(f"train/{name}", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=samples)
        self.forget()
