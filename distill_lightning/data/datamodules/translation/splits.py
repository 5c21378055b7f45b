"""Which pairs are for what: no source sentence stands in two splits, and no pair twice in the training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from distill_lightning.data.datamodules.translation.corpus import Pair, Splits
from distill_lightning.errors import InputError


class Dealt(NamedTuple):
    """The three splits, and what was left out.

    Attributes:
        splits: pairs by ``"train"``, ``"val"`` and ``"test"``.
        repeated: training pairs that stood there before.
        held_out: pairs for training or validation whose source sentence is in validation or test.
    """

    splits: Splits
    repeated: int
    held_out: int


def deal(read: Splits, *, val_size: int | None, test_size: int | None, drawn: int, seed: int) -> Dealt:
    """Give each pair its split.

    Validation and test files of their own stay whole, or their first ``val_size`` or ``test_size`` pairs: training
    pairs with a sentence of theirs leave the training. What has no files is drawn from the training pairs by a hash of
    the source sentence and the seed, so that most sentences keep their split where others are added or leave.

    Args:
        read: pairs of ``"train"`` and perhaps ``"val"`` and ``"test"``.
        val_size: pairs for validation; ``None``: all, or, where they are drawn, ``drawn``.
        test_size: of those for test.
        drawn: the size of a split without files.
        seed: of what is drawn.

    Raises:
        InputError: a split is larger than its files, or the training pairs do not suffice for what is drawn.
    """
    pairs = _distinct(read["train"])
    repeated = len(read["train"]) - len(pairs)
    sizes = {"test": test_size, "val": val_size}
    splits: Splits = {}
    held: set[str] = set()
    held_out = 0
    for split in (name for name in sizes if name in read):
        kept = [pair for pair in read[split] if pair.source not in held]
        held_out += len(read[split]) - len(kept)
        splits[split] = _first(kept, split, sizes[split])
        held |= {pair.source for pair in splits[split]}
    rest = [pair for pair in pairs if pair.source not in held]
    held_out += len(pairs) - len(rest)
    by_source: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in rest:
        by_source[pair.source].append(pair)
    order = sorted(by_source, key=lambda source: _hash(source, seed))
    for split in (name for name in sizes if name not in read):
        size = drawn if sizes[split] is None else sizes[split]
        splits[split] = _draw(by_source, order, split, size or 0)
    splits["train"] = [pair for pair in rest if pair.source in by_source]
    if not splits["train"]:
        raise InputError("val_size and test_size leave no pairs to train on: lower them")
    return Dealt({name: splits[name] for name in ("train", "val", "test")}, repeated, held_out)


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    found: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        found.setdefault((pair.source, pair.target), pair)
    return list(found.values())


def _first(pairs: list[Pair], split: str, size: int | None) -> list[Pair]:
    if size is not None and size > len(pairs):
        raise InputError(f"{split}_size={size} is larger than the {len(pairs):,} pairs of its files: lower it")
    return pairs[:size]


def _draw(by_source: dict[str, list[Pair]], order: list[str], split: str, size: int) -> list[Pair]:
    """Take so many pairs, sentence by sentence from the end of the order; translations beyond them are left out."""
    available = sum(map(len, by_source.values()))
    if size > available:
        raise InputError(f"{split}_size={size} is larger than the {available:,} training pairs that are left: lower it")
    found: list[Pair] = []
    while len(found) < size:
        found += by_source.pop(order.pop())
    return found[:size]


def _hash(source: str, seed: int) -> bytes:
    return blake2b(source.encode(errors="surrogatepass"), key=str(seed).encode()).digest()


def texts(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The source sentences and their translations."""
    return [pair.source for pair in pairs], [pair.target for pair in pairs]
