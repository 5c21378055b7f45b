"""What is known of the values of one run of a network: their channels, and the layers that make and read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.shrink.axes import own_parameters
from distill_lightning.compression.shrink.groups import tied_modules
from distill_lightning.compression.shrink.numbers import Channels, Count, Layout, parts
from distill_lightning.compression.shrink.watching import Call


class Ledger:
    """The channels of a network while it runs.

    Args:
        network: the network.
        inputs: what it is called with.
    """

    def __init__(self, network: nn.Module, inputs: Iterable[Any]) -> None:
        self.network = network
        self.channels = Channels()
        self.bindings: dict[tuple[str, str], Tensor] = {}
        self.made: list[tuple[str, str]] = []
        self.read_directly: set[str] = set()
        self.called: set[str] = set()
        self.inputs = {id(part) for part in parts(tuple(inputs)) if isinstance(part, Tensor)}
        # Every value of the run is kept, so that no other gets its id.
        self._values: dict[int, tuple[Tensor, Layout | None]] = {}
        self._owners: dict[int, tuple[str, str]] = {}
        self._attached: list[nn.Module] = []
        self.attach(network)
        self.record([part for part in parts(tuple(inputs)) if isinstance(part, Tensor)], None)

    def attach(self, network: nn.Module) -> None:
        """Know the tensors of the network, or of a copy of it that runs, too."""
        self._attached.append(network)  # so that it outlives the ids of its tensors
        for path, module in network.named_modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                self._owners.setdefault(id(tensor), (path, name))

    # Values.

    def layout(self, value: Any) -> Layout | None:
        """The channels of a value, if they are known."""
        if not isinstance(value, Tensor):
            return None
        if id(value) in self._values:
            return self._values[id(value)][1]
        if self._is_free(value):
            wide = [dim for dim in range(value.dim()) if value.shape[dim] > 1]
            if len(wide) == 1:
                layout = Layout(wide[0], self._numbered(value, wide[0]).view(value.shape), zero=True)
                self._values[id(value)] = value, layout
                return layout
        return None

    def record(self, value: Any, layout: Any) -> None:
        """Keep the channels of a value, or of each of a tuple."""
        if isinstance(value, Tensor):
            self._values[id(value)] = value, layout if isinstance(layout, Layout) else None
        elif isinstance(value, (tuple, list)):
            several = isinstance(layout, (tuple, list)) and len(layout) == len(value)
            for number, part in enumerate(value):
                self.record(part, layout[number] if several else None)

    def is_computed(self, value: Tensor) -> bool:
        """Whether a value depends on the inputs of the network."""
        return id(value) in self._values and id(value) not in self._owners

    def unknown(self, call: Call) -> None:
        """Fix the channels that go into a call; those that come out are unknown."""
        for tensor in call.tensors:
            self.fix(tensor, f"they go through {call.label}")

    def fix(self, value: Any, reason: str) -> None:
        """Fix the channels of a value."""
        layout = value if isinstance(value, Layout) else self.layout(value)
        if layout is not None:
            self.channels.fix(layout.numbers, reason)

    def count(self, value: Tensor, sizes: Iterable[int]) -> list[int]:
        """The sizes of a value, those of which follow its channels as a `Count`."""
        layout, found = self.layout(value), list(sizes)
        owner = self.owner(value)
        if layout is not None:
            line, numbers = layout.line(), layout.numbers
            line = numbers.movedim(layout.dim, 0).flatten(1)[:, 0] if line is None else line
            found[layout.dim] = Count(found[layout.dim], line, lambda reason: self.channels.fix(numbers, reason))
        elif owner is not None and isinstance(value, nn.Parameter) and not self._is_free(value):
            none = torch.zeros(0, dtype=torch.int64)
            found[:2] = [Count(size, none, lambda _: self.read_directly.add(owner[0])) for size in found[:2]]
        return found

    # Layers.

    def owner(self, tensor: Any) -> tuple[str, str] | None:
        """Path of the module to which a parameter or buffer belongs, and its name there."""
        return self._owners.get(id(tensor))

    def layer(self, call: Call, kinds: Any) -> tuple[str, Any] | None:
        """Path and layer of one of these kinds that a call computes with its own tensors, or ``None``."""
        if call.module is not None:
            return (call.path, call.module) if isinstance(call.module, kinds) else None
        owners = [self.owner(tensor) for tensor in call.tensors if tensor is not call.first]
        paths = {None if owner is None else owner[0] for owner in owners}
        path = paths.pop() if len(paths) == 1 else None
        if path is None or not isinstance(layer := self.network.get_submodule(path), kinds):
            return None
        return path, layer

    def read(self, call: Call, dim: int, size: int) -> Tensor:
        """The channels along a dimension of a layer's input; fixed ones where they are not known."""
        layout = self.layout(call.first)
        if layout is not None and layout.dim == dim % layout.numbers.dim():
            line = layout.line()
            if line is not None:
                return line
        self.unknown(call)
        numbers = self.channels.new(size)
        self.channels.fix(numbers, "they are not made by a layer")
        return numbers

    def bind(self, path: str, axis: str, numbers: Tensor) -> None:
        """Record the channels that a layer reads; if it runs again, it reads the same channels."""
        if (path, axis) in self.bindings:
            self.channels.same(self.bindings[path, axis], numbers)
        self.bindings[path, axis] = numbers

    def make(self, path: str, axis: str, size: int) -> Tensor:
        """The channels that a layer makes, the same ones each time it runs."""
        if (path, axis) not in self.bindings:
            self.bindings[path, axis] = self.channels.new(size)
            self.made.append((path, axis))
        return self.bindings[path, axis]

    def join(self, tensor: Tensor, dim: int, numbers: Tensor) -> bool:
        """Let a parameter that is no layer's weight have these channels along a dimension, if that can be."""
        if not self._is_free(tensor) or tensor.shape[dim] != len(numbers):
            return False
        self.channels.same(self._numbered(tensor, dim), numbers)
        return True

    def read_apart(self, call: Call) -> None:
        """Note the layers whose weights are read by something else than the layer."""
        for tensor in call.tensors:
            owner = self.owner(tensor)
            # A number of batches decides nothing about the channels.
            if (
                owner is not None
                and tensor.is_floating_point()
                and not own_parameters(self.network.get_submodule(owner[0]))
            ):
                self.read_directly.add(owner[0])

    def fix_shared(self) -> None:
        """Fix what cannot be cut because its weights are also used elsewhere."""
        tied = tied_modules(self.network)
        for (path, _), numbers in self.bindings.items():
            layer = self.network.get_submodule(path)
            if layer in tied:
                self.channels.fix(numbers, f"{path} shares its weights with another layer")
            elif path in self.read_directly:
                self.channels.fix(numbers, f"the network reads the weights of {path} itself")
            elif parametrize.is_parametrized(layer):
                self.channels.fix(numbers, f"the weights of {path} are computed from others")

    def _is_free(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter that is no layer's weight."""
        owner = self.owner(tensor)
        return owner is not None and owner[1] in own_parameters(self.network.get_submodule(owner[0]))

    def _numbered(self, parameter: Tensor, dim: int) -> Tensor:
        path, name = self._owners[id(parameter)]
        place = (path, f"{name}.{dim}")
        if place not in self.bindings:
            self.bindings[place] = self.channels.new(parameter.shape[dim])
        return self.bindings[place]
