"""Tied layers: the same module at several places of a network, stored, trained and counted once."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.parameters import join_path, layer_at, shared_outside
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.functional.common import wide

Init = Literal["first", "mean"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CALLABLE = (type, types.FunctionType, types.BuiltinFunctionType)
_INTERNAL = set(vars(nn.Module()))


def tie_layers(network: nn.Module, groups: Sequence[Sequence[str]], *, init: Init = "first") -> nn.Module:
    """Replace the modules of each group, in place, by the first one, which is then at every path of the group.

    Gradients of all its uses add up, so do not give its parameters a larger learning rate than before. An optimiser
    that was made before keeps the parameters of the replaced modules: make it afterwards. Everything in a module is
    shared, so a BatchNorm inside has one set of running statistics for all places, each of which updates them: where
    inputs differ much between places, tie the layers around the norms and leave the norms out. State dicts name a tied
    tensor at every path; loaded strictly, copied or saved, it remains one.

    Args:
        network: the network to change.
        groups: groups of two or more paths; the modules of a group have the same class, structure, shapes and options.
        init: the initial weights: ``"first"``: those of the first module; ``"mean"``: the mean of all modules'
            (parameters and floating-point buffers; counters are those of the first).

    Returns:
        The same network.

    Raises:
        InputError: a group has fewer than two paths, a path has no module, is given twice or is inside another one, or
            modules differ, have hooks or parametrizations, or share weights with a module outside the group. Nothing
            is changed then.
    """
    check_one_of("init", init, get_args(Init))
    check_groups(network, groups)
    for modules in [[_module_at(network, path) for path in group] for group in groups]:
        if init == "mean":
            _average(modules)
        _replace(network, modules)
    return network


def check_groups(network: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Refuse groups of modules that `tie_layers` cannot tie.

    Raises:
        InputError: see `tie_layers`.
    """
    for group in groups:
        if isinstance(group, str) or len(group) < 2:
            raise InputError(f"a group of tied layers needs at least two paths, got {group!r}")
    found = {path: _module_at(network, path) for group in groups for path in group}
    _check_paths([path for group in groups for path in group], found)
    for group in groups:
        _check_group(network, {path: found[path] for path in group})


def ties_of(network: nn.Module) -> list[list[str]]:
    """The places at which a network has the same module, for `restore_ties`.

    Returns:
        Groups of paths in the order of the network, in plain values. Modules that are tied only because modules around
        them are tied are not listed, nor are modules without parameters and buffers.
    """
    places: dict[nn.Module, list[str]] = {}
    for path, parent in network.named_modules():
        for name, child in parent._modules.items():  # noqa: SLF001  # the public iterators skip repeats
            if child is not None:
                places.setdefault(child, []).append(join_path(path, name))
    return [paths for module, paths in places.items() if len(paths) > 1 and next(_tensors(module), None) is not None]


def restore_ties(network: nn.Module, description: Sequence[Sequence[str]]) -> nn.Module:
    """Tie the modules of a network as described, in place; a state dict of the tied network then loads strictly.

    The network is built like the described one, before anything else (shrinking, quantizing) is rebuilt. Modules that
    are tied already remain so.
    """
    groups = []
    for paths in description:
        distinct: dict[nn.Module, str] = {}
        for path in paths:
            distinct.setdefault(_module_at(network, path), path)
        if len(distinct) > 1:
            groups.append(list(distinct.values()))
    return tie_layers(network, groups)


def _module_at(network: nn.Module, path: str) -> nn.Module:
    module = layer_at(network, path)
    if module is network:
        raise InputError(f"{type(network).__name__} cannot be tied as a whole: name layers in it, see named_modules()")
    return module


def _check_paths(paths: Sequence[str], found: dict[str, nn.Module]) -> None:
    for number, path in enumerate(paths):
        for other in paths[:number]:
            if path == other:
                raise InputError(f"{path!r} is named twice: name it once, in a group with everything it is tied to")
            # Compares objects, not names: either may be an alias of a module that is tied already.
            if found[path] is found[other]:
                raise InputError(f"{other!r} and {path!r} are the same module already: leave one of them out")
            for outer, inner in ((path, other), (other, path)):
                if any(module is found[inner] for module in found[outer].modules()):
                    raise InputError(f"{inner!r} is inside {outer!r}: name only one of them")


def _check_group(network: nn.Module, group: dict[str, nn.Module]) -> None:
    (first_path, first), *others = group.items()
    for path, module in group.items():
        for part in module.modules():
            if parametrize.is_parametrized(part):
                raise InputError(f"{path!r} is reparametrized: bake that in before it is tied, or tie it first")
            if any(value for name, value in vars(part).items() if name.endswith("_hooks")):
                raise InputError(f"{path!r} has hooks, which would be lost or run too often: tie it before adding them")
    for path, module in others:
        difference = _difference(first, module)
        if difference:
            raise InputError(f"{first_path!r} and {path!r} cannot be tied: {difference}")
    _check_outside(network, group)


def _check_outside(network: nn.Module, group: dict[str, nn.Module]) -> None:
    """Refuse to replace a module whose weights are used elsewhere: that tie would be lost silently."""
    for path, module in list(group.items())[1:]:
        name = shared_outside(network, module, *group.values())
        if name is not None:
            raise InputError(
                f"{path!r} shares weights with {name!r}, which would be left with the old ones: put it first in its "
                "group, or untie them"
            )


def _difference(one: nn.Module, other: nn.Module) -> str:
    """How two modules differ, in words; empty if one can replace the other."""
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    if type(one) is type(other) and list(ours) != list(theirs):
        return "their parts differ"
    for path, module in ours.items():
        where = f" at {path!r}" if path else ""
        own, its = type(module), type(theirs[path])
        if own is not its:
            return f"{own.__name__} and {its.__name__}{where}"
        options, others = _options(module), _options(theirs[path])
        # Differences in arguments come before those that follow from them.
        for name in sorted(options.keys() | others.keys(), key=lambda name: (name.startswith("_"), name)):
            if name not in options or name not in others or options[name] != others[name]:
                return f"{name} is {options.get(name)} and {others.get(name)}{where}"
    kinds, others = ({name: _kind(tensor) for name, tensor in _tensors(module)} for module in (one, other))
    for name in [*kinds, *others]:
        if kinds.get(name) != others.get(name):
            return f"{name} is {kinds.get(name, 'missing')} and {others.get(name, 'missing')}"
    return ""


def _options(module: nn.Module) -> dict[str, Any]:
    """The Python attributes of a module as far as they can be compared, and the types of the others."""
    return {name: _comparable(value) for name, value in vars(module).items() if name not in _INTERNAL}


def _comparable(value: Any) -> Any:
    if isinstance(value, (*_PLAIN, *_CALLABLE)):
        return value
    if isinstance(value, (list, tuple)):
        return [_comparable(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _comparable(part) for key, part in value.items()}
    return type(value).__name__


def _kind(tensor: Tensor) -> str:
    trained = " that trains" if tensor.requires_grad else ""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}{trained}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@torch.no_grad()
def _average(modules: Sequence[nn.Module]) -> None:
    """Set the first module's values to the means."""
    everything = [dict(_tensors(module)) for module in modules]
    done = set()
    for name, tensor in everything[0].items():
        if tensor.is_floating_point() and tensor not in done:
            done.add(tensor)
            tensor.copy_(torch.stack([wide(tensors[name]) for tensors in everything]).mean(0))


def _replace(network: nn.Module, modules: Sequence[nn.Module]) -> None:
    first, *others = modules
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # noqa: SLF001  # all names of a module that has several
            if any(child is other for other in others):
                parent._modules[name] = first  # noqa: SLF001
