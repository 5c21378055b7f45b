"""A data set that makes whole batches of views by their keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill_lightning.data.batch import Batch, map_tensors, spread
from distill_lightning.data.views import uniform_draws

# Keeps the draws of partners apart from those of the crops.
_PARTNER_STREAM = 0x50415254

ViewKey = int | tuple[int, int]
"""Index and view of a sample; an index alone means view 0."""


class ViewDataset(Dataset[Batch]):
    """Makes a whole batch at once, of views that depend on nothing but their keys; a subclass defines `make`.

    One that has something of all samples at hand says so in a method ``columns()``, see
    `distill_lightning.data.columns.Columns`: data are known again by it.

    Args:
        seed: of the views and the partners.
        partners: whether each view comes with another sample in the same view, drawn from the view's own key.
    """

    # What a view depends on besides the samples and the seed: names of attributes, for `ViewDataModule.fingerprint`.
    depends_on: tuple[str, ...] = ("seed", "partners")

    def __init__(self, *, seed: int, partners: bool) -> None:
        self.seed, self.partners = seed, partners

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__()")

    @property
    def views_are_alike(self) -> bool:
        """Whether all views of a sample have the same input, as those that nothing augments do."""
        return False

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these views, both ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define make(index, view)")

    def make_partner(self, index: Tensor, view: Tensor, others: Tensor) -> Batch:
        """The partners of these views, ``(N,)`` each: the same views of other samples, which were drawn."""
        return self.make(others, view)

    def __getitem__(self, key: ViewKey) -> Batch:
        """One sample: a batch without its first dimension."""
        return _first(self.__getitems__([key]))

    def __getitems__(self, keys: Sequence[ViewKey]) -> Batch:
        """The batch of these ``(index, view)`` pairs; PyTorch's loader asks for a whole batch at once.

        A sampler that knows nothing of views gives plain indices; they mean view 0. Samples in view -1 only fill up a
        process's share (see `ViewSampler`) and do not count.
        """
        pairs = [key if isinstance(key, (tuple, list)) else (key, 0) for key in keys]
        index, view = torch.tensor(pairs, dtype=torch.long).view(len(pairs), 2).unbind(dim=1)
        batch = self.make(index, view)
        if any(number < 0 for _, number in pairs):
            whole = view >= 0
            batch = batch.replace(
                counted=whole if batch.counted is None else batch.counted & spread(whole, batch.counted)
            )
        if not self.partners:
            return batch
        draws = uniform_draws(self.seed + _PARTNER_STREAM, index, view, 1)[:, 0]
        return batch.replace(partner=self.make_partner(index, view, (draws * len(self)).long()))


def _first(batch: Batch) -> Batch:
    """The first sample of a batch, without the first dimension."""
    first = partial(map_tensors, lambda tensor: tensor[0])
    return Batch(
        first(batch.input),
        first(batch.target),
        first(batch.index),
        first(batch.view),
        first(batch.counted),
        partner=None if batch.partner is None else _first(batch.partner),
    )
