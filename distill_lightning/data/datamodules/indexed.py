"""Sample indices for the training batches of any data module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError

# What Lightning calls on a data module, besides train_dataloader.
HOOKS = (
    "prepare_data",
    "setup",
    "teardown",
    "on_exception",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "state_dict",
    "load_state_dict",
)


class IndexedDataModule(pl.LightningDataModule):
    """Any data module, with training batches that tell which sample each row is.

    ::

        trainer.fit(SelfKDModule(student, num_classes=10), datamodule=IndexedDataModule(MyDataModule()))

    The index is the position in the data set that the training loader reads (of a `Subset`, the position in the
    subset). A batch that is a tuple or a list becomes a `Batch` of its first two parts and the index; a dict gets the
    key ``"index"``; a NamedTuple with a field ``index`` gets it there; a `Batch` that has indices keeps them. The rest
    is the data module's own: its other loaders, hooks, attributes and state.

    A dict or a NamedTuple becomes a `Batch` only on the training's device, its index with it: a `TeacherStore` then
    waits for a GPU in every step. Data that yield a `Batch` or a tuple do not make it wait.

    The training loader is built again with the same options, around a data set that notes what it was asked for. So any
    sampler, batch sampler, ``collate_fn`` and number of workers will do, and also the distributed sampler that
    Lightning puts in. With ``batch_size=None`` the sampler must yield lists of indices.

    Args:
        datamodule: the data module.
        join_views: whether the input of a batch is a list of views of its samples, as transforms of self-supervised
            learning make them, which then become the rows of one tensor ``(V * N, ...)``, each with the target and
            index of its sample: first all first views. Otherwise a list is for a network of several arguments.

    Raises:
        InputError: from ``train_dataloader``, or when a batch is made: the training data cannot be indexed, a
            ``collate_fn`` drops or adds samples, or views cannot be joined.

    Example:
        >>> import torch
        >>> import pytorch_lightning as pl
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from distill_lightning import IndexedDataModule
        >>> class Pairs(pl.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return DataLoader(TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])), batch_size=2)
        >>> [batch.index for batch in IndexedDataModule(Pairs()).train_dataloader()]
        [tensor([0, 1]), tensor([2, 3])]
    """

    datamodule: pl.LightningDataModule
    join_views: bool

    def __init__(self, datamodule: pl.LightningDataModule, *, join_views: bool = False) -> None:
        # Lightning's own __init__ would only make attributes that hide the data module's.
        self.__dict__.update(datamodule=datamodule, join_views=join_views)
        # In the instance, because Lightning compares them with its own to see which the data module overrides.
        self.__dict__.update({name: getattr(datamodule, name) for name in HOOKS if hasattr(datamodule, name)})

    def __getattr__(self, name: str) -> Any:
        # While being unpickled or copied there is nothing to ask yet.
        if name == "datamodule" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.datamodule, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.datamodule, name, value)

    def train_dataloader(self) -> DataLoader[Any]:
        """The data module's loader, with indices."""
        return _indexed(self.datamodule.train_dataloader(), join_views=self.join_views)


class _Asked(NamedTuple):
    """What a loader asked its data set for, and what it got."""

    keys: Any
    samples: Any


class _IndexedDataset(Dataset[Any]):
    """A data set that hands the indices on to the `_Collate` of its loader.

    Args:
        dataset: the data.
        whole_batches: whether the loader leaves batching to the sampler (``batch_size=None``).
    """

    def __init__(self, dataset: Dataset[Any], *, whole_batches: bool) -> None:
        self.dataset, self.whole_batches = dataset, whole_batches

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # without a length it raises what the data set would

    def __getitem__(self, key: Any) -> Any:
        return _Asked(key, self.dataset[key]) if self.whole_batches else self.dataset[key]

    def __getitems__(self, keys: Sequence[Any]) -> _Asked:
        many: Callable[[Sequence[Any]], Any] | None = getattr(self.dataset, "__getitems__", None)
        return _Asked(keys, [self.dataset[key] for key in keys] if many is None else many(keys))

    @property
    def unindexed(self) -> Dataset[Any]:
        """The data, as they were given."""
        return self.dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _Collate:
    """Collates as the loader did, adds the indices, and may join views."""

    def __init__(self, collate: Callable[[Any], Any], *, join_views: bool) -> None:
        self.collate, self.join_views = collate, join_views

    def __call__(self, asked: _Asked) -> Any:
        batch = self.collate(asked.samples)
        if isinstance(batch, Batch) and batch.index is not None:
            return batch
        index = _index_of(asked.keys)
        count = _rows(batch)
        if count is not None and count != len(index):
            raise InputError(
                f"IndexedDataModule: {len(index)} samples became a batch of {count}, so which is which cannot be told: "
                "let the data module yield distill_lightning.Batch(input, target, index)"
            )
        if self.join_views:
            return _joined(Batch.of(batch).replace(index=index))
        if isinstance(batch, Mapping):
            return {**batch, "index": index}
        if isinstance(batch, tuple) and "index" in getattr(batch, "_fields", ()):
            return batch._replace(index=index)  # type: ignore[attr-defined]  # a NamedTuple's
        return Batch.of(batch).replace(index=index)


def _index_of(keys: Any) -> Tensor:
    if not isinstance(keys, (list, tuple)):
        raise InputError(
            "IndexedDataModule: with batch_size=None, a data set that yields whole batches cannot tell their samples: "
            "let it yield distill_lightning.Batch(input, target, index)"
        )
    try:
        return torch.tensor([key.__index__() for key in keys])
    except AttributeError:
        raise InputError(
            f"IndexedDataModule: the training data are not indexed by integers, but by {type(keys[0]).__name__}: let "
            "the data module yield distill_lightning.Batch(input, target, index)"
        ) from None


def _joined(batch: Batch) -> Batch:
    """A batch whose views are rows."""
    views = batch.input
    are_views = isinstance(views, (list, tuple)) and all(isinstance(view, Tensor) for view in views)
    if not are_views or len({view.shape for view in views}) != 1:
        found = [tuple(view.shape) for view in views] if are_views else type(views).__name__
        raise InputError(
            f"IndexedDataModule: join_views=True joins a list of views of one shape, and the batch has {found}: leave "
            "it out, or let the data module make views of one size"
        )
    rows = batch.replace(input=None).map(lambda column: torch.cat([column] * len(views)))
    # With the index a batch gets its key anew.
    return rows.replace(input=torch.cat(list(views)), index=rows.index)


def _rows(batch: Any) -> int | None:
    """Length of the first tensor in a batch."""
    if isinstance(batch, Batch):
        return batch.size
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for part in parts:
        if isinstance(part, Tensor):
            return len(part)
    return None


def _indexed(loader: Any, *, join_views: bool) -> DataLoader[Any]:
    """The same loader around an `_IndexedDataset`."""
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"IndexedDataModule needs one DataLoader for training, got {type(loader).__name__}: join the data sets, or "
            "let the data module yield distill_lightning.Batch(input, target, index)"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"IndexedDataModule: {type(loader.dataset).__name__} is an IterableDataset, whose samples have no index: "
            "use a data set with __getitem__ and __len__"
        )
    batches = loader.batch_sampler
    arguments = [
        *inspect.signature(DataLoader).parameters.values(),
        *inspect.signature(type(loader)).parameters.values(),
    ]
    named = {one.name for one in arguments if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    named -= {"shuffle", "batch_sampler"}
    unknown = sorted(name for name in named if not hasattr(loader, name))
    if unknown:
        raise InputError(
            f"IndexedDataModule cannot build the {type(loader).__name__} again, which does not keep its {unknown[0]}: "
            "let the data module yield distill_lightning.Batch(input, target, index)"
        )
    options = {name: getattr(loader, name) for name in named}
    if type(batches) is BatchSampler:
        options |= {"sampler": batches.sampler, "batch_size": batches.batch_size, "drop_last": batches.drop_last}
    elif batches is not None:
        # A batch sampler of its own excludes what would make one.
        options = {k: v for k, v in options.items() if k not in ("sampler", "batch_size", "drop_last")}
        options["batch_sampler"] = batches
    options["dataset"] = _IndexedDataset(loader.dataset, whole_batches=batches is None)
    options["collate_fn"] = _Collate(loader.collate_fn, join_views=join_views)
    try:
        return type(loader)(**options)
    except TypeError as error:
        raise InputError(
            f"IndexedDataModule cannot build a {type(loader).__name__} with DataLoader's arguments ({error}): let the "
            "data module yield distill_lightning.Batch(input, target, index)"
        ) from error
