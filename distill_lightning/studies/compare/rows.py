"""The rows of a comparison's table, as its configuration names them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill_lightning.errors import InputError

if TYPE_CHECKING:
    from distill_lightning.studies.compare.config import CompareConfig

ALONE = "alone"
# A row has a folder of its name, which must not be hidden or stand elsewhere.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# These stand beside the rows' folders.
_OTHERS = re.compile(r"teacher_.*|set_\d+|search|store")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: how it is called.
        method: the key in ``methods`` that describes it; ``None``: the student alone.
        teachers: how many of the teachers it gets, or the row whose student teaches it.
        stage: how many students taught one another before this one.
        initial: the row whose student's weights it begins with.
        backbone: the key in ``backbones`` of the weights that its student's backbone begins with.
    """

    name: str
    method: str | None = None
    teachers: int | str = 0
    stage: int = 0
    initial: str | None = None
    backbone: str | None = None


def rows_of(config: CompareConfig) -> list[Row]:
    """The students' rows, the student alone first.

    Raises:
        InputError: a row has a name that another has or that is reserved, or names as its teacher or its beginning one
            that does not come before it, or a backbone that is none.
    """
    backbones = config.backbones or {}
    reserved = (ALONE, "ensemble", *map(backbone_run, backbones))
    rows = {ALONE: Row(ALONE, backbone=(config.supervised or {}).get("backbone"))}
    for method, spec in config.methods.items():
        names = [f"{method}_{stage}" for stage in range(1, spec.get("stages", 0) + 1)] or [method]
        teachers = ALONE if "stages" in spec else spec.get("teachers", config.number_of_teachers)
        initial = spec.get("initial")
        for name in (method, *names):
            if not NAME.fullmatch(name) or name in reserved or _OTHERS.fullmatch(name):
                raise InputError(
                    f"methods: {name!r} cannot be a method's name: letters, digits and _.+-, not a row's own"
                )
        for name in names:
            for key, earlier in (("teachers", teachers), ("initial", initial)):
                if isinstance(earlier, str) and earlier not in rows:
                    raise InputError(
                        f"methods.{method}.{key}: {earlier!r} is no earlier row; rows so far: {', '.join(rows)}"
                    )
            if name in rows:
                raise InputError(f"methods: two rows are called {name!r}")
            stage = rows[teachers].stage + 1 if isinstance(teachers, str) else 0
            rows[name] = Row(name, method, teachers, stage, initial, spec.get("backbone"))
            teachers = name if "stages" in spec else teachers
    for row in rows.values():
        if row.backbone is not None and row.backbone not in backbones:
            where = "supervised" if row.method is None else f"methods.{row.method}"
            raise InputError(
                f"{where}.backbone: {row.backbone!r} is none of the backbones; these are: {', '.join(backbones) or '-'}"
            )
    return list(rows.values())


def backbone_run(name: str) -> str:
    """How the runs are called that train the backbone of a name."""
    return f"backbone_{name}"
