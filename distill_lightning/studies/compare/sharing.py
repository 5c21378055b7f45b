"""What a call makes of a comparison that others may be working on as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill_lightning.errors import InputError, refusing
from distill_lightning.studies.compare.attempt import forget
from distill_lightning.studies.compare.claims import Presence
from distill_lightning.studies.compare.config import CompareConfig
from distill_lightning.studies.compare.runs import Run


def stored_config(known: Path) -> dict[str, Any] | None:
    """The configuration that a folder belongs to, as its file tells it; ``None``: to none.

    Raises:
        InputError: the file is damaged.
    """
    if not known.exists():
        return None
    with refusing(f"{known} is damaged, remove the folder or give another with --output", yaml.YAMLError, UnicodeError):
        stored = yaml.safe_load(known.read_text())
    if not isinstance(stored, dict):
        raise InputError(f"{known} is damaged: remove the folder or give another with --output")
    return stored


def chosen(runs: Sequence[Run], config: CompareConfig) -> list[Run]:
    """The runs of the rows and seeds that are asked for, and those that they depend on, in the order of all of them.

    Args:
        runs: all of them.
        config: tells the rows, by name; teachers have names, too, and no seeds to choose from.

    Raises:
        InputError: there is no row of a name.
    """
    if config.only is None:
        return list(runs)
    names = list(dict.fromkeys(run.name for run in runs))
    for name in config.only:
        if name not in names:
            raise InputError(f"only: there is no row {name!r}; these can be made: {', '.join(names)}")
    seeds = config.seeds if config.only_seeds is None else config.only_seeds
    waiting = [run for run in runs if run.name in config.only and (run.is_teacher or run.seed in seeds)]
    wanted = set()
    while waiting:
        run = waiting.pop()
        wanted.add(run.folder)
        waiting += run.depends_on
    return [run for run in runs if run.folder in wanted]


def refuse_others(option: str, presence: Presence) -> None:
    """Refuse what cannot be done while others work in the folder.

    Raises:
        InputError: somebody does.
    """
    if not presence.is_alone:
        raise InputError(
            f"{option}: another call is at work in {presence.folder}: wait until it has ended, or give another folder "
            "with --output"
        )


def forget_failures(runs: Sequence[Run]) -> None:
    """Let the runs that have diverged or failed be made again."""
    for run in runs:
        if run.is_finished and run.result().without_scores:
            forget(run)
