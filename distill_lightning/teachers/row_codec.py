"""How a teacher's answers are kept: rounded, and of probabilities perhaps the largest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.storage import largest, spread_rest

Answers = Mapping[str, Tensor]
"""What the teachers say about a batch: tensors ``(N, ...)`` by name; ``probabilities...`` are rows of such."""

_CLASSES = "_classes"


class RowCodec(NamedTuple):
    """Answers as a `TeacherStore` keeps them.

    Attributes:
        dtype: of what is kept, ``"float16"`` or ``"float32"``.
        top_k: how many of a row's largest probabilities are kept; ``None``: all.
    """

    dtype: str
    top_k: int | None

    def pack(self, answers: Answers) -> dict[str, NDArray[Any]]:
        """Answers as they are written.

        Raises:
            InputError: ``top_k`` is more than there are classes.
        """
        packed = {}
        for name, rows in answers.items():
            kept = rows.detach()
            if _are_probabilities(name) and self.top_k is not None:
                if self.top_k > kept.shape[-1]:
                    raise InputError(f"TeacherStore: top_k={self.top_k} of {kept.shape[-1]} classes: lower it")
                kept, classes = largest(kept.float(), self.top_k)
                packed[f"{name}{_CLASSES}"] = classes.cpu().numpy()
            packed[name] = self._rounded(kept).cpu().numpy()
        return packed

    def unpack(
        self, rows: Mapping[str, NDArray[Any]], num_classes: int | None, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Answers from what was written, float32."""
        answers = {}
        for name, values in rows.items():
            if name.endswith(_CLASSES):
                continue
            kept = _moved(values, device).float()
            if _are_probabilities(name):
                if self.top_k is not None:
                    classes = _moved(rows[f"{name}{_CLASSES}"], device)
                    kept = spread_rest(kept, classes, num_classes or 0)
                # What rounding has added or taken away must not become mass of the target.
                kept = kept / kept.sum(dim=-1, keepdim=True)
            answers[name] = kept
        return answers

    def narrow(self, answers: Answers) -> dict[str, Tensor]:
        """The same answers on the host, in no more memory than they need there until they are written."""
        return {
            name: (rows if _are_probabilities(name) else self._rounded(rows)).detach().cpu()
            for name, rows in answers.items()
        }

    def _rounded(self, rows: Tensor) -> Tensor:
        if self.dtype == "float32":
            return rows.float()
        limit = torch.finfo(torch.float16).max
        half = rows.half()
        # Beyond half precision's range there is nothing to tell apart. What a teacher has said stays as it is.
        return half.clamp(-limit, limit) if half is rows else half.clamp_(-limit, limit)


def shapes(fields: Sequence[Mapping[str, Any]], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one sample's answers, by name, from the fields that a store's header describes."""
    found = {field["name"]: tuple(field["shape"]) for field in fields if not field["name"].endswith(_CLASSES)}
    return {name: (*shape[:-1], num_classes) if _are_probabilities(name) else shape for name, shape in found.items()}


def _moved(values: NDArray[Any], device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(values)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # From other memory a copy waits until the device has done all that it was told before.
    return tensor.pin_memory().to(device, non_blocking=True)


def _are_probabilities(name: str) -> bool:
    return name.startswith("probabilities") and not name.endswith(_CLASSES)
