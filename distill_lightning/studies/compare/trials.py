"""What a comparison's ``search`` tries: the same number of combinations of options for each of its rows."""

from __future__ import annotations

import copy
import hashlib
import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distill_lightning.errors import InputError
from distill_lightning.studies.compare.rows import Row, rows_of

if TYPE_CHECKING:
    from distill_lightning.studies.compare.config import CompareConfig, Spec

Options = tuple[tuple[str, Any], ...]
"""Values by dotted path, in the order of the file."""

# Far from the seeds that anybody gives to a table, and from the teachers'.
_SEARCH_SEED = 2000
# What belongs to the module that is trained, in its own init_args or at the top for all.
_SHARED = ("optimizer", "lr_scheduler")
# Who teaches a row, and what it begins with, make it another row.
_NO_OPTIONS = ("class_path", "teachers", "stages", "initial", "backbone")


def check_search(config: CompareConfig) -> None:
    """Refuse a search that cannot be made, or that would favour a row.

    Raises:
        InputError: a row that is none, values that are no list, seeds of the table, or rows with unlike numbers of
            trials.
    """
    if not config.search:
        if config.trials is not None or config.search_seeds is not None:
            raise InputError("trials and search_seeds belong to a search, and there is none: add it, or leave them out")
        return
    _check_names(config)
    for row, options in config.search.items():
        _check_values(f"search.{row}", options)
    _check_seeds(config)
    counts = {row: math.prod(map(len, options.values())) for row, options in config.search.items()}
    fewest = min(counts, key=lambda row: counts[row])
    if config.trials is None and len(set(counts.values())) > 1:
        most = max(counts, key=lambda row: counts[row])
        raise InputError(
            f"search: {most} has {counts[most]} combinations to try and {fewest} has {counts[fewest]}, but every row "
            f"gets the same number of trials: give them as many, or trials: {counts[fewest]}, to be drawn from each"
        )
    if config.trials is not None and not 1 <= config.trials <= counts[fewest]:
        raise InputError(
            f"trials must be between 1 and {counts[fewest]}, the number of combinations that search.{fewest} has, got "
            f"{config.trials}"
        )


def _check_names(config: CompareConfig) -> None:
    rows = rows_of(config)
    known = [row.name for row in rows] + [row.method for row in rows if row.stage and row.method in config.methods]
    for name in config.search or {}:
        if name not in known:
            raise InputError(f"search.{name}: there is no such row; rows: {', '.join(row.name for row in rows)}")
    for row in rows:
        if row.method != row.name and {row.method, row.name} <= (config.search or {}).keys():
            raise InputError(f"search: {row.name} is one of the rows of {row.method}: leave one of them out")


def _check_values(where: str, options: Any) -> None:
    if not isinstance(options, Mapping) or not options:
        raise InputError(f"{where}: expected lists of values by option, got {options!r}")
    for path, values in options.items():
        if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            raise InputError(f"{where}.{path}: expected a list of different values, got {values!r}")
        if path.partition(".")[0] in _NO_OPTIONS:
            raise InputError(
                f"{where}.{path}: only what is in init_args, paraphrasers, optimizer and lr_scheduler can be searched: "
                "make another row of it"
            )


def _check_seeds(config: CompareConfig) -> None:
    seeds = search_seeds_of(config)
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise InputError(f"search_seeds must be different numbers between 0 and 2**32 - 1, at least one, got {seeds}")
    shared = sorted(set(seeds) & set(config.seeds))
    if shared:
        raise InputError(
            f"search_seeds: {shared[0]} is one of the table's seeds, and what is chosen on it would be shown on it: "
            "give others, or the table others"
        )


def search_seeds_of(config: CompareConfig) -> list[int]:
    """The seeds of the trials."""
    return _default_seeds(config.seeds) if config.search_seeds is None else config.search_seeds


def search_seeds_in(stored: Mapping[str, Any] | None) -> list[int] | None:
    """The seeds of the trials that a folder has, by the configuration that it belongs to; ``None``: it has none."""
    if stored is None or not stored.get("search"):
        return None
    # Older folders do not tell of their default.
    return stored.get("search_seeds") or _default_seeds(stored["seeds"])


def with_search_seeds(config: CompareConfig, stored: Mapping[str, Any] | None) -> CompareConfig:
    """A configuration that tells the seeds of its trials: without any of its own, those of the folder.

    Args:
        config: the comparison.
        stored: the configuration that its folder belongs to; ``None``: to none.

    Raises:
        InputError: the table has come to have one of them.
    """
    if not config.search:
        return config
    config = replace(config, search_seeds=config.search_seeds or search_seeds_in(stored) or search_seeds_of(config))
    _check_seeds(config)
    return config


def _default_seeds(seeds: Sequence[int]) -> list[int]:
    return [next(seed for seed in itertools.count(_SEARCH_SEED) if seed not in seeds)]


def trials_of(config: CompareConfig, rows: Iterable[Row]) -> dict[str, list[Options]]:
    """The combinations that are tried, by the name of the row.

    All of a row's where there are no more than ``trials``; else so many of them, drawn without replacement,
    by the row's name. A method's name stands for all of its stages, each of which chooses for itself.
    """
    search = config.search or {}
    found = {row.name: search.get(row.name, search.get(str(row.method))) for row in rows}
    return {name: _combinations(name, options, config.trials) for name, options in found.items() if options}


def _combinations(row: str, options: Mapping[str, list[Any]], trials: int | None) -> list[Options]:
    count = math.prod(map(len, options.values()))
    chosen: Iterable[int] = range(count)
    if trials is not None and trials < count:
        # More trials are these and others.
        chosen = sorted(heapq.nsmallest(trials, range(count), key=lambda number: _drawn(f"{row} {number}")))
    return [_combination(options, number) for number in chosen]


def _drawn(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _combination(options: Mapping[str, list[Any]], number: int) -> Options:
    """The combination of a number, as `itertools.product` counts them: the last option changes first."""
    found = []
    for path, values in reversed(list(options.items())):
        number, place = divmod(number, len(values))
        found.append((path, values[place]))
    return tuple(reversed(found))


def searched(config: CompareConfig, methods: Iterable[str]) -> dict[str, Any]:
    """What is searched for the student alone and for the rows of these methods."""
    method = {row.name: row.method for row in rows_of(config)}
    return {row: options for row, options in (config.search or {}).items() if method.get(row, row) in (None, *methods)}


def told(options: Options) -> str:
    """Options as they are shown: ``temperature 2, lr 0.1``; of a path, its last part."""
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in options)


def with_options(config: CompareConfig, row: Row, options: Options) -> CompareConfig:
    """A configuration in which a row has other options.

    The optimiser and the learning rate's schedule of the row alone are changed, where they stand at the top, too; so
    are, of the student alone, the options of ``supervised``: whoever trains teachers takes them from the configuration
    that was given.

    Raises:
        InputError: a path that leads nowhere.
    """
    spec = copy.deepcopy((config.supervised or {}) if row.method is None else config.methods[row.method])
    for path, value in options:
        where = f"search.{row.name}.{path}"
        if not isinstance(spec, Mapping):
            raise InputError(f"{where}: {row.name} is given in Python: only rows with init_args can be searched")
        _put(spec, path, value, where=where, config=config)
    if row.method is None:
        return replace(config, supervised=spec)
    return replace(config, methods={**config.methods, row.method: spec})


def _put(spec: Spec, path: str, value: Any, *, where: str, config: CompareConfig) -> None:
    *parts, last = path.split(".")
    if (parts or [last])[0] not in ("init_args", "paraphrasers"):
        parts.insert(0, "init_args")
    if parts[:1] == ["init_args"] and parts[1:2] and parts[1] in _SHARED:
        arguments = spec["init_args"] = spec.get("init_args") or {}
        arguments.setdefault(parts[1], copy.deepcopy(getattr(config, parts[1])))
    place: Any = spec
    for number, part in enumerate(parts):
        if part == "init_args":
            place[part] = place.get(part) or {}
        elif isinstance(place.get(part), str) and parts[number + 1 : number + 2] == ["init_args"]:
            # A choice may be given by its name alone.
            place[part] = {"class_path": place[part]}
        if not isinstance(place.get(part), dict):
            raise InputError(f"{where}: there is no {part} with keys of its own: give it, or leave that option out")
        place = place[part]
    place[last] = value
