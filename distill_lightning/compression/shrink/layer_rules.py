"""How layers with weights make, pass on and read channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distill_lightning.compression.shrink.axes import Conv, ConvTransposed, TurnedLinear, blocks, is_by_group, length
from distill_lightning.compression.shrink.ledger import Ledger
from distill_lightning.compression.shrink.norms import CountedLayerNorm, counted_dim
from distill_lightning.compression.shrink.numbers import Layout, parts, spread
from distill_lightning.compression.shrink.watching import Call

Rule = Callable[[Ledger, Call, str, Any], Any]


def layer_rule(ledger: Ledger, call: Call) -> tuple[Rule, str, Any] | None:
    """The rule for a call with a layer's weights, the layer's path and the layer; ``None`` for anything else."""
    for kinds, names, rule in _RULES:
        if call.module is not None or call.name in names:
            found = ledger.layer(call, kinds)
            if found is not None and not (isinstance(found[1], nn.PReLU) and found[1].num_parameters == 1):
                return rule, *found
    return None


def has_rule(module: nn.Module) -> bool:
    """Whether a module is a layer with weights whose rule is known."""
    return isinstance(module, tuple(kind for kinds, _, _ in _RULES for kind in _each(kinds)))


def _each(kinds: Any) -> tuple[Any, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _linear(ledger: Ledger, call: Call, path: str, layer: Any) -> Layout:
    before = ledger.layout(call.first)
    line = None if before is None else before.line()
    if before is not None and line is not None and before.dim != call.value.dim() - 1:
        # It mixes something else, tokens for example, each channel for itself; its own size stays beside them.
        ledger.channels.fix(ledger.make(path, "out", length(layer, "out")), f"{path} lies across other channels")
        return spread(line, call.value, before.dim, zero=before.zero and layer.bias is None)
    ledger.bind(path, "in", ledger.read(call, -1, length(layer, "in")))
    return spread(ledger.make(path, "out", length(layer, "out")), call.value, -1, zero=True)


def _conv(ledger: Ledger, call: Call, path: str, conv: Any) -> Layout:
    dim = call.value.dim() - len(conv.kernel_size) - 1
    numbers = ledger.read(call, dim, conv.in_channels)
    if not is_by_group(conv):
        # The same channels of every group, so that groups stay of one size.
        ledger.bind(path, "in", ledger.channels.bundle(numbers.view(conv.groups, -1).T))
        made = ledger.make(path, "out", conv.out_channels // conv.groups)
        return spread(made.repeat(conv.groups), call.value, dim, zero=True)
    groups = ledger.channels.bundle(numbers.view(conv.groups, -1))
    ledger.bind(path, "channels", groups)
    return spread(groups.repeat_interleave(conv.out_channels // conv.groups), call.value, dim, zero=True)


def _transposed(ledger: Ledger, call: Call, path: str, conv: Any) -> Layout | None:
    if conv.groups > 1:
        ledger.unknown(call)
        return None
    return _conv(ledger, call, path, conv)


def _embedding(ledger: Ledger, call: Call, path: str, layer: nn.Embedding) -> Layout:
    return spread(ledger.make(path, "columns", layer.embedding_dim), call.value, -1, zero=True)


def _norm(ledger: Ledger, call: Call, path: str, norm: Any) -> Layout:
    numbers = ledger.read(call, 1, norm.num_features)
    ledger.bind(path, "channels", numbers)
    return spread(numbers, call.value, 1, zero=norm.affine)


def _prelu(ledger: Ledger, call: Call, path: str, layer: nn.PReLU) -> Layout:
    before = ledger.layout(call.first)
    numbers = ledger.read(call, 1, layer.num_parameters)
    ledger.bind(path, "channels", numbers)
    return spread(numbers, call.value, 1, zero=before is not None and before.zero)


def _group_norm(ledger: Ledger, call: Call, path: str, norm: nn.GroupNorm) -> Layout:
    groups = ledger.channels.bundle(ledger.read(call, 1, norm.num_channels).view(norm.num_groups, -1))
    ledger.bind(path, "groups", groups)
    numbers = groups.repeat_interleave(norm.num_channels // norm.num_groups)
    return spread(numbers, call.value, 1, zero=norm.affine)


def _layer_norm(ledger: Ledger, call: Call, path: str, norm: Any) -> Layout | None:
    layout, sizes = ledger.layout(call.first), _sizes(norm)
    if layout is None:
        return None
    line, value = layout.line(), call.value
    dim = norm.dim if isinstance(norm, CountedLayerNorm) else -1
    inside = layout.dim == dim % value.dim() if len(sizes) == 1 else layout.dim >= value.dim() - len(sizes)
    if line is not None and not inside:
        return spread(line, value, layout.dim, zero=layout.zero and norm.bias is None)
    # The mean counts the channels that left, as zeros: so they must be zeros where they are masked.
    if line is None or len(sizes) != 1 or not layout.zero or counted_dim(norm) is None:
        ledger.unknown(call)
        return None
    ledger.bind(path, "features", line)
    return spread(line, value, layout.dim, zero=norm.weight is not None)


def _sizes(norm: Any) -> tuple[int, ...]:
    return (norm.features,) if isinstance(norm, CountedLayerNorm) else norm.normalized_shape


def _recurrent(ledger: Ledger, call: Call, path: str, rnn: nn.RNNBase) -> Any:
    output, state = call.value
    if rnn.proj_size or not isinstance(output, Tensor):
        return ledger.unknown(call)
    ledger.bind(path, "in", ledger.read(call, -1, rnn.input_size))
    units = ledger.make(path, "units", blocks(rnn) * rnn.hidden_size).view(-1, rnn.hidden_size)
    given = list(parts(call.rest()))
    # A state that is an argument of the whole network the caller has to slice.
    if not all(part is None or id(part) in ledger.inputs for part in given):
        reason = f"the network makes the initial state of {path}"
        ledger.channels.fix(units, reason)
        for part in given:
            ledger.fix(part, reason)
    last = units[-2 if rnn.bidirectional else -1 :].flatten()
    final = state[0] if isinstance(state, tuple) else state
    numbers = units if final.dim() == 2 else units[:, None].expand(final.shape)
    own = Layout(final.dim() - 1, numbers, state=True)
    return spread(last, output, -1), (own, own) if isinstance(state, tuple) else own


_CONV = {"conv1d", "conv2d", "conv3d"}
_RULES: list[tuple[Any, set[str], Rule]] = [
    (nn.Linear, {"linear"}, _linear),
    (TurnedLinear, set(), _linear),
    (Conv, _CONV, _conv),
    (ConvTransposed, {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}, _transposed),
    (nn.Embedding, {"embedding"}, _embedding),
    (_NormBase, {"batch_norm", "instance_norm"}, _norm),
    (nn.PReLU, {"prelu"}, _prelu),
    (nn.GroupNorm, {"group_norm"}, _group_norm),
    ((nn.LayerNorm, CountedLayerNorm), {"layer_norm"}, _layer_norm),
    (nn.RNNBase, set(), _recurrent),
]
