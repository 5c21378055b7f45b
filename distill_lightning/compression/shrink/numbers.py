"""The numbers that channels have while a network is followed, and where they lie in a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Channels:
    """Numbered channels, some of which turn out to be the same, and some to be fixed."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._fixed: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """Numbers ``(count,)`` of new channels."""
        start = len(self._parents)
        self._parents += range(start, start + count)
        return torch.arange(start, start + count)

    def root(self, number: int) -> int:
        """The number that represents all channels that are the same as this one."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def roots(self, numbers: Tensor) -> list[int]:
        """`root` of each."""
        return [self.root(number) for number in numbers.tolist()]

    def same(self, first: Tensor, second: Tensor) -> None:
        """Make the channels at the same places the same from now on."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._parents[self.root(a)] = self.root(b)

    def bundle(self, rows: Tensor) -> Tensor:
        """Make all channels of each row of ``(bundles, channels)`` one channel; the numbers ``(bundles,)`` of these."""
        for other in range(1, rows.shape[1]):
            self.same(rows[:, 0], rows[:, other])
        return rows[:, 0]

    def fix(self, numbers: Tensor, reason: str) -> None:
        """Mark channels that are never removed, with the reason."""
        for number in unrepeated(numbers).flatten().tolist():
            self._fixed.setdefault(number, reason)

    def fixed_roots(self) -> dict[int, str]:
        """Roots of all that are fixed, with the first reason."""
        return {self.root(number): reason for number, reason in reversed(self._fixed.items())}


@dataclass(frozen=True)
class Layout:
    """The channels of a value: along dimension ``dim``, with ``numbers``, int64, in the value's shape.

    Args:
        dim: the dimension along which the channels lie.
        numbers: the channel that each entry comes from, int64, in the value's shape.
        state: whether this is an RNN's final state as it was returned, which a caller may receive and pass back in.
        zero: whether the entries of a channel whose weights are masked are zero.
    """

    dim: int
    numbers: Tensor
    state: bool = False
    zero: bool = False

    def line(self) -> Tensor | None:
        """The numbers along ``dim``; ``None`` if they differ along another dimension, too."""
        rows = unrepeated(self.numbers, but=self.dim).movedim(self.dim, 0)
        rows = rows.reshape(len(rows), -1)
        return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


class Count(int):
    """A size that the network reads from a value: how many channels it has, or a multiple or part of that.

    A size of a view may follow the channels; whoever calculates with it otherwise would calculate differently without
    some of them, and calls ``fix`` with the reason.
    """

    numbers: Tensor
    fix: Callable[[str], None]

    def __new__(cls, value: int, numbers: Tensor, fix: Callable[[str], None]) -> Count:
        """See the class."""
        self = super().__new__(cls, value)
        self.numbers, self.fix = numbers, fix
        return self

    def __reduce__(self) -> Any:
        return int, (int.__int__(self),)

    def __mul__(self, other: Any) -> Any:
        return self._scaled(other, int.__mul__)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._scaled(other, int.__floordiv__)

    def _scaled(self, other: Any, how: Callable[[int, int], int]) -> Any:
        if type(other) is int and other > 0:
            return Count(how(self, other), self.numbers, self.fix)
        self.fix(_CALCULATED)
        plain = other.__int__() if isinstance(other, Count) else other
        return int.__int__(self) * plain if how is int.__mul__ else int.__int__(self) // plain

    __hash__ = int.__hash__


_CALCULATED = "the network calculates with their number"


def _calculating(name: str) -> Callable[..., Any]:
    def calculate(self: Count, *others: Any) -> Any:
        alike = [isinstance(other, Count) and torch.equal(other.numbers, self.numbers) for other in others]
        if not alike or not all(alike):
            self.fix(_CALCULATED)
        return getattr(int, name)(self, *others)

    return calculate


for _name in (
    "add", "radd", "sub", "rsub", "rfloordiv", "mod", "rmod", "pow", "rpow", "truediv", "rtruediv", "divmod", "rdivmod",
    "neg", "lt", "le", "gt", "ge", "eq", "ne", "float", "int", "bool",
):  # fmt: skip
    setattr(Count, f"__{_name}__", _calculating(f"__{_name}__"))


def unrepeated(numbers: Tensor, *, but: int = -1) -> Tensor:
    """The numbers without repeated dimensions, except one: a feature map has few numbers, which are not copied."""
    for dim in range(numbers.dim()):
        if dim != but and numbers.stride(dim) == 0:
            numbers = numbers.narrow(dim, 0, min(1, numbers.shape[dim]))
    return numbers


def spread(numbers: Tensor, value: Tensor, dim: int, *, zero: bool = False) -> Layout:
    """The layout of a value along one of whose dimensions there are channels with these numbers."""
    dim %= value.dim()
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    return Layout(dim, numbers.view(shape).expand(value.shape), zero=zero)


def aligned(layout: Any, operand: Tensor, value: Tensor) -> tuple[int, Tensor] | None:
    """The dimension of the result along which an operand's channels lie, and their numbers, or ``None``."""
    line = layout.line() if isinstance(layout, Layout) else None
    if line is None:
        return None
    dim = layout.dim + value.dim() - operand.dim()
    return (dim, line) if value.shape[dim] == len(line) else None


def all_in_order(line: Tensor, count: int) -> bool:
    """Whether the line is ``0 ... count - 1`` in order, each number or all of them repeated as flattening does."""
    if count == 1 or len(line) % count or not len(line):
        return False
    changes = (line != line[0]).nonzero()
    each = int(changes[0]) if len(changes) else 0
    if not each or len(line) % (each * count):
        return False
    expected = torch.arange(count).repeat_interleave(each).repeat(len(line) // (each * count))
    return torch.equal(line, expected)


def parts(value: Any) -> Iterable[Any]:
    """What tuples, lists, dictionaries and their like hold, also inside one another."""
    if isinstance(value, (tuple, list, set)):
        for part in value:
            yield from parts(part)
    elif isinstance(value, dict):
        yield from parts(list(value.values()))
    else:
        yield value
