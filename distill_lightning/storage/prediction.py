"""What a network predicted for every sample of its training set in the epoch before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from distill_lightning.errors import InputError, refusing
from distill_lightning.storage.exchange import exchange_rows
from distill_lightning.storage.header import FORMAT
from distill_lightning.storage.prediction_rows import PredictionRows
from distill_lightning.storage.rows import Field, Layout, RowFile, dtype_name, in_pieces
from distill_lightning.storage.sidecar import Sidecar, all_or_none, open_reference

_Rows = RowFile | Mapping[str, Tensor]


class PredictionStore:
    """Probabilities by sample index, with two buffers: what is written becomes readable when `advance` is called.

    ::

        probs, known = store.read(index)      # of the last epoch
        store.write(index, logits.softmax(1))  # for the next one
        store.advance()                       # at the end of the epoch

    A row that is not written in an epoch keeps what it held. With several processes every one writes its own samples;
    `advance` and `state_dict` exchange them, must be called by all, and leave the same rows everywhere. The tensors are
    not buffers of a module, because DDP would overwrite those with rank 0's; they live where `to` puts them. Reading
    and writing with an index on that device never wait for it; with an index elsewhere, rows are copied over.

    A row takes ``K`` numbers, or with ``top_k`` that many numbers and class indices (2 bytes each up to 32,768 classes,
    then 4); both buffers together twice that, see `nbytes`.

    With a `Sidecar` the rows stand in files, which the state dict refers to. `advance` writes the readable rows to one,
    which a store on the CPU maps in place of a buffer: the processes of a node share it, and rows are gathered on the
    host. A store on another device keeps both buffers there, where nothing waits for a file, and reads files only to go
    on from a checkpoint. What is not readable yet becomes a file when `state_dict` is called.

    Args:
        num_samples: ``N``; indices are ``0`` to ``N - 1``.
        num_classes: ``K``.
        dtype: type of the stored probabilities, ``torch.float32``, ``float16`` or ``bfloat16``. Half precision is
            divided by the row's sum when read; float16 is then off by less than ``2 ** -11``.
        top_k: how many of a row's largest probabilities are kept, the rest being spread evenly over the other classes;
            ``None``: all.
        sidecar: where rows are kept instead of in the state dict; ``None``: in the state dict.

    Raises:
        InputError: a size or a type that cannot be used.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        dtype: torch.dtype = torch.float32,
        top_k: int | None = None,
        sidecar: Sidecar | None = None,
    ) -> None:
        if num_samples < 1 or num_classes < 2:
            raise InputError(
                f"PredictionStore needs at least 1 sample and 2 classes, got num_samples={num_samples} and "
                f"num_classes={num_classes}"
            )
        self._row_format = PredictionRows(num_classes, dtype=dtype, top_k=top_k)
        self.num_samples, self.num_classes, self.dtype, self.top_k = num_samples, num_classes, dtype, top_k
        self.sidecar = sidecar
        self._next = self._row_format.zeros(num_samples)
        # Empty where the file is read instead, which is not there before anything is readable.
        self._now = self._row_format.zeros(num_samples) if sidecar is None else {}
        self._file: RowFile | None = None
        self._pending_file: RowFile | None = None
        self._known = torch.zeros(num_samples, dtype=torch.bool)
        # When a sample was last written since `advance`, counted in rows of this process; -1: not yet.
        self._written = torch.full((num_samples,), -1)
        self._count = 1

    @staticmethod
    def row_bytes(num_classes: int, *, dtype: torch.dtype = torch.float32, top_k: int | None = None) -> int:
        """Bytes of one sample's row in one buffer; arguments as in the constructor."""
        return PredictionRows(num_classes, dtype=dtype, top_k=top_k).nbytes

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._known.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; mapped files do not count."""
        return sum(tensor.nbytes for tensor in (*self._now.values(), *self._next.values(), self._known, self._written))

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors."""
        self._now = {name: rows.to(device) for name, rows in self._now.items()}
        self._next = {name: rows.to(device) for name, rows in self._next.items()}
        self._known, self._written = self._known.to(device), self._written.to(device)
        if self._reads_the_file:
            self._now = {}
        elif not self._now:
            self._now = {name: torch.zeros_like(rows) for name, rows in self._next.items()}
            self._copy_into(self._now, torch.arange(self.num_samples), self._file)
        return self

    @property
    def _reads_the_file(self) -> bool:
        return self.sidecar is not None and self.device.type == "cpu"

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of some samples, as they were when `advance` was last called.

        Args:
            index: int64 ``(N,)``.

        Returns:
            Probabilities, float32 ``(N, K)``, uniform where nothing is known, and whether something is, bool ``(N,)``,
            on the index's device.

        Raises:
            InputError: on the CPU, an index of ``N`` or more.
        """
        here = index.to(self.device)
        with refusing(f"num_samples={self.num_samples} does not fit the data's indices", IndexError):
            known = self._known[here].to(index.device)
        probs = self._row_format.unpack({name: rows.to(index.device) for name, rows in self._readable(here).items()})
        # In place, since what was read is a copy.
        return probs.masked_fill_(~known[:, None], 1 / self.num_classes), known

    def write(self, index: Tensor, probs: Tensor, keep: Tensor | None = None) -> None:
        """Keep the rows of some samples for `advance`; if a sample occurs more than once, the last row wins.

        Args:
            index: int64 ``(N,)``.
            probs: probabilities ``(N, K)``; no graph is kept.
            keep: bool ``(N,)``, which rows are kept; the others are treated as if they were not in the batch, whatever
                their indices and probabilities are. ``None``: all.

        Raises:
            InputError: ``probs`` or ``keep`` has another shape or type.
        """
        count = len(index)
        if probs.shape != (count, self.num_classes):
            raise InputError(
                f"PredictionStore: {count} samples of {self.num_classes} classes need probabilities "
                f"({count}, {self.num_classes}), got {tuple(probs.shape)}"
            )
        if keep is not None and (keep.shape != (count,) or keep.dtype != torch.bool):
            raise InputError(
                f"PredictionStore: keep must be bool ({count},), one for each sample, got {dtype_name(keep.dtype)} "
                f"{tuple(keep.shape)}"
            )
        index = index.to(self.device)
        order = torch.arange(count, device=index.device) + self._count
        if keep is not None:
            # Choosing rows by a mask would wait for the device. So the others are of sample 0, and older than anything.
            others = ~keep.to(self.device)
            index, order = index.masked_fill(others, 0), order.masked_fill(others, -1)
        self._written.scatter_reduce_(0, index, order, "amax")
        # A sample that stands in the batch twice gets its last row both times, so the order of writing cannot matter.
        last = self._written[index] - self._count
        packed = self._row_format.pack(probs.detach()[last.clamp_min(0).to(probs.device)])
        for name, rows in packed.items():
            new = rows.to(self.device)
            if keep is not None:
                # A sample of which this call keeps nothing gets what it has.
                new = torch.where(last[:, None] >= 0, new, self._next[name][index])
            self._next[name][index] = new
        self._count += count

    def advance(self) -> None:
        """Make readable what all processes have written; without any, nothing changes.

        Raises:
            InputError: the sidecar's disk is full, or its folder cannot be written to.
        """
        self._exchange()
        written = self._written >= 0
        if not bool(written.any()):
            return
        for piece in in_pieces((~written).nonzero()[:, 0], self._row_format.nbytes):
            for name, rows in self._readable(piece).items():
                self._next[name][piece] = rows
        if self.sidecar is not None:
            self._write_file(self.sidecar)
        if not self._reads_the_file:
            self._now, self._next = self._next, self._now
        self._known |= written
        self._written.fill_(-1)
        self._count = 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers; what is written but not yet readable is among them, of all processes.

        With a sidecar, what it says of its files stands in place of the rows.

        Raises:
            InputError: the sidecar's disk is full, or its folder cannot be written to.
        """
        fresh = self._exchange()
        pending = (self._written >= 0).nonzero()[:, 0]
        state = {"format": FORMAT, "num_classes": self.num_classes, "known": self._known, "pending": pending}
        if self.sidecar is None:
            return {**state, **self._now, **{f"pending_{name}": rows[pending] for name, rows in self._next.items()}}
        if len(pending) and (fresh or self._pending_file is None):
            self._pending_file = self.sidecar.pend(self._layout(len(pending)), self._columns(pending))
        files = self.sidecar.state_dict(self._file, self._pending_file)
        return {**state, **self._description(), "sidecar": files}

    def load_state_dict(self, state: Mapping[str, Any], *, folder: str | Path | None = None) -> None:
        """Take the rows of a store that was made with the same arguments, but for the sidecar.

        Args:
            state: of `state_dict`.
            folder: where the files that it refers to are looked for; what is not there, in this store's folder, then in
                that of the store that was saved.

        Raises:
            InputError: the store was made with other arguments, the message names them, or by another version; or a
                file is gone, damaged or another one.
        """
        self._compare(state)
        self._file = self._pending_file = None
        now: _Rows | None
        coming: _Rows | None
        if "sidecar" in state:
            file, pending_file = all_or_none(lambda: self._opened(state, folder))
            now, coming = file, pending_file
            if self.sidecar is not None:
                self.sidecar.load_state_dict(state["sidecar"])
                self._file, self._pending_file = file, pending_file
        else:
            now = {field.name: state[field.name] for field in self._row_format.fields}
            coming = {field.name: state[f"pending_{field.name}"] for field in self._row_format.fields}
        self._known.copy_(state["known"])
        if not self._reads_the_file:
            self._copy_into(self._now, torch.arange(self.num_samples), now)
        if self.sidecar is not None and self._file is None and bool(self._known.any()):
            # The checkpoint holds the rows themselves.
            self._copy_into(self._next, torch.arange(self.num_samples), now)
            self._write_file(self.sidecar)
        self._copy_into(self._next, state["pending"], coming)
        # Older than anything that will be written from now on.
        self._written.fill_(-1)
        self._written[state["pending"].to(self.device)] = 0
        self._count = 1

    def _opened(self, state: Mapping[str, Any], folder: str | Path | None) -> tuple[RowFile | None, RowFile | None]:
        """The files that a checkpoint refers to, of readable rows and of pending ones."""
        own = None if self.sidecar is None else self.sidecar.folder

        def open_it(reference: Mapping[str, Any] | None, rows: int) -> RowFile | None:
            if reference is None:
                return None
            folders = [Path(place) for place in (folder, own, reference["folder"]) if place is not None]
            return open_reference(reference, folders, self._layout(rows))

        files = state["sidecar"]
        return open_it(files["rows"], self.num_samples), open_it(files["pending"], len(state["pending"]))

    def _compare(self, state: Mapping[str, Any]) -> None:
        version = state.get("format", 1)
        if version != FORMAT:
            raise InputError(
                f"the saved PredictionStore has format {version}, this version reads {FORMAT}: resume with the version "
                "that saved it, or begin the training again"
            )
        if "sidecar" in state:
            saved = {name: state[name] for name in self._description()}
        else:
            kept = state["probabilities"]
            saved = {
                "num_samples": len(kept),
                "num_classes": state["num_classes"],
                "top_k": kept.shape[1] if "classes" in state else None,
                "dtype": dtype_name(kept.dtype),
            }
        different = [
            f"{name}={saved[name]} and not {own}" for name, own in self._description().items() if saved[name] != own
        ]
        if different:
            raise InputError(
                f"the saved PredictionStore has {', '.join(different)}: go on with the data and the settings that it "
                "was saved with"
            )

    def _description(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples, **self._row_format.as_plain()}

    def _layout(self, count: int) -> Layout:
        """Of a file of so many rows."""
        return Layout(self._row_format.fields, count, self._description())

    def _columns(self, index: Tensor | None = None) -> dict[str, Iterator[NDArray[Any]]]:
        """Some of the rows that will be readable, or all of them, in pieces for a file."""

        def pieces(field: Field) -> Iterator[NDArray[Any]]:
            rows = self._next[field.name]
            if index is None:
                return (field.array(piece) for piece in in_pieces(rows, field.nbytes))
            return (field.array(rows[piece]) for piece in in_pieces(index, field.nbytes))

        return {field.name: pieces(field) for field in self._row_format.fields}

    def _readable(self, index: Tensor) -> dict[str, Tensor]:
        """Readable rows as they are kept, by an index on the device."""
        if not self._reads_the_file:
            return self._take(self._now, index)
        return self._row_format.zeros(len(index)) if self._file is None else self._row_format.take(self._file, index)

    def _copy_into(self, target: dict[str, Tensor], index: Tensor, source: _Rows | None) -> None:
        """Copy all rows of the source, in order, to rows of the target; without a source, nothing."""
        for numbers in in_pieces(torch.arange(len(index)), self._row_format.nbytes):
            for name, piece in ({} if source is None else self._take(source, numbers)).items():
                target[name][index[numbers].to(self.device)] = piece.to(self.device)

    def _write_file(self, sidecar: Sidecar) -> None:
        """Make a file of the rows that will be readable."""
        self._file = sidecar.advance(self._layout(self.num_samples), self._columns())
        self._pending_file = None

    def _take(self, source: _Rows, index: Tensor) -> dict[str, Tensor]:
        if isinstance(source, RowFile):
            return self._row_format.take(source, index)
        return {name: rows[index.to(rows.device)] for name, rows in source.items()}

    def _exchange(self) -> bool:
        """Bring what every process has written to all, and tell whether there was any since the last time."""
        self._written, fresh = exchange_rows(self._next, self._written)
        return fresh
