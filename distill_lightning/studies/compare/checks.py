"""What a comparison's configuration may say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill_lightning.errors import InputError, check_count
from distill_lightning.studies.compare.rows import NAME, rows_of
from distill_lightning.studies.compare.trials import check_search

if TYPE_CHECKING:
    from distill_lightning.studies.compare.config import CompareConfig, Spec, TeachersConfig

METHOD_KEYS = ("class_path", "init_args", "teachers", "stages", "initial", "paraphrasers", "backbone", "evaluate")
BACKBONE_KEYS = ("class_path", "init_args", "data", "epochs", "optimizer", "lr_scheduler")


def check(config: CompareConfig) -> None:
    """Refuse what cannot be used.

    Raises:
        InputError: a number or a name that cannot be used.
    """
    for epochs in (config.epochs, config.teachers.epochs):
        if epochs is not None and epochs < 1:
            raise InputError(f"epochs must be at least 1, got {epochs}")
    _check_teachers(config.teachers)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise InputError(f"seeds must be different numbers, at least one, got {config.seeds}")
    if not all(0 <= seed < 2**32 for seed in config.seeds):
        raise InputError(f"seeds must lie between 0 and 2**32 - 1, got {config.seeds}")
    _check_work(config)
    if (
        config.teachers_store is not None
        and config.teachers_store.views is not None
        and config.teachers_store.views < 1
    ):
        raise InputError(f"teachers_store.views must be at least 1, got {config.teachers_store.views}")
    for name, spec in config.methods.items():
        _check_method(name, spec, config.number_of_teachers)
    for name, spec in (config.backbones or {}).items():
        _check_backbone(name, spec)
    rows = [row.name for row in rows_of(config)]
    if config.baseline not in rows:
        raise InputError(f"baseline: {config.baseline!r} is no row; rows: {', '.join(rows)}")
    check_search(config)


def _check_work(config: CompareConfig) -> None:
    """Refuse what is no part of the comparison, or makes nothing of it."""
    unknown = [seed for seed in config.only_seeds or () if seed not in config.seeds]
    if unknown:
        raise InputError(f"seeds: {unknown} are none of the comparison's, {config.seeds}, of which only some are made")
    for key in ("confidence", "retry", "anew"):
        if not isinstance(getattr(config, key), bool):
            raise InputError(f"{key} must be true or false, got {getattr(config, key)!r}")
    check_count("workers", config.workers, at_least=1)
    if config.ray is not None and config.workers > 1:
        raise InputError(
            f"workers is {config.workers}, but how many runs a Ray cluster makes at a time is its affair: leave it out"
        )
    if config.threads_per_run is not None:
        check_count("threads_per_run", config.threads_per_run, at_least=1)


def _check_teachers(teachers: TeachersConfig) -> None:
    for key in ("number", "sets"):
        if (count := getattr(teachers, key)) < 1:
            raise InputError(f"teachers.{key} must be at least 1, got {count}")
    if teachers.given is not None:
        if not teachers.given or not all(isinstance(spec, Mapping) and "class_path" in spec for spec in teachers.given):
            raise InputError(
                f"teachers, where it is a list, holds networks by class_path and init_args, got {teachers.given}"
            )
        if teachers != type(teachers)(given=teachers.given):
            raise InputError("teachers are trained already where they are a list: leave out network, number and so on")
    elif teachers.network is None and teachers != type(teachers)():
        raise InputError("teachers.network is missing: give it by class_path and init_args, or no teachers at all")


def no_teachers(value: Any) -> InputError:
    """The refusal of what can be no teachers at all."""
    return InputError(
        "teachers is a network and a number, for example {network: {class_path: SmallResNet}, number: 2}, or a list of "
        f"networks that are trained already, got {value!r}"
    )


def _check_method(name: str, spec: Spec, available: int) -> None:
    _check_keys(f"methods.{name}", spec, METHOD_KEYS)
    if "stages" in spec and ("teachers" in spec or not is_count(spec["stages"])):
        raise InputError(f"methods.{name}.stages is a number, at least 1, and leaves no choice of teachers")
    if not isinstance(spec.get("initial", ""), str) or ("stages" in spec and "initial" in spec):
        raise InputError(f"methods.{name}.initial is an earlier row's name, and stages begin afresh")
    if "initial" in spec and "backbone" in spec:
        raise InputError(f"methods.{name}: initial and backbone both give weights to begin with: leave one out")
    teachers = spec.get("teachers", available)
    if not available and "teachers" in spec and not isinstance(teachers, str):
        raise InputError(
            f"methods.{name}.teachers is {teachers}, but the comparison has no teachers: give some at the top level, "
            "or an earlier row's name"
        )
    counted = is_count(teachers) and teachers <= available
    if available and not counted and not isinstance(teachers, str):
        raise InputError(
            f"methods.{name}.teachers must be between 1 and {available}, or an earlier row's name, got {teachers}"
        )


def _check_backbone(name: str, spec: Spec) -> None:
    _check_keys(f"backbones.{name}", spec, BACKBONE_KEYS)
    if not NAME.fullmatch(name):
        raise InputError(f"backbones: {name!r} cannot be a backbone's name: letters, digits and _.+-")
    if not isinstance(spec.get("data"), Mapping) or not is_count(spec.get("epochs")):
        raise InputError(f"backbones.{name}: expected data and epochs, at least 1, beside class_path and init_args")


def _check_keys(where: str, spec: Spec, known: Sequence[str]) -> None:
    unknown = spec.keys() - set(known)
    if unknown:
        raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}; known: {', '.join(known)}")


def is_count(value: Any) -> bool:
    """Whether a value from the file is a number of things, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
