"""What a checkpoint says of the arguments that a module was made with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from distill_lightning.errors import InputError
from distill_lightning.networks import build_from
from distill_lightning.teachers import TeacherEnsemble


def unplain_arguments(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments that a checkpoint must not hold as they are, with their values.

    Those that would need code, networks, functions and the like, and those of a base class that the module's own
    constructor does not take, which the command line could not pass on to it.

    Args:
        module: whose constructor is running and calls this; arguments of every level of inheritance are looked at.
    """
    values: dict[str, Any] = {}
    frame = inspect.currentframe()
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code.co_name == "__init__" and _holds(frame.f_locals, module):
        code = frame.f_code
        arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        for name in arguments:
            if not takes(type(module), name) or not _is_plain(frame.f_locals[name]):
                values[name] = frame.f_locals[name]
        frame = frame.f_back
    return values


def objects_given(module: nn.Module, values: Mapping[str, Any]) -> list[str]:
    """Those of some arguments that are not what the constructor would have taken by itself.

    Args:
        module: made with them.
        values: arguments by name.
    """
    parameters = {
        name: parameter
        for kind in reversed(type(module).__mro__)
        if "__init__" in vars(kind)
        for name, parameter in inspect.signature(kind).parameters.items()
    }
    return [
        name for name, value in values.items() if takes(type(module), name) and value is not parameters[name].default
    ]


def refuse_unused(kind: type, reason: str, **options: Any) -> None:
    """Refuse options that would do nothing beside the others.

    Args:
        kind: the class whose constructor's defaults are no request.
        reason: what makes them useless, for the message.
        options: the values by name.

    Raises:
        InputError: one is not its default.
    """
    parameters = inspect.signature(kind).parameters
    unused = [name for name, value in options.items() if value != parameters[name].default]
    if unused:
        raise InputError(
            f"{' and '.join(unused)} would do nothing {reason}: leave {'it' if len(unused) == 1 else 'them'} out"
        )


def takes(kind: type, name: str) -> bool:
    """Whether a class's constructor takes an argument of this name, itself or by handing on its ``**options``."""
    for level in kind.__mro__:
        if "__init__" in vars(level):
            parameters = inspect.signature(level).parameters
            if name in parameters:
                return True
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                return False
    return False


def _holds(values: Mapping[str, Any], module: nn.Module) -> bool:
    return any(value is module for value in values.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in (*value.keys(), *value.values()))
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, np.generic) or type(value) in (bool, int, float, str)


def plain(value: Any) -> Any:
    """The same value in Python's own types: numpy's numbers would not be read again with ``weights_only=True``."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def rebuild(name: str, recipe: dict[str, Any] | None) -> nn.Module:
    """Build a network, or an ensemble of them, from what a checkpoint tells of it.

    Args:
        name: of the constructor's argument, for the message.
        recipe: of a network, or an ensemble's ``networks`` and other arguments.

    Raises:
        InputError: it tells nothing.
    """
    ensemble = recipe if recipe is not None and "networks" in recipe else None
    networks = []
    for part in [recipe] if ensemble is None else ensemble["networks"]:
        if part is None:
            raise InputError(f"the checkpoint cannot tell how {name} was built: load_from_checkpoint(path, {name}=...)")
        networks.append(build_from(part))
    if ensemble is None:
        return networks[0]
    return TeacherEnsemble(networks, **{name: value for name, value in ensemble.items() if name != "networks"})
