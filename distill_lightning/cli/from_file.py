"""What the command line takes of a checkpoint's hyper-parameters: plain values, and this package's own options.

A parser imports and calls what a hyper-parameter names, and a checkpoint may be anybody's.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import yaml

from distill_lightning.arguments import arguments_of
from distill_lightning.callables import is_of_files, named, types_in
from distill_lightning.choices import choice_class, is_choice
from distill_lightning.errors import InputError

_OF_A_CLASS = {"class_path", "init_args", "dict_kwargs"}
_BASES = ("torch", "lightning", "lightning_fabric", "pytorch_lightning")


def class_of(found: Mapping[str, Any]) -> str:
    """The import path of the class that a checkpoint's hyper-parameters are of; empty: they do not say."""
    path = found.get("_class_path") or (found.get("class_path") if found.keys() <= _OF_A_CLASS else "")
    return path if isinstance(path, str) else ""


def safe_options(
    path: Path, found: Mapping[str, Any], kind: Any, given: Mapping[str, Any], *, linked: Collection[str] = ()
) -> dict[str, Any]:
    """The options of a module that a checkpoint's hyper-parameters hold, looked at before anything parses them.

    Args:
        path: of the checkpoint, for the message.
        found: its hyper-parameters.
        kind: the class of the module, which the user names.
        given: the user's own options, plain; a class named here is also accepted from the checkpoint, in the same
            place.
        linked: names of options that are linked to the data, which Lightning notes even for a class that does not take
            them; there they are left out.

    Returns:
        The options. A file or folder that the configuration names takes the place of the checkpoint's: it may have
        been moved since, and what is read, written or removed is the user's to say.

    Raises:
        InputError: a hyper-parameter is none of the class's arguments; or it names a class or function that is none of
            this package's options, and that the configuration does not name in the same place; or a file or folder
            where the configuration names none.
    """
    options = {name: value for name, value in found.items() if name not in ("_class_path", "_instantiator")}
    if "_class_path" not in found and class_of(found):
        options = {**(found.get("init_args") or {}), **(found.get("dict_kwargs") or {})}
    annotations = _annotations(kind)
    options = {name: value for name, value in options.items() if name not in linked or name in annotations}
    for name, value in options.items():
        _check_name(path, name, kind, annotations)
        options[name] = own = _with_own_places(value, annotations.get(name, Any), given.get(name))
        _check(path, name, own, annotations.get(name, Any), given.get(name))
    return options


def _with_own_places(value: Any, annotation: Any, given: Any) -> Any:
    """A value with the files and folders that the configuration names in the same places."""
    if isinstance(value, (list, tuple)) and isinstance(given, (list, tuple)) and len(value) == len(given):
        return [_with_own_places(part, annotation, own) for part, own in zip(value, given, strict=True)]
    if isinstance(value, Mapping) and isinstance(given, Mapping):
        kind = _kind(value, given) if "class_path" in value else None
        if kind is None:
            return {name: _with_own_places(part, annotation, given.get(name)) for name, part in value.items()}
        annotations, known = _annotations(kind), given.get("init_args") or {}
        options = {
            name: _with_own_places(part, annotations.get(name, Any), known.get(name))
            for name, part in (value.get("init_args") or {}).items()
        }
        return {**value, "init_args": options}
    is_place = is_of_files(annotation) and isinstance(given, (str, PurePath))
    return str(given) if is_place and (value is None or isinstance(value, str)) else value


def _check_name(path: Path, name: Any, kind: Any, known: Collection[str]) -> None:
    """Refuse what is no argument of the class, and what a parser takes for something else than an argument.

    Raises:
        InputError: it is.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in _OF_A_CLASS or name.startswith("__"):
        raise InputError(
            f"{path}: {str(name)[:80]!r} is no name of a hyper-parameter: the file was not made by a training"
        )
    if name not in known and not _takes_any(kind):
        raise InputError(
            f"{path} has a hyper-parameter {name[:80]!r}, which {getattr(kind, '__name__', kind)} does not take: the "
            "checkpoint is of another version of the class, or was not made by a training"
        )


def _takes_any(kind: Any) -> bool:
    """Whether a class or function hands on what it does not know by name; torch's and Lightning's bases take all."""
    makers = [kind]
    if inspect.isclass(kind):
        owners = [owner for owner in kind.__mro__ if "__init__" in vars(owner)]
        makers = [vars(owner)["__init__"] for owner in owners if owner.__module__.partition(".")[0] not in _BASES]
    return all(_hands_on(maker) for maker in makers if maker is not object.__init__)


def _hands_on(maker: Any) -> bool:
    rest = [one for one in inspect.signature(maker).parameters.values() if one.kind is inspect.Parameter.VAR_KEYWORD]
    # What an ``Unpack`` says is all that there is; annotations are often text.
    return bool(rest) and "Unpack[" not in str(rest[0].annotation)


def _check(path: Path, key: str, value: Any, annotation: Any, given: Any) -> None:
    """Refuse what a parser would import, call or read from another file.

    Raises:
        InputError: it would.
    """
    if isinstance(value, str):
        if is_of_files(annotation):
            if not isinstance(given, (str, PurePath)):
                raise InputError(
                    f"{path} names the file or folder {value[:80]!r} in {key}, which the configuration does not name: "
                    f"if it is meant, name one in the configuration, in model.init_args.{key}"
                )
        elif value != given and not _is_plain_text(value, annotation):
            raise _refused(path, key, value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        same = given if isinstance(given, (list, tuple)) and len(given) == len(value) else [None] * len(value)
        for number, (part, own) in enumerate(zip(value, same, strict=True)):
            _check(path, f"{key}.{number}", part, annotation, own)
    elif isinstance(value, Mapping):
        _check_mapping(path, key, value, annotation, given if isinstance(given, Mapping) else {})


def _check_mapping(path: Path, key: str, value: Mapping[Any, Any], annotation: Any, given: Mapping[str, Any]) -> None:
    # A parser may take a dot in a key for a way into what stands there.
    if not any(str(name).partition(".")[0] in _OF_A_CLASS for name in value):
        for name, part in value.items():
            _check(path, f"{key}.{name}", part, annotation, given.get(name))
        return
    kind = _kind(value, given)
    if kind is None:
        raise _refused(path, key, value.get("class_path", dict(value)))
    annotations, known = _annotations(kind), given.get("init_args") or {}
    for name, part in (value.get("init_args") or {}).items():
        if name not in annotations:
            raise _refused(path, f"{key}.{name}", part)
        _check(path, f"{key}.{name}", part, annotations[name], known.get(name))


def _kind(value: Mapping[Any, Any], given: Mapping[str, Any]) -> Any:
    """The class that a mapping describes, if it is a choice of this package or what the configuration names there."""
    class_path, options = value.get("class_path"), value.get("init_args") or {}
    if value.keys() - {"class_path", "init_args"} or not isinstance(options, Mapping):
        return None
    if is_choice(class_path):
        return choice_class(typing.cast("str", class_path))
    # The user's own, which the parser has imported for the configuration.
    return named(class_path) if class_path and class_path == given.get("class_path") else None


def _is_plain_text(value: str, annotation: Any) -> bool:
    """Whether a parser leaves text as it is, neither importing what it names nor reading it as something else."""
    kinds = list(types_in(annotation))
    if any(typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind) for kind in kinds):
        return True
    if all(_is_plain_kind(kind) for kind in kinds):
        return True
    if any(kind not in (Any, object, inspect.Parameter.empty) and not _is_plain_kind(kind) for kind in kinds):
        return False
    try:
        return not isinstance(yaml.safe_load(value), (dict, list)) and not Path(value).is_file()
    except (yaml.YAMLError, OSError, ValueError):
        return False


def _is_plain_kind(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal or kind in (None, os.PathLike):
        return True
    return isinstance(kind, type) and issubclass(kind, (int, float, str, type(None), PurePath, Enum))


def _annotations(kind: Any) -> dict[str, Any]:
    """What a class's arguments are, those of the data classes above it, too, as far as it can be found out."""
    known = {name: parameter.annotation for name, parameter in arguments_of(kind).items()}
    try:
        hints = typing.get_type_hints(kind) if hasattr(kind, "__dataclass_fields__") else {}
    except (NameError, TypeError):
        hints = {}
    return {name: hints.get(name, annotation) for name, annotation in known.items()}


def _refused(path: Path, key: str, what: Any) -> InputError:
    return InputError(
        f"{path} names {str(what)[:80]!r} in {key}: of a checkpoint only plain values and this package's own options "
        f"are taken; if it is meant, name it in the configuration, in model.init_args.{key}"
    )
