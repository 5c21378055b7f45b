"""gettext's catalogues, in which programs keep their messages in many languages."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distill_lightning.data.datamodules.translation.corpus import (
    BYTE_ORDER_MARK,
    Corpus,
    Faults,
    Pair,
    Splits,
    one_line,
    read_bytes,
)
from distill_lightning.errors import InputError

LOCALE_FOLDER = Path("/usr/share/locale")
# In whose language messages are looked up.
_MESSAGES_ARE_IN = "en"

_CHARSET = re.compile(r"charset=([\w-]+)")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"\s*$')
_KEYWORD = re.compile(r"(msgctxt|msgid_plural|msgid|msgstr)(?:\[\d+\])?\s+")
# What is written as numbers are bytes, of which several may be one character.
_ESCAPE = re.compile(r"((?:\\[0-7]{1,3}|\\x[0-9a-fA-F]{1,2})+)|\\(.)")
_NUMBER = re.compile(r"\\(?:x([0-9a-fA-F]+)|([0-7]+))")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


class Message(NamedTuple):
    """An entry of a catalogue.

    Attributes:
        context: tells messages of the same text apart; empty: none.
        ids: the message, and its plural if it has one.
        forms: its translations: one, or as many as the language has plural forms.
        place: line of a ``.po`` file, number of the entry in a ``.mo`` file.
    """

    context: str
    ids: tuple[str, ...]
    forms: tuple[str, ...]
    place: int


@dataclass(frozen=True)
class GettextCatalogues(Corpus):
    """Messages of programs and their translations, from ``.mo`` and ``.po`` files.

    Any Linux system has tens of thousands below ``/usr/share/locale``, which is the default ``data_dir``: in
    ``<language>/LC_MESSAGES``. In another folder ``<language>.po`` and ``<language>.mo``, as the sources of programs
    have them, are found at any depth.

    Messages are in English (``"en"``). Between two other languages those of the same message, in catalogues of the same
    name, are a pair. The first plural form is taken for the translation of the singular and the last one for that of
    the plural. Fuzzy and obsolete entries, headers, and what was not translated are left out; white space and
    line ends within a message become single blanks.

    The text depends on the programs that are installed: results of different systems are not comparable.
    """

    def read(self, data_dir: Path | None, *, source: str, target: str, faults: Faults) -> Splits:
        """All pairs, as training pairs."""
        folder = LOCALE_FOLDER if data_dir is None else data_dir
        sides = {
            language: _texts(folder, language, faults) for language in (source, target) if language != _MESSAGES_ARE_IN
        }

        def said(language: str, key: _Key) -> str:
            return key[-1] if language == _MESSAGES_ARE_IN else sides[language].get(key, ("", ""))[0]

        known = sides[target if target in sides else source]
        pairs = (Pair(said(source, key), said(target, key), where) for key, (_, where) in known.items())
        return {"train": [pair for pair in pairs if pair.source and pair.source != pair.target]}


_Key = tuple[str, str, str]
"""Name of the catalogue, context, and the message in English."""


def _texts(folder: Path, language: str, faults: Faults) -> dict[_Key, tuple[str, str]]:
    """The translation of each message and where it is."""
    found: dict[_Key, tuple[str, str]] = {}
    for name, path in _files(folder, language):
        try:
            messages = list(read_mo(path) if path.suffix == ".mo" else read_po(path))
        except InputError as error:
            faults.note("damaged catalogues", str(error))
            continue
        for message in messages:
            where = f"{path}:{message.place}" if path.suffix == ".po" else f"{path}, message {message.place}"
            for english, text in _sentences(message):
                found.setdefault((name, message.context, english), (text, where))
    return found


def _files(folder: Path, language: str) -> list[tuple[str, Path]]:
    """The catalogues of a language, by names that they have in every language.

    Raises:
        InputError: there are none.
    """
    installed = folder / language / "LC_MESSAGES"
    found = [(path.stem, path) for path in installed.glob("*.[mp]o")]
    found += [(path.parent.relative_to(folder).as_posix(), path) for path in folder.rglob(f"{language}.[mp]o")]
    if not found:
        there = sorted(path.parent.name for path in folder.glob("*/LC_MESSAGES") if any(path.glob("*.[mp]o")))
        raise InputError(
            f"{folder} has no catalogues of {language!r} ({language}/LC_MESSAGES/*.mo or {language}.po): it has "
            f"{', '.join(there[:12]) or 'none'}; install translated programs, or give another language or data_dir"
        )
    return sorted(found)


def _sentences(message: Message) -> Iterator[tuple[str, str]]:
    """Pairs of a message and its translation in one line; the header has no message."""
    forms = [one_line(form) for form in message.forms]
    ids = [one_line(id_) for id_ in message.ids]
    if not ids[0] or not all(forms):
        return
    if len(ids) == 1:
        yield ids[0], forms[0]
        return
    # A language with one form says the plural by it.
    if len(forms) > 1:
        yield ids[0], forms[0]
    yield ids[1], forms[-1]


def read_mo(path: Path) -> Iterator[Message]:
    """The messages of a binary catalogue, of either byte order, in the character set of its header.

    Raises:
        InputError: the file is damaged.
    """
    content = read_bytes(path)
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(content[:4])
    if order is None:
        raise InputError(f"{path} is no gettext catalogue: its first four bytes are others")
    try:
        count, ids_at, texts_at = struct.unpack_from(f"{order}3I", content, 8)
        if max(ids_at, texts_at) + 8 * count > len(content):
            raise InputError(f"{path} is damaged: it has {len(content):,} bytes, too few for {count:,} messages")
        ids, texts = (
            [_slice(content, *struct.unpack_from(f"{order}2I", content, start + 8 * number)) for number in range(count)]
            for start in (ids_at, texts_at)
        )
        charset = next((_charset(text) for id_, text in zip(ids, texts, strict=True) if not id_), "utf-8")
        for number, (id_, text) in enumerate(zip(ids, texts, strict=True), start=1):
            context, _, message = id_.decode(charset).rpartition("\4")
            yield Message(context, tuple(message.split("\0")), tuple(text.decode(charset).split("\0")), number)
    except (struct.error, UnicodeDecodeError, LookupError) as error:
        raise InputError(f"{path} is damaged ({error})") from error


def _slice(content: bytes, length: int, offset: int) -> bytes:
    if offset + length > len(content):
        raise struct.error(f"a message ends at byte {offset + length:,} of {len(content):,}")
    return content[offset : offset + length]


def _charset(header: bytes) -> str:
    found = _CHARSET.search(header.decode("latin-1"))
    # "CHARSET" is what templates have there.
    return found[1] if found and found[1] != "CHARSET" else "utf-8"


def read_po(path: Path) -> Iterator[Message]:
    """The messages of a text catalogue that are translated, not fuzzy and not obsolete.

    Raises:
        InputError: a line is none of a catalogue's, or is not in the character set of the header.
    """
    content = read_bytes(path).removeprefix(BYTE_ORDER_MARK)
    charset = _charset(content)
    entry: dict[str, list[str]] = {}
    parts: list[str] = []
    is_fuzzy, begins = False, 0
    for number, raw in enumerate([*content.split(b"\n"), b""], start=1):
        try:
            line = raw.decode(charset).strip()
        except (UnicodeDecodeError, LookupError) as error:
            raise InputError(f"{path}:{number} is not in the character set {charset} ({error})") from error
        keyword = _KEYWORD.match(line)
        starts = keyword is not None and keyword[1] in ("msgctxt", "msgid")
        if "msgstr" in entry and (not line or line.startswith("#") or starts):
            yield from _finished(entry, begins, is_fuzzy=is_fuzzy)
            entry, is_fuzzy = {}, False
        if line.startswith("#"):
            # The flags before an obsolete entry are that one's.
            is_fuzzy = not line.startswith("#~") and (is_fuzzy or (line.startswith("#,") and "fuzzy" in line))
        elif line:
            string = _STRING.match(line, keyword.end() if keyword else 0)
            if string is None or not (keyword or entry):
                raise InputError(f"{path}:{number} is no line of a catalogue: {line[:60]!r}")
            if keyword:
                begins = begins if entry else number
                parts = entry.setdefault(keyword[1], [])
                parts.append("")
            try:
                parts[-1] += _unescaped(string[1], charset)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: an escape is not in the character set {charset} ({error})"
                ) from error
    if entry:
        raise InputError(f"{path}:{begins} begins an entry without msgstr: the file is damaged")


def _finished(entry: dict[str, list[str]], begins: int, *, is_fuzzy: bool) -> Iterator[Message]:
    if not is_fuzzy and "msgid" in entry:
        ids = (entry["msgid"][0], *entry.get("msgid_plural", []))
        yield Message(entry.get("msgctxt", [""])[0], ids, tuple(entry["msgstr"]), begins)


def _unescaped(text: str, charset: str) -> str:
    def shown(match: re.Match[str]) -> str:
        if match[1]:
            numbers = (
                int(hexadecimal or octal, 16 if hexadecimal else 8) for hexadecimal, octal in _NUMBER.findall(match[1])
            )
            return bytes(number % 256 for number in numbers).decode(charset)
        return _ESCAPES.get(match[2], match[2])

    return _ESCAPE.sub(shown, text)
