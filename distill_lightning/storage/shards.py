"""A directory of records by sample and view, in shards that are written whole and checked before they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill_lightning.errors import InputError, refusing
from distill_lightning.storage.files import explaining_disk_errors, sweep_partial
from distill_lightning.storage.header import FORMAT, HEADER, Compare, differences, read_header, write_header
from distill_lightning.storage.log import RecordLog
from distill_lightning.storage.rows import DamagedError, Field, Layout, RowFile, Rows, bytes_of

# Parts of a row that no record has: whether it is known in a shard, whose it is in a log.
_KNOWN = Field("_known", "bool", ())
_SAMPLE = Field("_sample", "int64", ())


_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_LARGE_RECORD = 2**26


def read_fields(folder: Path, header: Mapping[str, Any]) -> list[Field]:
    """The parts of a record, as the header of a folder of records describes them.

    Args:
        folder: where the records are.
        header: what `read_header` has read there.

    Raises:
        InputError: they are no such parts, or records of more than 64 MiB, of which no file there holds even one.
    """
    path = folder / HEADER
    way_out = f"remove the store {folder} and fill it again"
    with refusing(f"{path} is damaged, {way_out}", KeyError, TypeError, AttributeError):
        fields = [Field.of(field) for field in header["fields"]]
        sizes = [size for field in fields for size in field.shape]
    known = all(isinstance(field.name, str) and field.dtype in _DTYPES for field in fields)
    if not known or not all(type(size) is int and size >= 0 for size in sizes):
        raise InputError(f"{path} is damaged, its fields are of no known kind: {way_out}")
    wanted = bytes_of(fields)
    if wanted > _LARGE_RECORD and wanted > max((file.stat().st_size for file in folder.glob("view_*/*")), default=0):
        raise InputError(
            f"{path} describes records of {wanted:,} bytes, and no file of the store holds as many: {way_out}"
        )
    return fields


class ShardedRecords:
    """Records of ``samples`` samples in ``views`` views each.

    A record is found by its sample and view; nothing depends on the order in which records were made. On disk::

        header.json                what the records are, and what made them
        view_00003/00012.shard     samples 12 * shard_size and following, in view 3
        view_00003/rank_0.log      records of view 3 in the order they came, until `seal` makes shards of them

    A shard is a `RowFile` of its records, with a byte for each that tells whether it is known. It is written under
    another name, flushed, and then renamed: there is never half a shard. A log is only ever appended to, in blocks with
    a checksum; what a killed process left of its last block is cut off. So a store can be continued after a kill at any
    byte, and several processes may read while others write.

    Args:
        folder: where the records are.
        samples: number of samples.
        views: number of views of each sample.
        fields: the parts of a record.
        shard_size: number of samples in a shard.
        made_by: what the records depend on, plain values by name; kept in the header and compared with it.
        compare: how values of it are compared, by name; ``None``: all must be equal.
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
        compare: Mapping[str, Compare] | None = None,
    ) -> None:
        self.folder = folder
        self.compare = compare or {}
        self.samples, self.views, self.shard_size = samples, views, shard_size
        self.fields = tuple(fields)
        self.header: dict[str, Any] = {
            "format": FORMAT,
            "samples": samples,
            "views": views,
            "shard_size": shard_size,
            "fields": [field.as_plain() for field in fields],
            "made_by": dict(made_by or {}),
        }
        self.shards = -(-samples // shard_size)
        self._open: dict[tuple[int, int], RowFile] = {}
        self._damaged: set[tuple[int, int]] = set()

    @classmethod
    def open(cls, folder: Path) -> ShardedRecords:
        """Records that exist.

        Raises:
            InputError: there are none, or those of another version.
        """
        header = read_header(folder)
        sizes: dict[str, Any] = {name: header.get(name) for name in ("samples", "views", "shard_size")}
        if not all(type(size) is int and size >= 1 for size in sizes.values()):
            raise InputError(
                f"{folder / HEADER} is damaged, it says {sizes}: remove the store {folder} and fill it again"
            )
        fields = read_fields(folder, header)
        return cls(folder, fields=fields, made_by=header["made_by"], **sizes)

    def create(self) -> None:
        """Make the folder, or go on with what is there.

        Raises:
            InputError: it holds records of another kind, or made by something else; the message names what differs.
        """
        if (self.folder / HEADER).exists():
            self.check(read_header(self.folder))
            return
        with explaining_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Several processes may do this at once; all write the same.
            write_header(self.folder, self.header)

    def check(self, header: Mapping[str, Any]) -> None:
        """Compare a header with these rows.

        Raises:
            InputError: they differ; the message names in what.
        """
        found = {**header, **header["made_by"], "made_by": None}
        wanted = {**self.header, **self.header["made_by"], "made_by": None}
        different = differences(found, wanted, self.compare)
        if different:
            raise InputError(
                f"the store {self.folder} was made by something else: {'; '.join(different)}. Go on with what made it, "
                "or give another folder"
            )

    # Reading

    def read(
        self, samples: NDArray[np.int64], views: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """Some records.

        Args:
            samples: int64 ``(N,)``.
            views: int64 ``(N,)``.

        Returns:
            Arrays ``(N, ...)`` by field, and whether each record is known; those that are not hold zeros.

        Raises:
            InputError: a sample or a view is out of range.
        """
        count = len(samples)
        if count and not (
            samples.min() >= 0 and samples.max() < self.samples and views.min() >= 0 and views.max() < self.views
        ):
            raise InputError(
                f"the store {self.folder} has samples 0 to {self.samples - 1} and views 0 to {self.views - 1}, and was "
                f"asked for samples from {samples.min()} to {samples.max()} and views from {views.min()} to "
                f"{views.max()}"
            )
        rows = {field.name: np.zeros((count, *field.shape), field.kind.newbyteorder("=")) for field in self.fields}
        known = np.zeros(count, dtype=np.bool_)
        places = views * self.shards + samples // self.shard_size
        for place in np.unique(places):
            shard = self._shard(int(place) // self.shards, int(place) % self.shards)
            if shard is None:
                continue
            chosen = np.flatnonzero(places == place)
            found = shard.take(samples[chosen] % self.shard_size)
            known[chosen] = found.pop(_KNOWN.name)
            for name, values in found.items():
                rows[name][chosen] = values
        return rows, known

    def state_of(self, view: int, shard: int) -> str:
        """``"complete"``, ``"partial"``, ``"missing"`` or ``"damaged"``."""
        found = self._shard(view, shard)
        if found is None:
            return "damaged" if (view, shard) in self._damaged else "missing"
        return "complete" if bool(found.column(_KNOWN.name).all()) else "partial"

    def unfinished(self) -> list[tuple[int, int]]:
        """The views and shards that are not complete."""
        places = ((view, shard) for view in range(self.views) for shard in range(self.shards))
        return [place for place in places if self.state_of(*place) != "complete"]

    def known(self) -> int:
        """Number of records in shards that are whole and undamaged."""
        places = ((view, shard) for view in range(self.views) for shard in range(self.shards))
        found = (self._shard(*place) for place in places)
        return sum(int(shard.column(_KNOWN.name).sum()) for shard in found if shard is not None)

    def refresh(self) -> None:
        """Look again at what other processes may have written; files that have not changed are not verified again."""
        self._damaged.clear()
        self._open = {place: shard for place, shard in self._open.items() if shard.is_current}

    def path_of(self, view: int, shard: int) -> Path:
        """A shard's file."""
        return self._folder_of(view) / f"{shard:05d}.shard"

    def samples_of(self, shard: int) -> range:
        """The samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, without the byte that tells whether it is known."""
        return bytes_of(self.fields)

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files: a memory map would be pickled as a copy of its whole file."""
        return {**vars(self), "_open": {}}

    def _shard(self, view: int, shard: int) -> RowFile | None:
        place = (view, shard)
        if place not in self._open and place not in self._damaged:
            path = self.path_of(view, shard)
            if not path.exists():
                return None
            try:
                file = RowFile(path, self._layout(view, shard), way_out="remove it, and it is made again")
                self._open[place] = file.verify()
            except DamagedError:
                self._damaged.add(place)
        return self._open.get(place)

    # Writing

    def write_shard(self, view: int, shard: int, *pieces: Rows, known: NDArray[np.bool_] | None = None) -> None:
        """Write a shard, in place of the one that may be there.

        Args:
            view: number of the view.
            shard: number of the shard.
            pieces: arrays by field, which hold together one row for each of the shard's samples in order; a single one
                with ``known``.
            known: bool ``(N,)``, which of the rows are kept; ``None``: all.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        count = len(self.samples_of(shard))
        known = np.ones(count, dtype=np.bool_) if known is None else known
        lengths = [len(next(iter(rows.values()))) for rows in pieces]
        if sum(lengths) != count:
            name, _, shape = self.fields[0]
            raise InputError(
                f"the store {self.folder} needs {name} {(count, *shape)}, and was given {(sum(lengths), *shape)}"
            )
        columns = {field.name: list(map(partial(self._fitting, field), pieces, lengths)) for field in self.fields}
        if not known.all():
            # What is not known is zero, so that a store's bytes tell nothing of how it came about.
            for field in self.fields:
                (given,) = columns[field.name]
                is_known = known.reshape(-1, *[1] * len(field.shape))
                columns[field.name] = [np.where(is_known, given, np.zeros((), field.kind))]
        with explaining_disk_errors(self.folder):
            self._folder_of(view).mkdir(exist_ok=True)
            RowFile.write(self.path_of(view, shard), self._layout(view, shard), {**columns, _KNOWN.name: [known]})
        self._open.pop((view, shard), None)
        self._damaged.discard((view, shard))

    def append(self, view: int, rank: int, samples: NDArray[np.int64], rows: Rows) -> None:
        """Keep records in the order they come, for `seal`.

        Args:
            view: number of the view, the same for all records.
            rank: number of this process; each process has a log of its own.
            samples: int64 ``(N,)``.
            rows: arrays ``(N, ...)`` by field.

        Raises:
            InputError: the disk is full, or the folder cannot be written to.
        """
        count = len(samples)
        checked = {field.name: self._fitting(field, rows, count) for field in self.fields}
        with explaining_disk_errors(self.folder):
            self._folder_of(view).mkdir(exist_ok=True)
            self._log_of(view, rank).append({**checked, _SAMPLE.name: samples}, count)

    def _fitting(self, field: Field, rows: Rows, count: int) -> NDArray[Any]:
        """A field of some rows, of the type that stands in a file."""
        if rows.keys() != {other.name for other in self.fields}:
            names = ", ".join(other.name for other in self.fields)
            raise InputError(f"the store {self.folder} holds {names}, and was given {', '.join(rows)}")
        values = np.asarray(rows[field.name], dtype=field.kind)
        if values.shape != (count, *field.shape):
            raise InputError(
                f"the store {self.folder} needs {field.name} {(count, *field.shape)}, and was given {values.shape}"
            )
        return values

    def mend_log(self, view: int, rank: int) -> None:
        """Cut off what a killed process left of its last block; what is appended afterwards can then be read."""
        self._log_of(view, rank).mend()

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
        blocks = [(rows[_SAMPLE.name], rows) for path in logs for rows in self._log(path).blocks()]
        samples_of_all = np.concatenate([np.zeros(0, np.int64), *(samples for samples, _ in blocks)])
        for shard in np.unique(samples_of_all // self.shard_size).tolist():
            whole, known = self._contents(view, shard)
            for samples, rows in blocks:
                chosen = np.flatnonzero(samples // self.shard_size == shard)
                within = samples[chosen] % self.shard_size
                known[within] = True
                for name, values in whole.items():
                    values[within] = rows[name][chosen]
            self.write_shard(view, shard, whole, known=known)
        for path in logs:
            path.unlink()

    def _contents(self, view: int, shard: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """What a shard holds, and which of it is known."""
        before = self._shard(view, shard)
        if before is not None:
            return {f.name: before.column(f.name).copy() for f in self.fields}, before.column(_KNOWN.name).copy()
        count = len(self.samples_of(shard))
        return {f.name: np.zeros((count, *f.shape), f.kind) for f in self.fields}, np.zeros(count, dtype=np.bool_)

    def _layout(self, view: int, shard: int) -> Layout:
        return Layout((*self.fields, _KNOWN), len(self.samples_of(shard)), {"view": view, "shard": shard})

    def _folder_of(self, view: int) -> Path:
        return self.folder / f"view_{view:05d}"

    def _log_of(self, view: int, rank: int) -> RecordLog:
        return self._log(self._folder_of(view) / f"rank_{rank}.log")

    def _log(self, path: Path) -> RecordLog:
        return RecordLog(path, (_SAMPLE, *self.fields))


def sweep_records(folder: Path) -> None:
    """Remove the unfinished files that killed processes left in a folder of records; called while nobody writes."""
    # By their full names: what else lies in the folder is not the store's.
    sweep_partial(folder, HEADER, "view_*/*.shard")
