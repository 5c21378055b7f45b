"""Sixteen bytes that tell a value from others."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SIZE = 16


def digest_of(value: Any) -> bytes:
    """The digest of numbers, texts, tensors, arrays, images, and collections of them.

    A path counts without its folder, because data may be moved. Of an object of another kind, its type alone counts.

    Example:
        >>> import torch
        >>> from distill_lightning.data.digests import digest_of
        >>> digest_of({"image": torch.zeros(2), "label": 1}) == digest_of({"image": torch.zeros(2), "label": 2})
        False
    """
    digest = blake2b(digest_size=_SIZE)
    for piece in _pieces(value):
        digest.update(piece)
    return digest.digest()


def digests_of_rows(rows: Tensor | NDArray[Any]) -> list[bytes]:
    """The digest of each row of a tensor, or an array of numbers, ``(N, ...)``."""
    head = f"{rows.dtype} {tuple(rows.shape[1:])} ".encode()
    flat = _bytes_of(rows) if isinstance(rows, Tensor) else np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    size = len(flat) // max(len(rows), 1)
    return [blake2b(head + row.tobytes(), digest_size=_SIZE).digest() for row in flat.reshape(len(rows), size)]


def has_digest(value: Any) -> bool:
    """Whether the digest of a value tells more than its type."""
    plain = (Tensor, str, bytes, os.PathLike, bool, int, float, complex, Mapping, list, tuple)
    return isinstance(value, plain) or dataclasses.is_dataclass(value) or hasattr(value, "__array_interface__")


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield _bytes_of(value).tobytes()
    elif isinstance(value, bytes):
        yield b"bytes %d " % len(value) + value
    elif isinstance(value, (str, os.PathLike)):
        text = os.fsdecode(value)
        yield f"text {Path(text).name if text.startswith('/') else text}\0".encode(errors="surrogateescape")
    elif value is None or isinstance(value, (bool, int, float, complex)):
        yield f"{type(value).__name__} {value} ".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        yield from (piece for pair in value.items() for part in pair for piece in _pieces(part))
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)} ".encode()
        yield from (piece for part in value for piece in _pieces(part))
    elif dataclasses.is_dataclass(value):
        yield from _pieces([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif hasattr(value, "__array_interface__"):
        # NumPy's arrays and numbers, and Pillow's images.
        array = np.asarray(value)
        yield f"{array.dtype} {array.shape} ".encode()
        yield from _pieces(array.tolist()) if array.dtype.hasobject else [array.tobytes()]
    else:
        yield f"{type(value).__name__} ".encode()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    flat: NDArray[np.uint8] = dense.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat
