"""What a corpus is: pairs of sentences, read from files of some kind."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from distill_lightning.choices import Choice
from distill_lightning.errors import InputError, check_one_of

# With which some editors begin a file in UTF-8.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Pair(NamedTuple):
    """A sentence and its translation.

    Attributes:
        source: the sentence.
        target: its translation.
        where: the file and the line, for messages.
    """

    source: str
    target: str
    where: str


Splits = dict[str, list[Pair]]
"""The pairs of ``"train"`` and, where the corpus has files of their own for them, ``"val"`` and ``"test"``."""


class Faults:
    """What becomes of pairs that cannot be used.

    Args:
        on_damaged: ``"error"``: the first one is refused; ``"skip"``: they are left out, and counted.
        way_out: of a refusal, with which its message ends.

    Attributes:
        counts: how many were left out, by reason.
        first: a message for each reason.

    Raises:
        InputError: ``on_damaged`` is neither.
    """

    def __init__(
        self, on_damaged: Literal["error", "skip"], *, way_out: str = "mend it, or give on_damaged: skip"
    ) -> None:
        check_one_of("on_damaged", on_damaged, ("error", "skip"))
        self.skips, self.way_out = on_damaged == "skip", way_out
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def note(self, reason: str, message: str) -> None:
        """Refuse a pair, or count it.

        Args:
            reason: by which it is counted, in the plural.
            message: names the file, the line and what is wrong.

        Raises:
            InputError: pairs are not to be skipped.
        """
        if not self.skips:
            raise InputError(f"{message}: {self.way_out}")
        self.counts[reason] += 1
        self.first.setdefault(reason, message)

    def told(self) -> str:
        """How many pairs were left out and why, in one line; empty: none."""
        parts = [f"{count:,} {reason} (the first: {self.first[reason]})" for reason, count in self.counts.items()]
        return "; ".join(parts)


class Corpus(Choice):
    """Where pairs of sentences come from, and in which files they are."""

    @abstractmethod
    def read(self, data_dir: Path | None, *, source: str, target: str, faults: Faults) -> Splits:
        """Read all pairs; sentences are without white space around them, and neither side is empty.

        Args:
            data_dir: where the files are; ``None``: where the system has them.
            source: the language to translate from.
            target: the language to translate into.
            faults: hears of what cannot be used.

        Raises:
            InputError: files are missing, or damaged.
        """


def one_line(text: str) -> str:
    """A text with each run of white space as one blank, and none around it."""
    return " ".join(text.split())


def read_lines(path: Path, faults: Faults) -> list[str | None]:
    r"""The lines of a UTF-8 file without white space around them; ``None`` for one that is not UTF-8.

    Lines end with ``\n`` or ``\r\n`` alone: other characters at which Python splits lines stand within sentences.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8 and is not to be skipped.
    """
    content = read_bytes(path).removeprefix(BYTE_ORDER_MARK)
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    try:
        return [line.decode().strip() for line in lines]
    except UnicodeDecodeError:
        return [_decoded(line, f"{path}:{number}", faults) for number, line in enumerate(lines, start=1)]


def read_bytes(path: Path) -> bytes:
    """What is in a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): give a file that is there and that you may read"
        ) from error


def usable(pairs: Iterable[tuple[str | None, str | None, str]], faults: Faults) -> Iterator[Pair]:
    """The pairs with two sides; those without any are left out, and those with one are faults.

    Args:
        pairs: source, target, and where they are; ``None``: a side that cannot be read, which has been noted.
        faults: hears of the pairs with one side.

    Raises:
        InputError: a pair has one side and is not to be skipped.
    """
    for source, target, where in pairs:
        if source and target:
            yield Pair(source, target, where)
        elif source is not None and target is not None and (source or target):
            side = "target" if source else "source"
            faults.note("pairs with an empty side", f"{where}: the {side} is empty")


def _decoded(line: bytes, where: str, faults: Faults) -> str | None:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        faults.note("lines that are not UTF-8", f"{where} is not UTF-8 (byte {error.start + 1} of the line)")
        return None
