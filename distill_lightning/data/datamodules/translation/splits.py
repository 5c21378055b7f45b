"""Which pairs are for what: no source sentence stands in two splits, and no pair twice in the training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from distill_lightning.data.datamodules.translation.corpus import Pair, Splits, one_line
from distill_lightning.errors import InputError

_HELD_OUT = "with a source sentence of another split"


class Dealt(NamedTuple):
    """The three splits, and what was left out.

    Attributes:
        splits: pairs by ``"train"``, ``"val"`` and ``"test"``.
        left_out: how many other pairs there were, by the reason for which they are in none.
    """

    splits: Splits
    left_out: Mapping[str, int]


def deal(read: Splits, *, val_size: int | None, test_size: int | None, drawn: int, seed: int) -> Dealt:
    """Give each pair its split.

    Validation and test files of their own stay whole, with the pairs that they repeat, for which published figures
    count them; or their first ``val_size`` or ``test_size`` pairs do. Training pairs with a source sentence of theirs
    leave the training. What has no files is drawn from the training pairs by a hash of the source sentence and the
    seed, so that most sentences keep their split where others are added or leave.

    Source sentences that differ by white space or case alone count as the same one; pairs that differ by white space
    alone are repeated ones.

    Args:
        read: pairs of ``"train"`` and perhaps ``"val"`` and ``"test"``.
        val_size: pairs for validation; ``None``: all, or, where they are drawn, ``drawn``.
        test_size: of those for test.
        drawn: the size of a split without files.
        seed: of what is drawn.

    Raises:
        InputError: a split is larger than its files, nothing is left of one, or the training pairs do not suffice for
            what is drawn.
    """
    pairs = _distinct(read["train"])
    left_out = Counter({"repeated": len(read["train"]) - len(pairs)})
    sizes = {"test": test_size, "val": val_size}
    splits: Splits = {}
    held: set[str] = set()
    for split in (name for name in sizes if name in read):
        kept = _others(read[split], held, split)
        splits[split] = _first(kept, split, sizes[split])
        left_out[_HELD_OUT] += len(read[split]) - len(kept)
        left_out[f"beyond {split}_size"] += len(kept) - len(splits[split])
        held |= {_key(pair) for pair in splits[split]}
    rest = _others(pairs, held, "train")
    left_out[_HELD_OUT] += len(pairs) - len(rest)
    by_source: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in rest:
        by_source[_key(pair)].append(pair)
    order = sorted(by_source, key=lambda source: _hash(source, seed))
    for split in (name for name in sizes if name not in read):
        size = drawn if sizes[split] is None else sizes[split]
        found = _draw(by_source, order, split, size or 0)
        splits[split] = found[:size]
        left_out["further translations of a drawn sentence"] += len(found) - len(splits[split])
    splits["train"] = [pair for pair in rest if _key(pair) in by_source]
    if not splits["train"]:
        raise InputError(
            f"what is drawn for validation and test leaves none of {len(rest):,} pairs to train on: lower "
            "val_size or test_size, or give files for them"
        )
    return Dealt({name: splits[name] for name in ("train", "val", "test")}, +left_out)


def _key(pair: Pair) -> str:
    return one_line(pair.source).casefold()


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    found: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        found.setdefault((one_line(pair.source), one_line(pair.target)), pair)
    return list(found.values())


def _others(pairs: list[Pair], held: set[str], split: str) -> list[Pair]:
    """The pairs whose source sentences are not held out.

    Raises:
        InputError: there are none.
    """
    found = [pair for pair in pairs if _key(pair) not in held]
    if not found:
        raise InputError(
            f"all {len(pairs):,} pairs for {split} have a source sentence of another split's files: give other files"
            if pairs
            else f"no pair for {split} can be used: mend its files, or give others"
        )
    return found


def _first(pairs: list[Pair], split: str, size: int | None) -> list[Pair]:
    if size is not None and size > len(pairs):
        raise InputError(f"{split}_size={size} is larger than the {len(pairs):,} pairs of its files: lower it")
    return pairs[:size]


def _draw(by_source: dict[str, list[Pair]], order: list[str], split: str, size: int) -> list[Pair]:
    """Take at least so many pairs, all translations of a sentence together, from the end of the order."""
    available = sum(map(len, by_source.values()))
    if size > available:
        raise InputError(
            f"{split} has no files, and {size:,} pairs cannot be drawn for it from the {available:,} that are left to "
            f"train on: give files for it, or a lower {split}_size"
        )
    found: list[Pair] = []
    while len(found) < size:
        found += by_source.pop(order.pop())
    return found


def _hash(source: str, seed: int) -> bytes:
    return blake2b(source.encode(errors="surrogatepass"), key=str(seed).encode()).digest()


def texts(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """The source sentences and their translations."""
    return [pair.source for pair in pairs], [pair.target for pair in pairs]
