"""Which view of which sample is read when: a function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import Dataset, DistributedSampler

# Order seeds are spread, because the sampler adds the epoch to its seed: neighbours would repeat each other's orders.
_SEED_STRIDE = 1_000_003


def views_in_epoch(epoch: int, *, views: int | None, views_per_load: int = 1) -> list[int]:
    """Which views of its samples an epoch reads: the next ``views_per_load``, beginning again after ``views``.

    Args:
        epoch: from 0.
        views: number of different views; ``None``: there is no end of them.
        views_per_load: how many of them are read in one epoch.
    """
    numbers = range(epoch * views_per_load, (epoch + 1) * views_per_load)
    return [number if views is None else number % views for number in numbers]


class ViewSampler(DistributedSampler[Any]):
    """Yields ``(index, view)`` pairs: epoch ``e`` reads view ``e``, or ``e mod views``.

    The order is a function of the seed and the epoch, so a resumed run goes on as the uninterrupted one would have. As
    a `DistributedSampler` it gives every process its own share, and Lightning sets its epoch and leaves it in place.
    Processes need equally many samples, so some samples are read twice; where nothing is drawn (in validation and
    test) the second reading has view -1, by which `ViewDataset` knows that it does not count.

    Args:
        dataset: its length counts.
        views: number of different views; ``None``: a new one every epoch; 1: always view 0.
        shuffle: whether the order is drawn; otherwise ascending.
        seed: of the order.
        num_replicas: processes.
        rank: this process.
        views_per_load: how many views of a sample follow one another, in the same process; see `views_in_epoch`.

    Attributes:
        skip: how many of this process's pairs are left out at the beginning.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        views: int | None,
        shuffle: bool,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        views_per_load: int = 1,
    ) -> None:
        super().__init__(
            dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed * _SEED_STRIDE, drop_last=False
        )
        self.views, self.views_per_load = views, views_per_load
        self.skip = 0
        self._samples = len(dataset)  # type: ignore[arg-type]  # every data set that is sampled by index has a length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return islice(self._pairs(), self.skip, None)

    def _pairs(self) -> Iterator[tuple[int, int]]:
        views = views_in_epoch(self.epoch, views=self.views, views_per_load=self.views_per_load)
        for place, index in enumerate(super().__iter__()):
            surplus = self.rank + place * self.num_replicas >= self._samples
            for view in views:
                yield index, -1 if surplus and not self.shuffle else view

    def __len__(self) -> int:
        return super().__len__() * self.views_per_load
