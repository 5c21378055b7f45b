"""A directory of records by sample and view, in shards that are written whole and checked before they are read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill_lightning.errors import InputError
from distill_lightning.storage import files
from distill_lightning.storage.files import CHECKSUM_BYTES, checksum_fits, telling, with_checksum, write_whole

FORMAT = 1
_HEADER = "header.json"
_BLOCK = b"BLK1"

Rows = Mapping[str, NDArray[Any]]
"""Arrays by field, one row per record."""


class Field(NamedTuple):
    """One part of a record.

    Attributes:
        name: how it is called.
        dtype: numpy's name of its numbers' type, written in little endian.
        shape: of one record's part.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> np.dtype[Any]:
        """The numbers as they stand in a file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Bytes of one record's part."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.kind.itemsize


class _Shard(NamedTuple):
    rows: dict[str, NDArray[Any]]
    known: NDArray[np.bool_]
    file: tuple[int, ...] | None


class ShardedRecords:
    """Records of ``samples`` samples in ``views`` views each.

    A record is found by its sample and view; nothing depends on the order in which records were made. On disk::

        header.json                what the records are, and what made them
        view_00003/00012.shard     samples 12 * shard_size and following, in view 3
        view_00003/rank_0.log      records of view 3 in the order they came, until `seal` makes shards of them

    A shard holds each field of all its records, one field after the other, a byte for each record that tells whether it
    is known, and the CRC-32 of everything before. It is written under another name, flushed, and then renamed: there is
    never half a shard. A log is only ever appended to, in blocks with a checksum; what a killed process left of its
    last block is cut off. So a store can be continued after a kill at any byte, and several processes may read while
    others write.

    Args:
        folder: of the records.
        samples: number of samples.
        views: number of views of each.
        fields: of a record.
        shard_size: samples in a shard.
        made_by: what the records depend on, plain values by name; kept in the header and compared with it.

    Raises:
        InputError: the folder holds records of another kind, or made by something else; the message names what differs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        samples: int,
        views: int,
        fields: Sequence[Field],
        shard_size: int,
        made_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.samples, self.views, self.shard_size = samples, views, shard_size
        self.fields = tuple(fields)
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "samples": samples,
            "views": views,
            "shard_size": shard_size,
            "fields": [{"name": field.name, "dtype": field.dtype, "shape": list(field.shape)} for field in fields],
            "made_by": dict(made_by or {}),
        }
        self.shards = -(-samples // shard_size)
        self._open: dict[tuple[int, int], _Shard] = {}
        self._damaged: set[tuple[int, int]] = set()

    @classmethod
    def open(cls, folder: Path) -> ShardedRecords:
        """Records that exist.

        Raises:
            InputError: there are none, or those of another version.
        """
        header = read_header(folder)
        fields = [Field(field["name"], field["dtype"], tuple(field["shape"])) for field in header["fields"]]
        return cls(
            folder,
            samples=header["samples"],
            views=header["views"],
            fields=fields,
            shard_size=header["shard_size"],
            made_by=header["made_by"],
        )

    def create(self) -> None:
        """Make the folder, or go on with what is there.

        Raises:
            InputError: it holds other records.
        """
        if (self.folder / _HEADER).exists():
            self.check(read_header(self.folder))
            return
        with telling(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Several processes may do this at once; all write the same.
            write_whole(self.folder / _HEADER, [json.dumps(self.header, indent=1, sort_keys=True).encode()])

    def check(self, header: Mapping[str, Any]) -> None:
        """Hold a header against these records.

        Raises:
            InputError: they differ; the message names in what.
        """
        wanted = {**{k: v for k, v in self.header.items() if k != "made_by"}, **self.header["made_by"]}
        found = {**{k: v for k, v in header.items() if k != "made_by"}, **header["made_by"]}
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            told = "; ".join(f"{name} is {_short(found.get(name))}, not {_short(wanted[name])}" for name in different)
            raise InputError(
                f"the store {self.folder} was made by something else: {told}. Go on with what made it, or give another "
                "folder"
            )

    # Reading

    def read(
        self, samples: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """Some records.

        Args:
            samples: ``(N,)``.
            views: ``(N,)``.

        Returns:
            Arrays ``(N, ...)`` by field, and whether each record is known; those that are not hold zeros.

        Raises:
            InputError: a sample or view out of range.
        """
        count = len(samples)
        if count and not (
            samples.min() >= 0 and samples.max() < self.samples and views.min() >= 0 and views.max() < self.views
        ):
            raise InputError(
                f"the store {self.folder} has samples 0 to {self.samples - 1} and views 0 to {self.views - 1}, and was "
                f"asked for samples up to {samples.max()} and views from {views.min()} to {views.max()}"
            )
        rows = {field.name: np.zeros((count, *field.shape), np.dtype(field.dtype)) for field in self.fields}
        known = np.zeros(count, dtype=np.bool_)
        places = views * self.shards + samples // self.shard_size
        for place in np.unique(places):
            shard = self._shard(int(place) // self.shards, int(place) % self.shards)
            if shard is None:
                continue
            chosen = np.flatnonzero(places == place)
            within = samples[chosen] % self.shard_size
            for name, values in shard.rows.items():
                rows[name][chosen] = values[within]
            known[chosen] = shard.known[within]
        return rows, known

    def state_of(self, view: int, shard: int) -> str:
        """``"complete"``, ``"partial"``, ``"missing"`` or ``"damaged"``."""
        found = self._shard(view, shard)
        if found is None:
            return "damaged" if (view, shard) in self._damaged else "missing"
        return "complete" if bool(found.known.all()) else "partial"

    def unfinished(self) -> list[tuple[int, int]]:
        """The views and shards that are not complete."""
        places = ((view, shard) for view in range(self.views) for shard in range(self.shards))
        return [place for place in places if self.state_of(*place) != "complete"]

    def refresh(self) -> None:
        """Look again at what other processes may have written; what is as it was is not read again to be checked."""
        self._damaged.clear()
        for place, shard in list(self._open.items()):
            if shard.file != _identity(self.path_of(*place)):
                del self._open[place]

    def path_of(self, view: int, shard: int) -> Path:
        """A shard's file."""
        return self._folder_of(view) / f"{shard:05d}.shard"

    def samples_of(self, shard: int) -> range:
        """The samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, without the byte that tells whether it is known."""
        return sum(field.nbytes for field in self.fields)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the files itself: a memory map would be sent as a copy of its file."""
        return {**vars(self), "_open": {}}

    def _shard(self, view: int, shard: int) -> _Shard | None:
        place = (view, shard)
        if place in self._damaged:
            return None
        if place not in self._open:
            path = self.path_of(view, shard)
            if not path.exists():
                return None
            found = self._mapped(path, len(self.samples_of(shard)))
            if found is None:
                self._damaged.add(place)
                return None
            self._open[place] = found
        return self._open[place]

    def _mapped(self, path: Path, count: int) -> _Shard | None:
        """A shard's arrays in the file's memory map; ``None`` if the file is damaged."""
        size = count * (self.record_bytes + 1) + CHECKSUM_BYTES
        file = _identity(path)
        if path.stat().st_size != size:
            return None
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        if not checksum_fits(mapped.data):
            return None
        rows, begin = {}, 0
        for field in self.fields:
            end = begin + count * field.nbytes
            rows[field.name] = mapped[begin:end].view(field.kind).reshape(count, *field.shape)
            begin = end
        return _Shard(rows, mapped[begin : begin + count].view(np.bool_), file)

    # Writing

    def write_shard(self, view: int, shard: int, rows: Rows, known: NDArray[np.bool_] | None = None) -> None:
        """Write a shard, in place of the one that may be there.

        Args:
            view: which.
            shard: which.
            rows: of its samples in order.
            known: which of them mean something; ``None``: all.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        count = len(self.samples_of(shard))
        known = np.ones(count, dtype=np.bool_) if known is None else known
        parts = []
        for field in self.fields:
            values = self._fitting(field, rows, count)
            # What is not known is zero, so that a store's bytes tell nothing of how it came about.
            parts.append(
                np.where(known.reshape(-1, *[1] * len(field.shape)), values, np.zeros((), field.kind)).tobytes()
            )
        parts.append(known.astype(np.uint8).tobytes())
        with telling(self.folder):
            self._folder_of(view).mkdir(exist_ok=True)
            write_whole(self.path_of(view, shard), with_checksum(parts))
        self._open.pop((view, shard), None)
        self._damaged.discard((view, shard))

    def append(self, view: int, rank: int, samples: NDArray[np.int64], rows: Rows) -> None:
        """Keep records in the order they come, for `seal`.

        Args:
            view: of all of them.
            rank: of this process: each has a log of its own.
            samples: ``(N,)``.
            rows: of these samples.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        parts = [np.ascontiguousarray(samples, dtype="<i8").tobytes()]
        parts += [self._fitting(field, rows, len(samples)).tobytes() for field in self.fields]
        content = len(samples).to_bytes(4, "little") + b"".join(parts)
        with telling(self.folder):
            self._folder_of(view).mkdir(exist_ok=True)
            with self._log_of(view, rank).open("ab", buffering=0) as log:
                before = log.tell()
                try:
                    files.write_all(log, _BLOCK + content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little"))
                except OSError:
                    # Behind half a block nothing could be read.
                    log.truncate(before)
                    raise

    def _fitting(self, field: Field, rows: Rows, count: int) -> NDArray[Any]:
        """A field of some rows, as it stands in a file."""
        if rows.keys() != {other.name for other in self.fields}:
            names = ", ".join(other.name for other in self.fields)
            raise InputError(f"the store {self.folder} holds {names}, and was given {', '.join(rows)}")
        values = np.ascontiguousarray(rows[field.name], dtype=field.kind)
        if values.shape != (count, *field.shape):
            raise InputError(
                f"the store {self.folder} needs {field.name} {(count, *field.shape)}, and was given {values.shape}"
            )
        return values

    def mend_log(self, view: int, rank: int) -> None:
        """Cut off what a killed process left of its last block; what is appended afterwards can then be read."""
        path = self._log_of(view, rank)
        if path.exists():
            whole = sum(size for size, _, _ in self._blocks(path))
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    def seal(self, view: int) -> None:
        """Make shards of a view's logs, of all processes, together with the shards that are there.

        One process calls this while none appends to that view. Called again after a kill, it ends the same.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        logs = sorted(self._folder_of(view).glob("rank_*.log"))
        if not logs:
            return
        # The rows stay in the logs' memory maps: only one shard of them is in memory at a time.
        blocks = [(samples, rows) for path in logs for _, samples, rows in self._blocks(path)]
        touched = np.unique(
            np.concatenate([samples for samples, _ in blocks] or [np.zeros(0, np.int64)]) // self.shard_size
        )
        for shard in touched.tolist():
            count = len(self.samples_of(shard))
            before = self._shard(view, shard)
            known = np.zeros(count, dtype=np.bool_) if before is None else before.known.copy()
            whole = {
                field.name: np.zeros((count, *field.shape), field.kind)
                if before is None
                else before.rows[field.name].copy()
                for field in self.fields
            }
            for samples, rows in blocks:
                chosen = np.flatnonzero(samples // self.shard_size == shard)
                within = samples[chosen] % self.shard_size
                known[within] = True
                for name, values in rows.items():
                    whole[name][within] = values[chosen]
            self.write_shard(view, shard, whole, known)
        for path in logs:
            path.unlink()

    def _blocks(self, path: Path) -> Iterator[tuple[int, NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """The whole blocks of a log: bytes, samples and, in its memory map, rows of each."""
        content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        begin, head = 0, len(_BLOCK) + 4
        while begin + head <= len(content) and content[begin : begin + len(_BLOCK)].tobytes() == _BLOCK:
            count = int.from_bytes(content[begin + len(_BLOCK) : begin + head].tobytes(), "little")
            size = head + count * (8 + self.record_bytes) + CHECKSUM_BYTES
            block = content[begin : begin + size]
            if len(block) < size or not checksum_fits(block[len(_BLOCK) :].data):
                return
            place = head + 8 * count
            samples = np.frombuffer(block[head:place].tobytes(), dtype="<i8")
            rows = {}
            for field in self.fields:
                end = place + count * field.nbytes
                rows[field.name] = block[place:end].view(field.kind).reshape(count, *field.shape)
                place = end
            yield size, samples, rows
            begin += size

    def _folder_of(self, view: int) -> Path:
        return self.folder / f"view_{view:05d}"

    def _log_of(self, view: int, rank: int) -> Path:
        return self._folder_of(view) / f"rank_{rank}.log"


def _identity(path: Path) -> tuple[int, ...] | None:
    """What a file that was replaced has another of; ``None``: there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_header(folder: Path) -> dict[str, Any]:
    """What a folder of records says of itself.

    Raises:
        InputError: it holds none, or those of another version of the format.
    """
    path = folder / _HEADER
    if not path.is_file():
        raise InputError(f"there is no store in {folder}: fill one with 'distill-lightning record', or while training")
    try:
        header = json.loads(path.read_text())
        version = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: remove the store {folder} and fill it again") from error
    if version != FORMAT:
        raise InputError(f"the store {folder} has format {version}, this version reads {FORMAT}: fill it again")
    return dict(header)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of files of records that they were writing; called while nobody writes."""
    # By their full names: what else lies in the folder is not the store's.
    for path in (*folder.glob(f"partial.*.{_HEADER}"), *folder.glob("view_*/partial.*.shard")):
        path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
