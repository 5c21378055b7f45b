"""What data sets have at hand of all their samples, without making them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from distill_lightning.data.batch import Batch
from distill_lightning.data.digests import digest_of, digests_of_rows, has_digest

# Bytes of an array that are looked at; it takes a second or two.
_LARGEST = 2**30
# Under which names data sets keep what they have, without the underscores around them.
_NAMES = ("samples", "imgs", "files", "paths", "image_files", "image_paths", "file_names", "filenames", "names")
_LABELS = ("targets", "labels", "target", "label", "y")
_CONTENTS = ("data", "images", "inputs", "features", "x")
_WRAPPED = ("dataset", "subset", "base")
# Under which names a sample that is a mapping has its label.
_LABELLED = ("target", "label", "y")

Places = Any
"""Some samples: int64 ``(N,)``, or a slice."""


class Columns(NamedTuple):
    """What a data set has at hand of all its samples; one with a method ``columns()`` is asked for it.

    Attributes:
        names: one for each sample, of a file or not. What all names begin with, up to a ``/``, is where the data lie
            and does not count. ``None``: there are none.
        labels: a tensor, an array or a sequence; ``None``: not at hand.
        contents: tensors, arrays or sequences, each with a row for each sample; empty: not at hand.
        folder: where the names are files below.
    """

    names: Sequence[Any] | None = None
    labels: Any = None
    contents: tuple[Any, ...] = ()
    folder: str = ""


class SampleRows(NamedTuple):
    """Some bytes for each sample, which differ where samples do; each ``None`` where it is not known.

    Attributes:
        names: of the samples.
        labels: their digests.
        contents: digests of the samples without their labels; where they are files, their sizes.
        paths: of the files, where the contents are sizes.
    """

    names: list[bytes] | None = None
    labels: list[bytes] | None = None
    contents: list[bytes] | None = None
    paths: list[bytes] | None = None


def length_of(dataset: Any) -> int | None:
    """Number of samples; ``None``: the data set cannot tell."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def rows_at_hand(dataset: Any, places: Places = slice(None)) -> SampleRows:
    """What a data set has at hand of some samples, in the order of their places.

    Looked for are tensors, arrays and lists under the usual names, also in a `Subset`, a `ConcatDataset` or a wrapper
    of the same length.
    """
    if isinstance(dataset, Subset):
        return rows_at_hand(dataset.dataset, np.asarray(dataset.indices)[places])
    if isinstance(dataset, ConcatDataset):
        return _joined(dataset, places)
    if isinstance(dataset, (list, tuple)):
        return parts_of_samples([dataset[place] for place in _numbers(dataset, places)])
    count = length_of(dataset)
    held = getattr(dataset, "__dict__", {})
    found = _rows_of(_columns(dataset, held, count or 0), places)
    inner = next((held[name] for name in _WRAPPED if isinstance(held.get(name), (Dataset, list))), None)
    if found == SampleRows() and inner is not None and length_of(inner) == count:
        return rows_at_hand(inner, places)
    return found


def gives_what_it_holds(dataset: Any) -> bool:
    """Whether ``[]`` is known to give what is at hand; others may map, correct or reorder it on its way out."""
    if type(dataset) is Subset:
        return gives_what_it_holds(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(gives_what_it_holds, dataset.datasets))
    is_own = type(dataset).__module__.partition(".")[0] == __name__.partition(".")[0]
    return is_own or type(dataset) in (TensorDataset, list, tuple)


def parts_of_samples(samples: Sequence[Any]) -> SampleRows:
    """Labels and contents of samples that are there; of a sequence its first two parts count, as in a batch."""
    pairs = [_parts(sample) for sample in samples]
    return SampleRows(labels=[digest_of(label) for label, _ in pairs], contents=[digest_of(rest) for _, rest in pairs])


def _parts(sample: Any) -> tuple[Any, Any]:
    """A sample's label, and the rest of it."""
    if isinstance(sample, Batch):
        return sample.target, sample.input
    named = sample._asdict() if hasattr(sample, "_asdict") else sample
    if isinstance(named, Mapping):
        label = next((name for name in _LABELLED if name in named), None)
        return named.get(label), {name: part for name, part in named.items() if name != label}
    if isinstance(sample, (list, tuple)) and len(sample) >= 2:
        return sample[1], sample[0]
    return None, sample


def _joined(dataset: ConcatDataset[Any], places: Places) -> SampleRows:
    parts = [rows_at_hand(part) for part in dataset.datasets]
    wanted = np.arange(len(dataset))[places].tolist()
    # Of each sample, which part it is in and where.
    ends = [0, *accumulate(len(part) for part in dataset.datasets)]  # type: ignore[arg-type]  # all have a length
    numbers = np.searchsorted(ends, wanted, side="right") - 1

    def column(name: str) -> list[bytes] | None:
        columns = [getattr(part, name) for part in parts]
        if any(rows is None for rows in columns):
            return None
        return [columns[number][place - ends[number]] for number, place in zip(numbers, wanted, strict=True)]

    return SampleRows(*map(column, SampleRows._fields))


def _columns(dataset: Any, held: Mapping[str, Any], count: int) -> Columns:
    given = dataset.columns() if callable(getattr(type(dataset), "columns", None)) else None
    if isinstance(given, Columns):
        return given
    if isinstance(dataset, TensorDataset):
        first, *others = dataset.tensors
        return Columns(labels=others[0] if others else None, contents=(first, *others[1:]))
    # Attributes of the object itself: a property may take its time.
    known = {name.strip("_").lower(): value for name, value in held.items() if length_of(value) == count}
    columns = {name: value for name, value in known.items() if _is_column(value)}
    names = next((known[name] for name in _NAMES if name in known and _are_names(known[name])), None)
    if names is not None and isinstance(names[0], tuple):
        names = [pair[0] for pair in names]
    labels = next((columns[name] for name in _LABELS if name in columns), None)
    return Columns(names, labels, tuple(columns[name] for name in _CONTENTS if name in columns))


def _are_names(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    first = value[0][0] if isinstance(value[0], tuple) and value[0] else value[0]
    return isinstance(first, (str, bytes, os.PathLike))


def _is_column(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        # A mapped file may be larger than the memory.
        return not isinstance(value, np.memmap) and value.nbytes <= _LARGEST
    if isinstance(value, Tensor):
        return value.layout == torch.strided and value.nbytes <= _LARGEST
    # A list with None in it may be about to be filled.
    return isinstance(value, (list, tuple)) and all(map(has_digest, value))


def _rows_of(columns: Columns, places: Places) -> SampleRows:
    names = sizes = paths = None
    if columns.names is not None:
        every = [os.fsencode(name) for name in columns.names]
        start = _common(every)
        chosen = [every[place] for place in _numbers(every, places)]
        names = [name[start:] + b"\0" for name in chosen]
        folder = os.path.join(os.fsencode(columns.folder), b"")  # noqa: PTH118  # of a million files, Path takes long
        if chosen and Path(os.fsdecode(folder + chosen[0])).is_file():
            paths = [folder + name for name in chosen]
            sizes = [b"%d " % os.stat(path).st_size for path in paths]  # noqa: PTH116
    labels = None if columns.labels is None else _rows_of_column(columns.labels, places)
    parts = [_rows_of_column(part, places) for part in columns.contents]
    contents = [b"".join(row) for row in zip(*parts, strict=True)] if parts else sizes
    return SampleRows(names, labels, contents, None if parts else paths)


def _common(names: list[bytes]) -> int:
    """How many bytes, up to a ``/``, all names begin with."""
    first, last = min(names, default=b""), max(names, default=b"")
    same = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:same].rfind(b"/") + 1


def _rows_of_column(column: Any, places: Places) -> list[bytes]:
    if isinstance(column, (list, tuple)) and column and isinstance(column[0], (int, float)):
        column = np.asarray(column)
    if isinstance(column, np.ndarray) and column.dtype.kind in "biufc":
        return digests_of_rows(column[places])
    if isinstance(column, Tensor):
        return digests_of_rows(column[places if isinstance(places, slice) else torch.from_numpy(places)])
    return [digest_of(column[place]) for place in _numbers(column, places)]


def _numbers(column: Sequence[Any], places: Places) -> list[int]:
    numbers: list[int] = np.arange(len(column))[places].tolist()
    return numbers
