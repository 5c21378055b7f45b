"""Records in the order in which they come, in a file that is only ever appended to."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_lightning.storage import files
from distill_lightning.storage.files import CHECKSUM_BYTES, checksum_fits
from distill_lightning.storage.rows import Field, Rows, bytes_of, columns_of

_BLOCK = b"BLK1"
_COUNT_BYTES = 4


class RecordLog:
    """Blocks of rows, of which a killed process can have left at most the last one unfinished.

    A block on disk: ``BLK1``; the number of its rows in 4 bytes; the rows, one field after the other; the CRC-32 of
    these. Reading ends at the first block that is not whole.

    Args:
        path: the file.
        fields: of the rows.
    """

    def __init__(self, path: Path, fields: Sequence[Field]) -> None:
        self.path, self.fields = path, tuple(fields)

    def append(self, rows: Rows, count: int) -> None:
        """Append a block.

        Args:
            rows: arrays ``(count, *shape)`` by field.
            count: number of rows.

        Raises:
            OSError: the disk is full or refuses; the log then ends where it ended before.
        """
        parts = [field.content(rows[field.name]).tobytes() for field in self.fields]
        content = count.to_bytes(_COUNT_BYTES, "little") + b"".join(parts)
        with self.path.open("ab", buffering=0) as log:
            before = log.tell()
            try:
                files.write_all(log, _BLOCK + content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little"))
            except OSError:
                # Nothing could be read behind half a block.
                log.truncate(before)
                raise

    def mend(self) -> None:
        """Cut off what a killed process left of its last block, so that what is appended afterwards can be read."""
        if self.path.exists():
            whole = sum(size for size, _ in self._blocks())
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)

    def blocks(self) -> Iterator[Rows]:
        """The rows of each whole block, in the log's memory map."""
        return (rows for _, rows in self._blocks())

    def _blocks(self) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The bytes and the rows of each whole block."""
        # What is empty cannot be mapped.
        is_empty = self.path.stat().st_size == 0
        content = np.zeros(0, np.uint8) if is_empty else np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        begin, head = 0, len(_BLOCK) + _COUNT_BYTES
        while begin + head <= len(content) and content[begin : begin + len(_BLOCK)].tobytes() == _BLOCK:
            count = int.from_bytes(content[begin + len(_BLOCK) : begin + head].tobytes(), "little")
            size = head + count * bytes_of(self.fields) + CHECKSUM_BYTES
            block = content[begin : begin + size]
            if len(block) < size or not checksum_fits(block[len(_BLOCK) :].data):
                return
            columns = columns_of(block[head:-CHECKSUM_BYTES], self.fields, count)
            yield size, {field.name: field.typed(columns[field.name]) for field in self.fields}
            begin += size
