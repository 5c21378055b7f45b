"""A loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch.utils.data import DataLoader

from distill_lightning.data.batch import Batch
from distill_lightning.data.datamodules.view_sampler import ViewSampler


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
