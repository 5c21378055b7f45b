"""Parallel text: two files a split, a sentence a line, as most corpora come; and IWSLT's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_lightning.data.datamodules.translation import iwslt
from distill_lightning.data.datamodules.translation.corpus import Corpus, Faults, Pair, Splits, read_lines, usable
from distill_lightning.errors import InputError

# Of each split, the first that is there counts.
_KNOWN = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "tst", "test_2016_flickr", "eval"),
}
_SOURCES = "Multi30k is at https://github.com/multi30k/dataset, IWSLT's talks are at https://wit3.fbk.eu"


@dataclass(frozen=True)
class ParallelText(Corpus):
    """Plain text, ``<name>.<language>`` in ``data_dir``, where each line is the translation of the other file's.

    IWSLT's own files are read, too: ``train.tags.<pair>.<language>``, whose lines of mark-up (``<url>``, ``<title>``,
    ...) are left out, and ``IWSLT*.TED.<name>.<pair>.<language>.xml``, where a ``<seg>`` is a sentence. ``<pair>`` is
    ``en-de`` or ``de-en``, whichever is there.

    A name that is not given is looked for: ``train`` or ``training``; ``val``, ``valid``, ``validation`` or ``dev``;
    ``test``, ``tst``, ``test_2016_flickr`` (Multi30k's) or ``eval``; of IWSLT's files every ``dev*`` for validation and
    every ``tst*`` for test. What has no files is drawn from the training pairs; a plain file of such a name without its
    partner is refused.

    Args:
        train: name, or names, of the training files; ``None``: known ones.
        val: of those for validation.
        test: of those for test.

    Raises:
        InputError: a list of names is empty.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None

    def __post_init__(self) -> None:
        for split in _KNOWN:
            if not (names := getattr(self, split)) and names is not None:
                raise InputError(
                    f"ParallelText: {split}={names!r} names no file: give names, or null for the known ones"
                )

    def read(self, data_dir: Path | None, *, source: str, target: str, faults: Faults) -> Splits:
        """The pairs of each split that has files."""
        if data_dir is None:
            raise InputError("ParallelText needs data_dir, the folder with the text files")
        if not data_dir.is_dir():
            raise InputError(f"data_dir={data_dir} is no folder: give the one with the text files; {_SOURCES}")
        splits: Splits = {}
        for split, given in (("train", self.train), ("val", self.val), ("test", self.test)):
            found = _files(data_dir, split, given, source, target)
            if found:
                splits[split] = [pair for files in found for pair in _pairs(*files, faults=faults)]
        return splits


def _files(
    folder: Path, split: str, given: str | Sequence[str] | None, source: str, target: str
) -> list[tuple[Path, Path]]:
    """The two files of every name of a split.

    Raises:
        InputError: a given name, or one of the training files, has none, or a known name has one in one language alone.
    """
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        return [_known_pair(folder, split, [name], source, target) for name in names]
    plain = [name for name in _KNOWN[split] if _plain(folder, name, source, target)]
    found = iwslt.files(folder, split, source, target)
    if plain or not found:
        if not plain and split != "train":
            _refuse_one_side(folder, split, source, target)
            return []
        return [_known_pair(folder, split, plain[:1] or _KNOWN[split], source, target)]
    return found


def _refuse_one_side(folder: Path, split: str, source: str, target: str) -> None:
    """Else other pairs would be drawn in silence for a split that has half of its files."""
    for name in _KNOWN[split]:
        sides = [folder / f"{name}.{language}" for language in (source, target)]
        for path, other in (sides, sides[::-1]):
            if path.is_file():
                raise InputError(
                    f"{path} has no partner {other.name}: add it, or take this file out of the folder, and pairs for "
                    f"{split} are drawn from the training pairs"
                )


def _known_pair(folder: Path, split: str, names: Sequence[str], source: str, target: str) -> tuple[Path, Path]:
    for name in names:
        found = _plain(folder, name, source, target) or iwslt.named(folder, name, source, target)
        if found:
            return found
    sought = " or ".join(f"{name}.{source} and {name}.{target}" for name in names[:1])
    there = sorted(path.name for path in folder.iterdir() if path.is_file())[:6]
    raise InputError(
        f"{folder} has no {sought}: give the name of the files as {split} of ParallelText; there are "
        f"{', '.join(there) or f'no files; {_SOURCES}'}"
    )


def _plain(folder: Path, name: str, source: str, target: str) -> tuple[Path, Path] | None:
    pair = folder / f"{name}.{source}", folder / f"{name}.{target}"
    return pair if all(path.is_file() for path in pair) else None


def _pairs(of_source: Path, of_target: Path, *, faults: Faults) -> list[Pair]:
    if of_source.suffix == ".xml":
        return list(usable(iwslt.segments(of_source, of_target, faults), faults))
    if iwslt.is_tagged(of_source):
        first, second = (iwslt.sentences(path, faults) for path in (of_source, of_target))
    else:
        first, second = (list(enumerate(read_lines(path, faults), start=1)) for path in (of_source, of_target))
    if len(first) != len(second):
        longer, shorter = (of_source, of_target) if len(first) > len(second) else (of_target, of_source)
        number = max(first, second, key=len)[min(len(first), len(second))][0]
        raise InputError(
            f"{longer}:{number} has no partner: {shorter.name} has {min(len(first), len(second)):,} sentences, "
            f"{longer.name} has {max(len(first), len(second)):,}; give files whose lines are each other's translations"
        )
    rows = ((a, b, f"{of_source}:{number}") for (number, a), (_, b) in zip(first, second, strict=True))
    return list(usable(rows, faults))
