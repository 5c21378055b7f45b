"""What the teachers said about the validation samples, so that they need not say it again after every epoch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill_lightning.data.batch import Batch


class _Answer(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    view: Tensor
    prediction: Tensor


class TeacherAnswers:
    """The teachers' predictions for batches whose samples can be told, by who asks and the batch's number.

    Frozen teachers say the same about the same view of a sample. A batch is recognised by its indices and views; one
    that has none is never kept.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[int, int], _Answer] = {}

    def keep(self, asker: object, number: int, batch: Batch, prediction: Tensor) -> None:
        """Remember what the teachers said about a batch."""
        if batch.index is not None and batch.view is not None:
            self._answers[id(asker), number] = _Answer(batch.index, batch.view, prediction)

    def recall(self, asker: object, number: int, batch: Batch) -> Tensor | None:
        """What they said, if it was about the same samples."""
        answer = self._answers.get((id(asker), number))
        if answer is None or batch.index is None or batch.view is None:
            return None
        same = torch.equal(answer.index, batch.index) and torch.equal(answer.view, batch.view)
        return answer.prediction if same else None

    def forget(self) -> None:
        """The next data may be others."""
        self._answers.clear()
