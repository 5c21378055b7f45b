"""LibreOffice's help, which Debian packages in many languages: the same elements, by their ids, in each."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from distill_lightning.data.datamodules.translation.corpus import Corpus, Faults, Pair, Splits, one_line, read_bytes
from distill_lightning.errors import InputError

HELP_FOLDER = Path("/usr/share/libreoffice/help")
# The folder of a language, where that is not called as the language is.
_FOLDERS = {"en": "en-US"}

# Paragraphs and headings do not hold one another.
_ELEMENT = re.compile(r'<(p|h[1-6])\b[^>]*?\sid="((?:par|hd)_id[^"]*)"[^>]*>(.*?)</\1>', re.DOTALL)
# The text for other systems and applications, of which a browser shows one; the first is not always the same in two
# languages, "default" is.
_SWITCH = re.compile(r'<span\s+hidden="true"\s+id="(?!default)[^"]*"[^>]*>')
_SPAN = re.compile(r"<span\b|</span>")
_BREAK = re.compile(r"<br\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class LibreOfficeHelp(Corpus):
    """The paragraphs and headings of LibreOffice's help, about 35,000 pairs for English and German.

    They come with Debian's packages ``libreoffice-help-en-us``, ``libreoffice-help-de`` and so on, and are found in
    ``data_dir``, by default where these put them. An element of a page is paired with that of the same id on the same
    page in the other language. Where a text differs between systems, the one that is for any system is taken. Elements
    that were not translated, such as lines of code, are left out.

    The text depends on LibreOffice's version: results of different versions are not comparable.
    """

    def read(self, data_dir: Path | None, *, source: str, target: str, faults: Faults) -> Splits:
        """All pairs, as training pairs."""
        folder = HELP_FOLDER if data_dir is None else data_dir
        pages = read_help(folder, source, target)
        for message in pages.damaged:
            faults.note("pages that are not UTF-8", message)
        if not pages.pairs:
            raise InputError(
                f"{folder} has no elements with the same ids in {source} and {target}: give the folder of "
                "LibreOffice's help, or another corpus"
            )
        return {"train": list(pages.pairs)}


class Pages(NamedTuple):
    """What is in a folder of help pages.

    Attributes:
        pairs: in the order of the pages' paths.
        damaged: a message for each page that cannot be read, in either language.
    """

    pairs: tuple[Pair, ...]
    damaged: tuple[str, ...]


# Reading takes seconds, and a comparison makes a data module for every training.
@lru_cache(maxsize=2)
def read_help(folder: Path, source: str, target: str) -> Pages:
    """The pairs of a folder of help pages; kept while the process lasts.

    Raises:
        InputError: a language is not there.
    """
    of_source, of_target = (_language(folder, language) for language in (source, target))
    found: list[Pair] = []
    damaged: list[str] = []
    for page in sorted(of_source.rglob("*.html")):
        other = of_target / page.relative_to(of_source)
        if not other.is_file():
            continue
        try:
            found += _pairs(page, _elements(page), _elements(other))
        except _DamagedPageError as error:
            damaged.append(str(error))
    return Pages(tuple(found), tuple(damaged))


class _DamagedPageError(Exception):
    pass


def _language(folder: Path, language: str) -> Path:
    place = folder / _FOLDERS.get(language, language)
    if not place.is_dir():
        raise InputError(
            f"{place} is not there: apt-get install libreoffice-help-{place.name.lower()}, or give data_dir, a folder "
            "of text files"
        )
    return place


_Elements = dict[tuple[str, int], tuple[str, int]]
"""Text and place in the page, by the id and how many elements before had the same."""


def _elements(page: Path) -> _Elements:
    content = read_bytes(page)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _DamagedPageError(f"{page}:{line} is not UTF-8") from error
    found: _Elements = {}
    seen: Counter[str] = Counter()
    for match in _ELEMENT.finditer(text):
        found[match[2], seen[match[2]]] = (_shown(match[3]), text.count("\n", 0, match.start()) + 1)
        seen[match[2]] += 1
    return found


def _pairs(page: Path, ours: _Elements, theirs: _Elements) -> list[Pair]:
    every = ((text, theirs.get(key, ("", 0))[0], line) for key, (text, line) in ours.items())
    return [Pair(text, other, f"{page}:{line}") for text, other, line in every if text and other and text != other]


def _shown(markup: str) -> str:
    """The text of an element."""
    if "hidden=" in markup:
        markup = _without_switched(markup)
    return one_line(html.unescape(_TAG.sub("", _BREAK.sub(" ", markup))))


def _without_switched(markup: str) -> str:
    """What is left when the spans that are for one system or application alone are taken out."""
    while match := _SWITCH.search(markup):
        depth, end = 1, len(markup)
        for tag in _SPAN.finditer(markup, match.end()):
            depth += 1 if tag[0] == "<span" else -1
            if not depth:
                end = tag.end()
                break
        markup = markup[: match.start()] + markup[end:]
    return markup
