"""What the data sets share: a split by seed, an order by epoch, and loaders of whole batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Sampler

from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules.resumable_loader import ResumableLoader
from distill_lightning.data.datamodules.view_dataset import ViewDataset
from distill_lightning.data.datamodules.view_sampler import ViewSampler, views_in_epoch
from distill_lightning.data.fingerprint import data_fingerprint
from distill_lightning.data.views import VIEWS_VERSION
from distill_lightning.errors import InputError
from distill_lightning.processes import usable_cpus

# A GPU asks for no more images than so many workers decode, and each takes memory.
_WORKERS_AT_MOST = 16


class ViewDataModule(pl.LightningDataModule):
    """Base of the data sets whose samples have an index: yields `Batch`, and knows what its training views depend on.

    A subclass sets ``num_classes`` (or, for a regression, ``num_targets``) and ``input_shape``, and defines `setup` and
    `dataset`.

    Args:
        val_size: number of validation samples; ``None``: all that are for validation alone.
        test_size: number of test samples; ``None``: all.
        subset: number of training samples, drawn by ``seed``; smaller subsets are part of larger ones; ``None``: all.
        batch_size: samples per batch and process; each view of a sample counts.
        views: number of different views of a training sample; ``None``: a new one every epoch.
        views_per_load: how many views of a training sample an epoch reads, one after another; ``batch_size`` and
            ``views`` must be multiples of it.
        partners: whether each training view comes with another sample to be mixed with, a function of its own index and
            view alone (``Batch.partner``).
        seed: of the split, the views and the partners.
        order_seed: of the order of the training samples; ``None``: ``seed``.
        drop_last: whether an epoch of the training leaves out its last batch where that is smaller than the others.
        num_workers: worker processes of a loader; ``None``: the class's ``default_workers``.

    Raises:
        InputError: a size that is not positive, or not a multiple of ``views_per_load``; fewer than no workers; from
            ``train_dataloader``: ``drop_last`` leaves no batch.
    """

    num_classes: int | None
    num_targets: int | None = None
    input_shape: tuple[int, ...]
    # Zero workers: a batch made in memory costs less than handing it over from another process. None: one per CPU.
    default_workers: int | None = 0
    # 0 where a training may do without a validation.
    least_val_size: int = 1

    def __init__(
        self,
        *,
        val_size: int | None,
        test_size: int | None = None,
        subset: int | None = None,
        batch_size: int = 64,
        views: int | None = None,
        views_per_load: int = 1,
        partners: bool = False,
        seed: int = 0,
        order_seed: int | None = None,
        drop_last: bool = False,
        num_workers: int | None = None,
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
            least = self.least_val_size if name == "val_size" else 1
            if size is not None and size < least:
                raise InputError(f"{name} must be at least {least}, got {size}: the split or batch would be empty")
        for name, size in (("batch_size", batch_size), ("views", views)):
            if size is not None and size % views_per_load:
                raise InputError(
                    f"{name}={size} is not a multiple of views_per_load={views_per_load}: the views of one sample "
                    "would fall apart"
                )
        if num_workers is not None and num_workers < 0:
            raise InputError(f"num_workers cannot be negative, got {num_workers}")
        self.subset, self.val_size, self.test_size = subset, val_size, test_size
        self.batch_size, self.views, self.views_per_load = batch_size, views, views_per_load
        self.partners = partners
        self.seed, self.order_seed = seed, order_seed
        self.drop_last = drop_last
        self._given_workers = num_workers

    @property
    def num_workers(self) -> int:
        """Worker processes of a loader: as many as were given, or the default on this machine."""
        workers = self.default_workers if self._given_workers is None else self._given_workers
        if workers is not None:
            return workers
        processes = 1 if self.trainer is None else self.trainer.num_devices
        return max(1, min(usable_cpus() // processes, _WORKERS_AT_MOST))

    @num_workers.setter
    def num_workers(self, value: int | None) -> None:
        self._given_workers = value

    def setup(self, stage: str | None = None) -> None:
        """Read what there is and split it; a second call does nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define setup()")

    def dataset(self, split: str, *, augment: bool = False) -> ViewDataset:
        """One split, ``"train"``, ``"val"`` or ``"test"``; without ``augment`` every view is the plain sample."""
        raise NotImplementedError(f"{type(self).__name__} must define dataset(split)")

    def views_in_epoch(self, epoch: int) -> list[int]:
        """Which views of the training samples an epoch reads."""
        return views_in_epoch(epoch, views=self.views, views_per_load=self.views_per_load)

    def fingerprint(self) -> dict[str, Any]:
        """What a kept answer about a training view depends on: the samples in their order, and how views are made."""
        self.setup()
        made = self.dataset("train", augment=True)
        options = {name: getattr(made, name) for name in made.depends_on}
        return {
            "data": data_fingerprint(self.dataset("train")),
            "transform": f"{type(made).__name__} {VIEWS_VERSION} {options}",
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Augmented, shuffled."""
        seed = self.seed if self.order_seed is None else self.order_seed
        loader = self._loader(
            self.dataset("train", augment=True),
            views=self.views,
            views_per_load=self.views_per_load,
            shuffle=True,
            seed=seed,
            drop_last=self.drop_last,
        )
        if not len(loader):
            raise InputError(
                f"{type(self).__name__}: with drop_last=True and batch_size={self.batch_size} nothing is left of an "
                f"epoch of {len(loader.sampler)} views: lower batch_size"  # type: ignore[arg-type]  # a ViewSampler
            )
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Plain samples in order; no loader with ``val_size=0``."""
        if self.val_size == 0:
            # That was the intention, by which Lightning asks.
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
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
        drop_last: bool = False,
    ) -> DataLoader[Batch]:
        sampler = ViewSampler(
            dataset, views=views, views_per_load=views_per_load, shuffle=shuffle, seed=seed, **self._share
        )
        return self._loader_of(dataset, sampler, batch_size=self.batch_size, drop_last=drop_last)

    @property
    def _share(self) -> dict[str, Any]:
        """How many processes share the samples, and which this one is."""
        if self.trainer is None:
            return {}
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def _loader_of(
        self, dataset: ViewDataset, sampler: Sampler[Any], *, batch_size: int | None, drop_last: bool = False
    ) -> DataLoader[Batch]:
        """A loader that goes on in the middle of an epoch; without ``batch_size`` the sampler gives whole batches."""
        if self.default_workers == 0 == self.num_workers:
            # Lightning would ask for more; it does not say of which loader, so this can be no narrower.
            warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=_as_it_is,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Only from pinned memory does a copy to the GPU not wait.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


def _as_it_is(batch: Any) -> Any:
    """The data set has made the batch; there is nothing left to collate."""
    return batch
