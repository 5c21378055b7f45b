"""The batch that every data module yields and every method reads.

Shape legend, used in every docstring of the package:

===  ==========================================================
``N``  samples in the batch
``K``  classes
``M``  teachers
``C``  channels, ``H`` rows, ``W`` columns of an image or feature map
``D``  entries of one sample's feature map, ``C * H * W``
``T``  steps of a sequence, tokens of a text
===  ==========================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError

# By which names a field is found in a batch that is a dict or a NamedTuple; the first that is there counts.
_KEYS = {
    "input": ("input", "image", "x"),
    "target": ("target", "label", "labels", "y"),
    "index": ("index",),
    "view": ("view",),
    "counted": ("counted",),
}

IGNORED = -100
"""The class of a sample or position that does not count, as in `torch.nn.functional.cross_entropy`."""

# Samples without an index get one from their place in the epoch; no batch has as many samples as this.
_PLACES = 2**24


class Key(NamedTuple):
    """Which samples a batch holds, on the host.

    Attributes:
        index: which sample of the training set each row is, int64 ``(N,)``.
        view: which augmented view of that sample each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.

    Example:
        >>> import torch
        >>> from distill_lightning import Batch
        >>> Batch(torch.zeros(2, 1), index=torch.tensor([4, 7])).key
        Key(index=tensor([4, 7]), view=None)
    """

    index: Tensor  # type: ignore[assignment]  # shadows tuple.index
    view: Tensor | None


class Mixture(NamedTuple):
    """How the rows of a batch were mixed, row ``i`` of one sample with another.

    Attributes:
        share: the part of the first sample in each row, ``(N,)``; 1 where a row is not mixed.
        first: target distribution of the first sample, ``(N, K)``.
        second: target distribution of the second sample, ``(N, K)``.
        index: index of the second sample, int64 ``(N,)``; ``None`` if the data module cannot tell.

    Example:
        >>> import torch
        >>> from distill_lightning.data.batch import Mixture
        >>> first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> mixture = Mixture(torch.tensor([0.75]), first, second, torch.tensor([3]))
        >>> share = mixture.share[:, None]
        >>> share * mixture.first + (1 - share) * mixture.second
        tensor([[0.7500, 0.2500]])
    """

    share: Tensor
    first: Tensor
    second: Tensor
    index: Tensor | None  # type: ignore[assignment]  # shadows tuple.index


@dataclass
class Batch:
    """One batch; ``x, y, *_ = batch`` works, too.

    ``to`` and ``pin_memory`` are what Lightning and PyTorch's loaders move a batch by. ``key`` stays on the host, where
    stores can read it without waiting for the device. Only a batch that is made on the device, as a dict is read after
    its transfer, has it there.

    Attributes:
        input: what the networks read: ``(N, C, H, W)`` for images, int64 ``(N, T)`` for tokens; a tuple of such tensors
            for a network of several arguments, a dict for keyword arguments.
        target: class indices ``(N,)``, or ``(N, T)`` where each position has one; distributions ``(N, K)`` where labels
            were mixed or smoothed; real numbers ``(N, d)`` of a regression, ``(N,)`` will do for a single one; ``None``
            where nobody looks at labels.
        index: which sample of the training set each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.
        view: which augmented view of that sample each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.
        counted: which samples ``(N,)`` or positions ``(N, T)`` count in losses and metrics, bool; ``None``: all. A
            sample that only fills up a process's share does not, nor does padding, nor a target of -100, which is
            looked for where a batch is made.
        partner: another training sample for each row, to be mixed with it, a function of the row's index and view.
        mixture: how the rows were mixed; ``None``: they were not.
        key: ``index`` and ``view`` on the host.
        when: epoch, and the batch's place in it, by which samples without an index or a view draw random numbers.
        is_checked: whether targets of -100 have been looked for.

    Example:
        >>> import torch
        >>> from distill_lightning import Batch
        >>> batch = Batch(torch.zeros(2, 3), torch.tensor([1, -100]), index=torch.tensor([4, 7]))
        >>> batch.size
        2
        >>> batch.counted
        tensor([ True, False])
    """

    input: Any
    target: Any = None
    index: Tensor | None = None
    view: Tensor | None = None
    counted: Tensor | None = None
    partner: Batch | None = None
    mixture: Mixture | None = None
    key: Key | None = dataclasses.field(default=None, repr=False, compare=False)
    when: tuple[int, int] = dataclasses.field(default=(0, 0), repr=False, compare=False)
    # On the CPU, a step that transforms batches must not look again.
    is_checked: bool = dataclasses.field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep the index and the view where they are now, and see which targets count."""
        if self.key is None and self.index is not None:
            self.key = Key(self.index, self.view)
        target = self.target
        if not self.is_checked and _holds_classes(target):
            self.is_checked = True
            known = target != IGNORED
            # To see whether all are known would wait for another device.
            if target.device.type != "cpu" or not known.all():
                self.counted = known if self.counted is None else known & spread(self.counted, known)

    def __iter__(self) -> Iterator[Any]:
        """Input, target, and as far as they are known index and view."""
        yield from (self.input, self.target)
        if self.index is not None:
            yield self.index
            if self.view is not None:
                yield self.view

    @property
    def size(self) -> int:
        """Number of samples, ``N``."""
        return len(first_tensor(self.input))

    @property
    def count(self) -> int | Tensor:
        """How many samples or positions count, by which the batch weighs in a mean over several.

        Returns:
            A number where all count; else a scalar that stays on the device.

        Example:
            >>> import torch
            >>> from distill_lightning import Batch
            >>> Batch(torch.zeros(2, 3), torch.tensor([[1, 4, 0], [2, -100, -100]])).count
            tensor(4)
        """
        target, counted = self.target, self.counted
        has_classes = isinstance(target, Tensor) and not target.is_floating_point()
        if counted is None:
            return target.numel() if has_classes else self.size
        if has_classes and counted.ndim < target.ndim:
            counted = spread(counted, target).expand(target.shape)
        return counted.sum()

    @property
    def counted_rows(self) -> Tensor | None:
        """Which samples count, or have a position that does, bool ``(N,)``; ``None``: all."""
        return self.counted if self.counted is None or self.counted.ndim == 1 else self.counted.flatten(1).any(dim=1)

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return first_tensor(self.input).device

    def broken_rows(self) -> list[int]:
        """The samples whose inputs hold nan or infinity; the device is waited for.

        Example:
            >>> import torch
            >>> from distill_lightning import Batch
            >>> Batch(torch.tensor([[0.0], [torch.nan]])).broken_rows()
            [1]
        """
        found: set[int] = set()
        for tensor in tensors_of(self.input):
            if tensor.is_floating_point() and tensor.ndim:
                rows = ~tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else ~tensor.isfinite()
                found |= set(rows.nonzero().flatten().tolist())
        return sorted(found)

    def replace(self, **changes: Any) -> Self:
        """A batch with other fields; one with another index or view has another key."""
        if changes.keys() & {"index", "view"}:
            changes.setdefault("key", None)
        if changes.keys() & {"target", "counted"}:
            changes.setdefault("is_checked", False)
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device; the key stays on the host."""
        device = torch.device(device)
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Self:
        """The batch in memory from which a copy to the device does not wait."""
        pinned = self.map(Tensor.pin_memory)
        pinned.key = None if pinned.index is None else Key(pinned.index, pinned.view)
        return pinned

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The batch with a function that keeps the rows applied to each of its tensors; the key stays as it is."""
        moved = {
            name: map_tensors(function, getattr(self, name))
            for name in ("input", "target", "index", "view", "counted", "mixture")
        }
        partner = None if self.partner is None else self.partner.map(function)
        return dataclasses.replace(self, **moved, partner=partner)

    def draws(self, seed: int, *, rows: Tensor | None = None, copies: Tensor | None = None) -> Draws:
        """The random numbers that belong to the rows, functions of ``seed``, index and view alone.

        Args:
            seed: any integer.
            rows: which rows get some, int64 ``(S,)``; ``None``: each one.
            copies: number of each among the copies of its row, int64 ``(S,)``; ``None``: there is one each.
        """
        epoch, place = self.when
        index, view = self.index, self.view
        if index is None:
            index = torch.arange(self.size, device=self.device) + place * _PLACES
        view = torch.full_like(index, epoch) if view is None else view
        index, view = index.long(), view.long()
        return Draws(seed, *((index, view) if rows is None else (index[rows], view[rows])), copy=copies)

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Read the batch of any data module.

        It may be a `Batch`; a dict or a NamedTuple with ``input`` (or ``image``, ``x``) and perhaps ``target`` (or
        ``label``, ``labels``, ``y``), ``index``, ``view`` and ``counted``; a dict without such an input, whose other
        tensors the network gets by keyword (``{"input_ids": ..., "attention_mask": ..., "labels": ...}``); or a
        sequence of an input, perhaps a target, and what has no known meaning, as an ``index`` or a ``view`` that is no
        tensor has none. Without a target, or with ``None``, it is for predictions, and for methods that never look at
        labels.

        Raises:
            InputError: the batch is none of these, or its ``counted`` is not a tensor of booleans.

        Example:
            >>> import torch
            >>> from distill_lightning import Batch
            >>> batch = Batch.of({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
            >>> batch.target
            tensor([0, 1])
        """
        if isinstance(batch, cls):
            return batch
        named = batch._asdict() if isinstance(batch, tuple) and hasattr(batch, "_asdict") else batch
        if isinstance(named, Mapping):
            found = {field: next((key for key in keys if key in named), None) for field, keys in _KEYS.items()}
            fields = {field: named[key] for field, key in found.items() if key is not None}
            # Other libraries call names of files so, or say where a picture was taken from.
            fields |= {field: None for field in ("index", "view") if not isinstance(fields.get(field), Tensor)}
            if "input" not in fields and named is batch:
                # What is left has the names of the network's arguments.
                others = {key: value for key, value in batch.items() if key not in found.values()}
                fields["input"] = {key: value for key, value in others.items() if isinstance(value, Tensor)}
                if not fields["input"]:
                    raise InputError(
                        f"a batch that is a dict needs input, image or x, or tensors by the names of the network's "
                        f"arguments, got {list(batch)}: let the data module use these keys"
                    )
            if "input" in fields:
                _check_counted(named.get("counted"))
                return cls(**fields)
        if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
            return cls(*batch[:2])
        raise InputError(
            "a batch must be a Batch, a dict, or a sequence of an input and perhaps a target, got "
            f"{type(batch).__name__}: let the data module yield distill_lightning.Batch(input=..., target=...)"
        )


def _check_counted(counted: Any) -> None:
    if counted is None or (isinstance(counted, Tensor) and counted.dtype == torch.bool):
        return
    got = counted.dtype if isinstance(counted, Tensor) else type(counted).__name__
    raise InputError(f"counted in a batch must be a tensor of booleans (N,) or (N, T), got {got}: convert it")


def _holds_classes(target: Any) -> bool:
    """Whether a target can hold the class -100; bytes cannot."""
    return isinstance(target, Tensor) and target.dtype.is_signed and not target.is_floating_point()


def spread(rows: Tensor, like: Tensor) -> Tensor:
    """One value per row in a shape that broadcasts with a tensor of more dimensions: ``(N,)`` to ``(N, 1, ..., 1)``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.batch import spread
        >>> spread(torch.tensor([1, 2]), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return rows.view(*rows.shape, *[1] * (like.ndim - rows.ndim))


def answered_rows(batch: Batch) -> Tensor | None:
    """Which samples of a batch get a prediction, bool ``(N,)``; ``None``: all.

    What only fills up a batch gets none; a sample with no target but -100 gets one, for nobody looks at its target.

    Example:
        >>> import torch
        >>> from distill_lightning.data.batch import Batch, answered_rows
        >>> answered_rows(Batch(torch.zeros(2, 3), torch.tensor([[4, -100], [-100, -100]])))
        tensor([True, True])
    """
    rows, target = batch.counted_rows, batch.target
    if rows is None or batch.counted is None or batch.counted.ndim == 1 or not isinstance(target, Tensor):
        return rows
    return rows | (target == IGNORED).flatten(1).all(dim=1)


def map_tensors(function: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """Apply a function to every tensor in a nest of dicts, tuples and lists, and keep the nest's structure.

    Args:
        function: of one tensor of each nest.
        value: a nest; what is neither a tensor nor a nest in it stays as it is.
        others: nests of the same structure, whose tensors become the function's further arguments.

    Raises:
        InputError: the nests differ in structure.

    Example:
        >>> import torch
        >>> from distill_lightning.data.batch import map_tensors
        >>> map_tensors(torch.add, {"image": torch.tensor(1)}, {"image": torch.tensor(2)})
        {'image': tensor(3)}
    """
    if isinstance(value, Tensor):
        if not all(isinstance(other, Tensor) for other in others):
            raise _differ(value, others)
        return function(value, *others)
    if isinstance(value, Mapping):
        if not all(isinstance(other, Mapping) and other.keys() == value.keys() for other in others):
            raise _differ(value, others)
        return {name: map_tensors(function, part, *(other[name] for other in others)) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        if not all(isinstance(other, (tuple, list)) and len(other) == len(value) for other in others):
            raise _differ(value, others)
        parts = [map_tensors(function, *together) for together in zip(value, *others, strict=True)]
        structure: Any = type(value)
        # A NamedTuple takes its fields one by one.
        return structure(*parts) if hasattr(value, "_fields") else structure(parts)
    return value


def _differ(value: Any, others: Sequence[Any]) -> InputError:
    kinds = ", ".join(type(other).__name__ for other in others)
    return InputError(
        f"inputs of another structure than {type(value).__name__} ({kinds}): let each sample have the same"
    )


def first_tensor(value: Any) -> Tensor:
    """The first tensor in a nest of dicts, tuples and lists.

    Raises:
        InputError: there is none.

    Example:
        >>> import torch
        >>> from distill_lightning.data.batch import first_tensor
        >>> first_tensor({"name": "a", "pair": (torch.tensor(1), torch.tensor(2))})
        tensor(1)
    """
    found = next(tensors_of(value), None)
    if found is None:
        raise InputError(f"a batch needs at least one tensor as its input, got {type(value).__name__}: convert it")
    return found


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of dicts, tuples and lists, in their order.

    Example:
        >>> import torch
        >>> from distill_lightning.data.batch import tensors_of
        >>> list(tensors_of({"name": "a", "pair": (torch.tensor(1), torch.tensor(2))}))
        [tensor(1), tensor(2)]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)
