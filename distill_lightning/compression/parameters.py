"""Parameters of a network by their paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from distill_lightning.errors import InputError


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


def restore_order(network: nn.Module, built: nn.Module) -> None:
    """Restore the order in which every layer lists its parameters to that of its construction, in place.

    A weight that was computed for a while comes last when it is a parameter again, and an optimiser's saved state
    depends on the order.

    Args:
        network: a network whose layers may have other parameters than those of ``built``.
        built: a network built like this one before any change.
    """
    first = dict(built.named_modules())
    for path, module in network.named_modules():
        own = module._parameters  # noqa: SLF001
        order = list(first[path]._parameters) if path in first else []  # noqa: SLF001
        if own.keys() == set(order):
            for name in order:
                own[name] = own.pop(name)


def cuda_devices(network: nn.Module) -> list[int]:
    """The CUDA devices of the parameters, whose random states a fork has to include."""
    return sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})


def split_path(path: str) -> tuple[str, str]:
    """The path of the module and the parameter's own name: ``"a.b.weight"`` gives ``("a.b", "weight")``."""
    module, _, name = path.rpartition(".")
    return module, name
