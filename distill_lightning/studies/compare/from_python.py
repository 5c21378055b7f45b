"""From what is given in Python to the configuration that a YAML file would describe."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import get_loader
from torch import nn

from distill_lightning.errors import InputError, refusing
from distill_lightning.studies.compare.blueprint import Blueprint, Copies
from distill_lightning.studies.compare.config import CompareConfig, config_of
from distill_lightning.studies.compare.given import Given, all_given, refuse_unsendable
from distill_lightning.studies.compare.python_digest import import_path, python_digest

# Under these keys stands one thing that is made, under the others of the second line several by name.
_MADE = ("data", "student", "supervised", "optimizer", "lr_scheduler")
_MADE_BY_NAME = ("methods", "backbones")
_TRAIN = ("methods", "backbones", "supervised")
_PLAIN = (str, bytes, int, float, complex, type(None), Path)


def config_from(
    config: str | Path | Mapping[str, Any] | CompareConfig | None, keys: Mapping[str, Any]
) -> CompareConfig:
    """The comparison that is described.

    Args:
        config: a YAML file, its keys as a dict, or the configuration itself; ``None``: ``keys`` say everything.
        keys: of the YAML file; they win.

    Raises:
        ArgumentError: a key is missing or unknown, or a value has the wrong type.
        InputError: the file cannot be read, or something that is given cannot be used.
    """
    if isinstance(config, CompareConfig):
        known = dict(vars(config))
    elif isinstance(config, Mapping):
        known = dict(config)
    else:
        known = {} if config is None else _read(Path(config))
    given = {**known, **keys}
    only_seeds = given.pop("only_seeds", None)
    if given.get("only") is not None and {"seeds"} <= known.keys() & keys.keys():
        # As on the command line: those of the configuration stay, and these are made.
        only_seeds, given["seeds"] = list(keys["seeds"]), known["seeds"]
    plain = {name: described_value(name, value) for name, value in given.items()}
    described = config_of(plain, only_seeds=only_seeds)
    if described.workers > 1:
        refuse_unsendable(described)
    return described


def _read(path: Path) -> dict[str, Any]:
    with refusing(f"{path} cannot be read", OSError, UnicodeError, yaml.YAMLError):
        # As the command line does: 1e-3 is a number.
        found = get_loader("yaml")(path.read_text())
    if not isinstance(found, dict):
        raise InputError(f"{path} has no keys: it is no comparison's YAML file")
    return found


def described_value(key: str, value: Any) -> Any:
    """What stands under a key of the configuration, all that is not plain in it as a `Given`.

    Raises:
        InputError: an object that cannot be used there.
    """
    if key in _MADE and value is not None:
        return _spec(key, value)
    if key in _MADE_BY_NAME and isinstance(value, Mapping):
        return {name: _spec(f"{key}.{name}", one) for name, one in value.items()}
    if key in _OTHERWISE:
        return _OTHERWISE[key](value)
    if dataclasses.is_dataclass(value):
        return vars(value)
    return list(value) if isinstance(value, (tuple, range)) else str(value) if isinstance(value, Path) else value


def _plain_search(value: Any) -> Any:
    """Values to try, which stand in the names of files and in the report."""
    found = _argument("search", value)
    for key, given in all_given(found, "search").items():
        raise InputError(
            f"{key}: {given.name} was given in Python, and values to try are numbers, texts or a class by class_path "
            "and init_args"
        )
    return found


def _teachers(value: Any) -> Any:
    """A network that several are trained of, or finished ones."""
    if dataclasses.is_dataclass(value):
        value = {name: part for name, part in vars(value).items() if part is not None}
        value = value.get("given", value)
    if callable(value):
        raise InputError(
            "teachers is a network: give [network] if it is trained already, or dict(network=..., number=3) to train "
            "three like it"
        )
    if isinstance(value, (list, tuple)):
        return [_finished(f"teachers.{number}", one) for number, one in enumerate(value)]
    if isinstance(value, Mapping) and value.get("network") is not None:
        return {**value, "network": _spec("teachers.network", value["network"])}
    return value


_OTHERWISE = {"teachers": _teachers, "search": _plain_search}


def _spec(key: str, value: Any) -> Any:
    """A ``class_path`` and ``init_args`` for whatever makes an object, or is one."""
    if isinstance(value, functools.partial) and not value.args:
        value = {"class_path": value.func, "init_args": value.keywords}
    if not isinstance(value, Mapping):
        return {"class_path": _maker(key, value)}
    rest = {name: _argument(f"{key}.{name}", part) for name, part in value.items() if name != "class_path"}
    if "class_path" not in value:
        return rest
    made = value["class_path"]
    made = _spec(key, made) if isinstance(made, functools.partial) else {"class_path": _maker(key, made)}
    arguments = {**made.get("init_args", {}), **(rest.pop("init_args", None) or {})}
    return {**made, **rest, **({"init_args": arguments} if "init_args" in {**made, **value} else {})}


def _maker(key: str, value: Any) -> str | Given:
    """A ``class_path``, or what stands in its place."""
    if isinstance(value, (str, Given)):
        return value
    kind = type(value).__name__
    if isinstance(value, nn.Module) and key.split(".", maxsplit=1)[0] in _TRAIN:
        raise InputError(
            f"{key}: this {kind} belongs to one student, and every run trains one of its own: give a function, as in "
            f"lambda student, teachers: {kind}(student, teachers, ...)"
        )
    if isinstance(value, nn.Module):
        return Given(Blueprint(key, value), kind, python_digest(value, weights=False))
    if isinstance(value, pl.LightningDataModule):
        return Given(Copies(key, _apart(value)), kind, python_digest(value))
    if not callable(value):
        raise InputError(f"{key}: expected a class_path, an object or a function that makes one, got {value!r}")
    path = import_path(value) if isinstance(value, type) or _is_annotated(value) else None
    return path or Given(value, _name_of(value), python_digest(value))


def _finished(key: str, value: Any) -> Any:
    """A spec of a network that is trained already."""
    if isinstance(value, nn.Module):
        return {"class_path": Given(Copies(key, value), type(value).__name__, python_digest(value))}
    return _spec(key, value)


def _argument(key: str, value: Any) -> Any:
    """A value beside a ``class_path``, or among its arguments."""
    is_spec = isinstance(value, Mapping) and "class_path" in value
    if is_spec or (value is not None and key.rpartition(".")[2] in _MADE):
        return _spec(key, value)
    if isinstance(value, Mapping):
        return {name: _argument(f"{key}.{name}", part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_argument(f"{key}.{number}", part) for number, part in enumerate(value)]
    if isinstance(value, (Given, *_PLAIN)):
        return value
    if isinstance(value, nn.Module):
        return Given(Blueprint(key, value), type(value).__name__, python_digest(value, weights=False))
    return Given(functools.partial(_itself, value), _name_of(value), python_digest(value))


def _apart(data: pl.LightningDataModule) -> pl.LightningDataModule:
    """A data module without the Trainer that it was used with, which no copy is to be made of."""
    apart = copy.copy(data)
    apart.trainer = None
    return apart


def _itself(value: Any) -> Any:
    return value


def _is_annotated(function: Callable[..., Any]) -> bool:
    """Whether a function says what it makes, which YAML needs to know."""
    return inspect.isfunction(function) and "return" in function.__annotations__


def _name_of(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__name__).rpartition("<locals>.")[2]
    if name != "<lambda>":
        return name
    return f"lambda {', '.join(inspect.signature(value).parameters)}".strip()
