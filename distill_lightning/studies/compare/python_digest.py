"""By what a function, a class or an object of a notebook is known again in another process."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

from torch import nn

from distill_lightning.callables import named
from distill_lightning.data.digests import digest_of, has_digest
from distill_lightning.layers.fingerprints import fingerprint, structure

_SIZE = 4


def python_digest(value: Any, *, weights: bool = True) -> str:
    """Eight hexadecimal digits of what a value is made of.

    A class or function that can be imported counts by its name, as in a YAML file. One of a notebook, of the script
    that runs, or from inside of a function counts by its code, its defaults, and the values that its code refers to,
    in turn. A network counts by its layers and weights, an object of another kind by its class and its plain
    attributes.

    Args:
        value: whatever it is.
        weights: whether the weights of a network count, and not its layers alone.
    """
    digest = blake2b(digest_size=_SIZE)
    for piece in _pieces(value, {}, weights=weights):
        digest.update(piece)
    return digest.hexdigest()


def import_path(value: Any) -> str | None:
    """Where any process can import a class or function from, as one would write it in a YAML file.

    Args:
        value: the class or function.

    Returns:
        The shortest path; the bare name of a class that this package makes public. ``None``: it can be imported from
        nowhere, or stands in a notebook or in the script that runs.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    parts = module.split(".")
    paths = (".".join([*parts[:length], name]) for length in range(1, len(parts) + 1))
    path = next((path for path in paths if named(path) is value), None)
    # Functions have no bare names there.
    is_bare = path == f"distill_lightning.{name}" and isinstance(value, type)
    return name if is_bare else path


def _pieces(value: Any, seen: dict[int, Any], *, weights: bool) -> Iterator[bytes]:
    parts: Iterable[Any] = ()
    if isinstance(value, _IMPORTABLE) and import_path(value) is not None:
        yield str(import_path(value)).encode()
    elif isinstance(value, nn.Module):
        yield structure(value).encode()
        yield repr([(name, tuple(tensor.shape)) for name, tensor in value.named_parameters()]).encode()
        yield fingerprint(value).encode() if weights else b""
        parts = dict.fromkeys(map(type, value.modules()))
    elif isinstance(value, (set, frozenset)):
        # Their order is another one in every process.
        yield repr(sorted(map(repr, value))).encode()
    elif isinstance(value, (Mapping, list, tuple)):
        yield f"{len(value)} ".encode()
        parts = value if not isinstance(value, Mapping) else (part for pair in value.items() for part in pair)
    elif has_digest(value):
        yield digest_of(value)
    elif id(value) not in seen:
        # Kept, so that nothing else gets its place in memory.
        seen[id(value)] = value
        yield f"{type(value).__name__} ".encode()
        parts = next((inside(value) for kind, inside in _INSIDE.items() if isinstance(value, kind)), _of_object(value))
    for part in parts:
        yield from _pieces(part, seen, weights=weights)


def _of_function(function: types.FunctionType) -> list[Any]:
    code = function.__code__
    outer = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    known = [function.__globals__[name] for name in _names(code) if name in function.__globals__]
    return [code, function.__defaults__, function.__kwdefaults__, outer, known]


def _of_class(kind: type) -> list[Any]:
    own = {name: part for name, part in vars(kind).items() if isinstance(part, _CODE) or has_digest(part)}
    return [kind.__qualname__, kind.__bases__, {name: part for name, part in own.items() if name not in _NOT_CODE}]


def _of_object(value: Any) -> list[Any]:
    attributes = getattr(value, "__dict__", {})
    plain = {name: attributes[name] for name in sorted(attributes) if isinstance(attributes[name], _PLAIN)}
    return [type(value), plain]


_INSIDE: dict[type, Callable[[Any], Iterable[Any]]] = {
    functools.partial: lambda value: [value.func, value.args, value.keywords],
    types.MethodType: lambda value: [value.__func__, value.__self__],
    types.FunctionType: _of_function,
    types.CodeType: lambda value: [
        value.co_code,
        value.co_names,
        value.co_varnames,
        value.co_freevars,
        value.co_consts,
    ],
    types.ModuleType: lambda value: [value.__name__],
    staticmethod: lambda value: [value.__func__],
    classmethod: lambda value: [value.__func__],
    property: lambda value: [value.fget],
    type: _of_class,
}
_IMPORTABLE = (type, types.FunctionType, types.BuiltinFunctionType)
# Larger things, such as the images of a data module, may not be there yet.
_PLAIN = (bool, int, float, complex, str, bytes, tuple, os.PathLike)
_CODE = (types.FunctionType, staticmethod, classmethod, property)
# Where a class stands and what is said about it.
_NOT_CODE = ("__module__", "__doc__", "__firstlineno__", "__static_attributes__", "__annotations__")


def _names(code: types.CodeType) -> list[str]:
    """The names that a function's code, and that of functions inside of it, refers to."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return list(dict.fromkeys([*code.co_names, *(name for one in inner for name in _names(one))]))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        # A name that its function has not given a value yet.
        return False
