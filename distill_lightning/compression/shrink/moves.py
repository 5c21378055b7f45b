"""How operations that only move entries, and those that cut a value into pieces, pass channels on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill_lightning.compression.shrink.ledger import Ledger
from distill_lightning.compression.shrink.numbers import Count, Layout, all_in_order, parts, spread, unrepeated
from distill_lightning.compression.shrink.watching import Call

VIEWS = {"view", "reshape", "expand", "unflatten", "view_as", "reshape_as", "expand_as"}


def moved(ledger: Ledger, call: Call) -> Layout | None:
    """Follow the entries of the first argument.

    The sizes of a view that are written in the code stay, so channels are removed from the one that follows them: from
    ``view(b, 4, -1)`` the same ones from each of four blocks, from ``view(b, -1, 4)`` four after each other at once.
    """
    layout = ledger.layout(call.first)
    found = None if layout is None else _moved(ledger, call, layout)
    if found is None:
        ledger.unknown(call)
        _fix_counts(call)
    return found


def _moved(ledger: Ledger, call: Call, layout: Layout) -> Layout | None:
    if call.name == "squeeze" and call.module is None and not any(call.rest()):
        return None  # every dimension of size 1 goes, and a single channel may be left
    if _picks(call, layout.dim):
        return None
    # The index of each entry along its dimension: moved like the value, it shows where the dimension went.
    count = layout.numbers.shape[layout.dim]
    place = _on(call, spread(torch.arange(count), layout.numbers, layout.dim).numbers)
    line = layout.line()
    sizes = _sizes(ledger, call)
    for dim in range(place.dim()):
        along = Layout(dim, place).line()
        if along is None or not all_in_order(along, count):
            continue
        # The units of an RNN's blocks lie side by side in its state, so all numbers have to be moved.
        moved = Layout(dim, _on(call, layout.numbers)) if line is None else spread(line[along], place, dim)
        found = replace(moved, zero=layout.zero)
        if _follows(ledger, sizes, dim, found.numbers):
            return found
    return None if sizes is None or line is None else _divided(ledger, sizes, place, line, zero=layout.zero)


def _picks(call: Call, dim: int) -> bool:
    """Whether the code names channels by their place."""
    rank = call.first.dim()
    if call.name in ("narrow", "select"):
        return bool(call.argument(1, "dim") % rank == dim)
    if call.name != "getitem":
        return False
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    used = sum(part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1
               for part in index if part is not None and part is not Ellipsis)  # fmt: skip
    own: list[Any] = []
    for part in index:
        if part is Ellipsis:
            own += [slice(None)] * (rank - used)
        elif part is not None:
            own.append(part)
    return dim < len(own) and not isinstance(own[dim], slice)


def _on(call: Call, place: Tensor) -> Tensor:
    if call.name == "view" and call.module is None and not isinstance(call.argument(1, "dtype"), torch.dtype):
        # Repeated numbers have no memory of their own of which there could be a view.
        return place.reshape(call.value.shape)
    moved: Tensor = call.on(place)
    return moved


def _divided(ledger: Ledger, sizes: Sequence[int], place: Tensor, line: Tensor, *, zero: bool) -> Layout | None:
    """The layout where the channels' dimension became several, all but one of which keep their size."""
    dims = [dim for dim in range(place.dim()) if not bool((place == place.narrow(dim, 0, 1)).all())]
    if len(sizes) != place.dim() or torch.Size([place.shape[dim] for dim in dims]).numel() != len(line):
        return None
    follow = [dim for dim in dims if isinstance(sizes[dim], Count)] or [dim for dim in dims if sizes[dim] == -1]
    if len(follow) != 1:
        return None
    for dim in range(place.dim()):
        place = place if dim in dims else place.narrow(dim, 0, 1).expand(place.shape)
    rows = unrepeated(place, but=follow[0]).movedim(follow[0], 0).flatten(1)
    bundles = ledger.channels.bundle(line[rows])
    return spread(bundles, place, follow[0], zero=zero) if _follows(ledger, sizes, follow[0], bundles) else None


def _sizes(ledger: Ledger, call: Call) -> list[int] | None:
    """The sizes that the code gives to the dimensions of the value; ``None`` if they follow from its argument."""
    if call.module is not None or call.name not in VIEWS:
        return None
    if call.name.endswith("_as"):
        return ledger.count(call.args[1], call.args[1].shape)
    given = [part for part in parts(call.rest()) if isinstance(part, int)]
    if call.name == "unflatten":
        rank = call.first.dim()
        return [-1] * (given[0] % rank) + given[1:] + [-1] * (rank - given[0] % rank - 1)
    return given


def _follows(ledger: Ledger, sizes: Sequence[int] | None, dim: int, numbers: Tensor) -> bool:
    """Whether the code gives the channels' dimension a size that follows them, and no other."""
    if sizes is None:
        return True
    if dim >= len(sizes):
        return False
    wanted = set(ledger.channels.roots(unrepeated(numbers).flatten()))
    for number, size in enumerate(sizes):
        if isinstance(size, Count) and (number != dim or set(ledger.channels.roots(size.numbers)) != wanted):
            return False
    return isinstance(sizes[dim], Count) or sizes[dim] == -1


def _fix_counts(call: Call) -> None:
    for count in call.counts():
        count.fix(f"they go through {call.label}")


def split(ledger: Ledger, call: Call) -> Any:
    """Follow the pieces of a value: those that are cut along the channels lose the same channels each."""
    layout = ledger.layout(call.first)
    line = None if layout is None else layout.line()
    gated = call.name == "glu"
    pieces: Iterable[Tensor] = (call.value, call.value) if gated else call.value
    pieces = list(pieces)
    if layout is None or line is None:
        return ledger.unknown(call)
    place = 1 if gated or call.name == "unbind" else 2
    dim = call.argument(place, "dim", getattr(call.module, "dim", -1 if gated else 0)) % call.first.dim()
    if dim != layout.dim:
        gone = call.name == "unbind" and dim < layout.dim
        found = [spread(line, piece, layout.dim - gone, zero=layout.zero) for piece in pieces]
        return found[0] if gated else found
    adapts = call.name in ("chunk", "glu") or (call.name == "split" and isinstance(call.argument(1, ""), Count))
    if not adapts or any(len(line) != len(pieces) * piece.shape[dim] for piece in pieces):
        _fix_counts(call)
        return ledger.unknown(call)
    bundles = ledger.channels.bundle(line.view(len(pieces), -1).T)
    found = [replace(spread(bundles, piece, dim), zero=layout.zero) for piece in pieces]
    return found[0] if gated else found
