"""Rules for the number of components that a factored layer keeps, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill_lightning.compression.factor.decompositions import exact
from distill_lightning.errors import InputError

Rank = int | float | str
"""``8``; ``0.5``; ``"energy:0.95"``; ``"params:0.5"``; ``"macs:0.5"``; ``"evbmf"``. See `rank_rule`."""

_FORMS = "a number (8), a fraction of full rank (0.5), 'energy:0.95', 'params:0.5', 'macs:0.5' or 'evbmf'"


class UnfactorableError(InputError):
    """No factors can replace a layer, or none within the budget, whatever its weights are."""


class RankRule(NamedTuple):
    """A rule and its number, which ``"evbmf"`` ignores."""

    kind: Literal["number", "fraction", "energy", "params", "macs", "evbmf"]
    value: float


def rank_rule(rank: Rank) -> RankRule:
    """Parse a rank.

    Args:
        rank: an integer: this number of components, at most full rank. A float in (0, 1]: this fraction of full rank.
            ``"energy:f"``: the smallest rank that keeps the fraction ``f`` of the squared singular values.
            ``"params:f"``, ``"macs:f"``: the largest rank whose factors have at most the fraction ``f`` of the layer's
            weights, or of its multiply-accumulates. ``"evbmf"``: the components above the noise, see `evbmf_rank`.

    Raises:
        InputError: the rank has none of these forms.
    """
    if isinstance(rank, str):
        kind, _, number = rank.partition(":")
        if rank == "evbmf":
            return RankRule("evbmf", 1.0)
        value = _number(number)
        if value is not None and 0 < value <= 1:
            if kind == "energy":
                return RankRule("energy", value)
            if kind == "params":
                return RankRule("params", value)
            if kind == "macs":
                return RankRule("macs", value)
    elif isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return RankRule("number", rank)
    elif isinstance(rank, float) and 0 < rank <= 1:
        return RankRule("fraction", rank)
    raise InputError(f"rank must be {_FORMS} with fractions in (0, 1], got {rank!r}")


def number_ranks(full: Sequence[int], number: int) -> list[int]:
    """Use ``number`` for every rank, but at most full rank."""
    return [min(number, limit) for limit in full]


def fraction_ranks(full: Sequence[int], fraction: float) -> list[int]:
    """Use a fraction of full rank for every rank, rounded, at least 1."""
    return [max(1, round(fraction * limit)) for limit in full]


def energy_rank(singular_values: Tensor, fraction: float) -> int:
    """The smallest rank that keeps ``fraction`` of the energy, the sum of squares; at least 1.

    Args:
        singular_values: ``(R,)``, from large to small.
        fraction: the fraction, in (0, 1].
    """
    kept = exact(singular_values).square().cumsum(0)
    return int((kept < fraction * kept[-1]).sum().item()) + 1 if kept[-1] > 0 else 1


def budget_ranks(full: Sequence[int], budget: float, *, cost: Callable[[list[int]], int]) -> list[int]:
    """The largest ranks, in proportion to the full ones, whose cost is within a budget.

    The cost must not fall when a rank grows.
    """

    def at(step: int) -> list[int]:
        return [max(1, limit * step // max(full)) for limit in full]

    low, high = 0, max(full)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle - 1)
    if cost(at(low)) > budget:
        raise UnfactorableError(
            f"a budget of {budget:g} is below the {cost(at(low))} of rank 1: allow more, or leave it out"
        )
    return at(low)


def evbmf_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    r"""The number of components of a matrix above the noise: the global solution of empirical variational Bayes.

    The matrix is modelled as a product of two Gaussian matrices plus white noise of unknown variance. With ``L`` the
    smaller and ``M`` the larger dimension, :math:`\alpha = L / M` and singular values :math:`\gamma_h`, a component is
    kept where

    .. math:: \gamma_h^2 \ge M \sigma^2 \underline{x}, \qquad
        \underline{x} = (1 + \underline\tau) (1 + \alpha / \underline\tau)

    with :math:`\underline\tau` from `evbmf_threshold`, and the noise variance is the minimum of `evbmf_free_energy`.

    Args:
        singular_values: ``(min(shape),)``, all of them.
        shape: shape of the matrix.

    Returns:
        The number of components; 0 if everything is noise.

    Nakajima, Sugiyama, Babacan, Tomioka: *Global Analytic Solution of Fully-Observed Variational Bayesian Matrix
    Factorization*, Journal of Machine Learning Research 14, 2013
    """
    small, large = min(shape), max(shape)
    squares = exact(singular_values).square()
    if not squares.sum() > 0:
        return 0
    alpha = small / large
    edge = evbmf_threshold(alpha)
    # The bounds of the noise variance (from the paper's theorem): at most all of the energy is noise, and at least so
    # many of the smallest components that the others can be explained.
    most = min(math.ceil(small / (1 + alpha)) - 1, small)
    upper = squares.sum().item() / (small * large)
    lower = max(squares[most].item() / (large * edge), squares[most:].mean().item() / large, upper * 1e-30)
    variance = _minimum(lambda variances: evbmf_free_energy(squares, variances, large), lower, upper)
    return int((squares > large * variance * edge).sum().item())


def evbmf_threshold(alpha: float) -> float:
    r""":math:`\underline{x}`: squared singular values above this times ``M`` times the noise variance are kept.

    :math:`\underline\tau` is the zero of :math:`\Phi(\tau) + \Phi(\tau / \alpha)`, with
    :math:`\Phi(z) = \log(1 + z) / z - 1/2`; near :math:`2.5129 \sqrt\alpha`.

    Args:
        alpha: ``L / M``, in (0, 1].
    """

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 1e-12, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) + phi(middle / alpha) > 0 else (low, middle)
    return (1 + low) * (1 + alpha / low)


def evbmf_free_energy(squares: Tensor, variances: Tensor, large: int) -> Tensor:
    r"""The free energy as a function of the noise variance, up to a constant.

    .. math:: \Omega(\sigma^2) = \sum_h x_h + \log \sigma^2 + \psi_1(x_h) [x_h > \underline{x}], \qquad
        x_h = \frac{\gamma_h^2}{M \sigma^2}

    .. math:: \psi_1(x) = \log(\tau + 1) + \alpha \log(\tau / \alpha + 1) - \tau, \qquad
        \tau = \frac{x - 1 - \alpha + \sqrt{(x - 1 - \alpha)^2 - 4 \alpha}}{2}

    Args:
        squares: squared singular values, ``(L,)``.
        variances: ``(V,)``.
        large: ``M``.

    Returns:
        ``(V,)``.
    """
    alpha = len(squares) / large
    x = squares / (large * variances[:, None])
    kept = x > evbmf_threshold(alpha)
    # Below the threshold the root may be imaginary; these entries are dropped at the end.
    shifted = torch.where(kept, x - (1 + alpha), 2.0)
    tau = (shifted + (shifted.square() - 4 * alpha).clamp_min(0).sqrt()) / 2
    gain = torch.log1p(tau) + alpha * torch.log1p(tau / alpha) - tau
    return (x + variances.log()[:, None] + torch.where(kept, gain, 0.0)).sum(dim=1)


def _minimum(function: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Minimise a function of a positive number on grids over its logarithm, each within the best cell of the last.

    The free energy has several minima, so the first grid is a fine one.
    """
    for _ in range(4):
        grid = torch.logspace(math.log10(low), math.log10(high), 1000, dtype=torch.float64)
        best = int(function(grid).argmin().item())
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, len(grid) - 1)].item()
    return math.sqrt(low * high)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
