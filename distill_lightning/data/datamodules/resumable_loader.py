"""A loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import DataLoader

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError


class ResumableLoader(DataLoader[Batch]):
    """A `DataLoader` that a checkpoint from the middle of an epoch continues there.

    Lightning keeps its state in the checkpoint. The sampler leaves out what was read, as many of its items as its
    attribute ``skip`` says: `ViewSampler` and `LengthSampler` do. With any other it is a `DataLoader` and nothing else.

    Raises:
        InputError: from its iterator: the checkpoint is from the middle of this epoch, and of other batches.
    """

    _given = 0
    _saved: Mapping[str, int] = MappingProxyType({})

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader's is a class of its own
        # A generator, because Lightning sets the sampler's epoch after it has called iter.
        saved, self._saved = self._saved, {}
        self._given = 0
        sampler: Any = self.sampler
        if hasattr(sampler, "skip"):
            if saved.get("epoch") == sampler.epoch:
                self._given = saved["batches"]
                self._refuse_others(saved)
            sampler.skip = self._given * (self.batch_size or 1)
        state = torch.get_rng_state()
        batches = super().__iter__()
        if self._given:
            # An iterator draws a number when it is made: that of this epoch was drawn before the checkpoint.
            torch.set_rng_state(state)
        for batch in batches:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches were given, and of which size in how many processes."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._given, **self.way}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Leave out the batches that were given, if the next epoch is the one of the state."""
        self._saved = state

    def begin_after(self, batches: int, *, epoch: int) -> None:
        """Leave out so many batches, if the next epoch is the given one."""
        self._saved = {"epoch": epoch, "batches": batches, **self.way}

    @property
    def way(self) -> dict[str, int]:
        """In which batches the samples come: two loaders with the same way give the same."""
        budget = getattr(self.sampler, "budget", None)
        if budget is not None:
            # However many processes share a batch, it holds the same.
            return {"max_tokens": budget}
        return {"batch_size": self.batch_size or 1, "processes": getattr(self.sampler, "num_replicas", 1)}

    def _refuse_others(self, saved: Mapping[str, int]) -> None:
        before, now = {**self.way, **saved}, self.way
        if self._given and any(before[name] != value for name, value in now.items()):
            raise InputError(
                f"the checkpoint was made after {self._given} batches of an epoch, with {_told(before)}, and now there "
                f"are {_told(now)}: samples would be read twice or never; resume with the same, or from a checkpoint "
                "of an epoch's end"
            )


def _told(way: Mapping[str, int]) -> str:
    if "processes" in way:
        return f"batch_size={way['batch_size']} in {way['processes']} process(es)"
    return f"max_tokens={way['max_tokens']} of all processes together"
