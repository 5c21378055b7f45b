"""Decompositions against their bounds, random trials, and tensorly."""

import itertools

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.compression.factor.decompositions import (
    canonical,
    fit_train_ranks,
    relative_error,
    tensor_train,
    truncated_svd,
    tucker2,
    whitened_svd,
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tail(matrix, rank):
    """Energy of the singular values after a rank."""
    return torch.linalg.svdvals(matrix)[rank:].square().sum().item()


def unfolded(tensor, mode):
    """The matrix of a tensor, column by column."""
    others = [range(size) for at, size in enumerate(tensor.shape) if at != mode]
    columns = []
    for place in itertools.product(*others):
        index = list(place)
        index.insert(mode, slice(None))
        columns.append(tensor[tuple(index)])
    return torch.stack(columns, dim=1)


# SVD


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (1, 5), (7, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_error_of_a_truncated_svd_is_the_tail_of_the_singular_values(shape, dtype, tolerance):
    matrix = torch.randn(shape, dtype=dtype)
    sigma = torch.linalg.svdvals(matrix.double())
    for rank in range(1, min(shape) + 1):
        difference = truncated_svd(matrix, rank).full() - matrix
        bound = tail(matrix.double(), rank) ** 0.5
        assert abs(difference.norm().item() - bound) < tolerance * matrix.norm().item()
        spectral = torch.linalg.matrix_norm(difference, 2).item()
        expected = sigma[rank].item() if rank < len(sigma) else 0.0
        assert abs(spectral - expected) < tolerance * matrix.norm().item()


def test_no_other_matrix_of_the_rank_is_nearer():
    matrix, rank = double(10, 8), 3
    best = truncated_svd(matrix, rank)
    error = (best.full() - matrix).norm().item()
    for trial in range(20):
        # Random ones, refitted on one side, and neighbours of the best one.
        left = double(10, rank)
        fitted = left @ torch.linalg.lstsq(left, matrix).solution
        scale = 10.0 ** (-trial % 5)
        near = (best.left + scale * double(10, rank)) @ (best.right + scale * double(rank, 8))
        assert (fitted - matrix).norm().item() > error
        assert (near - matrix).norm().item() > error


def test_the_factors_share_the_sizes():
    factors = truncated_svd(double(9, 6), 4)
    assert torch.allclose(factors.left.norm(dim=0), factors.right.norm(dim=1))
    assert truncated_svd(torch.zeros(3, 4), 2).full().tolist() == torch.zeros(3, 4).tolist()


def test_relative_error_is_a_ratio_of_norms():
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def output_error(factors, matrix, inputs):
    """Squared error of the outputs, input by input."""
    return sum(((factors.full() - matrix) @ row).square().sum().item() for row in inputs)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_whitening_minimises_the_error_on_the_inputs(rank):
    matrix, inputs = double(6, 5), double(40, 5) @ double(5, 5)
    moment = inputs.T @ inputs / len(inputs)
    whitened = whitened_svd(matrix, rank, moment=moment, damping=0.0)
    error = output_error(whitened, matrix, inputs)
    # Reference: the outputs' own best approximation of that rank, by projection on its leading directions.
    outputs = inputs @ matrix.T
    assert error == pytest.approx(tail(outputs, rank), rel=1e-9)
    assert error <= output_error(truncated_svd(matrix, rank), matrix, inputs)
    assert torch.linalg.matrix_rank(whitened.full()).item() == rank
    assert torch.allclose(whitened.left.norm(dim=0), whitened.right.norm(dim=1))


def test_white_inputs_and_heavy_damping_give_the_plain_svd():
    matrix, skewed = double(6, 5), double(5, 5)
    plain = truncated_svd(matrix, 2).full()
    moment = skewed @ skewed.T
    assert torch.allclose(whitened_svd(matrix, 2, moment=3 * torch.eye(5)).full(), plain, atol=1e-10)
    assert torch.allclose(whitened_svd(matrix, 2, moment=moment, damping=1e9).full(), plain, atol=1e-6)
    assert not torch.allclose(whitened_svd(matrix, 2, moment=moment).full(), plain, atol=1e-3)


def test_damping_is_in_units_of_the_inputs():
    matrix, skewed = double(6, 5), double(5, 5)
    moment = skewed @ skewed.T
    assert torch.allclose(
        whitened_svd(matrix, 2, moment=moment).full(), whitened_svd(matrix, 2, moment=1e6 * moment).full(), atol=1e-9
    )


def test_inputs_that_leave_directions_out_need_damping():
    matrix, moment = double(4, 3), torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(InputError, match="moment is singular: calibrate with more inputs, .* or with damping"):
        whitened_svd(matrix, 1, moment=moment, damping=0.0)
    assert whitened_svd(matrix, 3, moment=moment).full().allclose(matrix)


# Tucker


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (4, 2), (5, 7)])
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (7, 5, 1, 2)])
def test_tucker_is_within_its_bounds_and_iterating_never_hurts(shape, ranks):
    kernel = double(*shape)
    total = kernel.square().sum().item()
    inner_tail, outer_tail = tail(unfolded(kernel, 1), ranks[0]), tail(unfolded(kernel, 0), ranks[1])
    found = tucker2(kernel, ranks, sweeps=0)
    error = (found.full() - kernel).square().sum().item()
    assert max(inner_tail, outer_tail) - 1e-9 <= error <= inner_tail + outer_tail + 1e-9
    assert len(found.errors) == 1
    assert found.errors[0] ** 2 * total == pytest.approx(error, abs=1e-9)
    iterated = tucker2(kernel, ranks, sweeps=30, tolerance=0.0)
    errors = iterated.errors
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[0] == pytest.approx(found.errors[0], abs=1e-12)
    assert errors[-1] ** 2 * total >= max(inner_tail, outer_tail) - 1e-9
    for basis in (iterated.outer, iterated.inner):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-10)


def test_iterating_helps_where_it_can():
    errors = tucker2(double(8, 8, 3, 3), (3, 3), tolerance=0.0).errors
    assert errors[-1] < errors[0] - 1e-3


def test_tucker_of_its_own_ranks_is_exact():
    kernel = torch.einsum("os,srhw,cr->ochw", double(8, 3), double(3, 2, 3, 3), double(6, 2))
    assert tucker2(kernel, (2, 3)).errors[-1] < 1e-12


# CP


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 4, 12])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_cp_never_rises(seed, rank):
    torch.manual_seed(seed)
    kernel = double(7, 5, 3, 3)
    found = canonical(kernel, rank, tolerance=0.0, sweeps=60)
    assert len(found.errors) > 2
    assert all(after <= before for before, after in itertools.pairwise(found.errors))
    assert found.errors[-1] == pytest.approx(relative_error(found.full(), kernel), abs=1e-9)
    assert found.errors[-1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rank", "window"), [(1, 3), (2, 3), (3, 3), (2, 1)])
def test_cp_of_its_own_rank_is_exact(rank, window, seed):
    torch.manual_seed(seed)
    parts = [double(size, rank) for size in (6, 5, window, window)]
    kernel = torch.einsum("or,cr,hr,wr->ochw", *parts)
    assert canonical(kernel, rank, sweeps=2000, tolerance=1e-10).errors[-1] < 1e-5


def test_cp_of_rank_1_is_no_worse_than_random_ones():
    kernel = double(5, 4, 3, 3)
    error = canonical(kernel, 1).errors[-1]
    for _ in range(20):
        parts = [double(size) for size in kernel.shape]
        direction = torch.einsum("o,c,h,w->ochw", *parts)
        fitted = direction * (direction * kernel).sum() / direction.square().sum()
        assert relative_error(fitted, kernel) > error


@pytest.mark.slow
def test_cp_shares_the_sizes_and_repeats_itself():
    kernel = double(5, 4, 3, 3)
    first, second = canonical(kernel, 6), canonical(kernel, 6)
    norms = torch.stack([factor.norm(dim=0) for factor in first.factors])
    assert torch.allclose(norms, norms[:1].expand_as(norms), atol=1e-9)
    assert all(torch.equal(one, other) for one, other in zip(first.factors, second.factors, strict=True))


def test_a_kernel_of_zeros_decomposes_into_zeros():
    zeros = torch.zeros(4, 3, 3, 3)
    for found in (tucker2(zeros, (2, 2)), canonical(zeros, 2)):
        assert torch.equal(found.full(), zeros.double())
    assert torch.equal(tensor_train(zeros, [2, 2, 2]).full(), zeros.double())


# tensor train


@pytest.mark.parametrize("ranks", [[1, 1, 1], [2, 3, 2], [3, 4, 2], [5, 12, 4]])
def test_a_train_is_within_the_bound_of_its_truncations(ranks):
    tensor = double(5, 4, 3, 4)
    found = tensor_train(tensor, fit_train_ranks(tensor.shape, ranks))
    error = (found.full() - tensor).square().sum().item()
    splits = [tail(tensor.reshape(5 * (1, 4, 12)[at], -1), ranks[at]) for at in range(3)]
    assert max(splits) - 1e-9 <= error <= sum(splits) + 1e-9
    assert [core.shape[2] for core in found.cores] == [*ranks, 1]


def test_a_train_of_two_cores_is_the_truncated_svd():
    matrix = double(6, 5)
    train = tensor_train(matrix, [2])
    assert torch.allclose(train.full(), truncated_svd(matrix, 2).full(), atol=1e-12)


def test_the_squared_error_of_a_train_is_the_sum_of_what_each_step_cut_off():
    tensor = double(4, 3, 5)
    rest, cut = tensor.reshape(4, -1), 0.0
    cut += tail(rest, 2)
    _, s, vt = torch.linalg.svd(rest, full_matrices=False)
    rest = (s[:2, None] * vt[:2]).reshape(6, 5)
    cut += tail(rest, 3)
    error = (tensor_train(tensor, [2, 3]).full() - tensor).square().sum().item()
    assert error == pytest.approx(cut, rel=1e-10)


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 2, 2, 2, 2), (7, 1, 3), (6,)])
def test_a_train_of_full_rank_is_exact(shape):
    tensor = double(*shape)
    ranks = fit_train_ranks(shape, [1000] * (len(shape) - 1))
    found = tensor_train(tensor, ranks)
    assert relative_error(found.full(), tensor) < 1e-12
    norms = [core.norm().item() for core in found.cores]
    assert norms == pytest.approx([norms[0]] * len(norms))


@pytest.mark.parametrize("sizes", [(4, 3, 5), (2, 9, 2, 3), (1, 6, 1)])
def test_no_fitted_rank_exceeds_what_its_neighbours_span(sizes):
    for wished in itertools.product([1, 2, 5, 50], repeat=len(sizes) - 1):
        edges = [1, *fit_train_ranks(sizes, wished), 1]
        for at, size in enumerate(sizes):
            assert edges[at] <= size * edges[at + 1]
            assert edges[at + 1] <= size * edges[at]
        assert all(fitted <= wish for fitted, wish in zip(edges[1:-1], wished, strict=True))


# the oracle


@pytest.fixture
def tensorly():
    oracle = pytest.importorskip("tensorly")
    oracle.set_backend("numpy")
    return oracle


def test_tensorly_finds_the_same_tucker(tensorly):
    from tensorly.decomposition import partial_tucker

    kernel = double(7, 5, 3, 3)
    (core, (outer, inner)), _ = partial_tucker(kernel.numpy(), rank=[3, 2], modes=[0, 1], n_iter_max=200, tol=1e-12)
    theirs = torch.einsum("os,srhw,cr->ochw", *map(torch.tensor, (outer, core, inner)))
    ours = tucker2(kernel, (2, 3), sweeps=200, tolerance=0.0)
    assert ours.errors[-1] == pytest.approx(relative_error(theirs, kernel), abs=1e-4)


def test_tensorly_finds_the_same_train(tensorly):
    from tensorly.decomposition import tensor_train as oracle

    tensor = double(5, 4, 3, 4)
    theirs = torch.tensor(oracle(tensor.numpy(), rank=[1, 2, 3, 2, 1]).to_tensor())
    assert torch.allclose(tensor_train(tensor, [2, 3, 2]).full(), theirs, atol=1e-10)


@pytest.mark.slow
def test_tensorly_finds_no_better_cp(tensorly):
    from tensorly.decomposition import parafac

    kernel = double(6, 5, 3, 3)
    theirs = torch.tensor(parafac(kernel.numpy(), rank=3, n_iter_max=300, tol=1e-10, init="svd").to_tensor())
    ours = canonical(kernel, 3, sweeps=300, tolerance=1e-10)
    assert ours.errors[-1] == pytest.approx(relative_error(theirs, kernel), abs=0.02)
