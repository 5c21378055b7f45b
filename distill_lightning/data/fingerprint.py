"""What tells data from others: number, names, labels, order and, where they are cheap to see, contents of samples.

The same data have the same fingerprint wherever they lie, whenever they were written, and however they are batched,
shuffled, loaded and augmented at random.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from distill_lightning.data.columns import SampleRows, gives_what_it_holds, length_of, parts_of_samples, rows_at_hand
from distill_lightning.data.digests import digest_of

Fingerprint = dict[str, Any]
"""Plain values by name: ``count``; digests of the ``names``, ``labels`` and ``contents`` of all samples in their order;
``some_labels`` and ``some_contents``, of a few samples; ``samples``, of all samples in whatever order; and ``seen``,
what was looked at, in words. ``None``: not known."""

LOOKED_AT = 256
"""Samples that are made, or files that are read, where to look at all would take long."""

# Bytes of a file that are read.
_BEGINNING = 2**20
# So many samples are made at least, to see whether they are always the same.
_TRIED = 64


def data_fingerprint(dataset: Any, make: Callable[[int], Any] | None = None) -> Fingerprint:
    """The fingerprint of a data set.

    Looked at are the names, labels and contents of all samples as far as the data set has them at hand (see
    `rows_at_hand`), or the sizes of their files; beside these, the contents of `LOOKED_AT` files. Where labels or
    contents are not at hand, `LOOKED_AT` samples are made, several times each: what is not always the same, because it
    is augmented at random, is left out.

    Args:
        dataset: with a length and ``[]``; of any other nothing but a length is known.
        make: makes a sample of the data set; ``None``: its ``[]``.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from distill_lightning.data.fingerprint import data_difference, data_fingerprint
        >>> inputs, labels = torch.rand(6, 2), torch.tensor([0, 1, 1, 0, 0, 1])
        >>> known = data_fingerprint(TensorDataset(inputs, labels))
        >>> data_difference(known, data_fingerprint(TensorDataset(inputs.roll(1, 0), labels.roll(1))))
        'another order'
        >>> data_difference(known, data_fingerprint(TensorDataset(inputs, labels.roll(1))))
        'other labels'
    """
    count = length_of(dataset)
    if count is None or isinstance(dataset, IterableDataset):
        return _fingerprint(count, SampleRows(), SampleRows(), looked_at=0)
    rows, some = rows_at_hand(dataset), SampleRows()
    places = np.unique(np.linspace(0, count - 1, num=min(count, LOOKED_AT)).round().astype(int)).tolist()
    if rows.paths is not None:
        some = SampleRows(contents=[_beginning(rows.paths[place]) for place in places])
    elif count and (rows.labels is None or rows.contents is None or not gives_what_it_holds(dataset)):
        # A copy: what opens its files when it is first asked must not do so before there are workers.
        some = _made(copy.copy(dataset).__getitem__ if make is None else make, places)
        if len(places) == count:
            rows, some = _completed(rows, some)
    return _fingerprint(count, rows, some, looked_at=len(places))


def loader_fingerprint(loader: Any, *, view: int | None = None) -> Fingerprint:
    """The fingerprint of the data set that a loader reads.

    Args:
        loader: a `torch.utils.data.DataLoader`; of any other, nothing is known.
        view: of samples that are asked for by index and view; ``None``: by index alone.
    """
    if not isinstance(loader, DataLoader):
        return data_fingerprint(None)
    dataset: Any = loader.dataset
    # What was put around it to tell indices is not the data's own.
    dataset = copy.copy(getattr(dataset, "unindexed", dataset))
    many = getattr(dataset, "__getitems__", None)

    def make(index: int) -> Any:
        key: Any = index if view is None else (index, view)
        if loader.batch_sampler is None:
            # With batch_size=None the data set itself makes batches.
            return dataset[[key]]
        found = dataset[key] if many is None else many([key])
        return found[0] if isinstance(found, list) else found

    return data_fingerprint(dataset, make)


def data_difference(known: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """In what data differ, in words, by their fingerprints; empty: in nothing that is known of both."""

    def differs(name: str) -> bool:
        return None not in (known.get(name), present.get(name)) and known[name] != present[name]

    if differs("count"):
        return f"{known['count']} samples, not {present['count']}"
    of_all = [name for name in ("names", "labels", "contents") if differs(name)]
    if of_all and known.get("samples") is not None and not differs("samples"):
        return "another order"
    found = [name for name in ("names", "labels", "contents") if name in of_all or differs(f"some_{name}")]
    if "names" in found and "contents" in found:
        # What has another name has other contents.
        found.remove("contents")
    return f"other {' and '.join(found)}" if found else ""


def _fingerprint(count: int | None, rows: SampleRows, some: SampleRows, *, looked_at: int) -> Fingerprint:
    columns = {"names": rows.names, "labels": rows.labels, "contents": rows.contents}
    few = {"labels": some.labels, "contents": some.contents}
    known = [values for values in columns.values() if values is not None]
    called = [
        "sizes" if name == "contents" and rows.paths is not None else name
        for name, values in columns.items()
        if values is not None
    ]
    seen = [f"{', '.join(called)} of all samples"] if called else []
    seen += [f"{name} of {looked_at}" for name, values in few.items() if values is not None]
    return {
        "count": count,
        **{name: _digest(values) for name, values in columns.items()},
        **{f"some_{name}": _digest(values) for name, values in few.items()},
        "samples": _digest(sorted(map(b"".join, zip(*known, strict=True))) if known else None),
        "seen": "; ".join(seen) or "nothing",
    }


def _digest(rows: list[bytes] | None) -> str | None:
    return None if rows is None else blake2b(b"".join(rows), digest_size=16).hexdigest()


def _completed(rows: SampleRows, made: SampleRows) -> tuple[SampleRows, SampleRows]:
    """What is not at hand, as all samples were made, and what was made besides."""
    parts = ("labels", "contents")
    missing = {name: getattr(made, name) for name in parts if getattr(rows, name) is None}
    return rows._replace(**missing), SampleRows(**{name: getattr(made, name) for name in parts if name not in missing})


def _beginning(path: bytes) -> bytes:
    with Path(os.fsdecode(path)).open("rb") as file:
        return digest_of(file.read(_BEGINNING))


def _made(make: Callable[[int], Any], places: Sequence[int]) -> SampleRows:
    """Labels and contents of some samples, as far as they are always the same."""
    kept: SampleRows | None = None
    for number in range(max(2, -(-_TRIED // len(places)))):
        with _drawing_from(number):
            found = parts_of_samples([make(place) for place in places])
        kept = found if kept is None else SampleRows(*map(_same, kept, found))
    return kept or SampleRows()


def _same(known: list[bytes] | None, found: list[bytes] | None) -> list[bytes] | None:
    return known if known == found else None


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Draw from a seed, and go on afterwards as if nothing had been drawn."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        # torch.manual_seed would seed the GPUs, too.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
