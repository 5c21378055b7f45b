"""Options that are objects with options of their own, and what a checkpoint holds of any option."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from distill_lightning.errors import InputError, check_finite, check_one_of

_PACKAGE = __name__.partition(".")[0]
_KEYS = {"class_path", "init_args"}
# As text, because the modules of choices postpone the evaluation of annotations.
_COUNTS = (int, int | None, "int", "int | None")
_NUMBERS = (float, float | None, "float", "float | None")


class Choice(ABC):  # noqa: B024  (kinds of choices say what their alternatives must define)
    """A description of what a module is to do, with the options that belong to it; immutable, so it can be shared.

    A kind of choice is an abstract class below this one, its alternatives are frozen dataclasses below that. In YAML
    and on the command line an alternative is named like any class (``distance: FactorDistance``,
    ``--model.init_args.distance.init_args.p 2``). A checkpoint holds a choice of this package as plain values, from
    which it is made again.
    """

    def check_known(self, **known: Sequence[str]) -> None:
        """Refuse options whose values are none of the known ones.

        Raises:
            InputError: one is none of them.
        """
        for name, values in known.items():
            check_one_of(f"{type(self).__name__}: {name}", getattr(self, name), values)

    def check_numbers(self) -> None:
        """Refuse infinity and NaN in every option, also in those of choices within, and fractions in counts.

        A count is what the dataclass declares as ``int`` or ``int | None``, a number what it declares as ``float`` or
        ``float | None``.

        Raises:
            InputError: a number is not finite or is none, or a count is not an integer.
        """
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        for field in fields:
            name, value = f"{type(self).__name__}: {field.name}", getattr(self, field.name)
            is_count = isinstance(value, Integral) and not isinstance(value, bool)
            if field.type in _COUNTS and value is not None and not is_count:
                raise InputError(f"{name} must be an integer, got {value!r}")
            if field.type in _NUMBERS and value is not None and not isinstance(value, Real):
                raise InputError(f"{name} must be a number, got {value!r}")
            parts = value.values() if isinstance(value, Mapping) else value
            for part in parts if isinstance(value, (Mapping, list, tuple)) else [value]:
                if isinstance(part, Choice):
                    part.check_numbers()
                elif isinstance(part, Real):
                    check_finite(name, part)


def plain(value: Any) -> Any:
    """A value as a checkpoint can hold it and ``weights_only=True`` reads it: numbers, text, lists and dicts of them.

    A `Choice` of this package becomes ``{"class_path": ..., "init_args": {...}}``, as it stands in a YAML file.

    Raises:
        TypeError: the value, or a part of it, is something else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    kind: Any = type(value)
    if isinstance(value, Choice) and hasattr(kind, "__dataclass_fields__") and _is_own(kind):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(kind)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": fields}
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{kind.__name__} is not a plain value")


def is_plain(value: Any) -> bool:
    """Whether `plain` takes the value."""
    try:
        plain(value)
    except TypeError:
        return False
    return True


def from_plain(value: Any) -> Any:
    """A value as it was before `plain`, choices included; only classes of this package are ever made.

    Raises:
        InputError: a choice of another package, or of a name or with options that this version does not know.
    """
    if isinstance(value, (list, tuple)):
        return [from_plain(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == _KEYS:
        options = {name: from_plain(part) for name, part in value["init_args"].items()}
        try:
            return choice_class(value["class_path"])(**options)
        except TypeError as error:
            raise InputError(f"the checkpoint's {value['class_path']}: {error}: give it anew") from error
    return {name: from_plain(part) for name, part in value.items()}


def is_choice(path: Any) -> bool:
    """Whether this is the import path of a choice of this package."""
    if not isinstance(path, str):
        return False
    try:
        choice_class(path)
    except InputError:
        return False
    return True


def choice_class(path: str) -> type:
    """The choice of this package that has an import path.

    Raises:
        InputError: there is none.
    """
    module, _, name = path.rpartition(".")
    kind = None
    # A module of a private name may do something when it is imported.
    if module.partition(".")[0] == _PACKAGE and "._" not in module:
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ImportError:
            kind = None
    if not (isinstance(kind, type) and issubclass(kind, Choice)):
        raise InputError(f"the checkpoint names {path!r}, which is not an option of this version: give it anew")
    return kind


def check_choices(who: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Look at arguments whose defaults are choices.

    Args:
        who: what the message begins with.
        given: the arguments, by name.
        defaults: of all that there are, by name.

    Raises:
        InputError: one is not a choice of its default's kind.
    """
    for name, value in given.items():
        default = defaults.get(name)
        if not isinstance(default, Choice):
            continue
        kind: Any = next(base for base in type(default).__mro__ if Choice in base.__bases__)
        if not isinstance(value, kind):
            known = ", ".join(f"{other.__name__}(...)" for other in kind.__subclasses__())
            raise InputError(f"{who}: {name}={value!r} is not a {kind.__name__}: give one of {known}")


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == _PACKAGE
