"""What a network said about every sample of its training set in the epoch before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from distill_lightning.errors import InputError, refusing
from distill_lightning.processes import all_reduce, is_alone
from distill_lightning.storage.sidecar import Column, RowFile, Sidecar, open_reference, together
from distill_lightning.storage.top_k import class_dtype, largest, spread

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Rows are exchanged, written and copied in pieces of this size, so that what is needed beside them stays small.
_PIECE_BYTES = 2**26

_Rows = RowFile | Mapping[str, Tensor]


class PredictionStore:
    """Probabilities by sample index, with two buffers: what is written becomes readable when `advance` is called.

    ::

        probs, known = store.read(index)      # of the last epoch
        store.write(index, logits.softmax(1))  # for the next one
        store.advance()                       # at the end of the epoch

    A row that is not written in an epoch keeps what it held. With several processes every one writes its own samples;
    `advance` and `state_dict` exchange them, must be called by all, and leave the same rows everywhere. The tensors are
    no buffers of a module; they live where `to` puts them. Reading and writing with an index on that device never wait
    for it; with an index elsewhere, rows are copied over.

    A row takes ``K`` numbers, or with ``top_k`` that many numbers and class indices (2 bytes each up to 32,768 classes,
    then 4); both buffers together twice that, see `nbytes`.

    With a `Sidecar` the rows stand in files, which the state dict refers to. `advance` writes the readable rows to one,
    which a store on the CPU maps in place of a buffer: the processes of a node share it, and rows are gathered on the
    host. A store on another device keeps both buffers there, where nothing waits for a file, and reads files only to go
    on from a checkpoint. What is not readable yet becomes a file when `state_dict` is called.

    Args:
        num_samples: ``N``; indices are ``0`` to ``N - 1``.
        num_classes: ``K``.
        dtype: of the stored probabilities: ``torch.float32``, ``float16`` or ``bfloat16``. Half precision is divided by
            the row's sum when read; float16 is then off by less than ``2 ** -11``.
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
        if dtype not in _DTYPES:
            names = ", ".join(_name(kind) for kind in _DTYPES)
            raise InputError(f"PredictionStore keeps {names}, got dtype={_name(dtype)}")
        if top_k is not None and not 1 <= top_k <= num_classes:
            raise InputError(f"top_k must be between 1 and num_classes={num_classes}, got {top_k}")
        self.num_samples, self.num_classes, self.dtype, self.top_k = num_samples, num_classes, dtype, top_k
        self.sidecar = sidecar
        self._columns = _columns_of(num_classes, dtype, top_k)
        self._row_bytes = self.row_bytes(num_classes, dtype=dtype, top_k=top_k)
        self._next = self._zeros(num_samples)
        # Empty where the file is read instead, which is not there before anything is readable.
        self._now = self._zeros(num_samples) if sidecar is None else {}
        self._file: RowFile | None = None
        self._pending_file: RowFile | None = None
        self._known = torch.zeros(num_samples, dtype=torch.bool)
        # When a sample was last written since `advance`, counted in rows of this process; -1: not yet.
        self._written = torch.full((num_samples,), -1)
        self._count = 1

    @staticmethod
    def row_bytes(num_classes: int, *, dtype: torch.dtype = torch.float32, top_k: int | None = None) -> int:
        """Bytes of one sample's row in one buffer; arguments as in the constructor."""
        return sum(column.nbytes for column in _columns_of(num_classes, dtype, top_k))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._known.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a mapped file is none."""
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
            self._fill(self._now, torch.arange(self.num_samples), self._file)
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
            InputError: on the CPU, an index out of range.
        """
        here = index.to(self.device)
        with refusing(f"num_samples={self.num_samples} does not fit the data's indices", IndexError):
            known = self._known[here].to(index.device)
        probs = self._unpack({name: rows.to(index.device) for name, rows in self._rows(here).items()})
        return torch.where(known[:, None], probs, 1 / self.num_classes), known

    def write(self, index: Tensor, probs: Tensor) -> None:
        """Keep the rows of some samples for `advance`; of several for one sample the last one wins.

        Args:
            index: int64 ``(N,)``.
            probs: probabilities ``(N, K)``; no graph is kept.

        Raises:
            InputError: ``probs`` has another shape.
        """
        if probs.shape != (len(index), self.num_classes):
            raise InputError(
                f"PredictionStore: {len(index)} samples of {self.num_classes} classes need probabilities "
                f"({len(index)}, {self.num_classes}), got {tuple(probs.shape)}"
            )
        index = index.to(self.device)
        order = torch.arange(len(index), device=index.device) + self._count
        self._written.scatter_reduce_(0, index, order, "amax")
        # A sample that stands in the batch twice gets its last row both times, so the order of writing cannot matter.
        last = self._written[index] - self._count
        for name, rows in self._pack(probs.detach()[last.to(probs.device)]).items():
            self._next[name][index] = rows.to(self.device)
        self._count += len(index)

    def advance(self) -> None:
        """Make readable what all processes have written; without any, nothing changes.

        Raises:
            InputError: the sidecar's disk is full, or its folder cannot be written to.
        """
        self._exchange()
        written = self._written >= 0
        if not bool(written.any()):
            return
        for piece in self._split((~written).nonzero()[:, 0]):
            for name, rows in self._rows(piece).items():
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
        state = {"num_classes": self.num_classes, "known": self._known, "pending": pending}
        if self.sidecar is None:
            return {**state, **self._now, **{f"pending_{name}": rows[pending] for name, rows in self._next.items()}}
        if len(pending) and (fresh or self._pending_file is None):
            parts = (rows[piece] for rows in self._next.values() for piece in self._split(pending))
            self._pending_file = self.sidecar.pend(self._about(len(pending)), self._columns, parts)
        files = self.sidecar.state_dict(self._file, self._pending_file)
        return {**state, **self._kind(), "sidecar": files}

    def load_state_dict(self, state: Mapping[str, Any], *, folder: str | Path | None = None) -> None:
        """Take the rows of a store that was made with the same arguments, but for the sidecar.

        Args:
            state: of `state_dict`.
            folder: where the files that it refers to are looked for; what is not there, in this store's folder, then in
                that of the store that was saved.

        Raises:
            InputError: the store was made with other arguments, the message names them; or a file is gone, damaged or
                another one.
        """
        self._compare(state)
        self._file = self._pending_file = None
        now: _Rows | None
        coming: _Rows | None
        if "sidecar" in state:
            file, pending_file = together(lambda: self._opened(state, folder))
            now, coming = file, pending_file
            if self.sidecar is not None:
                self.sidecar.load_state_dict(state["sidecar"])
                self._file, self._pending_file = file, pending_file
        else:
            now = {column.name: state[column.name] for column in self._columns}
            coming = {column.name: state[f"pending_{column.name}"] for column in self._columns}
        self._known.copy_(state["known"])
        if not self._reads_the_file:
            self._fill(self._now, torch.arange(self.num_samples), now)
        if self.sidecar is not None and self._file is None and bool(self._known.any()):
            # The checkpoint holds the rows themselves.
            self._fill(self._next, torch.arange(self.num_samples), now)
            self._write_file(self.sidecar)
        self._fill(self._next, state["pending"], coming)
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
            return open_reference(reference, folders, self._about(rows), self._columns)

        files = state["sidecar"]
        return open_it(files["rows"], self.num_samples), open_it(files["pending"], len(state["pending"]))

    def _compare(self, state: Mapping[str, Any]) -> None:
        if "sidecar" in state:
            saved = {name: state[name] for name in self._kind()}
        else:
            kept = state["probabilities"]
            saved = {
                "num_samples": len(kept),
                "num_classes": state["num_classes"],
                "top_k": kept.shape[1] if "classes" in state else None,
                "dtype": _name(kept.dtype),
            }
        different = [f"{name}={saved[name]} and not {own}" for name, own in self._kind().items() if saved[name] != own]
        if different:
            raise InputError(
                f"the saved PredictionStore has {', '.join(different)}: go on with the data and the settings that it "
                "was saved with"
            )

    def _kind(self) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples,
            "num_classes": self.num_classes,
            "top_k": self.top_k,
            "dtype": _name(self.dtype),
        }

    def _about(self, rows: int) -> dict[str, Any]:
        """What a file of so many rows says of them."""
        return {**self._kind(), "rows": rows}

    def _zeros(self, count: int) -> dict[str, Tensor]:
        return {column.name: torch.zeros(count, column.width, dtype=column.dtype) for column in self._columns}

    def _split(self, rows: Tensor) -> Iterator[Tensor]:
        """Pieces of rows, or of their numbers."""
        return iter(torch.split(rows, max(_PIECE_BYTES // self._row_bytes, 1)))

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        """Readable rows as they are kept, by an index on the device."""
        if not self._reads_the_file:
            return _chosen(self._now, index)
        return self._zeros(len(index)) if self._file is None else self._file.rows(index)

    def _fill(self, rows: dict[str, Tensor], index: Tensor, values: _Rows | None) -> None:
        """Put values into some rows, one after the other; without any, nothing."""
        for numbers in self._split(torch.arange(len(index))):
            for name, piece in ({} if values is None else _chosen(values, numbers)).items():
                rows[name][index[numbers].to(self.device)] = piece.to(self.device)

    def _write_file(self, sidecar: Sidecar) -> None:
        """Make a file of the rows that will be readable."""
        parts = (piece for rows in self._next.values() for piece in self._split(rows))
        self._file = sidecar.advance(self._about(self.num_samples), self._columns, parts)
        self._pending_file = None

    def _pack(self, probs: Tensor) -> dict[str, Tensor]:
        if self.top_k is None:
            return {"probabilities": probs.to(self.dtype)}
        values, classes = largest(probs, self.top_k)
        return {"probabilities": values.to(self.dtype), "classes": classes}

    def _unpack(self, rows: Mapping[str, Tensor]) -> Tensor:
        probs = rows["probabilities"].float()
        if self.top_k is not None:
            probs = spread(probs, rows["classes"], self.num_classes)
        # What half precision has rounded away or added must not become mass of the target.
        return probs if self.dtype == torch.float32 else probs / probs.sum(dim=1, keepdim=True)

    def _exchange(self) -> bool:
        """Bring what every process has written to all of them, and tell whether there was any since the last time.

        Each sample's row comes from one process, the others contribute zero bytes: a sum of bytes is exact for every
        type, and needs no equal numbers of rows.
        """
        world, rank = (1, 0) if is_alone() else (dist.get_world_size(), dist.get_rank())
        # The order in which one process would have read the samples that several have taken in turns.
        claim = torch.where(self._written >= 0, self._written * world + rank, -1)
        if not is_alone():
            all_reduce(claim, dist.ReduceOp.MAX)
        # What has been exchanged before has order 0 in every process.
        fresh = bool((claim >= world).any())
        if fresh and not is_alone():
            others = (claim < 0) | (claim % world != rank)
            for rows in self._next.values():
                count = max(_PIECE_BYTES // rows[0].nbytes, 1)
                for piece, not_ours in zip(torch.split(rows, count), torch.split(others, count), strict=True):
                    piece.masked_fill_(not_ours[:, None], 0)
                    all_reduce(piece.view(torch.uint8), dist.ReduceOp.SUM)
        self._written = torch.where(claim >= 0, 0, -1)
        return fresh


def _columns_of(num_classes: int, dtype: torch.dtype, top_k: int | None) -> list[Column]:
    columns = [Column("probabilities", dtype, top_k or num_classes)]
    return columns if top_k is None else [*columns, Column("classes", class_dtype(num_classes), top_k)]


def _chosen(rows: _Rows, index: Tensor) -> dict[str, Tensor]:
    if isinstance(rows, RowFile):
        return rows.rows(index)
    return {name: values[index.to(values.device)] for name, values in rows.items()}


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
