"""Small image sets: held in memory as bytes, indexed and augmented a whole batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from distill_lightning.batch import Batch, PairedBatch
from distill_lightning.errors import InputError
from distill_lightning.views import VIEWS_VERSION, crop_and_flip, uniform_draws

# Order seeds are spread, because the sampler adds the epoch to its seed: neighbours would repeat each other's orders.
_SEED_STRIDE = 1_000_003


class Images(NamedTuple):
    """Images ``(N, C, H, W)`` as uint8, and their classes ``(N,)`` as int64 or a regression's targets ``(N, d)``."""

    images: Tensor
    targets: Tensor

    def take(self, index: Tensor) -> Images:
        """The samples at ``index``."""
        return Images(self.images[index], self.targets[index])


Key = int | tuple[int, int]

# Keeps the draws of partners apart from those of the crops.
_PARTNER_STREAM = 0x50415254


class ImageTensors(Dataset[Batch]):
    """Images in memory; a batch is one indexing operation, and its views depend on nothing but their keys.

    Args:
        images: the samples.
        mean: of the pixels, in ``[0, 1]``; views are ``(pixel / 255 - mean) / std`` in float32.
        std: likewise.
        seed: of the views.
        padding: pixels of zeros around the image that a random crop may take in; 0 crops nothing.
        flip: whether half of the views are mirrored.
        partners: whether each view comes with another sample in the same view, drawn from the view's own key.
    """

    def __init__(
        self,
        images: Images,
        *,
        mean: float,
        std: float,
        seed: int = 0,
        padding: int = 0,
        flip: bool = False,
        partners: bool = False,
    ) -> None:
        self.images, self.targets = images
        self.mean, self.std = mean, std
        self.seed, self.padding, self.flip, self.partners = seed, padding, flip, partners

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Batch:
        """One sample: a batch without its first dimension."""
        batch = self.__getitems__([key])
        single = _first(batch)
        return single if batch.partner is None else PairedBatch(*single, _first(batch.partner))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of these ``(index, view)`` pairs; PyTorch's loader asks for a whole batch at once.

        A sampler that knows nothing of views gives plain indices; they mean view 0.
        """
        pairs = [(key, 0) if isinstance(key, int) else key for key in keys]
        index, view = torch.tensor(pairs, dtype=torch.long).view(len(pairs), 2).unbind(dim=1)
        batch = self._views(index, view)
        if not self.partners:
            return batch
        draws = uniform_draws(self.seed + _PARTNER_STREAM, index, view, 1)[:, 0]
        return PairedBatch(*batch, self._views((draws * len(self)).long(), view))

    def _views(self, index: Tensor, view: Tensor) -> Batch:
        images = self.images[index]
        if self.padding or self.flip:
            draws = uniform_draws(self.seed, index, view, 3)
            images = crop_and_flip(images, draws, padding=self.padding, flip=self.flip)
        inputs = images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)
        return Batch(inputs, self.targets[index], index, view)


def _first(batch: Batch) -> Batch:
    """The first sample of a batch without partners, without the first dimension."""
    return Batch(*(cast("Tensor", part)[0] for part in batch[:4]))


class ViewSampler(DistributedSampler[Any]):
    """Yields ``(index, view)`` pairs: epoch ``e`` reads view ``e``, or ``e mod views``.

    The order is a function of the seed and the epoch, so a resumed run goes on as the uninterrupted one would have. As
    a `DistributedSampler` it gives every process its own share, and Lightning sets its epoch and leaves it in place.
    Processes need equally many samples, so some samples are read twice; where nothing is drawn (in validation and
    test) the second reading has view -1, and `distill_lightning.DistillationModule` does not count it.

    Args:
        dataset: its length counts.
        views: number of different views; ``None``: a new one every epoch; 1: always view 0.
        shuffle: whether the order is drawn; otherwise ascending.
        seed: of the order.
        num_replicas: processes.
        rank: this process.

    Attributes:
        skip: how many of this process's samples are left out at the beginning.
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
    ) -> None:
        super().__init__(
            dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed * _SEED_STRIDE, drop_last=False
        )
        self.views = views
        self.skip = 0
        self._samples = len(dataset)  # type: ignore[arg-type]  # every data set that is sampled by index has a length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        view = self.epoch if self.views is None else self.epoch % self.views
        for place, index in islice(enumerate(super().__iter__()), self.skip, None):
            surplus = self.rank + place * self.num_replicas >= self._samples
            yield index, -1 if surplus and not self.shuffle else view


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


class InMemoryImageDataModule(pl.LightningDataModule):
    """Base of the small image sets: reads once, splits by seed, yields `Batch`.

    A subclass sets ``num_classes`` (or, for a regression, ``num_targets``), ``input_shape``, ``class_names``, ``mean``
    and ``std``, and defines `read`. The test images are never part of training or validation.

    Args:
        subset: number of training images, drawn by ``seed``; smaller subsets are part of larger ones; ``None``: all.
        val_size: number of validation images, drawn by ``seed`` from the training files.
        test_size: number of test images, the first ones; ``None``: all.
        batch_size: samples per batch and process.
        padding: pixels of zeros around a training image that its random crop may take in; 0 crops nothing.
        flip: whether half of the training views are mirrored.
        views: number of different views of a training image; ``None``: a new one every epoch.
        partners: whether each training view comes with another image to be mixed with, a function of its own index and
            view alone, see `PairedBatch`.
        seed: of the split, the views and the partners.
        order_seed: of the order of the training images; ``None``: ``seed``.
        num_workers: worker processes of the loaders; a batch is so cheap that 0 is usually fastest.

    Raises:
        InputError: a size that is not positive, or, from `setup`, one that is larger than the data.
    """

    num_classes: int | None
    num_targets: int | None = None
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: float
    std: float

    def __init__(
        self,
        *,
        subset: int | None = None,
        val_size: int,
        test_size: int | None = None,
        batch_size: int = 64,
        padding: int = 2,
        flip: bool = False,
        views: int | None = None,
        partners: bool = False,
        seed: int = 0,
        order_seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "subset": subset,
            "val_size": val_size,
            "test_size": test_size,
            "batch_size": batch_size,
            "views": views,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"{name} must be at least 1, got {size}: the split or batch would be empty")
        if padding < 0 or num_workers < 0:
            raise InputError(f"padding and num_workers cannot be negative, got {padding} and {num_workers}")
        self.subset, self.val_size, self.test_size = subset, val_size, test_size
        self.batch_size, self.padding, self.flip, self.views = batch_size, padding, flip, views
        self.partners = partners
        self.seed, self.order_seed = seed, order_seed
        self.num_workers = num_workers
        self._splits: dict[str, Images] = {}

    def read(self) -> tuple[Images, Images]:
        """The images for training and validation, and those for test."""
        raise NotImplementedError(f"{type(self).__name__} must define read()")

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split them; a second call does nothing."""
        if self._splits:
            return
        rest, test = self.read()
        name = type(self).__name__
        available = len(rest.targets) - self.val_size
        if available < 1:
            raise InputError(f"{name}: val_size={self.val_size} leaves none of {len(rest.targets)} images to train on")
        if self.subset is not None and self.subset > available:
            raise InputError(
                f"{name}: subset={self.subset} is larger than the {available} training images that "
                f"val_size={self.val_size} leaves"
            )
        if self.test_size is not None and self.test_size > len(test.targets):
            raise InputError(f"{name}: test_size={self.test_size} is larger than the {len(test.targets)} test images")
        order = torch.randperm(len(rest.targets), generator=torch.Generator().manual_seed(self.seed))
        val, train = order[: self.val_size], order[self.val_size :][: self.subset]
        self._splits = {
            "train": self.samples(rest, train, part=0),
            "val": self.samples(rest, val, part=0),
            "test": self.samples(test, torch.arange(self.test_size or len(test.targets)), part=1),
        }

    def samples(self, images: Images, index: Tensor, *, part: int) -> Images:
        """The samples of a split; a data module that makes another task of them does so here.

        Args:
            images: what was read.
            index: which of them, their places in what was read.
            part: 0 for training and validation, 1 for test.
        """
        return images.take(index)

    def dataset(self, split: str, *, augment: bool = False) -> ImageTensors:
        """One split, ``"train"``, ``"val"`` or ``"test"``; without ``augment`` every view is the plain image."""
        self.setup()
        return ImageTensors(
            self._splits[split],
            mean=self.mean,
            std=self.std,
            seed=self.seed,
            padding=self.padding if augment else 0,
            flip=self.flip and augment,
            partners=self.partners and augment,
        )

    def fingerprint(self) -> dict[str, str]:
        """What a kept answer about a training view depends on: the samples in their order, and how views are made."""
        self.setup()
        digest = hashlib.sha256()
        for tensor in self._splits["train"]:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        made = self.dataset("train", augment=True)
        options = {name: getattr(made, name) for name in ("mean", "std", "seed", "padding", "flip", "partners")}
        return {"data": digest.hexdigest(), "transform": f"{type(made).__name__} {VIEWS_VERSION} {options}"}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Augmented, shuffled."""
        seed = self.seed if self.order_seed is None else self.order_seed
        return self._loader(self.dataset("train", augment=True), views=self.views, shuffle=True, seed=seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Plain images in order."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Plain images in order."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self.test_dataloader()

    def _loader(
        self, dataset: ImageTensors, *, views: int | None = 1, shuffle: bool = False, seed: int = 0
    ) -> DataLoader[Batch]:
        world = (
            {} if self.trainer is None else {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        )
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=ViewSampler(dataset, views=views, shuffle=shuffle, seed=seed, **world),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _as_it_is(batch: Any) -> Any:
    """The data set has made the batch; there is nothing left to collate."""
    return batch
