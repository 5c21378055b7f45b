"""Which arguments a class or a function takes by name, with shared ``**options`` spelled out."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from distill_lightning.errors import InputError


def arguments_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a class's constructor, or a function, takes by name.

    ``**options: Unpack[Options]`` stands for the keys of the ``TypedDict``. Plain ``**options`` of a constructor are
    taken to be handed on to the next constructor in the method resolution order, and stand for its parameters; plain
    ``**options`` of a function, or of the last constructor, stand for nothing.

    Args:
        target: the class or function.

    Returns:
        The parameters by name; none if Python knows no signature. Annotations are resolved where possible and left as
        strings where not. What comes from ``**options`` is keyword-only. The default of a key of a ``TypedDict`` is
        that of the parameter of the same name in the next class above that has one, or ``Parameter.empty``.
    """
    return _named(_levels(target))


def takes(target: Callable[..., Any], name: str) -> bool:
    """Whether a class's constructor, or a function, takes an argument of this name, see `arguments_of`.

    Args:
        target: the class or function.
        name: of the argument.
    """
    return name in arguments_of(target)


def bound_arguments(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name.

    Args:
        target: the class or function that is called.
        args: its positional arguments.
        kwargs: its arguments by name, those for ``**options`` among them.

    Returns:
        What is given, in the order of the parameters; neither defaults nor missing arguments are filled in.

    Raises:
        InputError: a positional argument has no name, because it goes to ``*args``.
        TypeError: the arguments do not fit the signature.
    """
    own = _levels(target)[0]
    values: dict[str, Any] = {}
    for name, value in inspect.Signature(list(own.values())).bind_partial(*args, **kwargs).arguments.items():
        if own[name].kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(
                f"{getattr(target, '__name__', target)} takes *{name}, which have no names: give arguments by name"
            )
        if own[name].kind is inspect.Parameter.VAR_KEYWORD:
            values |= value
        else:
            values[name] = value
    return values


def _levels(target: Callable[..., Any]) -> list[dict[str, inspect.Parameter]]:
    """The parameters of a function, or those of a class's constructor and of every one above it."""
    if not inspect.isclass(target):
        return [_parameters(target)]
    # Not the class's own signature: one of a metaclass or of __new__ would hide the constructor's.
    constructors = [vars(kind)["__init__"] for kind in target.__mro__[:-1] if "__init__" in vars(kind)]
    return [_parameters(constructor, leading=1) for constructor in constructors or [target.__new__]]


def _parameters(function: Callable[..., Any], *, leading: int = 0) -> dict[str, inspect.Parameter]:
    """A function's parameters without some leading ones, their annotations resolved; none where Python knows none."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[leading:]
    except ValueError:
        return {}
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    annotations = _resolved({parameter.name: parameter.annotation for parameter in parameters}, scope)
    return {parameter.name: parameter.replace(annotation=annotations[parameter.name]) for parameter in parameters}


def _named(levels: Sequence[Mapping[str, inspect.Parameter]]) -> dict[str, inspect.Parameter]:
    """What a constructor takes by name, itself or for those above it, which follow it in ``levels``."""
    if not levels:
        return {}
    own, *above = levels
    named = {
        name: parameter
        for name, parameter in own.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    options = next((parameter for parameter in own.values() if parameter.kind is inspect.Parameter.VAR_KEYWORD), None)
    if options is None:
        return named
    keys = _keys(options.annotation)
    if keys is None:
        passed_on = _named(above)
    else:
        passed_on = {name: _key(name, annotation, above) for name, annotation in keys.items()}
    return named | {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in passed_on.items()
        if name not in named
    }


def _key(name: str, annotation: Any, above: Sequence[Mapping[str, inspect.Parameter]]) -> inspect.Parameter:
    """A key of a ``TypedDict`` as a parameter, with the default of the next class that has one of its name."""
    default = next((level[name].default for level in above if name in level), inspect.Parameter.empty)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _keys(annotation: Any) -> dict[str, Any] | None:
    """The keys of an ``Unpack[TypedDict]`` and what they are; ``None``: the annotation is none."""
    # That of typing, or of typing_extensions.
    unpacked = repr(typing.get_origin(annotation)).rpartition(".")[2] == "Unpack"
    kind = typing.get_args(annotation)[0] if unpacked else None
    if kind is None or not typing.is_typeddict(kind):
        return None
    return _resolved(kind.__annotations__, vars(sys.modules[kind.__module__]))


def _resolved(annotations: Mapping[str, Any], scope: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations without strings, except where a name in them is unknown."""
    resolved = {}
    for name, annotation in annotations.items():
        try:
            hints = typing.get_type_hints(SimpleNamespace(__annotations__={name: annotation}), dict(scope))
        except Exception:
            # Annotations may be any code: names that only a type checker imports, or syntax of a later Python.
            hints = {name: getattr(annotation, "__forward_arg__", annotation)}
        resolved[name] = hints[name]
    return resolved
