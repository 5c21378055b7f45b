"""Numbers in a graph that say how many channels there are: sizes that the network reads of its own values.

Such a number is right after channels have left only where it says how many of these very channels there are, as in
``x.view(n, c, -1)``. Everywhere else (``x * c ** -0.5``, a view of other channels, a size of a new tensor) the channels
that were counted have to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# What a value says of itself beside its sizes.
_OTHERS = {
    "dim", "ndim", "ndimension", "dtype", "device", "layout", "requires_grad", "training", "is_cuda", "is_sparse",
    "is_floating_point", "is_complex", "is_contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Count:
    """A number that depends on how many there are of some channels.

    Args:
        channels: the numbers of the channels, int64.
        exact: whether it is how many they are, or a constant multiple; otherwise anything may have been computed.
    """

    channels: Tensor
    exact: bool


Counts = Count | tuple[Any, ...] | None
"""What is known of a value that is no tensor: a count; for a tuple, that of each entry; ``None`` for a constant."""


def counts_of(node: fx.Node, value: Any, line: Callable[[fx.Node], list[Count | None] | None], known: Any) -> Counts:
    """The counts in a node's value, which is no tensor.

    Args:
        node: the node.
        value: its value.
        line: the count along each dimension of a node's tensor; ``None`` if it has no channels.
        known: the counts of earlier nodes, by node.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = str(node.args[1]) if name == "getattr" and len(node.args) > 1 else name
    source = node.args[0] if node.args else None
    sizes = line(source) if isinstance(source, fx.Node) else None
    given = tuple(_of(argument, known) for argument in node.args)
    if name in _OTHERS:
        return None
    if name in ("shape", "size") and sizes is not None:
        dim = node.kwargs.get("dim", node.args[1] if name == "size" and len(node.args) > 1 else None)
        return sizes[dim] if isinstance(dim, int) else tuple(sizes)
    if name == "getitem" and isinstance(given[0], tuple) and _is_constant(node.args[1]):
        return given[0][node.args[1]]  # type: ignore[index, no-any-return]
    if name in ("add", "iadd") and all(isinstance(part, tuple) for part in given):
        return given[0] + given[1]  # type: ignore[no-any-return]
    found = [*flat(given), *(count for other in node.all_input_nodes for count in line(other) or () if count)]
    # A constant multiple still says how many there are.
    exact = name in ("mul", "imul") and isinstance(value, int) and len(found) == 1 and found[0].exact
    mixed = Count(torch.cat([count.channels for count in found]), exact) if found else None
    return (mixed,) * len(value) if isinstance(value, tuple) else mixed


def counts_in(arguments: Any, known: Any) -> list[Count]:
    """All counts among a node's arguments."""
    return flat(_of(arguments, known))


def flat(counts: Any) -> list[Count]:
    """The counts in a nested tuple."""
    if isinstance(counts, Count):
        return [counts]
    return [count for part in counts for count in flat(part)] if isinstance(counts, tuple) else []


def sizes_given(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that ``view`` or ``reshape`` are given: numbers or nodes, or one node for all of them."""
    sizes = node.args[1:] if len(node.args) > 1 else tuple(node.kwargs.values())
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else tuple(sizes)


def fits(count: Any, channels: Sequence[int], root: Callable[[Tensor], list[int]]) -> bool:
    """Whether a number says how many there are of some channels, which are given by their roots."""
    return isinstance(count, Count) and count.exact and set(root(count.channels)) == set(channels)


def _is_constant(index: Any) -> bool:
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    return all(part is None or isinstance(part, int) for part in parts)


def _of(argument: Any, known: Any) -> Any:
    if isinstance(argument, fx.Node):
        return known.get(argument)
    if isinstance(argument, (tuple, list)):
        return tuple(_of(part, known) for part in argument)
    if isinstance(argument, dict):
        return tuple(_of(part, known) for part in argument.values())
    if isinstance(argument, slice):
        return tuple(_of(part, known) for part in (argument.start, argument.stop, argument.step))
    return None
