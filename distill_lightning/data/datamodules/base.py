"""What the data sets share: views by key, an order by epoch, a split by seed, and loaders of whole batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from distill_lightning.data.batch import Batch, map_tensors, spread
from distill_lightning.data.views import VIEWS_VERSION, uniform_draws
from distill_lightning.errors import InputError

# Order seeds are spread, because the sampler adds the epoch to its seed: neighbours would repeat each other's orders.
_SEED_STRIDE = 1_000_003

# Keeps the draws of partners apart from those of the crops.
_PARTNER_STREAM = 0x50415254

Key = int | tuple[int, int]


class ViewDataset(Dataset[Batch]):
    """Makes a whole batch at once, of views that depend on nothing but their keys; a subclass defines `make`.

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

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these views, both ``(N,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define make(index, view)")

    def __getitem__(self, key: Key) -> Batch:
        """One sample: a batch without its first dimension."""
        return _first(self.__getitems__([key]))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these ``(index, view)`` pairs; PyTorch's loader asks for a whole batch at once.

        A sampler that knows nothing of views gives plain indices; they mean view 0. Samples in view -1 only fill up a
        process's share (see `ViewSampler`) and do not count.
        """
        pairs = [(key, 0) if isinstance(key, int) else key for key in keys]
        index, view = torch.tensor(pairs, dtype=torch.long).view(len(pairs), 2).unbind(dim=1)
        batch = self.make(index, view)
        if any(view < 0 for _, view in pairs):
            whole = view >= 0
            batch = batch.replace(
                counted=whole if batch.counted is None else batch.counted & spread(whole, batch.counted)
            )
        if not self.partners:
            return batch
        draws = uniform_draws(self.seed + _PARTNER_STREAM, index, view, 1)[:, 0]
        return batch.replace(partner=self.make((draws * len(self)).long(), view))


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


class ResumableLoader(DataLoader[Batch]):
    """A `DataLoader` of a `ViewSampler`, which a checkpoint from the middle of an epoch continues there.

    Lightning keeps its state in the checkpoint. With any other sampler it is a `DataLoader` and nothing else.
    """

    _given = 0
    _saved: Mapping[str, int] = MappingProxyType({})

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader's is a class of its own
        # A generator, because Lightning sets the sampler's epoch after it has called iter.
        saved, self._saved = self._saved, {}
        self._given = 0
        if isinstance(self.sampler, ViewSampler):
            if saved.get("epoch") == self.sampler.epoch:
                self._given = saved["batches"]
            self.sampler.skip = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Leave out the batches that were given, if the next epoch is the one of the state."""
        self._saved = state


class ViewDataModule(pl.LightningDataModule):
    """Base of the data sets whose samples have an index: yields `Batch`, and knows what its training views depend on.

    A subclass sets ``num_classes`` (or, for a regression, ``num_targets``) and ``input_shape``, and defines `setup`,
    `dataset` and `describe_samples`.

    Args:
        subset: number of training samples, drawn by ``seed``; smaller subsets are part of larger ones; ``None``: all.
        val_size: number of validation samples.
        test_size: number of test samples; ``None``: all.
        batch_size: samples per batch and process.
        views: number of different views of a training sample; ``None``: a new one every epoch.
        views_per_load: how many views of a training sample an epoch reads, one after another.
        partners: whether each training view comes with another sample to be mixed with, a function of its own index and
            view alone, see `Batch`.
        seed: of the split, the views and the partners.
        order_seed: of the order of the training samples; ``None``: ``seed``.
        num_workers: worker processes of the loaders.

    Raises:
        InputError: a size that is not positive.
    """

    num_classes: int | None
    num_targets: int | None = None
    input_shape: tuple[int, ...]

    def __init__(
        self,
        *,
        subset: int | None,
        val_size: int,
        test_size: int | None,
        batch_size: int,
        views: int | None,
        partners: bool,
        seed: int,
        order_seed: int | None,
        num_workers: int,
        views_per_load: int = 1,
    ) -> None:
        super().__init__()
        sizes = {
            "subset": subset,
            "val_size": val_size,
            "test_size": test_size,
            "batch_size": batch_size,
            "views": views,
            "views_per_load": views_per_load,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"{name} must be at least 1, got {size}: the split or batch would be empty")
        self.subset, self.val_size, self.test_size = subset, val_size, test_size
        self.batch_size, self.views, self.views_per_load = batch_size, views, views_per_load
        self.partners = partners
        self.seed, self.order_seed = seed, order_seed
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        """Read what there is and split it; a second call does nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define setup()")

    def dataset(self, split: str, *, augment: bool = False) -> ViewDataset:
        """One split, ``"train"``, ``"val"`` or ``"test"``; without ``augment`` every view is the plain sample."""
        raise NotImplementedError(f"{type(self).__name__} must define dataset(split)")

    def describe_samples(self) -> Iterable[bytes]:
        """What makes the training samples and their order these and no others, for `fingerprint`."""
        raise NotImplementedError(f"{type(self).__name__} must define describe_samples()")

    def views_in_epoch(self, epoch: int) -> list[int]:
        """Which views of the training samples an epoch reads."""
        return views_in_epoch(epoch, views=self.views, views_per_load=self.views_per_load)

    def fingerprint(self) -> dict[str, str]:
        """What a kept answer about a training view depends on: the samples in their order, and how views are made."""
        self.setup()
        digest = hashlib.sha256()
        for part in self.describe_samples():
            digest.update(part)
        made = self.dataset("train", augment=True)
        options = {name: getattr(made, name) for name in made.depends_on}
        return {"data": digest.hexdigest(), "transform": f"{type(made).__name__} {VIEWS_VERSION} {options}"}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Augmented, shuffled."""
        seed = self.seed if self.order_seed is None else self.order_seed
        return self._loader(
            self.dataset("train", augment=True),
            views=self.views,
            views_per_load=self.views_per_load,
            shuffle=True,
            seed=seed,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Plain samples in order."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Plain samples in order."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test samples."""
        return self.test_dataloader()

    def _loader(
        self,
        dataset: ViewDataset,
        *,
        views: int | None = 1,
        views_per_load: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ) -> DataLoader[Batch]:
        world = (
            {} if self.trainer is None else {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        )
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=ViewSampler(
                dataset, views=views, views_per_load=views_per_load, shuffle=shuffle, seed=seed, **world
            ),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Only from pinned memory does a copy to the GPU not wait.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


class ImageDataModule(ViewDataModule):
    """Base of the image sets, which are split by number; the test images are never part of training or validation.

    A subclass sets ``class_names`` besides what a `ViewDataModule` needs. Validation images are drawn by ``seed`` from
    the training files, test images are the first ones.

    Args:
        subset: see `ViewDataModule`, as all of them.
        val_size: likewise.
        test_size: likewise.
        batch_size: likewise.
        views: likewise.
        partners: likewise.
        seed: likewise.
        order_seed: likewise.
        num_workers: likewise.
        views_per_load: likewise.

    Raises:
        InputError: a size that is not positive.
    """

    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    def split(self, rest: int, test: int) -> dict[str, Tensor]:
        """Which samples belong to ``"train"``, ``"val"`` and ``"test"``, as their places in what was read.

        Args:
            rest: number of samples for training and validation.
            test: number of samples for test.

        Raises:
            InputError: a split is larger than the data.
        """
        name = type(self).__name__
        available = rest - self.val_size
        if available < 1:
            raise InputError(f"{name}: val_size={self.val_size} leaves none of {rest} images to train on")
        if self.subset is not None and self.subset > available:
            raise InputError(
                f"{name}: subset={self.subset} is larger than the {available} training images that "
                f"val_size={self.val_size} leaves"
            )
        if self.test_size is not None and self.test_size > test:
            raise InputError(f"{name}: test_size={self.test_size} is larger than the {test} test images")
        order = torch.randperm(rest, generator=torch.Generator().manual_seed(self.seed))
        return {
            "train": order[self.val_size :][: self.subset],
            "val": order[: self.val_size],
            "test": torch.arange(self.test_size or test),
        }


def _as_it_is(batch: Any) -> Any:
    """The data set has made the batch; there is nothing left to collate."""
    return batch
