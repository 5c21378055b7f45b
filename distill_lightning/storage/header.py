"""Headers of stores: what a folder or file states about itself, and its comparison with what is expected."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distill_lightning.errors import InputError
from distill_lightning.storage.files import replaced_file, write_parts

FORMAT = 2
"""Version of everything that is written here; what has another one is refused."""

Compare = Callable[[Any, Any], str]
"""In what a header's value differs from the wanted one, as a message says it after the value's name; empty: in nothing
that matters."""

HEADER = "header.json"
"""The file that describes a folder of records."""


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], compare: Mapping[str, Compare] = MappingProxyType({})
) -> list[str]:
    """In which of the wanted values a header differs, one phrase each, for a message.

    Args:
        found: the header.
        wanted: what it should say, by name.
        compare: by name, for values that need not be equal.
    """
    told = {name: compare.get(name, _inequality)(found.get(name), value) for name, value in wanted.items()}
    return [f"{name} {difference}" for name, difference in told.items() if difference]


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write what a folder of records says of itself.

    Raises:
        OSError: the disk is full or refuses.
    """
    with replaced_file(folder / HEADER) as partial:
        write_parts(partial, [json.dumps(header, indent=1, sort_keys=True).encode()])


def read_header(folder: Path) -> dict[str, Any]:
    """What a folder of records says of itself.

    Raises:
        InputError: it holds none, or those of another version of the format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise InputError(f"there is no store in {folder}: fill one with 'distill-lightning record', or while training")
    try:
        header = json.loads(path.read_text())
        version = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: remove the store {folder} and fill it again") from error
    if version != FORMAT:
        raise InputError(f"the store {folder} has format {version}, this version reads {FORMAT}: fill it again")
    return dict(header)


def _inequality(found: Any, wanted: Any) -> str:
    return "" if found == wanted else f"is {_short(found)}, not {_short(wanted)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
