"""What a network said about every sample of its training set in the epoch before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from distill_lightning.errors import InputError, refusing
from distill_lightning.processes import all_reduce, is_alone
from distill_lightning.stores.top_k import class_dtype, largest, spread

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Rows are exchanged in pieces of this size, so that what a backend copies stays small.
_PIECE_BYTES = 2**26


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

    Args:
        num_samples: ``N``; indices are ``0`` to ``N - 1``.
        num_classes: ``K``.
        dtype: of the stored probabilities: ``torch.float32``, ``float16`` or ``bfloat16``. Half precision is divided by
            the row's sum when read; float16 is then off by less than ``2 ** -11``.
        top_k: how many of a row's largest probabilities are kept, the rest being spread evenly over the other classes;
            ``None``: all.

    Raises:
        InputError: a size or a type that cannot be used.
    """

    def __init__(
        self, num_samples: int, num_classes: int, *, dtype: torch.dtype = torch.float32, top_k: int | None = None
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
        kinds = {"probabilities": dtype}
        if top_k is not None:
            kinds["classes"] = class_dtype(num_classes)
        width = top_k or num_classes
        self._now = {name: torch.zeros(num_samples, width, dtype=kind) for name, kind in kinds.items()}
        self._next = {name: torch.zeros_like(rows) for name, rows in self._now.items()}
        self._known = torch.zeros(num_samples, dtype=torch.bool)
        # When a sample was last written since `advance`, counted in rows of this process; -1: not yet.
        self._written = torch.full((num_samples,), -1)
        self._count = 1

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._known.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self._now.values(), *self._next.values(), self._known, self._written))

    def to(self, device: torch.device | str) -> Self:
        """Move the tensors."""
        self._now = {name: rows.to(device) for name, rows in self._now.items()}
        self._next = {name: rows.to(device) for name, rows in self._next.items()}
        self._known, self._written = self._known.to(device), self._written.to(device)
        return self

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
        probs = self._unpack({name: rows[here].to(index.device) for name, rows in self._now.items()})
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
        """Make readable what all processes have written; without any, nothing changes."""
        self._exchange()
        written = self._written >= 0
        if not bool(written.any()):
            return
        missed = (~written).nonzero()[:, 0]
        for name, rows in self._next.items():
            rows[missed] = self._now[name][missed]
        self._now, self._next = self._next, self._now
        self._known |= written
        self._written.fill_(-1)
        self._count = 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers; what is written but not yet readable is among them, of all processes."""
        self._exchange()
        pending = (self._written >= 0).nonzero()[:, 0]
        return {
            "num_classes": self.num_classes,
            "known": self._known,
            "pending": pending,
            **self._now,
            **{f"pending_{name}": rows[pending] for name, rows in self._next.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows of a store that was made with the same arguments.

        Raises:
            InputError: it was made with others; the message names them.
        """
        kept = state["probabilities"]
        saved = {
            "num_samples": len(kept),
            "num_classes": state["num_classes"],
            "top_k": kept.shape[1] if "classes" in state else None,
            "dtype": kept.dtype,
        }
        different = [
            f"{name}={_name(value)} and not {_name(getattr(self, name))}"
            for name, value in saved.items()
            if value != getattr(self, name)
        ]
        if different:
            raise InputError(
                f"the saved PredictionStore has {', '.join(different)}: go on with the data and the settings that it "
                "was saved with"
            )
        pending = state["pending"].to(self.device)
        for name, rows in self._now.items():
            rows.copy_(state[name])
            self._next[name][pending] = state[f"pending_{name}"].to(self.device)
        self._known.copy_(state["known"])
        # Older than anything that will be written from now on.
        self._written.fill_(-1)
        self._written[pending] = 0
        self._count = 1

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

    def _exchange(self) -> None:
        """Bring what every process has written to all of them.

        Each sample's row comes from one process, the others contribute zero bytes: a sum of bytes is exact for every
        type, and needs no equal numbers of rows.
        """
        if is_alone():
            return
        world, rank = dist.get_world_size(), dist.get_rank()
        # The order in which one process would have read the samples that several have taken in turns.
        claim = torch.where(self._written >= 0, self._written * world + rank, -1)
        all_reduce(claim, dist.ReduceOp.MAX)
        if not bool((claim >= 0).any()):
            return
        others = (claim < 0) | (claim % world != rank)
        for rows in self._next.values():
            count = max(_PIECE_BYTES // rows[0].nbytes, 1)
            for piece, not_ours in zip(torch.split(rows, count), torch.split(others, count), strict=True):
                piece.masked_fill_(not_ours[:, None], 0)
                all_reduce(piece.view(torch.uint8), dist.ReduceOp.SUM)
        self._written = torch.where(claim >= 0, 0, -1)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
