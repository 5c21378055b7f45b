"""The rules that choose a rank."""

import itertools
import math

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.compression.factor.layers import balanced_factors, covering_factors
from distill_lightning.compression.factor.ranks import (
    budget_ranks,
    energy_rank,
    evbmf_free_energy,
    evbmf_rank,
    evbmf_threshold,
    fraction_ranks,
    number_ranks,
    rank_rule,
)


@pytest.mark.parametrize(
    ("rank", "kind", "value"),
    [
        (8, "number", 8),
        (1, "number", 1),
        (0.25, "fraction", 0.25),
        (1.0, "fraction", 1.0),
        ("energy:0.95", "energy", 0.95),
        ("params:.5", "params", 0.5),
        ("macs:1", "macs", 1.0),
        ("evbmf", "evbmf", 1.0),
    ],
)
def test_a_rank_is_read(rank, kind, value):
    assert rank_rule(rank) == (kind, value)


@pytest.mark.parametrize(
    "rank",
    [0, -3, 0.0, 1.5, float("nan"), True, "energy", "energy:", "energy:2", "energy:x", "evbmf:1", "rank:0.5", ""],
)
def test_what_is_no_rank_is_refused(rank):
    with pytest.raises(InputError, match=r"rank must be a number \(8\), a fraction of full rank .* in \(0, 1\], got "):
        rank_rule(rank)


def test_numbers_and_fractions():
    assert number_ranks([5, 100], 8) == [5, 8]
    assert fraction_ranks([1, 10, 101], 0.25) == [1, 2, 25]
    assert fraction_ranks([7, 3], 1.0) == [7, 3]


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_energy_rule_gives_the_smallest_rank_that_reaches_the_fraction(seed, fraction):
    torch.manual_seed(seed)
    sigma = torch.linalg.svdvals(torch.randn(9, 7).double())
    energies = [value**2 for value in sigma.tolist()]
    rank = energy_rank(sigma, fraction)
    assert math.fsum(energies[:rank]) >= fraction * math.fsum(energies) * (1 - 1e-12)
    assert math.fsum(energies[: rank - 1]) < fraction * math.fsum(energies)


def test_the_energy_rule_at_its_edges():
    assert energy_rank(torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]), 0.5) == 1  # 4 of 8: reached exactly
    assert energy_rank(torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]), 0.51) == 2
    assert energy_rank(torch.tensor([3.0, 0.0, 0.0]), 1.0) == 1
    assert energy_rank(torch.zeros(3), 0.9) == 1


@pytest.mark.parametrize("full", [[7], [12, 5], [3, 9, 4], [1]])
def test_a_budget_is_never_exceeded_and_the_next_step_would(full):
    def cost(ranks):
        return 3 * sum(ranks) + math.prod(ranks)

    steps = sorted({tuple(max(1, limit * n // max(full)) for limit in full) for n in range(max(full) + 1)})
    for budget in range(cost([1] * len(full)), cost(full) + 3):
        ranks = budget_ranks(full, budget, cost=cost)
        assert cost(ranks) <= budget
        assert all(1 <= rank <= limit for rank, limit in zip(ranks, full, strict=True))
        allowed = [step for step in steps if cost(step) <= budget]
        assert tuple(ranks) == max(allowed)


def test_a_budget_below_rank_1_is_refused():
    with pytest.raises(InputError, match="a budget of 9 is below the 10 of rank 1: allow more, or leave it out"):
        budget_ranks([5], 9, cost=lambda ranks: 10 * ranks[0])


# EVBMF


def naive_free_energy(gammas, variance, rows, columns):
    """The paper's sums, one singular value at a time, with the constant terms."""
    small, large = min(rows, columns), max(rows, columns)
    alpha = small / large
    edge, total = evbmf_threshold(alpha), 0.0
    for gamma in gammas:
        x = gamma**2 / (large * variance)
        total += x - math.log(x)
        if x > edge:
            tau = (x - (1 + alpha) + math.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha)) / 2
            total += math.log(tau + 1) + alpha * math.log(tau / alpha + 1) - tau
    return total


def naive_rank(matrix):
    """Every noise variance of a fine grid, one by one."""
    rows, columns = matrix.shape
    gammas = torch.linalg.svdvals(matrix).tolist()
    highest = sum(gamma**2 for gamma in gammas) / (rows * columns)
    grid = [highest * 10 ** (-step / 400) for step in range(1, 1200)]
    best = min(grid, key=lambda variance: naive_free_energy(gammas, variance, rows, columns))
    limit = max(rows, columns) * best * evbmf_threshold(min(rows, columns) / max(rows, columns))
    return sum(gamma**2 > limit for gamma in gammas)


def planted(rows, columns, rank, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right, rest = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, rank), (rank, columns), (rows, columns))
    )
    return left @ right + noise * rest


def rank_of(matrix):
    return evbmf_rank(torch.linalg.svdvals(matrix), tuple(matrix.shape))


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.1, 0.01])
def test_the_threshold_is_the_zero_of_its_equation_and_near_the_published_line(alpha):
    edge = evbmf_threshold(alpha)
    # x = (1 + t)(1 + alpha / t) is t + alpha / t + 1 + alpha: the larger root is the one that is meant.
    half = (edge - 1 - alpha) / 2
    tau = half + math.sqrt(half**2 - alpha)
    phi = [math.log(1 + z) / z - 0.5 for z in (tau, tau / alpha)]
    assert sum(phi) == pytest.approx(0, abs=1e-7)
    assert tau == pytest.approx(2.5129 * math.sqrt(alpha), rel=0.15)


def test_the_threshold_of_a_square_matrix_is_the_published_number():
    assert evbmf_threshold(1.0) == pytest.approx(3.5129 * (1 + 1 / 2.5129), abs=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 15)])
def test_the_free_energy_is_the_sum_of_the_paper(rows, columns):
    matrix = planted(rows, columns, 2, 0.5)
    gammas = torch.linalg.svdvals(matrix)
    variances = torch.tensor([0.01, 0.1, 0.3, 1.0, 3.0], dtype=torch.float64)
    ours = evbmf_free_energy(gammas.square(), variances, max(rows, columns))
    naive = torch.tensor([naive_free_energy(gammas.tolist(), v, rows, columns) for v in variances.tolist()])
    differences = (ours - naive).tolist()
    assert differences == pytest.approx([differences[0]] * 5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (20, 200)])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_evbmf_finds_a_planted_rank_in_noise(shape, rank, noise):
    matrix = planted(*shape, rank, noise)
    assert rank_of(matrix) == rank == naive_rank(matrix)


@pytest.mark.parametrize("shape", [(40, 60), (50, 50)])
@pytest.mark.parametrize("seed", range(5))
def test_evbmf_finds_nothing_in_noise_alone(shape, seed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert rank_of(matrix) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_evbmf_agrees_with_the_brute_search_where_the_signal_is_weak(seed):
    matrix = planted(24, 30, 6, 2.0, seed=seed) + planted(24, 30, 2, 0.0, seed=seed + 50)
    assert rank_of(matrix) == naive_rank(matrix)


def test_evbmf_knows_no_scale_and_no_sides():
    matrix = planted(30, 45, 3, 0.7)
    for scale, transposed in itertools.product([1e-6, 1.0, 1e6], [False, True]):
        assert rank_of(scale * (matrix.T if transposed else matrix)) == 3


def test_evbmf_of_a_matrix_without_noise_and_of_zeros():
    assert rank_of(planted(30, 45, 3, 0.0)) == 3
    assert rank_of(torch.zeros(4, 5, dtype=torch.float64)) == 0
    assert evbmf_rank(torch.tensor([2.0]), (1, 7)) in (0, 1)
    exactly = torch.diag(torch.tensor([5.0, 4.0] + [0.0] * 18, dtype=torch.float64))
    assert rank_of(exactly) == 2


# digits


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_digits_multiply_to_the_number_or_cover_it(parts):
    for number in [*range(1, 65), 97, 1000, 50257]:
        factors, cover = balanced_factors(number, parts), covering_factors(number, parts)
        assert math.prod(factors) == number
        assert len(factors) == len(cover) == parts
        assert factors == sorted(factors)
        assert number <= math.prod(cover)
        for at in range(parts):
            less = [factor - (place == at) for place, factor in enumerate(cover)]
            assert math.prod(less) < number
    assert balanced_factors(64, 3) == [4, 4, 4]
    assert covering_factors(50257, 3) == [37, 37, 37]
