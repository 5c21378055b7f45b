"""From scores to masks: an exact number of units is pruned, those with the lowest scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.compression.mask.masks import Masks, lowest
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.functional.common import wide

Amount = float | Mapping[str, float]
Scope = Literal["global", "layer"]
Reduce = Literal["mean", "sum"]


class Granularity(NamedTuple):
    """The units that are pruned as a whole.

    ``weight``: each entry; ``row``: an index of the first dimension; ``block``: ``first`` rows by ``second`` columns of
    the matrix ``(shape[0], everything else)``; ``n:m``: ``first`` of ``second`` consecutive inputs (indices of the
    second dimension) stay.
    """

    kind: Literal["weight", "row", "block", "n:m"]
    first: int = 1
    second: int = 1

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Read ``"weight"``, ``"row"``, ``"block:4x8"`` or ``"2:4"``.

        Raises:
            InputError: an unknown text, a block without entries, or not ``0 < n < m``.
        """
        if text == "weight":
            return cls("weight")
        if text == "row":
            return cls("row")
        block = re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", text)
        if block:
            return cls("block", int(block[1]), int(block[2]))
        part = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if part and int(part[1]) < int(part[2]):
            return cls("n:m", int(part[1]), int(part[2]))
        raise InputError(f"granularity must be 'weight', 'row', 'block:4x8' or '2:4' (2 of each 4 stay), got {text!r}")


def select(
    scores: Mapping[str, Tensor],
    amount: Amount | None,
    *,
    granularity: str = "weight",
    scope: Scope = "global",
    reduce: Reduce = "mean",
    previous: Masks | None = None,
) -> Masks:
    """Prune an exact share of the units, those with the lowest scores.

    Exactly ``round(amount * units)`` of them are pruned, however many scores are equal (of equal scores, the first).
    There are two exceptions: the best unit of each parameter always stays, and more units may have been pruned before.

    Args:
        scores: a tensor for each parameter's path, in the parameter's shape.
        amount: total share of pruned units, in ``[0, 1]``: one for all, or one for each path, which is then always
            within the layer. ``None`` for ``"n:m"``, which fixes it.
        granularity: see `Granularity`. A block at the edge of a matrix may be smaller.
        scope: whether units compete with those of all parameters, or only with those of their own.
        reduce: how a unit's score is computed from those of its entries. The mean makes units of different sizes
            comparable; the sum is for criteria that estimate a change of the loss.
        previous: current masks: what they prune stays pruned and counts towards the amount. With ``None`` every unit
            may return, which is regrowth if the scores belong to weights that kept learning.

    Returns:
        Masks of all the parameters.

    Raises:
        InputError: an option is unknown, an amount is outside ``[0, 1]`` or missing, a score is NaN, or the second
            dimension is not a multiple of ``m``.
    """
    unit = Granularity.parse(granularity)
    _check(scores, reduce)
    before = {path: _previous(previous, path, score) for path, score in scores.items()}
    if unit.kind == "n:m":
        if amount is not None:
            raise InputError(f"granularity {granularity!r} fixes the amount: leave amount out")
        kept = {
            path: _n_of_m(path, score.masked_fill(~before[path], -torch.inf), unit) for path, score in scores.items()
        }
    else:
        if amount is None:
            raise InputError(f"granularity {granularity!r} needs an amount between 0 and 1")
        units = {path: _unit_scores(score, unit, reduce) for path, score in scores.items()}
        # A unit is pruned when all its entries are.
        gone = {path: _unit_scores(mask.float(), unit, "sum") == 0 for path, mask in before.items()}
        staying = choose(units, amount, scope=scope, gone=gone)
        kept = {path: _entries(staying[path], score.shape, unit) for path, score in scores.items()}
    return Masks({path: mask & before[path] for path, mask in kept.items()})


def select_below(
    scores: Mapping[str, Tensor],
    threshold: float,
    *,
    granularity: str = "weight",
    reduce: Reduce = "mean",
    previous: Masks | None = None,
) -> Masks:
    """Prune the units whose scores are below a threshold, however many, except for the best of each parameter.

    The threshold is in the units of the scores. The options are those of `select`, without n:m.
    """
    unit = Granularity.parse(granularity)
    _check(scores, reduce)
    if unit.kind == "n:m":
        raise InputError(f"granularity {granularity!r} fixes the amount, so there is no threshold: use select")
    masks = {}
    for path, score in scores.items():
        units = _unit_scores(score, unit, reduce)
        kept = units >= threshold
        if not kept.any():
            kept[_last_best(units)] = True
        masks[path] = _entries(kept, score.shape, unit) & _previous(previous, path, score)
    return Masks(masks)


def choose(
    scores: Mapping[str, Tensor],
    amount: Amount,
    *,
    scope: Scope = "global",
    gone: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Choose the units that stay by their scores.

    Scores are ``(U,)`` for each layer. Bool ``(U,)`` are ``gone``, the units that are pruned already and stay pruned,
    and the result, the units that stay.
    """
    check_one_of("scope", scope, get_args(Scope))
    each = isinstance(amount, Mapping) or scope == "layer"
    pools = [[layer] for layer in scores] if each else [list(scores)]
    kept: dict[str, Tensor] = {}
    for pool in pools:
        share = amount_of(amount, pool[0])
        if not 0 <= share <= 1:
            raise InputError(f"amount is a share of all units, between 0 and 1, got {share}")
        before = [torch.zeros_like(scores[layer], dtype=torch.bool) if gone is None else gone[layer] for layer in pool]
        kept.update(zip(pool, _stay([scores[layer] for layer in pool], before, share), strict=True))
    return kept


def _stay(scores: Sequence[Tensor], gone: Sequence[Tensor], amount: float) -> Sequence[Tensor]:
    """Which units of competing layers stay."""
    ranked = [
        wide(score).masked_fill(own.to(score.device), -torch.inf) for score, own in zip(scores, gone, strict=True)
    ]
    total = sum(map(len, ranked))
    pruned = sum(int(own.sum()) for own in gone)
    most = total
    for score, own in zip(ranked, gone, strict=True):
        if not own.all():
            score[_last_best(score)] = torch.inf
            most -= 1
    count = max(min(round(amount * total), most), pruned)
    return torch.split(~lowest(torch.cat(ranked), count), [*map(len, ranked)])


def _last_best(scores: Tensor) -> Tensor:
    """The best of ``(U,)`` scores; of equal scores the last, because the first of them are pruned."""
    return (scores == scores.max()).nonzero()[-1, 0]


def _unit_scores(score: Tensor, unit: Granularity, reduce: Reduce) -> Tensor:
    """Scores ``(U,)`` of the units of a tensor."""
    if unit.kind == "weight":
        return wide(score).flatten()
    matrix = wide(score).reshape(len(score), -1)
    if unit.kind == "row":
        return matrix.mean(1) if reduce == "mean" else matrix.sum(1)
    sums = _blocks(matrix, unit)
    return sums / _blocks(torch.ones_like(matrix), unit) if reduce == "mean" else sums


def _blocks(matrix: Tensor, unit: Granularity) -> Tensor:
    """Sums over the blocks of a matrix, row by row."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % unit.second, 0, -rows % unit.first))
    cut = padded.view(-(-rows // unit.first), unit.first, -(-columns // unit.second), unit.second)
    return cut.sum((1, 3)).flatten()


def _entries(units: Tensor, shape: torch.Size, unit: Granularity) -> Tensor:
    """The mask of all entries from that of the units."""
    if unit.kind == "weight":
        return units.reshape(shape)
    if unit.kind == "row":
        return units.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    rows, columns = shape[0], shape[1:].numel()
    grid = units.reshape(-(-rows // unit.first), -1)
    spread = grid.repeat_interleave(unit.first, 0).repeat_interleave(unit.second, 1)
    return spread[:rows, :columns].reshape(shape)


def _n_of_m(path: str, score: Tensor, unit: Granularity) -> Tensor:
    """A mask that keeps the best ``n`` of every ``m`` consecutive inputs."""
    n, m = unit.first, unit.second
    if score.ndim < 2 or score.shape[1] % m:
        raise InputError(
            f"granularity '{n}:{m}': the inputs of {path!r}, shape {tuple(score.shape)}, are not a multiple of {m}"
        )
    inputs_last = wide(score).movedim(1, -1)
    groups = inputs_last.reshape(*inputs_last.shape[:-1], -1, m)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, value=True)
    return kept.flatten(-2).movedim(-1, 1)


def _previous(previous: Masks | None, path: str, like: Tensor) -> Tensor:
    """A copy of the current mask, or one that keeps everything."""
    mask = previous.kept.get(path) if previous is not None else None
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if mask.shape != like.shape:
        raise InputError(
            f"the previous mask of {path!r} has shape {tuple(mask.shape)}, not {tuple(like.shape)}: drop it"
        )
    return mask.to(like.device, copy=True)


def amount_of(amount: Amount, path: str) -> float:
    """The amount for one path."""
    if not isinstance(amount, Mapping):
        return amount
    if path not in amount:
        raise InputError(f"amount has no entry for {path!r}: give one number for all, or one for each")
    return amount[path]


def _check(scores: Mapping[str, Tensor], reduce: str) -> None:
    check_one_of("reduce", reduce, get_args(Reduce))
    if not scores:
        raise InputError("no scores are given: score at least one parameter")
    for path, score in scores.items():
        if score.isnan().any():
            raise InputError(f"the scores of {path!r} hold NaN: is the network's loss finite on the calibration data?")
