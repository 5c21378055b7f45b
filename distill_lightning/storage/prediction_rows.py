"""How probabilities are kept as rows: all of them, or the largest ones and their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.storage.rows import Field, RowFile, bytes_of, dtype_name
from distill_lightning.storage.top_k import class_dtype, largest, spread_rest

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PredictionRows:
    """The row format of a `PredictionStore`.

    Args:
        num_classes: ``K``.
        dtype: see `PredictionStore`.
        top_k: see `PredictionStore`.

    Raises:
        InputError: a size or a type that cannot be used.
    """

    def __init__(self, num_classes: int, *, dtype: torch.dtype, top_k: int | None) -> None:
        if dtype not in _DTYPES:
            names = ", ".join(dtype_name(kind) for kind in _DTYPES)
            raise InputError(f"PredictionStore keeps {names}, got dtype={dtype_name(dtype)}")
        if top_k is not None and not 1 <= top_k <= num_classes:
            raise InputError(f"top_k must be between 1 and num_classes={num_classes}, got {top_k}")
        self.num_classes, self.dtype, self.top_k = num_classes, dtype, top_k
        fields = [Field("probabilities", dtype_name(dtype), (top_k or num_classes,))]
        if top_k is not None:
            fields.append(Field("classes", dtype_name(class_dtype(num_classes)), (top_k,)))
        self.fields = tuple(fields)

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return bytes_of(self.fields)

    def as_plain(self) -> dict[str, Any]:
        """What the rows are, plain values by name."""
        return {"num_classes": self.num_classes, "top_k": self.top_k, "dtype": dtype_name(self.dtype)}

    def zeros(self, count: int) -> dict[str, Tensor]:
        """Rows by field, of zeros."""
        return {field.name: field.zeros(count) for field in self.fields}

    def take(self, file: RowFile, index: Tensor) -> dict[str, Tensor]:
        """Some rows of a file by field, copies; the index is on the CPU."""
        rows = file.take(index.numpy())
        return {field.name: field.tensor(rows[field.name]) for field in self.fields}

    def pack(self, probs: Tensor) -> dict[str, Tensor]:
        """Rows by field of probabilities ``(N, K)``."""
        if self.top_k is None:
            return {"probabilities": probs.to(self.dtype)}
        values, classes = largest(probs, self.top_k)
        return {"probabilities": values.to(self.dtype), "classes": classes}

    def unpack(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Probabilities, float32 ``(N, K)``, of rows by field."""
        probs = rows["probabilities"].float()
        if self.top_k is not None:
            probs = spread_rest(probs, rows["classes"], self.num_classes)
        # What half precision has rounded away or added must not become mass of the target.
        return probs if self.dtype == torch.float32 else probs / probs.sum(dim=1, keepdim=True)
