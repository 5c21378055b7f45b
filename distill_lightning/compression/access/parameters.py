"""Parameters of a network by their paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from distill_lightning.errors import InputError


def layer_at(network: nn.Module, path: str) -> nn.Module:
    """The layer at a dotted path; the network itself at ``""``.

    Raises:
        InputError: there is none.
    """
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        raise InputError(
            f"{type(network).__name__} has no layer {path!r}: see named_modules(), or build it as before"
        ) from error


def parameter_of(network: nn.Module, path: str) -> nn.Parameter:
    """The parameter at a dotted path, as in ``network.named_parameters()``; a tied parameter has several paths.

    Raises:
        InputError: there is none; the message lists similar names.
    """
    # In the wrapper of torch.compile the same parameters have other names.
    plain: nn.Module = getattr(network, "_orig_mod", network)
    try:
        return plain.get_parameter(path)
    except AttributeError as error:
        names = [name for name, _ in plain.named_parameters(remove_duplicate=False)]
        near = difflib.get_close_matches(path, names, n=5, cutoff=0.4) or names[:5]
        raise InputError(
            f"{type(plain).__name__} has no parameter {path!r}; similar names: {', '.join(near) or 'it has none'}"
        ) from error


def parameters_of(network: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters at some paths, in their order.

    Raises:
        InputError: a path names none, two name the same tied parameter, or there is no path at all.
    """
    found = {path: parameter_of(network, path) for path in paths}
    if not found:
        raise InputError(f"{type(network).__name__}: no parameter is named: name at least one")
    first: dict[int, str] = {}
    for path, parameter in found.items():
        other = first.setdefault(id(parameter), path)
        if other != path:
            raise InputError(f"{path!r} and {other!r} are one tied parameter: name it once")
    return found


def names_of_parameters(network: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The names of each parameter: several, if modules are tied, or one of them has it under several names."""
    names: dict[nn.Parameter, list[str]] = {}
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001  # the public iterators skip repetitions
            if parameter is not None:
                names.setdefault(parameter, []).append(join_path(path, name))
    return names


def shared_outside(network: nn.Module, layer: nn.Module, *others: nn.Module) -> str | None:
    """The name of a layer's parameter in a module that is outside this layer and others; ``None`` if there is none."""
    own, inside = set(layer.parameters()), (layer, *others)
    homes = [path for path, module in network.named_modules(remove_duplicate=False) if module in inside]
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter in own and not any(name.startswith(f"{home}.") for home in homes):
            return name
    return None


def cuda_devices(network: nn.Module) -> list[int]:
    """The CUDA devices of the parameters, whose random states a fork has to include."""
    return sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})


def join_path(module: str, name: str) -> str:
    """The path of a parameter or layer in a module, which may be the network itself: ``""``."""
    return f"{module}.{name}" if module else name


def split_path(path: str) -> tuple[str, str]:
    """The path of the module and the parameter's own name: ``"a.b.weight"`` gives ``("a.b", "weight")``."""
    module, _, name = path.rpartition(".")
    return module, name
