"""How matrix products and attention pass channels on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill_lightning.compression.shrink.ledger import Ledger
from distill_lightning.compression.shrink.numbers import Layout, spread
from distill_lightning.compression.shrink.watching import Call


def product(ledger: Ledger, call: Call) -> Layout | None:
    """Follow ``(..., n, m) @ (..., m, p)``: rows, columns and batches stay, and what is summed leaves from both."""
    operands = call.tensors[:2] if call.name != "rmatmul" else call.tensors[1::-1]
    if len(operands) != 2 or min(operand.dim() for operand in operands) < 2:
        ledger.unknown(call)
        return None
    (left, right), value = operands, call.value
    places = [_place(ledger.layout(operand), operand) for operand in operands]
    if places[0] == places[1] == "none":
        return None
    one, two = (_line(ledger, operand) for operand in operands)
    if places == ["columns", "rows"] and one is not None and two is not None and _zero(ledger, left, right):
        ledger.channels.same(one, two)
        return None
    for place, line, operand in ((places[0], one, left), (places[1], two, right)):
        other = places[1] if operand is left else places[0]
        if place == ("rows" if operand is left else "columns") and other == "none" and line is not None:
            dim = value.dim() - (2 if operand is left else 1)
            return spread(line, value, dim, zero=_zero(ledger, operand))
    if places == ["batch", "batch"]:
        return _batches(ledger, call, operands)
    ledger.unknown(call)
    return None


def _batches(ledger: Ledger, call: Call, operands: list[Tensor]) -> Layout | None:
    """Both operands have their channels among the batches."""
    layouts = [ledger.layout(operand) for operand in operands]
    dims = {layout.dim - layout.numbers.dim() for layout in layouts if layout is not None}
    lines = [_line(ledger, operand) for operand in operands]
    one, two = lines
    if len(dims) != 1 or one is None or two is None or len(one) != len(two):
        ledger.unknown(call)
        return None
    ledger.channels.same(one, two)
    zero = any(_zero(ledger, operand) for operand in operands)
    return spread(one, call.value, dims.pop(), zero=zero)


def attention(ledger: Ledger, call: Call) -> Layout | None:
    """Follow attention whose channels are heads ``(N, h, L, E)``, or the values' features."""
    query, key, value = (call.argument(place, name) for place, name in enumerate(("query", "key", "value")))
    layouts = [ledger.layout(part) for part in (query, key, value)]
    lines = [None if layout is None else layout.line() for layout in layouts]
    mask = call.argument(3, "attn_mask")
    grouped = bool(call.argument(7, "enable_gqa", default=False))
    if layouts == [None, None, None]:
        return None
    heads = [layout is not None and layout.dim == query.dim() - 3 for layout in layouts]
    q, k, v = lines
    same = q is not None and k is not None and v is not None and len(q) == len(k) == len(v)
    if not all(heads) or not same or grouped or (isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-3] > 1):
        ledger.unknown(call)
        return None
    ledger.channels.same(q, k)  # type: ignore[arg-type]
    ledger.channels.same(k, v)  # type: ignore[arg-type]
    return spread(v, call.value, -3, zero=_zero(ledger, value))  # type: ignore[arg-type]


def _place(layout: Layout | None, operand: Tensor) -> str:
    if layout is None:
        return "none"
    return {operand.dim() - 1: "columns", operand.dim() - 2: "rows"}.get(layout.dim, "batch")


def _line(ledger: Ledger, operand: Tensor) -> Any:
    layout = ledger.layout(operand)
    return None if layout is None else layout.line()


def _zero(ledger: Ledger, *operands: Tensor) -> bool:
    return any(layout is not None and layout.zero for layout in map(ledger.layout, operands))
