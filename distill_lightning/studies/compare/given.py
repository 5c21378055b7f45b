"""What Python hands to a comparison and no file can say: functions, classes of a notebook, networks, data modules."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from distill_lightning.errors import InputError, in_a_line


class Given:
    """An object, or what makes one, in the place of a ``class_path`` or of a value in a comparison's configuration.

    In ``compare.yaml`` it is ``given in Python: <name> (<digest>)``. An output folder goes on only under the same
    digest, so a function whose code has changed does not go on with the runs of the one before.

    Args:
        make: a class or function that makes the object, with the ``init_args`` beside it; in the place of a value, a
            function of nothing.
        name: for people.
        digest: tells it from others, the same in every process.
    """

    def __init__(self, make: Callable[..., Any], name: str, digest: str) -> None:
        self.make, self.name, self.digest = make, name, digest

    def __str__(self) -> str:
        return f"given in Python: {self.name} ({self.digest})"

    __repr__ = __str__

    def __deepcopy__(self, memo: dict[int, Any]) -> Given:
        # What makes things is no thing of any run.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (_packed(self), self.name, self.digest)


def plain(value: Any) -> Any:
    """A configuration in the types of YAML, with a line of text for what was given in Python."""
    if isinstance(value, Given):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def all_given(value: Any, where: str = "") -> dict[str, Given]:
    """What of a configuration was given in Python, by the dotted key."""
    if isinstance(value, Given):
        return {where.removesuffix(".class_path"): value}
    parts: list[tuple[Any, Any]] = []
    if dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    return {
        key: found
        for name, part in parts
        for key, found in all_given(part, f"{where}.{name}" if where else str(name)).items()
    }


def refuse_unsendable(value: Any) -> None:
    """Refuse a configuration that cannot be sent to another process.

    Raises:
        InputError: something in it was given in Python and cannot be pickled; the message names it.
    """
    for key, given in all_given(value).items():
        try:
            pickle.dumps(given)
        except Exception as error:
            # Whatever an object's own way to be pickled raises.
            more = "" if _by_value() else ", or install cloudpickle"
            raise InputError(
                f"{key}: {given.name} cannot be sent to another process ({in_a_line(error)}): give "
                f"workers=1, or a class or function of a module that can be imported{more}"
            ) from error


def _by_value() -> Any:
    """What pickles functions and classes of a notebook, too; ``None``: it is not installed."""
    try:
        return importlib.import_module("cloudpickle")
    except ImportError:
        return None


def _packed(given: Given) -> bytes:
    packed: bytes = (_by_value() or pickle).dumps(given.make)
    return packed


def _unpacked(packed: bytes, name: str, digest: str) -> Given:
    return Given(pickle.loads(packed), name, digest)  # noqa: S301  (a process of the same comparison has packed it)
