"""Rows of a store in files beside the checkpoint, which the processes of a node map and so share."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from distill_lightning.errors import InputError, refusing
from distill_lightning.processes import all_reduce, broadcast, is_alone
from distill_lightning.storage.files import CHECKSUM_BYTES, checksum_fits, telling, with_checksum, write_whole

T = TypeVar("T")

FORMAT = 1
# A page, so that the rows begin with one.
_HEADER_BYTES = 4096
# The training, the generation, and a pending file's number.
_NAME = r"[^.]+\.(\d+)(?:\.rows|\.(\d+)\.pending)"
_WAY_OUT = (
    "name the folder that holds it as store_dir, or resume from a later checkpoint; a larger store_keep keeps the "
    "files of more checkpoints"
)
_FULL = "make room and resume from the last checkpoint, whose files are kept, or name another folder as store_dir"


class Column(NamedTuple):
    """One tensor of rows.

    Attributes:
        name: how it is called.
        dtype: of its numbers.
        width: numbers in a row.
    """

    name: str
    dtype: torch.dtype
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize


class RowFile:
    """Rows by their number, in a file that is mapped read-only and never changes.

    On disk: 4096 bytes of JSON, filled up with blanks, that say what the rows are; the rows of each column, one column
    after the other; the CRC-32 of everything before.

    Args:
        path: the file.
        header: what it must say of itself.
        columns: of the rows.

    Raises:
        InputError: the file is gone, cannot be read, is damaged, or of another store.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], columns: Iterable[Column]) -> None:
        self.path, self.header, self.columns = path, dict(header), tuple(columns)
        count = self.header["rows"]
        self.nbytes = _HEADER_BYTES + count * sum(column.nbytes for column in self.columns) + CHECKSUM_BYTES
        if not path.is_file():
            raise InputError(f"the past predictions {path} are not there: let all processes of a node see one folder")
        if path.stat().st_size < _HEADER_BYTES + CHECKSUM_BYTES:
            raise self._damaged()
        with refusing(f"the past predictions {path} cannot be read", OSError):
            self._bytes: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        self._compare()
        if len(self._bytes) != self.nbytes:
            raise self._damaged()
        self._rows, begin = {}, _HEADER_BYTES
        for column in self.columns:
            end = begin + count * column.nbytes
            self._rows[column.name] = self._bytes[begin:end].reshape(count, column.nbytes)
            begin = end

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the array would be the whole file in memory.
        return type(self), (self.path, self.header, self.columns)

    @property
    def crc(self) -> int:
        """The CRC-32 that stands in the file."""
        return int.from_bytes(self._bytes[-CHECKSUM_BYTES:].tobytes(), "little")

    def check(self, crc: int, *, whole: bool) -> RowFile:
        """Look whether this is the very file that is meant.

        Args:
            crc: of that file.
            whole: whether to read everything, and not only what the file says of itself.

        Raises:
            InputError: it is not, or it is damaged.
        """
        if whole and not checksum_fits(self._bytes.data):
            raise self._damaged()
        if self.crc != crc:
            raise InputError(
                f"{self.path} has other rows than the checkpoint refers to, another training replaced it: {_WAY_OUT}"
            )
        return self

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """Some rows.

        Args:
            index: ``(N,)`` on the CPU.

        Returns:
            Tensors ``(N, width)`` by column, copies.
        """
        found = {column.name: torch.empty(len(index), column.width, dtype=column.dtype) for column in self.columns}
        for name, rows in found.items():
            np.take(self._rows[name], index.numpy(), axis=0, out=rows.view(torch.uint8).numpy())
        return found

    def _compare(self) -> None:
        try:
            found = json.loads(self._bytes[:_HEADER_BYTES].tobytes())
        except ValueError:
            raise self._damaged() from None
        different = [
            f"{name} is {found.get(name)}, not {value}"
            for name, value in self.header.items()
            if found.get(name) != value
        ]
        if different:
            if not checksum_fits(self._bytes.data):
                raise self._damaged()
            raise InputError(f"{self.path} belongs to another store, its {'; its '.join(different)}: {_WAY_OUT}")

    def _damaged(self) -> InputError:
        return InputError(f"{self.path} is damaged: put back the file that was there, {_WAY_OUT}")


class Sidecar:
    """The folder in which a `PredictionStore` keeps its rows, and which files of it are kept.

    ::

        7f3a90c1.000004.rows             readable rows after the 4th `PredictionStore.advance` of training 7f3a90c1
        7f3a90c1.000004.000002.pending   what was written since, at the 2nd checkpoint before the next `advance`

    Every training that begins has a number of its own, and one that is resumed goes on under its number: what a killed
    training left is written over. So two trainings that are resumed at once from one checkpoint need two folders. Files
    of other trainings are never touched.

    Kept are the rows of the last ``keep`` generations and of the last ``keep - 1`` that a checkpoint was made of, and
    the last ``keep`` pending files that belong to them. All methods must be called by all processes.

    Args:
        folder: where the files are; made when the first one is written.
        keep: how many generations.
        writes: whether this process writes; one of each node does.

    Raises:
        InputError: ``keep`` is less than 2: the one that the last checkpoint refers to would be removed too early.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, writes: bool = True) -> None:
        if keep < 2:
            raise InputError(
                f"store_keep must be at least 2, the new rows and those of the last checkpoint, got {keep}"
            )
        self.folder, self.keep, self.writes = Path(folder).absolute(), keep, writes
        self.training = ""
        self.generation = self._pendings = 0
        self._saved: list[int] = []

    def advance(self, about: Mapping[str, Any], columns: Iterable[Column], parts: Iterable[Tensor]) -> RowFile:
        """Write and map the rows of the next generation.

        Args:
            about: what they are, plain values; the number of rows among them.
            columns: of the rows.
            parts: the rows, contiguous, column by column.

        Raises:
            InputError: the disk is full or refuses; then nothing has changed.
        """
        if not self.training:
            self.training = _draw()
        header = self._header(about, self.generation + 1, 0)
        file = self._written(header, columns, parts)
        self.generation, self._pendings = self.generation + 1, 0
        together(self._tidy)
        return file

    def pend(self, about: Mapping[str, Any], columns: Iterable[Column], parts: Iterable[Tensor]) -> RowFile:
        """Write and map what is not readable yet; arguments and errors as `advance`."""
        if not self.training:
            self.training = _draw()
        file = self._written(self._header(about, self.generation, self._pendings + 1), columns, parts)
        self._pendings += 1
        together(self._tidy)
        return file

    def state_dict(self, rows: RowFile | None, pending: RowFile | None) -> dict[str, Any]:
        """What a checkpoint says of the files, plain values; from now on they are those of a checkpoint."""
        self._saved = [*(old for old in self._saved if old != self.generation), self.generation][-self.keep :]
        return {
            "training": self.training,
            "generation": self.generation,
            "pendings": self._pendings,
            "saved": self._saved,
            "rows": _reference(rows),
            "pending": _reference(pending),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self.training, self.generation, self._pendings = state["training"], state["generation"], state["pendings"]
        self._saved = list(state["saved"])

    def _written(self, header: Mapping[str, Any], columns: Iterable[Column], parts: Iterable[Tensor]) -> RowFile:
        path = self.folder / _name(header)

        def write() -> None:
            if self.writes:
                with telling(self.folder, way_out=_FULL):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_whole(path, with_checksum(_content(header, parts)))

        together(write)
        file = together(lambda: RowFile(path, header, columns))
        crc = torch.tensor(file.crc)
        if not is_alone():
            broadcast(crc)
        return together(lambda: file.check(int(crc), whole=False))

    def _header(self, about: Mapping[str, Any], generation: int, pending: int) -> dict[str, Any]:
        return {**about, **_format(), "training": self.training, "generation": generation, "pending": pending}

    def _tidy(self) -> None:
        """Remove what is not kept, and what killed processes left half-written; no process writes now."""
        if not self.writes:
            return
        generations = {*range(self.generation - self.keep + 1, self.generation + 1), *self._saved[1 - self.keep :]}
        pending = []
        removed = list(self.folder.glob(f"partial.*.{self.training}.*"))
        for path in sorted(self.folder.glob(f"{self.training}.*")):
            place = re.fullmatch(_NAME, path.name)
            generation, number = (int(part or 0) for part in place.groups()) if place else (sys.maxsize, 0)
            if (generation, number) > (self.generation, self._pendings):
                # Of a training that got further, and was then resumed from here; or no file of ours.
                continue
            if generation not in generations:
                removed.append(path)
            elif number:
                pending.append(path)
        with telling(self.folder):
            for path in [*removed, *pending[: -self.keep]]:
                path.unlink(missing_ok=True)


def together(act: Callable[[], T]) -> T:
    """Do something in every process, or fail in every one: who fails alone would leave the others waiting.

    Raises:
        InputError: of this process, or that another one had one.
    """
    problem: InputError | None = None
    try:
        result = act()
    except InputError as error:
        problem = error
    failed = torch.tensor(int(problem is not None))
    if not is_alone():
        all_reduce(failed, dist.ReduceOp.MAX)
    if problem is not None:
        raise problem
    if failed:
        raise InputError("another process has failed at the files of its store: the line that it gives says why")
    return result


def open_reference(
    reference: Mapping[str, Any], folders: Iterable[Path], header: Mapping[str, Any], columns: Iterable[Column]
) -> RowFile:
    """The file that a checkpoint refers to, read once from end to end.

    Args:
        reference: what `Sidecar.state_dict` says of it.
        folders: where it may be, the first one that has it counts.
        header: what it must say of itself, beside what the reference does.
        columns: of its rows.

    Raises:
        InputError: it is in none of them, damaged, or another one.
    """
    # Each once, in this order.
    places = list(dict.fromkeys(folder.absolute() for folder in folders))
    path = next((place / reference["file"] for place in places if (place / reference["file"]).is_file()), None)
    if path is None:
        raise InputError(
            f"the past predictions {reference['file']} that the checkpoint refers to are not in "
            f"{' or '.join(map(str, places))}: {_WAY_OUT}"
        )
    return RowFile(path, {**header, **_format()}, columns).check(reference["crc"], whole=True)


def _reference(file: RowFile | None) -> dict[str, Any] | None:
    if file is None:
        return None
    return {"folder": str(file.path.parent), "file": file.path.name, "crc": file.crc, "bytes": file.nbytes}


def _format() -> dict[str, Any]:
    return {"format": FORMAT, "byteorder": sys.byteorder}


def _name(header: Mapping[str, Any]) -> str:
    name = f"{header['training']}.{header['generation']:06d}"
    return f"{name}.{header['pending']:06d}.pending" if header["pending"] else f"{name}.rows"


def _content(header: Mapping[str, Any], parts: Iterable[Tensor]) -> Iterator[Any]:
    yield json.dumps(header).encode().ljust(_HEADER_BYTES)
    for part in parts:
        yield part.cpu().view(torch.uint8).flatten().numpy()


def _draw() -> str:
    """A number for a training, the same in all processes, and no draw of torch's that another would miss."""
    number = torch.tensor(secrets.randbits(32))
    if not is_alone():
        broadcast(number)
    return f"{int(number):08x}"
