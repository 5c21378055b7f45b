"""From what a comparison's YAML file describes to functions that build it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning import LightningDataModule

import distill_lightning
from distill_lightning.arguments import arguments_of, takes
from distill_lightning.callables import check_callables, named
from distill_lightning.errors import InputError
from distill_lightning.studies.compare.checks import is_count
from distill_lightning.studies.compare.config import Spec, TeachersConfig

# What data tell that some class is built with.
_TOLD = ("num_classes", "num_targets", "in_channels", "input_shape", "pad_id", "class_names")


def parsed(key: str, kind: Any, spec: Spec) -> Callable[[], Any]:
    """A function that builds what a spec describes; the spec itself is checked now.

    Args:
        key: where it stands in the YAML file, dotted.
        kind: the type of what is built.
        spec: ``class_path`` and ``init_args``.

    Raises:
        ArgumentError: there is no such class, or it does not take what it is given.
        InputError: what is named makes something else.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind, required=True)
    nested: Any = _spelled_out(spec)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    found = parser.parse_object(nested)
    check_callables(key, kind, found[key].as_dict() if isinstance(found[key], Namespace) else found[key])
    return lambda: parser.instantiate(found)[key]


def _spelled_out(value: Any) -> Any:
    """A value of the YAML file in which functions, too, have whole names: parsers know short ones of classes alone."""
    if isinstance(value, list):
        return [_spelled_out(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    spelled_out = {name: _spelled_out(part) for name, part in value.items()}
    path = value.get("class_path")
    if isinstance(path, str) and "." not in path and inspect.isroutine(named(path)):
        spelled_out["class_path"] = f"{distill_lightning.__name__}.{path}"
    return spelled_out


def filled(key: str, spec: Spec, known: Mapping[str, Any]) -> Spec:
    """A spec with the known values that its class takes and its ``init_args`` leave out.

    Raises:
        InputError: it is no ``class_path`` with ``init_args``.
    """
    arguments = spec.get("init_args") or {}
    if not isinstance(spec.get("class_path"), str) or not isinstance(arguments, Mapping):
        raise InputError(f"{key}: expected a class_path and init_args with its arguments, got {spec!r}")
    target = find(spec["class_path"])
    accepted = {} if target is None else arguments_of(target)
    missing = {name: value for name, value in known.items() if name in accepted and value is not None}
    return {**spec, "init_args": {**missing, **arguments}}


def teacher_specs(teachers: TeachersConfig) -> list[tuple[str, Spec]]:
    """What describes the teachers' networks, under the keys where it stands."""
    if teachers.given is not None:
        return [(f"teachers.{number}", spec) for number, spec in enumerate(teachers.given)]
    return [] if teachers.network is None else [("teachers.network", teachers.network)]


def filled_network(key: str, spec: Spec, known: Mapping[str, Any]) -> Spec:
    """The spec of a network with the known values in the network whose weights are loaded, too."""
    arguments = spec.get("init_args")
    if isinstance(arguments, Mapping) and isinstance(arguments.get("network"), Mapping):
        nested = filled_network(f"{key}.init_args.network", dict(arguments["network"]), known)
        spec = {**spec, "init_args": {**arguments, "network": nested}}
    return filled(key, spec, known)


def find(class_path: str) -> Any:
    """The class or function; ``None`` if there is none: the parser's message is the better one then."""
    found = named(class_path)
    return found if callable(found) else None


def set_up(data: LightningDataModule) -> LightningDataModule:
    """The data module, with its data read."""
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    return data


@contextmanager
def remembering_warnings() -> Iterator[list[str]]:
    """Show warnings as ever, after the block, and collect their texts, so that they need not be shown again."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    for warning in caught:
        said.append(str(warning.message))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def told_by(data: Any) -> dict[str, Any]:
    """What a data module that is set up tells of its data, by the names of arguments, as plain values."""
    found = {name: getattr(data, name, None) for name in _TOLD}
    if found["input_shape"] is not None:
        found["input_shape"] = list(found["input_shape"])
        found["in_channels"] = found["input_shape"][0]
    if found["class_names"] is not None:
        found["class_names"] = list(found["class_names"])
    return found


def paraphraser_spec(name: str, spec: Spec) -> Spec:
    """The spec of what trains a method's paraphrasers, its layers those that the method taps."""
    given = spec["paraphrasers"]
    if not isinstance(given, Mapping) or not is_count(given.get("epochs")) or given.keys() - {"epochs", "init_args"}:
        raise InputError(f"methods.{name}.paraphrasers: expected epochs, at least 1, and init_args, got {given}")
    target = find(str(spec.get("class_path")))
    if target is not None and not takes(target, "paraphrasers"):
        raise InputError(f"methods.{name}: {spec['class_path']} takes no paraphrasers: leave them out")
    taps = spec.get("init_args") or {}
    layers = taps.get("teacher_layers") or taps.get("student_layer")
    arguments = {"layers": layers, **(given.get("init_args") or {})}
    return {"class_path": "distill_lightning.ParaphraserModule", "init_args": arguments}
