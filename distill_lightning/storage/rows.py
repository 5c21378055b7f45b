"""Rows of typed fields, and a file of them that is written whole and checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_lightning.errors import InputError, refusing
from distill_lightning.storage.files import CHECKSUM_BYTES, checksum_fits, replaced_file, with_checksum, write_parts
from distill_lightning.storage.header import FORMAT, differences

# The header fills whole pages, so that the rows begin with one.
_PAGE_BYTES = 4096
_LARGEST_HEADER = 2**20

# Rows are exchanged, written and copied in pieces of this size.
_PIECE_BYTES = 2**26

Rows = Mapping[str, NDArray[Any]]
"""Arrays by field, one row per record."""


class Field(NamedTuple):
    """One part of a row.

    Attributes:
        name: how it is called.
        dtype: name of its numbers' type, the same in numpy and torch: ``"float16"``, ``"int32"``, ``"bool"``, or
            torch's ``"bfloat16"``.
        shape: of one row's part.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Field:
        """The field that `as_plain` describes."""
        return cls(plain["name"], plain["dtype"], tuple(plain["shape"]))

    def as_plain(self) -> dict[str, Any]:
        """Plain values, for a header."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @property
    def kind(self) -> np.dtype[Any]:
        """The numbers' type in a file, little-endian; bfloat16, which numpy lacks, by its bits as int16."""
        return np.dtype("int16" if self.dtype == "bfloat16" else self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Bytes of one row's part."""
        # Not numpy's product, which goes wrong above 2 ** 63.
        return math.prod(self.shape) * self.kind.itemsize

    def zeros(self, count: int) -> Tensor:
        """A tensor ``(count, *shape)``."""
        return torch.zeros(count, *self.shape, dtype=getattr(torch, self.dtype))

    def array(self, rows: Tensor) -> NDArray[Any]:
        """A tensor's numbers on the host, as numpy has them."""
        rows = rows.cpu()
        return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()

    def tensor(self, rows: NDArray[Any]) -> Tensor:
        """The tensor whose numbers numpy has so; no copy."""
        return torch.from_numpy(rows).view(getattr(torch, self.dtype))

    def content(self, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes of rows in a file."""
        return np.ascontiguousarray(rows, dtype=self.kind).reshape(-1).view(np.uint8)

    def typed(self, raw: NDArray[np.uint8]) -> NDArray[Any]:
        """The rows ``(N, *shape)`` whose bytes ``(N, nbytes)`` are given; no copy."""
        return raw.view(self.kind).reshape(len(raw), *self.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """As `Field` calls a type of torch."""
    return str(dtype).removeprefix("torch.")


def bytes_of(fields: Iterable[Field]) -> int:
    """Bytes of one row."""
    return sum(field.nbytes for field in fields)


def in_pieces(rows: Tensor, row_bytes: int) -> Iterator[Tensor]:
    """Pieces of rows, or of their numbers, so that what is needed beside them stays small; no copies.

    Args:
        rows: ``(N, ...)``.
        row_bytes: of one row.
    """
    return iter(torch.split(rows, max(_PIECE_BYTES // row_bytes, 1)))


def columns_of(content: NDArray[np.uint8], fields: Iterable[Field], count: int) -> dict[str, NDArray[np.uint8]]:
    """The bytes ``(count, nbytes)`` of each field, which stand in ``content`` one field after the other; no copies."""
    columns, begin = {}, 0
    for field in fields:
        end = begin + count * field.nbytes
        columns[field.name] = content[begin:end].reshape(count, field.nbytes)
        begin = end
    return columns


class Layout(NamedTuple):
    """What a file of rows holds.

    Attributes:
        fields: of the rows.
        rows: their number.
        about: what else the file says of itself, plain values by name.
    """

    fields: tuple[Field, ...]
    rows: int
    about: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows * bytes_of(self.fields)

    def header(self) -> dict[str, Any]:
        """What the file says of itself."""
        fields = [field.as_plain() for field in self.fields]
        return {**self.about, "format": FORMAT, "rows": self.rows, "fields": fields}


class DamagedError(InputError):
    """A file that is not as it was written."""


class RowFile:
    """Rows by their number, in a file that is mapped read-only and never changes.

    On disk: JSON that says what the rows are, padded with spaces to whole pages of 4096 bytes; the rows, one field
    after the other; the CRC-32 of everything before.

    Opening a file looks at what it says of itself and at its size; `verify` reads all of it.

    Args:
        path: the file.
        layout: what it must hold; the file may say more of itself.
        way_out: what to do about a file that cannot be used, the end of the errors' line.

    Raises:
        DamagedError: the file is not as it was written.
        InputError: it is gone, cannot be read, is of another version of the format, or holds something else.
    """

    def __init__(self, path: Path, layout: Layout, *, way_out: str) -> None:
        self.path, self.layout, self.way_out = path, layout, way_out
        if not path.is_file():
            raise InputError(f"{path} is not there: {way_out}")
        with refusing(f"{path} cannot be read", OSError):
            self._identity = _identity(path)
            # What is empty cannot be mapped.
            if path.stat().st_size < _PAGE_BYTES + CHECKSUM_BYTES:
                raise self._damaged()
            self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        begin = self._check_header()
        end = begin + layout.nbytes
        self.nbytes = end + CHECKSUM_BYTES
        if len(self._bytes) != self.nbytes:
            raise self._damaged()
        self._columns = columns_of(self._bytes[begin:end], layout.fields, layout.rows)

    @staticmethod
    def write(path: Path, layout: Layout, columns: Mapping[str, Iterable[NDArray[Any]]]) -> None:
        """Write a file, whole or not at all.

        Args:
            path: the file.
            layout: what it holds.
            columns: pieces ``(N, *shape)`` of the rows by field, which make ``layout.rows`` rows of each field. They
                need not be in memory at once.

        Raises:
            OSError: the disk is full or refuses; what was there before is kept.
        """
        with replaced_file(path) as partial_file:
            write_parts(partial_file, with_checksum(_content(layout, columns)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the array would be the whole file in memory.
        return partial(type(self), way_out=self.way_out), (self.path, self.layout)

    @property
    def crc(self) -> int:
        """The CRC-32 that stands in the file."""
        return int.from_bytes(self._bytes[-CHECKSUM_BYTES:].tobytes(), "little")

    @property
    def is_current(self) -> bool:
        """Whether the file has neither been replaced nor removed since it was opened."""
        return self._identity == _identity(self.path)

    def verify(self) -> Self:
        """Read everything once.

        Raises:
            DamagedError: the checksum does not fit.
        """
        if not checksum_fits(self._bytes.data):
            raise self._damaged()
        return self

    def take(self, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Some rows.

        Args:
            index: ``(N,)``.

        Returns:
            Arrays ``(N, *shape)`` by field, copies.
        """
        taken = {}
        for field in self.layout.fields:
            # As bytes: of a typed view that begins at an odd place numpy would copy everything first.
            raw = np.empty((len(index), field.nbytes), np.uint8)
            np.take(self._columns[field.name], index, axis=0, out=raw)
            taken[field.name] = field.typed(raw).astype(field.kind.newbyteorder("="), copy=False)
        return taken

    def column(self, name: str) -> NDArray[Any]:
        """All rows of a field, in the memory map."""
        field = next(field for field in self.layout.fields if field.name == name)
        return field.typed(self._columns[name])

    def _check_header(self) -> int:
        """Compare the file's header with the layout; return where the rows begin."""
        text = self._bytes[:_LARGEST_HEADER].tobytes().decode("latin-1")
        try:
            found, end = json.JSONDecoder().raw_decode(text)
            version = found["format"]
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None
        wanted = self.layout.header()
        different = differences(found, wanted)
        if different:
            self.verify()
            if version != FORMAT:
                raise InputError(f"{self.path} has format {version}, this version reads {FORMAT}: {self.way_out}")
            raise InputError(f"{self.path} belongs to another store, its {'; its '.join(different)}: {self.way_out}")
        return _whole_pages(end)

    def _damaged(self) -> DamagedError:
        return DamagedError(f"{self.path} is damaged: put back the file that was there, or {self.way_out}")


def _content(layout: Layout, columns: Mapping[str, Iterable[NDArray[Any]]]) -> Iterator[Any]:
    text = json.dumps(layout.header()).encode()
    yield text.ljust(_whole_pages(len(text)))
    for field in layout.fields:
        for piece in columns[field.name]:
            yield field.content(piece)


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that replaces it; ``None``: there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
