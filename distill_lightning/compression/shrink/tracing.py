"""Tracing channels through a network: which axes of which layers carry the same channels.

A network is traced with `torch.fx` and its graph is run once on example inputs. Every value has a companion tensor of
its shape that holds, for each entry, the number of the channel it comes from. What makes channels (a convolution, a
linear layer, an RNN) hands out new numbers; what only moves entries (``flatten``, ``permute``, an index) moves the
numbers with them; what puts two channels together (an addition) makes them one. Channels at operations that are not
known here are *fixed* and never removed, so an unknown operation costs savings, never correctness.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.axes import Conv, blocks, is_depthwise
from distill_lightning.compression.shrink.counts import Count, Counts, counts_in, counts_of, fits, sizes_given
from distill_lightning.compression.shrink.groups import tied_modules
from distill_lightning.errors import InputError
from distill_lightning.layers import eval_mode

# Names of functions, methods and, in lower case, modules. In-place forms are looked up without their underscore or "i".
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "truediv", "neg", "abs", "pow", "sqrt", "exp", "clamp", "contiguous", "clone", "float",
    "relu", "relu6", "leakyrelu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign",
    "sigmoid", "tanh", "logsigmoid", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "tanhshrink",
    "threshold", "prelu", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "featurealphadropout",
    "identity", "double", "half", "to", "type_as", "detach",
}  # fmt: skip
_MOVING = {
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "getitem", "movedim", "swapaxes",
    "moveaxis", "select",
}  # fmt: skip
# Their values are new, and of the tensor they only have the type.
_MAKING = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"}
_REDUCING = {"mean", "sum", "amax", "amin"}
_POOLING = re.compile(r"(adaptive_?)?(max|avg|lp)_?pool([123])d")
_RESIZING = {"interpolate", "upsample", "upsamplingnearest2d", "upsamplingbilinear2d"}


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

    def fix(self, numbers: Tensor, reason: str) -> None:
        """Mark channels that are never removed, with the reason."""
        for number in _unrepeated(numbers).flatten().tolist():
            self._fixed.setdefault(number, reason)

    def fixed_roots(self) -> dict[int, str]:
        """Roots of all that are fixed, with the first reason."""
        return {self.root(number): reason for number, reason in reversed(self._fixed.items())}


@dataclass(frozen=True)
class _Layout:
    """The channels of a value: along dimension ``dim``, with ``numbers``, int64, in the value's shape.

    ``state`` marks an RNN's final state as it was returned, which a caller may receive and pass back in.
    """

    dim: int
    numbers: Tensor
    state: bool = False

    def line(self) -> Tensor | None:
        """The numbers along ``dim``; ``None`` if they differ along another dimension, too."""
        rows = _unrepeated(self.numbers, but=self.dim).movedim(self.dim, 0)
        rows = rows.reshape(len(rows), -1)
        return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


@dataclass(frozen=True)
class Dependencies:
    """The dependencies between the layers of a network.

    Args:
        bindings: the channels along each axis of each layer, by path and axis; equal numbers are the same channel.
        made: the bindings whose layers make the channels, in the order of the forward pass.
        fixed: the channels that are never removed, with the reason.
    """

    bindings: dict[tuple[str, str], list[int]]
    made: list[tuple[str, str]]
    fixed: dict[int, str]


def follow(network: nn.Module, example_inputs: Tensor | Sequence[Any]) -> Dependencies:
    """Run a network once on example inputs, in eval mode, and find which channels go together."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    name = type(network).__name__
    try:
        # Missing arguments keep their defaults while tracing, so that "if mask is None" takes the right branch.
        parameters = list(inspect.signature(network.forward).parameters.values())[len(inputs) :]
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        with eval_mode(network), torch.no_grad():
            follower = _Follower(network, _Tracer().trace(network, defaults))
            # A copy, because the first operation of a network may be in place.
            follower.run(*copy.deepcopy(inputs))
    except Exception as error:  # tracing and the network may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} cannot be followed on these example_inputs by torch.fx ({reason})") from error
    follower = _in_train_mode(follower, defaults, inputs)
    follower.fix_shared()
    channels = follower.channels
    bindings = {place: channels.roots(numbers) for place, numbers in follower.bindings.items()}
    return Dependencies(bindings, follower.made, channels.fixed_roots())


def _in_train_mode(follower: _Follower, defaults: dict[str, Any], inputs: tuple[Any, ...]) -> _Follower:
    """Follow what a network does in train mode, too, where that is something else: its channels are the same ones."""
    network = follower.network
    with eval_mode(network), torch.no_grad():
        try:
            network.train()
            graph = _Tracer().trace(network, defaults)
            if str(graph) == str(follower.graph):
                return follower
            # The layers run in eval mode, which counts the same channels and changes no statistics.
            network.eval()
            trained = _Follower(network, graph, follower)
            trained.run(*copy.deepcopy(inputs))
        except Exception as error:  # the network may raise anything
            called = {str(node.target) for node in follower.graph.nodes if node.op == "call_module"}
            unseen = _unseen(network, called | follower.read_directly)
            if not unseen:
                return follower
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{type(network).__name__} cannot be followed in train mode on these example_inputs ({reason}), and "
                f"only there runs {unseen[0]}, with channels that may have to stay"
            ) from error
    return trained


def _unseen(network: nn.Module, called: set[str]) -> list[str]:
    """The layers with parameters of their own that are not called."""
    return [
        path
        for path, layer in network.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
        and not any(path == place or (place and path.startswith(f"{place}.")) for place in called)
        and layer not in {network.get_submodule(place) for place in called}
    ]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*Conv, nn.Linear, _NormBase, nn.RNNBase, nn.PReLU, Attention))
        return known or super().is_leaf_module(m, module_qualified_name)


class _Follower(fx.Interpreter):
    """Runs a graph, and keeps the layout of each value: a `_Layout`, a tuple of them, or ``None`` if unknown."""

    def __init__(self, network: nn.Module, graph: fx.Graph, earlier: _Follower | None = None) -> None:
        super().__init__(network, graph=graph)
        self.extra_traceback = False
        self.network = network
        self.channels: Channels = Channels() if earlier is None else earlier.channels
        self.bindings: dict[tuple[str, str], Tensor] = {} if earlier is None else earlier.bindings
        self.made: list[tuple[str, str]] = [] if earlier is None else earlier.made
        self.read_directly: set[str] = set() if earlier is None else earlier.read_directly
        self.layouts: dict[fx.Node, Any] = {}
        self.counts: dict[fx.Node, Counts] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute the node's value, and record its layout."""
        value = super().run_node(n)
        self.layouts[n] = self._follow(n, value)
        self._count(n, value)
        return value

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

    def _count(self, node: fx.Node, value: Any) -> None:
        """Record the counts in a number that the network reads; fix what is counted for anything but a view of it."""
        number = value is not None and not any(isinstance(part, Tensor) for part in _parts(value))
        if number and node.op in ("call_function", "call_method"):
            self.counts[node] = counts_of(node, value, self._sizes, self.counts)
            return
        shown = self.layouts[node]
        named = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        right = self._line_roots(shown) if named in ("view", "reshape") and isinstance(shown, _Layout) else None
        for count in counts_in([node.args, node.kwargs], self.counts):
            if right is None or not fits(count, right, self.channels.roots):
                self.channels.fix(count.channels, f"their number goes into {_named(node)}")

    def _sizes(self, node: fx.Node) -> list[Count | None] | None:
        """The count along each dimension of a tensor with channels."""
        layout = self.layouts.get(node)
        if not isinstance(layout, _Layout):
            return None
        counted = Count(_unrepeated(layout.numbers).flatten(), exact=layout.line() is not None)
        return [counted if dim == layout.dim else None for dim in range(layout.numbers.dim())]

    def _line_roots(self, layout: _Layout) -> list[int]:
        return self.channels.roots(_unrepeated(layout.numbers).flatten())

    # What a node does.

    def _follow(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            self.read_directly.add(str(node.target).rpartition(".")[0])
            return None
        if node.op == "output":
            for layout in _flat(self._layout_of(node.args)):
                if not layout.state:
                    self.channels.fix(layout.numbers, "they are the network's outputs")
            return None
        if node.op == "call_module":
            return self._module(node, self.network.get_submodule(str(node.target)), value)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return self._operation(node, _plain(str(name)), value)

    def _module(self, node: fx.Node, module: nn.Module, value: Any) -> Any:
        path = str(node.target)
        if isinstance(module, nn.Linear):
            self._bind(path, "in", self._read(node, -1, module.in_features))
            # Of a subclass only this much is known: its input meets the columns of its weight.
            made = self._make(path, "out", module.out_features) if _is_plain(module) else None
            return None if made is None else _spread(made, value, value.dim() - 1)
        if isinstance(module, (*Conv, nn.RNNBase, _NormBase)) and not _is_plain(module):
            return self._unknown(node)
        if isinstance(module, Conv):
            return self._conv(node, path, module, value)
        if isinstance(module, nn.RNNBase):
            return self._recurrent(node, path, module, value)
        if isinstance(module, _NormBase) or (isinstance(module, nn.PReLU) and module.num_parameters > 1):
            size = module.num_features if isinstance(module, _NormBase) else module.num_parameters
            numbers = self._read(node, 1, size)
            self._bind(path, "channels", numbers)
            return _spread(numbers, value, 1)
        return self._operation(node, type(module).__name__.lower(), value)

    def _operation(self, node: fx.Node, name: str, value: Any) -> Any:
        if name == "getitem" and isinstance(self._first(node), tuple):
            return self._first(node)[node.args[1]]
        made = node.op == "call_method" and name in _MAKING
        if made or not any(isinstance(part, Tensor) for part in _parts(value)):
            return None  # a number, see `_count`, or a tensor without channels
        rules = (
            (_ELEMENTWISE, self._elementwise),
            (_MOVING, self._moved),
            (_REDUCING, self._reduced),
            ({"cat", "concat"}, self._joined),
        )
        rule = next((rule for names, rule in rules if name in names), None)
        pooling = _POOLING.fullmatch(name)
        if not isinstance(value, Tensor) or _is_foreign(node.target):
            return self._unknown(node)
        if rule is not None:
            return rule(node, value)
        if pooling or name in _RESIZING:
            return self._resized(node, value, int(pooling[3]) if pooling else value.dim() - 2)
        return self._unknown(node)

    def _unknown(self, node: fx.Node) -> _Layout | None:
        """Fix the channels that go into the node; those that come out are unknown."""
        for source in node.all_input_nodes:
            for layout in _flat(self.layouts.get(source)):
                self.channels.fix(layout.numbers, f"they go through {_named(node)}")
        return None

    # Layers.

    def _conv(self, node: fx.Node, path: str, conv: Any, value: Tensor) -> _Layout | None:
        dim = value.dim() - len(conv.kernel_size) - 1
        if conv.groups == 1:
            self._bind(path, "in", self._read(node, dim, conv.in_channels))
            return _spread(self._make(path, "out", conv.out_channels), value, dim)
        if is_depthwise(conv):
            numbers = self._read(node, dim, conv.in_channels)
            self._bind(path, "channels", numbers)
            return _spread(numbers, value, dim)
        self._unknown(node)
        return None

    def _recurrent(self, node: fx.Node, path: str, rnn: nn.RNNBase, value: Any) -> Any:
        output, state = value
        if rnn.proj_size or not isinstance(output, Tensor):
            return self._unknown(node)
        self._bind(path, "in", self._read(node, -1, rnn.input_size))
        units = self._make(path, "units", blocks(rnn) * rnn.hidden_size).view(-1, rnn.hidden_size)
        given = [*node.args[1:], *(value for name, value in node.kwargs.items() if name != "input")]
        if not all(self._from_caller(part) for part in given):
            reason = f"the network makes the initial state of {path}"
            self.channels.fix(units, reason)
            for layout in _flat(self._layout_of(given)):
                self.channels.fix(layout.numbers, reason)
        last = units[-2 if rnn.bidirectional else -1 :].flatten()
        final = state[0] if isinstance(state, tuple) else state
        numbers = units if final.dim() == 2 else units[:, None].expand(final.shape)
        own = _Layout(final.dim() - 1, numbers, state=True)
        return _spread(last, output, output.dim() - 1), (own, own) if isinstance(state, tuple) else own

    def _from_caller(self, argument: Any) -> bool:
        """Whether an initial state is ``None`` or an argument of the whole network, which the caller has to slice."""
        if isinstance(argument, (tuple, list)):
            return all(self._from_caller(part) for part in argument)
        return argument is None or (isinstance(argument, fx.Node) and argument.op == "placeholder")

    # Operations without weights.

    def _elementwise(self, node: fx.Node, value: Tensor) -> _Layout | None:
        operands = [(source, self._value(source)) for source in node.all_input_nodes]
        tensors = [(self.layouts.get(source), tensor) for source, tensor in operands if isinstance(tensor, Tensor)]
        if len(tensors) == 1 and isinstance(tensors[0][0], _Layout) and tensors[0][1].shape == value.shape:
            return replace(tensors[0][0], state=False)
        lines = [_aligned(layout, tensor, value) for layout, tensor in tensors]
        dims = {line[0] for line in lines if line is not None}
        if len(dims) != 1:
            return self._unknown(node)
        dim = dims.pop()
        numbers = next(line[1] for line in lines if line is not None)
        for (_, tensor), line in zip(tensors, lines, strict=True):
            own = dim - value.dim() + tensor.dim()
            if line is not None:
                self.channels.same(line[1], numbers)
            elif own >= 0 and tensor.shape[own] != 1:
                self.channels.fix(numbers, f"{_named(node)} meets a tensor of fixed size")
        # A tensor that is broadcast along the channels has one channel of its own, which stays.
        for layout, tensor in tensors:
            if layout is not None and _aligned(layout, tensor, value) is None:
                for part in _flat(layout):
                    self.channels.fix(part.numbers, f"{_named(node)} spreads them over other channels")
        return _spread(numbers, value, dim)

    def _moved(self, node: fx.Node, value: Tensor) -> _Layout | None:
        layout = self._first(node)
        if not isinstance(layout, _Layout):
            return self._unknown(node)
        shape = layout.numbers.shape
        # The index of each entry along its dimension: moved like the value, it shows where the dimension went.
        count = shape[layout.dim]
        place = torch.arange(count).view([-1 if d == layout.dim else 1 for d in range(len(shape))]).expand(shape)
        numbers, place = self._apply(node, layout.numbers), self._apply(node, place)
        for dim in range(value.dim()):
            line = _Layout(dim, place).line()
            if line is not None and _all_in_order(line, count) and self._follows(node, _Layout(dim, numbers)):
                return _Layout(dim, numbers)
        return self._unknown(node)

    def _reduced(self, node: fx.Node, value: Tensor) -> _Layout | None:
        layout = self._first(node)
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not isinstance(layout, _Layout) or not isinstance(dims, (int, tuple, list)):
            return self._unknown(node)
        rank = layout.numbers.dim()
        gone = {int(dim) % rank for dim in ([dims] if isinstance(dims, int) else dims)}
        line = layout.line()
        if layout.dim in gone or line is None:
            return self._unknown(node)
        dim = layout.dim if value.dim() == rank else layout.dim - sum(d < layout.dim for d in gone)
        return _spread(line, value, dim)

    def _joined(self, node: fx.Node, value: Tensor) -> _Layout | None:
        sources = node.args[0] if node.args else node.kwargs.get("tensors")
        along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        layouts = [self.layouts.get(source) for source in sources]  # type: ignore[union-attr, arg-type]
        known = [layout for layout in layouts if isinstance(layout, _Layout)]
        lines = [layout.line() for layout in known]
        if not isinstance(along, int) or not known or None in [type(line) if line is None else 0 for line in lines]:
            return self._unknown(node)
        dim = known[0].dim
        if along % value.dim() != dim or any(layout.dim != dim for layout in known):
            return self._unknown(node)
        pieces = []
        for source, layout in zip(sources, layouts, strict=True):  # type: ignore[arg-type]
            line = layout.line() if isinstance(layout, _Layout) else None
            if line is None:  # for example an input of the network: it stays next to channels that may be removed
                line = self.channels.new(self._value(source).shape[dim])
                self.channels.fix(line, "they are not made by a layer")
            pieces.append(line)
        return _spread(torch.cat(pieces), value, dim)

    def _resized(self, node: fx.Node, value: Tensor, spatial: int) -> _Layout | None:
        layout = self._first(node)
        line = layout.line() if isinstance(layout, _Layout) else None
        if line is None or layout.dim != value.dim() - spatial - 1:
            return self._unknown(node)
        return _spread(line, value, layout.dim)

    def _follows(self, node: fx.Node, layout: _Layout) -> bool:
        """Whether a moved value has as many channels as are left, and not a number that does not shrink with them."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name == "squeeze":
            # Without a dimension it removes every one of size 1, and a single channel may be left.
            return len(node.args) + len(node.kwargs) > 1
        if node.op == "call_module" or name not in ("view", "reshape"):
            return True
        sizes = sizes_given(node)
        values = [self._value(size) if isinstance(size, fx.Node) else size for size in sizes]
        counts: Any = [self.counts.get(size) if isinstance(size, fx.Node) else None for size in sizes]
        if len(values) == 1 and isinstance(values[0], tuple):
            values, counts = list(values[0]), counts[0] or (None,) * len(values[0])
        if layout.dim >= len(values):
            return False  # a view in another type
        return values[layout.dim] == -1 or fits(counts[layout.dim], self._line_roots(layout), self.channels.roots)

    # Helpers.

    def _value(self, node: Any) -> Any:
        return self.env[node]

    def _first(self, node: fx.Node) -> Any:
        source = node.args[0] if node.args else node.kwargs.get("input")
        return self.layouts.get(source) if isinstance(source, fx.Node) else None

    def _layout_of(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.layouts.get(argument)
        if isinstance(argument, (tuple, list)):
            return tuple(self._layout_of(part) for part in argument)
        if isinstance(argument, dict):
            return tuple(self._layout_of(part) for part in argument.values())
        return None

    def _read(self, node: fx.Node, dim: int, size: int) -> Tensor:
        """The channels along a dimension of a layer's input; fixed ones where they are not known."""
        layout = self._first(node)
        if isinstance(layout, _Layout) and layout.dim == dim % layout.numbers.dim():
            line = layout.line()
            if line is not None:
                return line
        self._unknown(node)
        numbers = self.channels.new(size)
        self.channels.fix(numbers, "they are not made by a layer")
        return numbers

    def _bind(self, path: str, axis: str, numbers: Tensor) -> None:
        """Record the channels that a layer reads; if it runs again, it reads the same channels."""
        if (path, axis) in self.bindings:
            self.channels.same(self.bindings[path, axis], numbers)
        self.bindings[path, axis] = numbers

    def _make(self, path: str, axis: str, size: int) -> Tensor:
        """The channels that a layer makes, the same ones each time it runs."""
        if (path, axis) not in self.bindings:
            self.bindings[path, axis] = self.channels.new(size)
            self.made.append((path, axis))
        return self.bindings[path, axis]

    def _apply(self, node: fx.Node, numbers: Tensor) -> Tensor:
        """The node's own operation, on numbers in place of its first argument."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        if node.op == "call_module":
            moved = self.network.get_submodule(str(node.target))(numbers)
        elif node.op == "call_method":
            # The numbers are repeated without copies, of which no view can be taken.
            whole = numbers.contiguous() if node.target == "view" else numbers
            moved = getattr(whole, str(node.target))(*args[1:], **rest)
        else:
            moved = node.target(numbers, *args[1:], **rest)  # type: ignore[operator]
        return moved  # type: ignore[no-any-return]


def _named(node: fx.Node) -> str:
    """An operation or module, for messages."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{target}()" if node.op != "call_module" else target


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly of one of PyTorch's classes; a subclass may compute something else."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch."):
            return True
        if vars(kind).keys() & {"forward", "_conv_forward"}:
            return False
    return False


def _is_foreign(function: Any) -> bool:
    """Whether a function in the graph is neither PyTorch's nor Python's, whatever its name."""
    home = getattr(function, "__module__", None)
    return (
        not isinstance(function, str) and home is not None and not home.startswith(("torch", "_operator", "builtins"))
    )


def _plain(name: str) -> str:
    """``add`` of ``add_``, ``iadd``, ``__add__`` and ``radd``."""
    name = name.strip("_")
    for start in ("i", "r"):
        if name[:1] == start and name[1:] in ("add", "sub", "mul", "truediv"):
            return name[1:]
    return name


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def _flat(layouts: Any) -> list[_Layout]:
    return [layout for layout in _parts(layouts) if isinstance(layout, _Layout)]


def _unrepeated(numbers: Tensor, *, but: int = -1) -> Tensor:
    """The numbers without repeated dimensions, except one: a feature map has few numbers, which are not copied."""
    for dim in range(numbers.dim()):
        if dim != but and numbers.stride(dim) == 0:
            numbers = numbers.narrow(dim, 0, min(1, numbers.shape[dim]))
    return numbers


def _spread(numbers: Tensor, value: Tensor, dim: int) -> _Layout:
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    return _Layout(dim, numbers.view(shape).expand(value.shape))


def _aligned(layout: Any, operand: Tensor, value: Tensor) -> tuple[int, Tensor] | None:
    """The dimension of the result along which an operand's channels lie, and their numbers, or ``None``."""
    line = layout.line() if isinstance(layout, _Layout) else None
    if line is None:
        return None
    dim = layout.dim + value.dim() - operand.dim()
    return (dim, line) if value.shape[dim] == len(line) else None


def _all_in_order(line: Tensor, count: int) -> bool:
    """Whether the line is ``0 ... count - 1`` in order, each number or all of them repeated as flattening does."""
    if count == 1 or len(line) % count or not len(line):
        return False
    changes = (line != line[0]).nonzero()
    each = int(changes[0]) if len(changes) else 0
    if not each or len(line) % (each * count):
        return False
    expected = torch.arange(count).repeat_interleave(each).repeat(len(line) // (each * count))
    return torch.equal(line, expected)
