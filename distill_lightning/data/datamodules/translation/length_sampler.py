"""Batches of sentences of similar length, under a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from distill_lightning.errors import check_count

# As ViewSampler's: neighbouring order seeds would repeat each other's epochs.
_SEED_STRIDE = 1_000_003

Keys = list[tuple[int, int]]
"""Index and view of the sentences of a batch; the view is 0, or -1 for one that does not count."""


class LengthSampler(DistributedSampler[Any]):
    r"""Yields the keys of whole batches: sentences that are about as long as one another, each of them once an epoch.

    A batch of ``n`` sentences, the longest of which have ``S`` source and ``T`` target ids, fills its budget as long as

    .. math:: n (S + T) \le W B

    with ``W`` processes and ``B`` tokens for each. Batches are cut from all sentences in the order of their lengths,
    where those of the same lengths lie in an order drawn anew each epoch; then they are shuffled. Process ``r`` gets
    every ``W``-th sentence of each, from the ``r``-th: **two processes with budgets of** ``B`` **read what one with**
    ``2B`` **reads**. A share that would have one sentence less than another one repeats the batch's first, in view -1,
    by which `ViewDataset` knows that it does not count. So a share may exceed ``B`` by less than a sentence. A sentence
    that is longer than the budget is a batch of its own.

    Everything is a function of the seed and the epoch. The number of batches is the same in each epoch.

    Args:
        dataset: that is sampled.
        lengths: of source and target of each sentence, int64 ``(N, 2)``.
        max_tokens: ``B``.
        shuffle: whether an order is drawn; otherwise from the shortest sentence to the longest.
        in_order: whether batches are cut from the sentences as they stand.
        seed: of the order.
        num_replicas: processes, ``W``.
        rank: this process.

    Attributes:
        skip: how many batches are left out at the beginning.
        budget: of all processes together, ``W * B``.

    Raises:
        InputError: ``max_tokens`` is below 2, or no integer.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        lengths: Tensor,
        *,
        max_tokens: int,
        shuffle: bool,
        in_order: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        check_max_tokens(max_tokens)
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed * _SEED_STRIDE)
        # Evaluations look here for samples that count twice; those that are repeated do not count.
        self.total_size = len(lengths)
        self.budget = num_replicas * max_tokens
        self.skip = 0
        self._lengths: NDArray[np.int64] = lengths.numpy()
        self._in_order = in_order
        order = self._sorted(np.arange(len(lengths)))
        self._cuts = cuts(self._lengths[order], self.budget)

    def __iter__(self) -> Iterator[Keys]:
        return islice(map(self._share, self.batches()), self.skip, None)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def batches(self) -> Iterator[list[int]]:
        """The indices of each batch of this epoch, of all processes."""
        order = np.arange(len(self._lengths))
        numbers = np.arange(len(self))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self._drawn_in)
            order = torch.randperm(len(order), generator=generator).numpy()
            numbers = torch.randperm(len(numbers), generator=generator).numpy()
        order = self._sorted(order)
        for number in numbers.tolist():
            yield order[self._cuts[number] : self._cuts[number + 1]].tolist()

    @property
    def _drawn_in(self) -> int:
        """The epoch whose order it is."""
        return self.epoch

    def _sorted(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """By length, keeping the order of what has the same lengths."""
        if self._in_order:
            return order
        source, target = self._lengths[order].T
        # Up and down alternately, so that a batch across two source lengths has targets of similar length.
        return order[np.lexsort((np.where(source % 2, target, -target), source))]

    def _share(self, batch: list[int]) -> Keys:
        own = [(index, 0) for index in batch[self.rank :: self.num_replicas]]
        fill = -(-len(batch) // self.num_replicas) - len(own)
        return own + [(batch[0], -1)] * fill


class SameLengthSampler(LengthSampler, SequentialSampler):  # type: ignore[misc]  # both yield; LengthSampler's counts
    """A `LengthSampler` with the same batches in every epoch, those of the first one.

    For Lightning's ``overfit_batches``, which puts single samples in the place of any sampler that is no
    `SequentialSampler`.
    """

    @property
    def _drawn_in(self) -> int:
        return 0


def check_max_tokens(max_tokens: int) -> None:
    """Refuse a budget that no pair fits.

    Raises:
        InputError: it is below 2, or no integer.
    """
    check_count("max_tokens", max_tokens, at_least=2, because="a source and a target id")


def cuts(lengths: NDArray[np.int64], budget: int) -> list[int]:
    """Where batches begin, and where the last one ends, when each takes all sentences that fit.

    Args:
        lengths: of source and target, ``(N, 2)``.
        budget: number of sentences times the longest source and target together, at most.

    Example:
        >>> import numpy as np
        >>> from distill_lightning.data.datamodules.translation.length_sampler import cuts
        >>> cuts(np.array([[1, 1], [2, 2], [2, 2], [5, 6]]), budget=8)
        [0, 2, 3, 4]
    """
    found = [0]
    longest_source = longest_target = 0
    for place, (source, target) in enumerate(lengths.tolist()):
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if place > found[-1] and (place + 1 - found[-1]) * (longest_source + longest_target) > budget:
            found.append(place)
            longest_source, longest_target = source, target
    return [*found, len(lengths)] if len(lengths) else found
