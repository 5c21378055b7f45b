"""Filling a `TeacherStore` ahead of time, on whatever devices the Trainer has."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distill_lightning.errors import InputError
from distill_lightning.teachers.layer_errors import explained
from distill_lightning.teachers.origin import claim, describe, fetched
from distill_lightning.teachers.store import TeacherStore
from distill_lightning.teachers.teachers import Teachers

# Samples that are asked about together where the loader does not tell how many.
_BATCH = 64


class Recorded(NamedTuple):
    """What a recording has done in this process.

    Attributes:
        answers: samples and views that were asked about.
        nbytes: bytes that were written.
        seconds: that it took, data included.
    """

    answers: int
    nbytes: int
    seconds: float


def record(trainer: pl.Trainer, module: Any, datamodule: pl.LightningDataModule) -> Recorded:
    """Ask a module's teachers about every view of every training sample, and keep their answers in its store.

    Only what the store does not know is asked for, shard by shard; a call that was killed is continued by the next one.
    Several processes share the shards, and write what one would have written.

    Args:
        trainer: of any strategy; its ``predict`` does the work.
        module: whose ``teachers`` are a `TeacherStore` with networks.
        datamodule: with a number of ``views``; or one that has none, whose training samples are always the same.

    Returns:
        What was done in this process; nothing with a strategy that spawns its processes.

    Raises:
        InputError: there are no teachers or no store, the data's views are not numbered, the store was made by
            something else or is filled by another process, or the disk is full.
    """
    recorder = _Recorder(module, datamodule)
    start = time.perf_counter()
    with warnings.catch_warnings():
        # Where the store is complete, there is nothing to do.
        warnings.filterwarnings("ignore", message="Total length of `_Gaps` across ranks is zero")
        try:
            trainer.predict(recorder, return_predictions=False)
        finally:
            recorder.end()
    return Recorded(recorder.answers, recorder.answers * recorder.store.nbytes, time.perf_counter() - start)


class _Recorder(pl.LightningModule):
    """Gives `pytorch_lightning.Trainer.predict` the store's gaps as its data, and keeps what the teachers say."""

    def __init__(self, module: Any, datamodule: pl.LightningDataModule) -> None:
        super().__init__()
        teachers = module.teachers
        if not isinstance(teachers, Teachers) or teachers.store is None or teachers.ensemble is None:
            raise InputError(
                f"record needs a TeacherStore with networks that fill it: give {type(module).__name__} one as teachers"
            )
        self.module, self.data = module, datamodule
        self.teachers, self.store = teachers, teachers.store
        self.answers = 0
        self._parts: list[dict[str, Tensor]] = []
        # The disk is written to while the teachers are asked about the next shard. Begun with the first one: what has
        # threads cannot be sent to other processes.
        self._writer: ThreadPoolExecutor | None = None
        self._written: Future[None] | None = None

    def predict_dataloader(self) -> _Gaps:
        """The training samples of this process's share of the shards."""
        # As in a fit, what is downloaded is downloaded once.
        if self.trainer.is_global_zero:
            self.data.prepare_data()
        self.trainer.strategy.barrier("prepare_data")
        self.data.setup("fit")
        loader: Any = self.data.train_dataloader()
        origin = describe(self.module, self.teachers, self.data, loader, str(self.trainer.precision))
        self.store.begin(**origin, rank=self.trainer.global_rank)
        claim(self.trainer, self.store)
        self.trainer.strategy.barrier("store")
        self.store.refresh()
        places = self.store.unfinished()
        # Nobody writes before everybody has looked.
        self.trainer.strategy.barrier("store")
        # With fewer shards than processes some do the first one, too, and write the same: Lightning stops where a
        # process has nothing to do.
        share = places[self.trainer.global_rank :: self.trainer.world_size] or places[:1]
        return _Gaps(loader, self.store, share, numbered=hasattr(self.data, "views"))

    def predict_step(self, item: tuple[Any, tuple[int, int], tuple[int, int], bool], batch_idx: int) -> int:
        """Ask about a batch; with a shard's last one, write the shard."""
        batch, (view, shard), (begin, end), is_last = item
        batch = self.module.prepared(batch)
        if batch.key is not None and batch.key.index.tolist() != list(range(begin, end)):
            raise InputError(
                f"record asked for the training samples {begin} to {end - 1} and got others, by their "
                "own index: let a sample's index be its place in the data set"
            )
        rows = explained(self.module, self.teachers.rows_to_store, batch, f"recorded batch {batch_idx}")
        self._parts.append(self.store.narrowed(rows))
        self.answers += batch.size
        if is_last:
            # No more than one shard waits, and what has gone wrong with the last one is told here.
            self._wait()
            if self._writer is None:
                self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
            self._written = self._writer.submit(self.store.write, view, shard, *self._parts)
            self._parts = []
        return int(batch.size)

    def on_predict_end(self) -> None:
        """Here too, because this may be another process than the one that has called `record`."""
        self._wait()
        self.store.release()

    def end(self) -> None:
        """Leave the store, whatever has happened."""
        if self._writer is not None:
            self._writer.shutdown()
        self.store.release()

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()


class _Gaps:
    """Batches of what a store does not know, shard by shard, each with its place and whether it is the shard's last.

    Not a `DataLoader`: the order must be this one, and Lightning gives every data loader a sampler of its own.
    """

    def __init__(self, loader: Any, store: TeacherStore, places: list[tuple[int, int]], *, numbered: bool) -> None:
        self.workers = loader.num_workers
        self.batches = _Batches(loader, store, places, numbered=numbered)

    def __len__(self) -> int:
        return len(self.batches.plan)

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.batches, batch_size=None, num_workers=self.workers, collate_fn=_as_it_is))


def _as_it_is(item: Any) -> Any:
    """The loader has made the batch; there is nothing left to convert."""
    return item


class _Batches(IterableDataset[Any]):
    """The batches of some shards, dealt to the workers in turn, so that together they keep the order.

    Args:
        loader: makes the training batches.
        store: whose shards they are.
        places: views and shards.
        numbered: whether the data set takes ``(index, view)`` pairs; else indices.
    """

    def __init__(self, loader: Any, store: TeacherStore, places: list[tuple[int, int]], *, numbered: bool) -> None:
        self.loader, self.numbered = loader, numbered
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or _BATCH
        self.plan = []
        for place in places:
            samples = store.samples_of(place[1])
            for begin in range(samples.start, samples.stop, size):
                some = range(begin, min(begin + size, samples.stop))
                self.plan.append((some, place, some.stop == samples.stop))

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for samples, place, is_last in self.plan[first::step]:
            batch = fetched(self.loader, samples, view=place[0] if self.numbered else None)
            yield batch, place, (samples.start, samples.stop), is_last
