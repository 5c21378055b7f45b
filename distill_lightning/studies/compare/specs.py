"""From what a comparison's YAML file describes to functions that build it."""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning import LightningDataModule

import distill_lightning
from distill_lightning.arguments import arguments_of, takes
from distill_lightning.callables import check_callables, named
from distill_lightning.errors import InputError, refusing
from distill_lightning.modules.options import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.studies.compare.checks import is_count
from distill_lightning.studies.compare.config import CompareConfig, Spec, TeachersConfig
from distill_lightning.studies.compare.constructors import Constructor, constructor_of
from distill_lightning.studies.compare.given import Given, all_given

_FUNCTIONS: dict[str, Any] = {"optimizer": OptimizerCallable, "lr_scheduler": LRSchedulerCallable}
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
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
    if isinstance(spec.get("class_path"), Given):
        return partial(_made, key, kind, spec)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind, required=True)

    def read() -> Namespace:
        nested: Any = _spelled_out(_resolved(key, spec))
        for part in reversed(key.split(".")):
            nested = {part: nested}
        return cast("Namespace", parser.parse_object(nested))

    found = read()
    check_callables(key, kind, found[key].as_dict() if isinstance(found[key], Namespace) else found[key])
    # What Python has given is a fresh object every time.
    return lambda: parser.instantiate(read() if all_given(spec) else found)[key]


def _made(key: str, kind: Any, spec: Spec) -> Any:
    """What a class or function from Python makes, or, where a function is wanted, that function, with its options.

    Raises:
        InputError: it takes other arguments, or makes something else.
    """
    given: Given = spec["class_path"]
    options = {
        name: parsed(name, _FUNCTIONS[name], dict(part))() if name in _FUNCTIONS and isinstance(part, Mapping) else part
        for name, part in _resolved(key, spec.get("init_args") or {}).items()
    }
    origin = typing.get_origin(kind)
    wanted = kind if origin is None else typing.get_args(kind)[1]

    def make(*networks: Any, **more: Any) -> Any:
        signature = None
        with suppress(ValueError):
            # Python knows none of some that are not written in it.
            signature = inspect.signature(given.make)
        if signature is not None:
            with refusing(f"{key}: {given.name} is called with other arguments than it takes", TypeError):
                signature.bind(*networks, **options, **more)
        made = given.make(*networks, **options, **more)
        if not isinstance(made, wanted):
            raise InputError(
                f"{key}: {given.name} makes a {type(made).__name__}, and a {getattr(wanted, '__name__', wanted)} is "
                "needed here"
            )
        return made

    # What reads a configuration asks a function for what it makes.
    make.__annotations__["return"] = wanted
    return make() if origin is None else make


def _resolved(key: str, value: Any) -> Any:
    """A part of a configuration with the objects that were given in Python for it."""
    if isinstance(value, Given):
        return value.make()
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), Given):
        name = key.rpartition(".")[2]
        return _made(key, _FUNCTIONS.get(name, object), cast("Spec", value))
    if isinstance(value, Mapping):
        return {name: _resolved(f"{key}.{name}", part) for name, part in value.items()}
    if isinstance(value, list):
        return [_resolved(f"{key}.{number}", part) for number, part in enumerate(value)]
    return value


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
    if not isinstance(spec.get("class_path"), (str, Given)) or not isinstance(arguments, Mapping):
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


def find(class_path: Any) -> Any:
    """The class or function; ``None`` if there is none: the parser's message is the better one then."""
    found = class_path.make if isinstance(class_path, Given) else named(class_path)
    return found if callable(found) else None


def constructor_for(key: str, class_path: Any) -> Constructor:
    """How what stands at a ``class_path`` is given its networks, see `constructor_of`.

    Args:
        key: of the configuration, for messages.
        class_path: a path, or what Python has given; one that cannot be found is left to the parser.

    Raises:
        InputError: another argument stands before a network.
    """
    target = find(class_path)
    constructor = constructor_of(key, target)
    if not isinstance(class_path, Given) or isinstance(target, type) or constructor.teachers is not None:
        return constructor
    # A function of Python's may call its arguments what it likes.
    parameters = inspect.signature(target).parameters.values()
    needed = [each.name for each in parameters if each.kind in _BY_NAME and each.default is each.empty]
    teachers = next((name for name in needed if name != constructor.student), None)
    return replace(constructor, teachers=teachers)


def with_optimizer(module: Any, spec: Spec, known: Mapping[str, Any]) -> Any:
    """A module that a function from Python made, with the comparison's optimiser unless it has one of its own.

    Args:
        module: is changed.
        spec: of what made it.
        known: the comparison's ``optimizer`` and ``lr_scheduler``.
    """
    if isinstance(spec.get("class_path"), Given) and getattr(module, "optimizer", None) is default_optimizer:
        for name, kind in _FUNCTIONS.items():
            if known[name] is not None:
                setattr(module, name, parsed(name, kind, known[name])())
    return module


def check_top_level(config: CompareConfig) -> None:
    """See to what all classes get, so that what is wrong with it is not said of the first of them.

    Raises:
        ArgumentError: there is no such class, or it does not take what it is given.
        InputError: what is named makes something else.
    """
    for name, kind in _FUNCTIONS.items():
        if getattr(config, name) is not None:
            parsed(name, kind, getattr(config, name))


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
    if isinstance(found["input_shape"], Mapping):
        # As plain values, and without channels: they are of more than one tensor.
        found["input_shape"] = {name: list(shape) for name, shape in found["input_shape"].items()}
    elif found["input_shape"] is not None:
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
    target = find(spec.get("class_path"))
    if target is not None and not takes(target, "paraphrasers"):
        raise InputError(f"methods.{name}: {spec['class_path']} takes no paraphrasers: leave them out")
    taps = spec.get("init_args") or {}
    layers = taps.get("teacher_layers") or taps.get("student_layer")
    arguments = {"layers": layers, **(given.get("init_args") or {})}
    return {"class_path": "distill_lightning.ParaphraserModule", "init_args": arguments}
