"""Watching a network run: every function of PyTorch that it calls, and every module that is taken as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.container import ModuleDict, ModuleList, Sequential
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distill_lightning.compression.shrink.attention import Attention
from distill_lightning.compression.shrink.axes import TurnedLinear
from distill_lightning.compression.shrink.numbers import Count, parts

_CONTAINERS = (Sequential, ModuleList, ModuleDict)


@dataclass
class Call:
    """One call of a function or module, with what it returned.

    Args:
        function: what computes the value from the arguments.
        name: of a function as in ``torch``, without the underscores of in-place and reflected forms; of a module its
            class in lower case.
        label: for messages.
        args: the positional arguments.
        kwargs: the others.
        value: what was returned.
        path: of a module, its path in the network.
        module: the module, if it is one.
    """

    function: Callable[..., Any]
    name: str
    label: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    value: Any = None
    path: str = ""
    module: nn.Module | None = None
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = [part for part in parts([self.args, self.kwargs]) if isinstance(part, Tensor)]

    @property
    def first(self) -> Any:
        """The first argument, ``input`` by name."""
        return self.argument(0, "input")

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def rest(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments but the first."""
        return self.args[1:], {name: value for name, value in self.kwargs.items() if self.args or name != "input"}

    def on(self, first: Tensor) -> Any:
        """What the function returns for another first argument."""
        args, kwargs = self.rest()
        return self.function(first, *args, **kwargs)

    def counts(self) -> list[Count]:
        """The sizes among the arguments that follow channels."""
        return [part for part in parts([self.args, self.kwargs]) if isinstance(part, Count)]


class Watch(TorchFunctionMode):
    """Tells of every function of PyTorch that is called, but not of those that it calls in turn.

    Args:
        see: is told of a `Call`; what it returns is returned to the network.
    """

    def __init__(self, see: Callable[[Call], Any]) -> None:
        super().__init__()
        self._see = see
        # Whether a call is being told of.
        self.busy = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `Watch`."""
        del types
        if self.busy:
            return func(*args, **(kwargs or {}))
        return self.told(Call(func, plain_name(_name(func)), f"{_name(func)}()", args, kwargs or {}))

    def told(self, call: Call) -> Any:
        """Run a call, and tell of it."""
        self.busy = True
        try:
            call.value = call.function(*call.args, **call.kwargs)
            return self._see(call)
        finally:
            self.busy = False

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Watch a network while it runs; afterwards it is as before."""
        taken = {path: module for path, module in network.named_modules() if is_one(module)}
        for path, module in taken.items():
            module.forward = partial(self._run, path, module, module.forward)
        try:
            with _Beneath(self), self:
                yield
        finally:
            for module in taken.values():
                del module.forward

    def _run(self, path: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.busy:
            return forward(*args, **kwargs)
        return self.told(Call(forward, type(module).__name__.lower(), path, args, kwargs, path=path, module=module))


class _Beneath(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a `Watch` of the operations that no function of PyTorch asks for: those of compiled code."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `Watch`."""
        del types
        if self._watch.busy:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        return self._watch.told(Call(func, plain_name(name), f"{name}()", args, kwargs or {}))


def is_one(module: nn.Module) -> bool:
    """Whether a module is taken as one operation, because PyTorch or this package defines what it computes."""
    if "forward" in vars(module) or isinstance(module, (*_CONTAINERS, torch.jit.ScriptModule)):
        return False
    for kind in type(module).__mro__:
        if kind.__module__ == parametrize.__name__:
            continue  # a class made of the layer's own
        if kind.__module__.startswith("torch.") or kind is Attention or issubclass(kind, TurnedLinear):
            return True
        if vars(kind).keys() & {"forward", "_conv_forward"}:
            return False
    return False


def _name(function: Any) -> str:
    name = getattr(function, "__name__", "")
    # A property: ``Tensor.shape`` is the method ``__get__`` of what is called ``shape``.
    return str(function.__self__.__name__) if name == "__get__" else str(name)


def plain_name(name: str) -> str:
    """``add`` of ``add_``, ``iadd``, ``__add__`` and ``radd``."""
    name = name.strip("_").lower()
    for start in ("i", "r"):
        if name[:1] == start and name[1:] in ("add", "sub", "mul", "truediv", "div"):
            return name[1:]
    return name
