"""Rows of a store in files beside the checkpoint, which the processes of a node map and so share."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import distributed as dist

from distill_lightning.errors import InputError
from distill_lightning.processes import all_reduce, broadcast, is_alone
from distill_lightning.storage.files import explaining_disk_errors, sweep_partial
from distill_lightning.storage.rows import Layout, RowFile

T = TypeVar("T")

_TRAINING = r"[0-9a-f]{8}"
# The training, the generation, and a pending file's number.
_NAME = rf"{_TRAINING}\.([0-9]{{6,}})(?:\.rows|\.([0-9]{{6,}})\.pending)"
_MADE_BY_HAND = "it was not written by this package, or it was changed since: resume from another checkpoint"
_WAY_OUT = (
    "name the folder that holds it, with load_state_dict(state, folder=...) or in a training StoredPast(folder=...), "
    "or resume from a later checkpoint; a larger keep keeps the files of more checkpoints"
)
_FULL = "make room and resume from the last checkpoint, whose files are kept, or name another folder"
_NOT_SHARED = "let all processes of a node see one folder"


class Sidecar:
    """The folder in which a `PredictionStore` keeps its rows, and which files of it are kept.

    ::

        7f3a90c1.000004.rows             readable rows after the 4th `PredictionStore.advance` of training 7f3a90c1
        7f3a90c1.000004.000002.pending   what was written since, at the 2nd checkpoint before the next `advance`

    Every training that begins has a number of its own, and one that is resumed goes on under its number: what a killed
    training left is written over. So two trainings that are resumed at once from one checkpoint need two folders. Files
    of other trainings are never touched.

    The folder keeps the rows of the last ``keep`` generations and of the last ``keep - 1`` that a checkpoint was made
    of, and the last ``keep`` pending files that belong to them. All methods must be called by all processes.

    Args:
        folder: where the files are; made when the first one is written.
        keep: how many generations.
        writes: whether this process writes; one of each node does.

    Raises:
        InputError: ``keep`` is less than 2: the one that the last checkpoint refers to would be removed too early.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, writes: bool = True) -> None:
        if keep < 2:
            raise InputError(f"keep must be at least 2, the new rows and those of the last checkpoint, got {keep}")
        self.folder, self.keep, self.writes = Path(folder).absolute(), keep, writes
        self.training = ""
        self.generation = self._pendings = 0
        self._saved: list[int] = []

    def advance(self, layout: Layout, columns: Mapping[str, Iterable[NDArray[Any]]]) -> RowFile:
        """Write and map the rows of the next generation.

        Args:
            layout: of the file.
            columns: the rows by field, see `RowFile.write`.

        Raises:
            InputError: the disk is full or refuses; then nothing has changed.
        """
        file = self._write_and_map(self.generation + 1, 0, layout, columns)
        self.generation, self._pendings = self.generation + 1, 0
        all_or_none(self._tidy)
        return file

    def pend(self, layout: Layout, columns: Mapping[str, Iterable[NDArray[Any]]]) -> RowFile:
        """Write and map the rows that are not readable yet; arguments and errors as for `advance`."""
        file = self._write_and_map(self.generation, self._pendings + 1, layout, columns)
        self._pendings += 1
        all_or_none(self._tidy)
        return file

    def state_dict(self, rows: RowFile | None, pending: RowFile | None) -> dict[str, Any]:
        """What a checkpoint says of the files, plain values; from now on they count as the files of a checkpoint."""
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
        """Go on where a checkpoint was made, whose files were found.

        Raises:
            InputError: it names a training, or numbers, that this class does not give, or a training whose files it
                does not know.
        """
        # Files whose names begin so are written over and removed.
        if state["training"] != "" and not _matches(_TRAINING, state["training"]):
            raise InputError(f"the checkpoint names the training {state['training']!r}: {_MADE_BY_HAND}")
        files = [file["file"] for file in (state["rows"], state["pending"]) if file is not None]
        if state["training"] and not any(name.startswith(f"{state['training']}.") for name in files):
            raise InputError(
                f"the checkpoint names the training {state['training']!r} and none of its files: {_MADE_BY_HAND}"
            )
        numbers = [state["generation"], state["pendings"], *state["saved"]]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"the checkpoint names generations of past predictions {numbers}: {_MADE_BY_HAND}")
        self.training, self.generation, self._pendings = state["training"], state["generation"], state["pendings"]
        self._saved = list(state["saved"])

    def _write_and_map(
        self, generation: int, pending: int, layout: Layout, columns: Mapping[str, Iterable[NDArray[Any]]]
    ) -> RowFile:
        """The file of a generation, or one that is pending in it, written by one process and mapped by all."""
        self.training = self.training or _draw()
        path = self.folder / _name(self.training, generation, pending)
        place = {"training": self.training, "generation": generation, "pending": pending}
        layout = layout._replace(about={**layout.about, **place})

        def write() -> None:
            if self.writes:
                with explaining_disk_errors(self.folder, way_out=_FULL):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    RowFile.write(path, layout, columns)

        all_or_none(write)
        file = all_or_none(lambda: RowFile(path, layout, way_out=_NOT_SHARED))
        crc = torch.tensor(file.crc)
        if not is_alone():
            broadcast(crc)
        return all_or_none(lambda: _with_crc(file, int(crc)))

    def _tidy(self) -> None:
        """Remove what is not kept, and what killed processes left half-written; no process writes now."""
        if not self.writes:
            return
        generations = {*range(self.generation - self.keep + 1, self.generation + 1), *self._saved[1 - self.keep :]}
        pending, removed = [], []
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
        with explaining_disk_errors(self.folder):
            sweep_partial(self.folder, f"{self.training}.*")
            for path in [*removed, *pending[: -self.keep]]:
                path.unlink(missing_ok=True)


def all_or_none(act: Callable[[], T]) -> T:
    """Do something in every process, or fail in every one: one that fails alone would leave the others waiting.

    Raises:
        InputError: what this process raised, or that another one did.
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


def open_reference(reference: Mapping[str, Any], folders: Iterable[Path], layout: Layout) -> RowFile:
    """The file that a checkpoint refers to, read once from end to end.

    Args:
        reference: what `Sidecar.state_dict` says of it.
        folders: where it may be; the first one that has it counts.
        layout: what it must hold.

    Raises:
        InputError: it is in none of them, damaged, another one, or of a name that this package does not give.
    """
    if not _matches(_NAME, reference["file"]):
        raise InputError(f"the checkpoint refers to past predictions {reference['file']!r}: {_MADE_BY_HAND}")
    # Each once, in this order.
    places = list(dict.fromkeys(folder.absolute() for folder in folders))
    path = next((place / reference["file"] for place in places if (place / reference["file"]).is_file()), None)
    if path is None:
        raise InputError(
            f"the past predictions {reference['file']} that the checkpoint refers to are not in "
            f"{' or '.join(map(str, places))}: {_WAY_OUT}"
        )
    return _with_crc(RowFile(path, layout, way_out=_WAY_OUT).verify(), reference["crc"])


def _with_crc(file: RowFile, crc: int) -> RowFile:
    """The file, if it has this checksum and so is the one that is meant."""
    if file.crc != crc:
        raise InputError(
            f"{file.path} has other rows than the checkpoint refers to, another training replaced it: {_WAY_OUT}"
        )
    return file


def _matches(pattern: str, name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None


def _reference(file: RowFile | None) -> dict[str, Any] | None:
    if file is None:
        return None
    return {"folder": str(file.path.parent), "file": file.path.name, "crc": file.crc, "bytes": file.nbytes}


def _name(training: str, generation: int, pending: int) -> str:
    name = f"{training}.{generation:06d}"
    return f"{name}.{pending:06d}.pending" if pending else f"{name}.rows"


def _draw() -> str:
    """A number for a training, the same in all processes, and no draw of torch's that another would miss."""
    number = torch.tensor(secrets.randbits(32))
    if not is_alone():
        broadcast(number)
    return f"{int(number):08x}"
