"""How operations without weights pass channels on.

A rule gets the ledger and the call, and returns the layout of the value: ``None`` where it has no channels any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill_lightning.compression.shrink.ledger import Ledger
from distill_lightning.compression.shrink.moves import moved, split
from distill_lightning.compression.shrink.numbers import Layout, aligned, spread
from distill_lightning.compression.shrink.products import attention, product
from distill_lightning.compression.shrink.watching import Call

Rule = Callable[[Ledger, Call], Any]

_POOLING = re.compile(r"(adaptive_?)?(max|avg|lp)_?pool([123])d(_with_indices)?")


def operation_rule(name: str) -> Rule | None:
    """The rule for a function or module of this name."""
    return _resized if _POOLING.fullmatch(name) else _RULES.get(name)


def _elementwise(ledger: Ledger, call: Call) -> Layout | None:
    value = call.value
    tensors = [(ledger.layout(tensor), tensor) for tensor in call.tensors]
    if len(tensors) == 1 and isinstance(tensors[0][0], Layout) and tensors[0][1].shape == value.shape:
        return replace(tensors[0][0], state=False, zero=_keeps_zero(ledger, call))
    lines = [aligned(layout, tensor, value) for layout, tensor in tensors]
    dims = {line[0] for line in lines if line is not None}
    if len(dims) != 1:
        ledger.unknown(call)
        return None
    dim = dims.pop()
    numbers = next(line[1] for line in lines if line is not None)
    joined = set()
    for (_, tensor), line in zip(tensors, lines, strict=True):
        own = dim - value.dim() + tensor.dim()
        if line is not None:
            ledger.channels.same(line[1], numbers)
        elif own >= 0 and tensor.shape[own] != 1:
            if ledger.join(tensor, own, numbers):
                joined.add(id(tensor))
            else:
                ledger.channels.fix(numbers, f"{call.label} meets a tensor of fixed size")
    # A tensor that is broadcast along the channels has one channel of its own, which stays.
    for (layout, _), line in zip(tensors, lines, strict=True):
        if layout is not None and line is None:
            ledger.fix(layout, f"{call.label} spreads them over other channels")
    return spread(numbers, value, dim, zero=_keeps_zero(ledger, call, joined))


def _keeps_zero(ledger: Ledger, call: Call, joined: set[int] = frozenset()) -> bool:  # type: ignore[assignment]
    """Whether the value is zero where those arguments are that are zero where they are masked."""

    def masked(part: Any) -> Any:
        if isinstance(part, (tuple, list)):
            return type(part)(map(masked, part)) if type(part) in (tuple, list) else part
        if not isinstance(part, Tensor):
            return part
        layout = ledger.layout(part)
        zero = id(part) in joined or (layout is not None and layout.zero)
        # A copy of the others, because the operation may write into them.
        return torch.zeros_like(part) if zero else part.clone()

    if not any(id(t) in joined or ((lay := ledger.layout(t)) is not None and lay.zero) for t in call.tensors):
        return False
    found = call.function(*map(masked, call.args), **{name: masked(part) for name, part in call.kwargs.items()})
    return not bool(found.any())


def _copied(ledger: Ledger, call: Call) -> Layout | None:
    layout = ledger.layout(call.first)
    if layout is None or call.value.shape != call.first.shape:
        ledger.unknown(call)
        return None
    return replace(layout, state=False, zero=call.name == "zeros_like" or (layout.zero and call.name != "ones_like"))


def _reduced(ledger: Ledger, call: Call) -> Any:
    layout = ledger.layout(call.first)
    place = 2 if call.name == "norm" else 1
    dims = call.argument(place, "dim", call.kwargs.get("axis"))
    if layout is None or not isinstance(dims, (int, tuple, list)):
        return ledger.unknown(call)
    value = call.value if isinstance(call.value, Tensor) else call.value[0]
    rank = layout.numbers.dim()
    gone = {int(dim) % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    line = layout.line()
    if layout.dim in gone and layout.zero and call.name == "sum":
        return None  # zeros add nothing
    if layout.dim in gone or line is None:
        return ledger.unknown(call)
    dim = layout.dim if value.dim() == rank else layout.dim - sum(d < layout.dim for d in gone)
    # Of zeros all that is called a reduction here is zero, but the logarithm of a sum.
    found = spread(line, value, dim, zero=layout.zero and call.name not in ("logsumexp", "prod"))
    return found if value is call.value else tuple(found for _ in call.value)


def _along(ledger: Ledger, call: Call) -> Layout | None:
    """What mixes the entries along one dimension: not the channels', or dividing them by their length."""
    layout = ledger.layout(call.first)
    dim = call.argument(2 if call.name == "normalize" else 1, "dim", getattr(call.module, "dim", None))
    dim = 1 if dim is None and call.name == "normalize" else dim
    if layout is not None and layout.zero and call.name == "normalize" and call.argument(1, "p", 2.0) > 0:
        return replace(layout, state=False)  # zeros add nothing to the length
    if layout is None or not isinstance(dim, int) or dim % call.value.dim() == layout.dim:
        ledger.unknown(call)
        return None
    zero = layout.zero and call.name in ("cumsum", "normalize")
    return replace(layout, state=False, zero=zero)


def _joined(ledger: Ledger, call: Call) -> Layout | None:
    rank = call.value.dim()
    # Without those of another rank: an empty list of numbers may stand beside anything.
    sources = [source for source in call.argument(0, "tensors") if source.dim() + (call.name == "stack") == rank]
    along = call.argument(1, "dim", 0)
    layouts = [ledger.layout(source) for source in sources]
    known = [layout for layout in layouts if layout is not None]
    if not isinstance(along, int) or not known or any(layout.line() is None for layout in known):
        ledger.unknown(call)
        return None
    value, dim = call.value, known[0].dim
    along %= value.dim()
    if any(layout.dim != dim for layout in known):
        ledger.unknown(call)
        return None
    lines, zero = [], True
    for source, layout in zip(sources, layouts, strict=True):
        line = None if layout is None else layout.line()
        zero = zero and (layout is None or layout.zero)
        if line is None:  # for example an input of the network: it stays next to channels that may be removed
            line = ledger.channels.new(source.shape[dim])
            ledger.channels.fix(line, "they are not made by a layer")
        lines.append(line)
    if call.name != "stack" and along == dim:
        return spread(torch.cat(lines), value, dim, zero=zero)
    for line in lines[1:]:
        ledger.channels.same(line, lines[0])
    return spread(lines[0], value, dim + (call.name == "stack" and along <= dim), zero=zero)


def _resized(ledger: Ledger, call: Call) -> Layout | None:
    layout, value = ledger.layout(call.first), call.value
    value = value if isinstance(value, Tensor) else value[0]
    pooling = _POOLING.fullmatch(call.name)
    spatial = int(pooling[3]) if pooling else value.dim() - 2
    line = None if layout is None else layout.line()
    if layout is None or line is None or layout.dim != value.dim() - spatial - 1:
        ledger.unknown(call)
        return None
    return spread(line, value, layout.dim, zero=layout.zero)


def _padded(ledger: Ledger, call: Call) -> Layout | None:
    layout, value = ledger.layout(call.first), call.value
    line = None if layout is None else layout.line()
    sizes = call.argument(1, "pad", getattr(call.module, "padding", ()))
    sizes = (sizes,) * (2 * (value.dim() - 2)) if isinstance(sizes, int) else tuple(sizes)
    own = 2 * (value.dim() - 1 - layout.dim) if layout is not None else 0
    if layout is None or line is None or any(sizes[own : own + 2]):
        ledger.unknown(call)
        return None
    return spread(line, value, layout.dim, zero=layout.zero and not bool(call.on(torch.zeros_like(call.first)).any()))


def _names(text: str) -> list[str]:
    return text.split()


# Names of functions, methods and, in lower case, modules. In-place forms are looked up without their underscore or "i".
_ELEMENTWISE = _names("""
    add sub mul div divide multiply subtract true_divide truediv neg abs pow square sqrt rsqrt reciprocal exp log log1p
    expm1 sign sin cos erf clamp clip clamp_min clamp_max maximum minimum lerp where masked_fill addcmul addcdiv rsub
    relu relu6 leakyrelu leaky_relu elu celu selu gelu silu mish softplus softsign sigmoid tanh logsigmoid hardtanh
    hardsigmoid hardswish hardshrink softshrink tanhshrink threshold prelu rrelu dropout dropout1d dropout2d dropout3d
    alphadropout featurealphadropout alpha_dropout feature_dropout feature_alpha_dropout identity
    eq ne lt le gt ge logical_not logical_and logical_or nan_to_num
""")
_COPYING = _names("""
    contiguous clone detach float double half bfloat16 bool to type type_as cpu cuda data real zeros_like ones_like
""")
_MOVING = _names("""
    flatten unflatten reshape view view_as reshape_as expand expand_as repeat tile repeat_interleave permute transpose
    t mt swapaxes swapdims movedim moveaxis squeeze unsqueeze getitem select narrow roll flip ravel
""")
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_COPYING, _copied),
    **dict.fromkeys(_MOVING, moved),
    **dict.fromkeys(_names("mean sum amax amin max min norm std var logsumexp prod vector_norm"), _reduced),
    **dict.fromkeys(_names("softmax log_softmax logsoftmax softmin cumsum normalize"), _along),
    **dict.fromkeys(_names("cat concat concatenate stack"), _joined),
    **dict.fromkeys(_names("chunk split split_with_sizes tensor_split unbind glu"), split),
    **dict.fromkeys(_names("interpolate upsample upsamplingnearest2d upsamplingbilinear2d"), _resized),
    **dict.fromkeys(_names("pad zeropad2d zeropad1d constantpad2d reflectionpad2d replicationpad2d"), _padded),
    **dict.fromkeys(_names("matmul rmatmul bmm mm"), product),
    "scaled_dot_product_attention": attention,
}
