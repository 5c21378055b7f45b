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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

from torch import Tensor

from distill_lightning.errors import InputError

# By which names a field is found in a batch that is a dict or a NamedTuple; the first that is there counts.
_KEYS = {
    "input": ("input", "image", "x"),
    "target": ("target", "label", "y"),
    "index": ("index",),
    "view": ("view",),
}


class Batch(NamedTuple):
    """One batch; a tuple with names, so ``x, y, *_ = batch`` works too.

    Attributes:
        input: what the networks read, ``(N, C, H, W)`` for images, int64 ``(N, T)`` for tokens.
        target: class indices ``(N,)``, or ``(N, T)`` where each position has one.
        index: which sample of the training set each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.
        view: which augmented view of that sample each row is, int64 ``(N,)``; ``None`` if the data module cannot tell.
    """

    input: Tensor
    target: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # shadows tuple.index, which no one asks a batch for
    view: Tensor | None = None

    @property
    def partner(self) -> Batch | None:
        """Another training sample for each row, to be mixed with it; only a `PairedBatch` has them."""
        return None

    @property
    def size(self) -> int:
        """``N``."""
        first: Any = self.input
        while not isinstance(first, Tensor):
            first = next(iter(first.values() if isinstance(first, Mapping) else first))
        return len(first)

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Read the batch of any data module.

        It may be a `Batch`; a dict or a NamedTuple with ``input`` (or ``image``, ``x``), ``target`` (or ``label``,
        ``y``) and perhaps ``index`` and ``view``; or a sequence that begins with input and target, of which the rest
        has no known meaning. A target may be ``None`` for methods that never look at labels.

        Raises:
            InputError: the batch is none of these.
        """
        if isinstance(batch, cls):
            return batch
        named = batch._asdict() if isinstance(batch, tuple) and hasattr(batch, "_asdict") else batch
        if isinstance(named, Mapping):
            found = {field: next((key for key in keys if key in named), None) for field, keys in _KEYS.items()}
            if found["input"] is not None and found["target"] is not None:
                return cls(**{field: named[key] for field, key in found.items() if key is not None})
            if named is batch:
                raise InputError(
                    f"a batch that is a dict needs input, image or x, and target, label or y, got {list(batch)}: let "
                    "the data module use these keys"
                )
        if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= 2:
            return cls(batch[0], batch[1])
        raise InputError(
            f"a batch must be a Batch, a dict or an (input, target) pair, got {type(batch).__name__}: "
            "let the data module yield distill_lightning.Batch(input=..., target=...)"
        )


class PairedBatch(Batch):
    """A batch whose rows come with partners, a fifth field.

    Row ``i`` of ``partner`` is a training sample to be mixed with row ``i``, a function of that row's index and view.
    Not a field of every `Batch`, because Lightning takes a ``None`` in a batch for a batch size of its own.
    """

    _fields = (*Batch._fields, "partner")  # type: ignore[assignment]  # a tuple with one more name

    def __new__(
        cls,
        input: Tensor,  # noqa: A002  # the field's name
        target: Tensor,
        index: Tensor | None,
        view: Tensor | None,
        partner: Batch,
    ) -> Self:
        """The five fields."""
        return tuple.__new__(cls, (input, target, index, view, partner))

    @property
    def partner(self) -> Batch:
        """The partners, a batch as large."""
        return cast("Batch", tuple.__getitem__(self, 4))

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Self:  # type: ignore[override]  # NamedTuple's is typed more widely
        return cls(*iterable)

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    def _replace(self, **fields: Any) -> Self:
        return type(self)(**{**self._asdict(), **fields})

    def __getnewargs__(self) -> tuple[Any, ...]:
        """For copies, and for the pipe from a worker process."""
        return tuple(self)

    def __repr__(self) -> str:
        return f"PairedBatch({', '.join(f'{name}={part!r}' for name, part in self._asdict().items())})"
