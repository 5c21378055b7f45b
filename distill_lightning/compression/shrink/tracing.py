"""Tracing channels through a network: which axes of which layers carry the same channels.

A network is run once on example inputs, and every function of PyTorch that it calls is watched. A value has a companion
tensor of its shape that holds, for each entry, the number of the channel it comes from. What makes channels (a
convolution, a linear layer, an RNN) hands out new numbers; what only moves entries (``flatten``, ``permute``, an index)
moves the numbers with them; what puts two channels together (an addition) makes them one. Channels at operations that
are not known here are *fixed* and never removed, so an unknown operation costs savings, never correctness.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import cuda_devices
from distill_lightning.compression.shrink.layer_rules import has_rule, layer_rule
from distill_lightning.compression.shrink.ledger import Ledger
from distill_lightning.compression.shrink.moves import VIEWS, split
from distill_lightning.compression.shrink.numbers import parts
from distill_lightning.compression.shrink.operations import operation_rule
from distill_lightning.compression.shrink.watching import Call, Watch
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode

_SIZES = {"shape", "size"}
_DECISIONS = {"bool", "item", "int", "float", "index", "tolist", "numpy", "is_nonzero", "equal", "allclose"}
# What is read of a value without reading its numbers or its channels.
_HARMLESS = {
    "dim", "ndim", "ndimension", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn", "grad", "names",
    "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_contiguous", "is_sparse", "is_nested", "is_quantized",
    "is_meta", "get_device", "element_size", "itemsize", "type", "assert", "retain_grad", "is_mps", "is_xpu",
    "is_inference", "data_ptr", "untyped_storage", "is_mkldnn",
}  # fmt: skip
_AS_IT_IS = {"to", "contiguous", "float", "detach", "type", "double", "half", "bfloat16", "type_as"}


@dataclass(frozen=True)
class Dependencies:
    """The dependencies between the layers of a network.

    Args:
        bindings: the channels along each axis of each layer, by path and axis; equal numbers are the same channel.
        made: the bindings whose layers make the channels, in the order of the forward pass.
        fixed: the channels that are never removed, with the reason.
        apart: paths of the layers whose weights are read by something else than the layer's own operation.
    """

    bindings: dict[tuple[str, str], list[int]]
    made: list[tuple[str, str]]
    fixed: dict[int, str]
    apart: frozenset[str] = frozenset()

    @cached_property
    def places(self) -> dict[int, set[tuple[str, str]]]:
        """The bindings of each channel."""
        found: dict[int, set[tuple[str, str]]] = {}
        for place, roots in self.bindings.items():
            for root in roots:
                found.setdefault(root, set()).add(place)
        return found


def follow(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> Dependencies:
    """Run a network once on example inputs, in eval mode, and find which channels go together.

    Raises:
        InputError: the network fails on these inputs, or decides by the numbers in them what it computes.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    # A copy, because the first operation of a network may be in place.
    inputs = copy.deepcopy(inputs)
    ledger = Ledger(network, inputs)
    watch = Watch(lambda call: _see(ledger, call))
    try:
        with eval_mode(network), torch.no_grad(), watch.watching(network):
            outputs = _outputs(network(*inputs))
        if _idle(network, ledger):
            # Some layers run in training only. On a copy, with its own statistics, and with enough samples for them.
            twin, twice = copy_network(network).train(), _twice(inputs)
            ledger.attach(twin)
            ledger.record([part for part in parts(twice) if isinstance(part, Tensor)], None)
            with torch.random.fork_rng(devices=cuda_devices(network)), torch.no_grad(), watch.watching(twin):
                outputs += _outputs(twin(*twice))
    except Exception as error:  # the network may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        name = type(network).__name__
        raise InputError(f"{name} cannot be followed on these example_inputs ({reason})") from error
    for part in outputs:
        layout = ledger.layout(part)
        if layout is not None and not layout.state:
            ledger.fix(layout, "they are the network's outputs")
    ledger.fix_shared()
    channels = ledger.channels
    bindings = {place: channels.roots(numbers) for place, numbers in ledger.bindings.items()}
    return Dependencies(bindings, ledger.made, channels.fixed_roots(), frozenset(ledger.read_directly))


def _idle(network: nn.Module, ledger: Ledger) -> list[str]:
    """The layers that have not run."""
    ran = ledger.called | ledger.read_directly
    return [
        path for path, module in network.named_modules()
        if has_rule(module) and not any(path == one or path.startswith(f"{one}.") for one in ran)
    ]  # fmt: skip


def _twice(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return torch.cat([inputs, inputs]) if inputs.dim() else inputs
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(map(_twice, inputs))
    return {name: _twice(part) for name, part in inputs.items()} if isinstance(inputs, dict) else inputs


def _see(ledger: Ledger, call: Call) -> Any:
    """Record what a call does with the channels; what it returned, with sizes that know what they are sizes of."""
    value = call.value
    if not any(isinstance(part, Tensor) for part in parts(value)):
        return _fact(ledger, call)
    if call.module is not None:
        ledger.called.add(call.path)
    found = layer_rule(ledger, call)
    if found is not None:
        rule, path, layer = found
        ledger.called.add(path)
        layouts = rule(ledger, call, path, layer)
    else:
        operation = operation_rule(call.name)
        if not (call.name in _AS_IT_IS and value is call.first):
            ledger.read_apart(call)
        if operation is not split:
            _fix_counts(call)
        layouts = None if operation is None else operation(ledger, call)
        if operation is None:
            ledger.unknown(call)
    _record(ledger, call, layouts)
    return value


def _fact(ledger: Ledger, call: Call) -> Any:
    """What a call tells of a value that is no tensor."""
    first = call.first
    if call.name in _SIZES and isinstance(first, Tensor):
        sizes = ledger.count(first, first.shape)
        return sizes[call.argument(1, "dim")] if isinstance(call.value, int) else torch.Size(sizes)
    if call.name in _DECISIONS and any(ledger.is_computed(tensor) for tensor in call.tensors):
        raise InputError(f"it decides by numbers in the data, {call.label}, and only one of its ways would be followed")
    layout = ledger.layout(first)
    if call.name in _HARMLESS or (call.name == "len" and (layout is None or layout.dim)):
        return call.value
    ledger.read_apart(call)
    ledger.unknown(call)
    _fix_counts(call)
    return call.value


def _record(ledger: Ledger, call: Call, layouts: Any) -> None:
    if layouts is not None or any(ledger.is_computed(tensor) for tensor in call.tensors):
        ledger.record(call.value, layouts)


def _fix_counts(call: Call) -> None:
    """Fix the channels of sizes that go into anything but the view of a value."""
    if call.name not in VIEWS:
        for count in call.counts():
            count.fix(f"their number goes into {call.label}")


def _outputs(output: Any) -> list[Any]:
    """What a network returns, also in a dataclass."""
    if dataclasses.is_dataclass(output) and not isinstance(output, (dict, type)):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return list(parts(output))
