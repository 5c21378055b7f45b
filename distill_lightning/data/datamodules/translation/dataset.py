"""Pairs of sentences as padded batches of ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from distill_lightning.data.batch import Batch
from distill_lightning.data.columns import Columns
from distill_lightning.data.datamodules.translation.tokenizer import BOS, PAD
from distill_lightning.data.datamodules.view_dataset import ViewDataset, ViewKey
from distill_lightning.data.sequences import shifted_right


class Ragged:
    """Rows of different lengths in one tensor.

    Args:
        rows: of ids.

    Attributes:
        lengths: of the rows, int64 ``(N,)``.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        self._starts = self.lengths.cumsum(0) - self.lengths
        values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(self.lengths.sum()))
        self._values = torch.from_numpy(values)

    def padded(self, index: Tensor) -> Tensor:
        """Some rows, int64 ``(N, T)`` with the longest one's ``T``; the others end in padding."""
        place, is_there = self._places(index)
        return torch.where(is_there, self._values[place].long(), PAD)

    def _places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[index]
        steps = torch.arange(int(lengths.max()))
        is_there = steps < lengths[:, None]
        return torch.where(is_there, self._starts[index][:, None] + steps, 0), is_there


class TranslationDataset(ViewDataset):
    """Sentences and their translations as ids; the view of a sentence is the sentence.

    Args:
        source: the sentences, each with its end.
        target: their translations; ``None``: there are none.
        sentences: the text of both, in UTF-8, by which the data are known again.
        where: the file and the line of each sentence, for messages; empty: they are told by their numbers.
    """

    depends_on = ()

    def __init__(
        self,
        source: Sequence[Sequence[int]],
        target: Sequence[Sequence[int]] | None,
        *,
        sentences: tuple[list[bytes], list[bytes]],
        where: Sequence[str] = (),
    ) -> None:
        super().__init__(seed=0, partners=False)
        self.source = Ragged(source)
        self.target = None if target is None else Ragged(target)
        self._sentences = sentences
        self._where = where

    def __len__(self) -> int:
        return len(self.source.lengths)

    @property
    def lengths(self) -> Tensor:
        """Ids of source and target of each sentence, int64 ``(N, 2)``; without translations these count 0."""
        source = self.source.lengths
        return torch.stack([source, torch.zeros_like(source) if self.target is None else self.target.lengths], dim=1)

    def longest(self) -> tuple[int, str]:
        """The most ids that a source or a target has, and where that sentence stands."""
        count, place = self.lengths.max(dim=1).values.max(dim=0)
        return int(count), self._where[int(place)] if self._where else f"sentence {int(place) + 1}"

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these sentences; the decoder reads the target one step late, behind a beginning."""
        source = self.source.padded(index)
        inputs = {"input_ids": source, "attention_mask": (source != PAD).long()}
        if self.target is None:
            return Batch(inputs, None, index, view)
        target = self.target.padded(index)
        # The end of a sentence, which stands before the first padding, is not read.
        inputs["decoder_input_ids"] = shifted_right(target, begin=BOS, pad_id=PAD).masked_fill(target == PAD, PAD)
        return Batch(inputs, target, index, view)

    def __getitem__(self, key: ViewKey | Sequence[ViewKey]) -> Batch:
        """The batch of one sentence, or of a list of them; the loader leaves batching to the sampler."""
        return self.__getitems__(key if isinstance(key, list) else [key])  # type: ignore[list-item]  # a single key

    def columns(self) -> Columns:
        """All sentences."""
        source, target = self._sentences
        return Columns(labels=target or None, contents=(source,))
