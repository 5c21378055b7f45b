"""What a configuration names in the place of a function that makes something."""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from distill_lightning.arguments import arguments_of
from distill_lightning.errors import InputError


def types_in(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of: those in unions and containers, a ``Literal`` and a ``Callable`` whole.

    Args:
        annotation: of an argument, resolved where that is possible.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from types_in(parts[0])
    elif origin in (None, typing.Literal, Callable) or not parts:
        yield annotation
    else:
        for part in parts:
            if part is not Ellipsis:
                yield from types_in(part)


def is_of_files(annotation: Any) -> bool:
    """Whether an argument names a file or folder: in this package everything that does has ``Path`` in its annotation.

    Args:
        annotation: of the argument, resolved.
    """
    kinds = (kind for kind in types_in(annotation) if isinstance(kind, type))
    return any(issubclass(kind, PurePath) or kind is os.PathLike for kind in kinds)


def named(path: Any) -> Any:
    """What an import path names; ``None``: nothing.

    Args:
        path: ``package.module.name``, or the name of one of this package's public classes.
    """
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module or __name__.partition(".")[0]), name, None)
    except (ImportError, ValueError):
        return None


def check_callables(key: str, annotation: Any, value: Any) -> None:
    """Refuse a class or function in the place of one that makes an object of another kind.

    A parser takes anything that can be called where a ``Callable`` is expected.

    Args:
        key: of the configuration, with which the message begins.
        annotation: of what stands there.
        value: of the configuration, parsed; a class in it is a mapping with ``class_path`` and ``init_args``.

    Raises:
        InputError: what is named there, or in its own arguments, is neither a class of the kind that is needed nor a
            function that is annotated to return one.
    """
    if isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            check_callables(f"{key}.{number}", annotation, part)
        return
    spec = _plain_mapping(value)
    path = spec.get("class_path", value)
    kinds = _kinds(annotation)
    if kinds and not _is_literal(annotation, path) and (isinstance(path, str) or inspect.isroutine(path)):
        found = named(path) if isinstance(path, str) else path
        if not _makes(found, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            said = path if isinstance(path, str) else f"{path.__module__}.{path.__qualname__}"
            raise InputError(
                f"{key}: {said} makes no {wanted}: give a class of that kind, or a function that is annotated "
                "to return one"
            )
    target = named(path) if spec else None
    if target is not None:
        known = arguments_of(target)
        for name, part in _plain_mapping(spec.get("init_args")).items():
            if name in known:
                check_callables(f"{key}.{name}", known[name].annotation, part)


def _kinds(annotation: Any) -> list[type]:
    """The classes of what may stand somewhere, if functions that make them are among it; else none.

    Numbers and text are no such classes: a function that computes them is not asked to say so.
    """
    found: list[type] = []
    makes_objects = False
    for part in types_in(annotation):
        if typing.get_origin(part) is Callable:
            made = [kind for kind in types_in(typing.get_args(part)[1]) if isinstance(kind, type)]
            makes_objects = makes_objects or any(kind.__module__ != "builtins" for kind in made)
            found += made
        elif isinstance(part, type) and part.__module__ != "builtins":
            found.append(part)
    return found if makes_objects else []


def _is_literal(annotation: Any, value: Any) -> bool:
    literals = (part for part in types_in(annotation) if typing.get_origin(part) is typing.Literal)
    return any(value in typing.get_args(literal) for literal in literals)


def _makes(found: Any, kinds: list[type]) -> bool:
    made = [found]
    if not isinstance(found, type):
        try:
            made = list(types_in(typing.get_type_hints(found)["return"]))
        except (TypeError, NameError, AttributeError, KeyError):
            return False
    return all(isinstance(one, type) and issubclass(one, tuple(kinds)) for one in made)


def _plain_mapping(value: Any) -> dict[str, Any]:
    """A mapping, or jsonargparse's namespace of one; of anything else an empty one."""
    if isinstance(value, Mapping):
        return dict(value)
    # Not by its class: this package's lower rooms know no parser.
    return dict(vars(value)) if type(value).__name__ == "Namespace" else {}
