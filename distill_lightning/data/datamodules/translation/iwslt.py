"""The files of IWSLT's campaigns on TED talks: training text between lines of mark-up, XML for the other splits."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from distill_lightning.data.datamodules.translation.corpus import Faults, one_line, read_lines
from distill_lightning.errors import InputError

_TAG = re.compile(
    r"</?(?:url|doc|content|speaker|talkid|title|description|keywords|reviewer|translator|transcript|srclang)\b[^>]*>"
)
_SEGMENT = re.compile(r"<seg\s+id\s*=\s*\"([^\"]*)\"\s*>(.*)</seg>")
_PREFIXES = {"val": "dev", "test": "tst"}


def files(folder: Path, split: str, source: str, target: str) -> list[tuple[Path, Path]]:
    """The files of a split, in the order of their names; empty: there are none."""
    if split == "train":
        found = named(folder, "train.tags", source, target)
        return [found] if found else []
    names = {path.name.split(".TED.", 1)[-1].split(".")[0] for path in folder.glob(f"*.TED.{_PREFIXES[split]}*.xml")}
    every = (named(folder, name, source, target) for name in sorted(names))
    return [pair for pair in every if pair]


def named(folder: Path, name: str, source: str, target: str) -> tuple[Path, Path] | None:
    """The two files of a name such as ``train.tags`` or ``tst2013``, whichever way round their pair is called."""
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        for pattern in (f"{name}.{pair}.{{}}", f"*.TED.{name}.{pair}.{{}}.xml"):
            sides = [sorted(folder.glob(pattern.format(language))) for language in (source, target)]
            if all(sides):
                return sides[0][0], sides[1][0]
    return None


def is_tagged(path: Path) -> bool:
    """Whether this is a training file, with lines of mark-up between the sentences."""
    return path.name.startswith("train.tags.")


def sentences(path: Path, faults: Faults) -> list[tuple[int, str | None]]:
    """Line number and text of each line of a training file that is no mark-up."""
    lines = enumerate(read_lines(path, faults), start=1)
    return [(number, line and _text(line)) for number, line in lines if line is None or not _TAG.match(line)]


def segments(of_source: Path, of_target: Path, faults: Faults) -> Iterator[tuple[str | None, str | None, str]]:
    """The segments of two XML files, which must have the same ones.

    Raises:
        InputError: they have not, or there are none, or a segment does not end in its line.
    """
    first, second = _segments(of_source, faults), _segments(of_target, faults)
    for (number, name, text), (other_number, other_name, translation) in zip(first, second, strict=False):
        if name != other_name:
            raise InputError(
                f"{of_source}:{number} is segment {name}, and {of_target.name}:{other_number} is segment {other_name}: "
                "give files with the same segments"
            )
        yield text, translation, f"{of_source}:{number}"
    if len(first) != len(second):
        path, longer = max((of_source, first), (of_target, second), key=lambda side: len(side[1]))
        raise InputError(
            f"{path}:{longer[min(len(first), len(second))][0]}: the segment has no partner in the other language: give "
            "files with the same segments"
        )


def _segments(path: Path, faults: Faults) -> list[tuple[int, str, str | None]]:
    """Line number, id and text of each segment."""
    found: list[tuple[int, str, str | None]] = []
    for number, line in enumerate(read_lines(path, faults), start=1):
        if line is None:
            raise InputError(f"{path}:{number} is not UTF-8, and which segment it is cannot be told: mend it")
        if not line.startswith("<seg"):
            continue
        match = _SEGMENT.match(line)
        if match is None:
            raise InputError(f'{path}:{number} is no <seg id="...">...</seg> of one line: mend it')
        found.append((number, match[1], _text(match[2])))
    if not found:
        raise InputError(f"{path} has no <seg>: give IWSLT's files as they are published")
    return found


def _text(written: str) -> str:
    """A sentence as the other kind of file has it, too: some have entities, some do not."""
    return one_line(html.unescape(written))
