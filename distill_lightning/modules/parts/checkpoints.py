"""What a module's checkpoint holds besides weights, and how a module is made from one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any, Self

from torch import nn

from distill_lightning.arguments import arguments_of, bound_arguments, takes
from distill_lightning.callables import is_of_files
from distill_lightning.choices import Choice, check_choices, choice_class, from_plain, is_choice, is_plain, plain
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import circumstances, convert_early, noted_place, settle_progress
from distill_lightning.networks.budget import Budget, bytes_of_tensors
from distill_lightning.networks.provenance import (
    build_from,
    note_structure,
    recipe_of,
    restore_structure,
    without_weights,
)
from distill_lightning.networks.weights import check_architecture, read_checkpoint
from distill_lightning.teachers import TeacherEnsemble

FORMAT = 2
"""Raised whenever modules of an older version could not take up what a checkpoint holds."""

_FORMAT_KEY = "distill_lightning"
# Bytes that a network may take by its recipe, at any rate and for each byte of the weights: teachers, whose weights are
# not in the checkpoint, may be far larger than the student.
_SMALL = 2**31
_RATIO = 100


class RemembersArguments:
    """A module that knows what it was made with; the constructors of its base classes do not see all arguments."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments until the constructor asks for them."""
        module = super().__new__(cls)
        given = bound_arguments(cls, args, kwargs)
        check_choices(cls.__name__, given, _defaults(cls))
        module.__dict__["_given"] = given
        return module

    def given_arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, without defaults; may be called once, by the constructor."""
        return dict(self.__dict__.pop("_given"))


def hyperparameters(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a class's arguments, given or default, that a checkpoint can hold, as plain values."""
    values = {name: given.get(name, parameter.default) for name, parameter in arguments_of(kind).items()}
    return {name: plain(value) for name, value in values.items() if is_plain(value)}


def objects(kind: type, given: Mapping[str, Any]) -> list[str]:
    """The names of given arguments that no checkpoint can hold, networks, functions and the like."""
    defaults = _defaults(kind)
    return [name for name, value in given.items() if not is_plain(value) and value is not defaults.get(name)]


def _defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in arguments_of(kind).items()}


def note(module: Any, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint how a module and its networks were made, and what its frozen networks weigh."""
    # LightningCLI notes the class itself; here it is noted for a module that was made in Python, too. A plain dict,
    # because older Lightning versions save a class of their own, which weights_only=True refuses.
    made_by = f"{type(module).__module__}.{type(module).__qualname__}"
    note_format(checkpoint)
    checkpoint["hyper_parameters"] = {"_class_path": made_by, **dict(checkpoint.get("hyper_parameters", {}))}
    checkpoint["fingerprints"] = module.fingerprints()
    recipes = {name: frozen.recipe() for name, frozen in module.frozen.items()}
    checkpoint["recipes"] = {"student": recipe_of(module.student)} | {k: v for k, v in recipes.items() if v is not None}
    checkpoint["objects"] = module._objects  # noqa: SLF001
    checkpoint["circumstances"] = circumstances(module)
    note_structure(module, checkpoint)
    if "optimizer_states" in checkpoint:
        # A checkpoint of weights alone, which no training can go on from, needs no more.
        states = {name: part.state_dict() for name, part in module.parts.items()}
        checkpoint["parts"] = {name: state for name, state in states.items() if state is not None}
        checkpoint["place"] = noted_place(module)


def take(module: Any, checkpoint: dict[str, Any]) -> None:
    """Make a module ready for a checkpoint's weights, and give its parts what they had kept.

    Raises:
        InputError: the checkpoint is of another architecture, or of another version of this package.
    """
    check_format(checkpoint, "the checkpoint")
    restore_structure(module, checkpoint)
    check_architecture(module, checkpoint["state_dict"], source="what is being loaded")
    # Lightning restores before `on_fit_start`, and a training before may have had other teachers.
    module.forget_fingerprints()
    convert_early(module, (network for frozen in module.frozen.values() for network in frozen.networks))
    fingerprints = module.fingerprints()
    for name, known in checkpoint.get("fingerprints", {}).items():
        if fingerprints.get(name) != known:
            warnings.warn(
                f"{name}: the weights are not those that this checkpoint was trained with; predictions are not "
                f"touched, but training on would follow other {name}",
                stacklevel=2,
            )
    for name, state in checkpoint.get("parts", {}).items():
        if name in module.parts:
            module.parts[name].load_state_dict(state)
    module.resumed_at = settle_progress(module, checkpoint)


def note_format(checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint the version of what it holds."""
    checkpoint[_FORMAT_KEY] = FORMAT


def check_format(checkpoint: Mapping[str, Any], source: str) -> None:
    """Refuse a checkpoint of another version.

    Raises:
        InputError: it is one; the message begins with ``source``.
    """
    version = checkpoint.get(_FORMAT_KEY, 1)
    if version != FORMAT:
        raise InputError(
            f"{source} has format {version} of distill_lightning's checkpoints, this version reads {FORMAT}: train "
            "anew, or take the student alone: Pretrained(network, checkpoint)"
        )


def rebuilt(kind: type, path: Path, overrides: Mapping[str, Any]) -> Any:
    """The module of a checkpoint, see `DistillationModule.load_from_checkpoint`."""
    checkpoint = read_checkpoint(path)
    if "recipes" not in checkpoint:
        raise InputError(
            f"{path} is the checkpoint of another kind of module: distill_lightning.Pretrained(network, checkpoint, "
            "part=...) takes a network's weights from it"
        )
    check_format(checkpoint, str(path))
    recipes = {
        name: recipe for name, recipe in checkpoint["recipes"].items() if name not in overrides and takes(kind, name)
    }
    held = {
        name: value
        for name, value in checkpoint["hyper_parameters"].items()
        if takes(kind, name) and name not in overrides
    }
    # What the checkpoint holds the weights of needs neither its first file nor a download.
    recipes |= {name: without_weights(recipes[name]) for name in recipes if _has_weights(checkpoint, name)}
    known, left_out = _without_places(kind, path, held)
    kept, defaults = {*overrides, *recipes}, _defaults(kind)
    missing = [name for name in checkpoint.get("objects", []) if name not in kept]
    # Another choice may be another architecture; what else is missing matters only to a training.
    lost = [name for name in missing if isinstance(defaults.get(name), Choice)]
    if lost:
        raise InputError(
            f"{path} does not hold {' and '.join(lost)}, of which a part is not a plain value: load_from_checkpoint("
            f"path, {', '.join(f'{name}=...' for name in lost)})"
        )
    largest = max(_SMALL, _RATIO * bytes_of_tensors(checkpoint["state_dict"]))
    networks = {}
    for name, recipe in recipes.items():
        with Budget(
            largest, source=f"{path}: {name}", way_out=f"if it is meant, load_from_checkpoint(path, {name}=...)"
        ):
            networks[name] = _network(name, recipe)
    module: Any = kind(**{**known, **networks, **overrides})
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    module._missing = [*missing, *left_out]  # noqa: SLF001
    return module


def _has_weights(checkpoint: Mapping[str, Any], name: str) -> bool:
    return any(key.startswith(f"{name}.") for key in checkpoint["state_dict"])


def _without_places(kind: type, path: Path, held: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Hyper-parameters as they were, but for the files and folders of choices, which are the defaults; and their names.

    A checkpoint may be anybody's: what a training writes to, reads and removes is the caller's to name.

    Raises:
        InputError: an argument of the module itself names a file or folder, or an option that has no default does.
    """
    left_out: list[str] = []

    def check(key: str, value: Any, parameter: Parameter) -> None:
        if parameter.default is not Parameter.empty and "." in key:
            left_out.append(key)
            return
        raise InputError(
            f"{path} names the file or folder {str(value)[:80]!r} in {key}, and a checkpoint may be anybody's: if it "
            f"is meant, load_from_checkpoint(path, {key.partition('.')[0]}=...)"
        )

    def taken(key: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [taken(f"{key}.{number}", part) for number, part in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if not is_choice(value.get("class_path")) or not isinstance(value.get("init_args"), Mapping):
            return {name: taken(f"{key}.{name}", part) for name, part in value.items()}
        options = some(f"{key}.", value["init_args"], choice_class(value["class_path"]))
        return {**value, "init_args": options}

    def some(before: str, options: Mapping[str, Any], owner: type) -> dict[str, Any]:
        known, found = arguments_of(owner), {}
        for name, value in options.items():
            if name in known and _is_other_place(known[name], value):
                check(f"{before}{name}", value, known[name])
            else:
                found[name] = taken(f"{before}{name}", value)
        return found

    return {name: from_plain(value) for name, value in some("", held, kind).items()}, left_out


def _is_other_place(parameter: Parameter, value: Any) -> bool:
    """Whether a value is a file or folder that is not the default one."""
    default = str(parameter.default) if isinstance(parameter.default, Path) else parameter.default
    return is_of_files(parameter.annotation) and value is not None and value != default


def _network(name: str, recipe: dict[str, Any] | None) -> nn.Module:
    """A network, or an ensemble of them, built from what a checkpoint tells of it."""
    ensemble = recipe if recipe is not None and "networks" in recipe else None
    networks = []
    for part in [recipe] if ensemble is None else ensemble["networks"]:
        if part is None:
            raise InputError(f"the checkpoint cannot tell how {name} was built: load_from_checkpoint(path, {name}=...)")
        networks.append(build_from(part))
    if ensemble is None:
        return networks[0]
    return TeacherEnsemble(networks, **{name: value for name, value in ensemble.items() if name != "networks"})
