"""Low-rank decompositions of matrices and convolution kernels, as pure functions of tensors.

All of them compute in float64 on the CPU and return such tensors: a decomposition is done only once, and in this way it
does not depend on the type and the device of the weight. The letters: a matrix is ``(M, N)``, a kernel ``(O, C, H, W)``
with ``O`` output channels, ``C`` input channels and the window ``H, W``; ``R`` is a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill_lightning.errors import InputError


class Product(NamedTuple):
    """A matrix ``(M, N)`` as ``left @ right``: ``(M, R)`` and ``(R, N)``."""

    left: Tensor
    right: Tensor

    def full(self) -> Tensor:
        """The matrix."""
        return self.left @ self.right


class Tucker2(NamedTuple):
    """A kernel as ``outer (O, S)``, ``core (S, R, H, W)`` and ``inner (C, R)``; the window is not decomposed.

    ``errors`` are the relative errors after HOSVD and after each sweep of HOOI.
    """

    outer: Tensor
    core: Tensor
    inner: Tensor
    errors: tuple[float, ...]

    def full(self) -> Tensor:
        """The kernel ``(O, C, H, W)``."""
        return torch.einsum("os,srhw,cr->ochw", self.outer, self.core, self.inner)


class Canonical(NamedTuple):
    """A kernel as the sum of ``R`` products of vectors: ``factors`` are ``(O, R) (C, R) (H, R) (W, R)``.

    ``errors`` are the relative errors after each sweep of alternating least squares.
    """

    factors: tuple[Tensor, ...]
    errors: tuple[float, ...]

    def full(self) -> Tensor:
        """The kernel ``(O, C, H, W)``."""
        sizes = [len(factor) for factor in self.factors]
        return (self.factors[0] @ _columnwise(self.factors[1:]).T).reshape(sizes)


class Train(NamedTuple):
    """A tensor ``(n_1, ..., n_d)`` as a tensor train: ``cores`` are ``(R_{k-1}, n_k, R_k)`` with ``R_0 = R_d = 1``."""

    cores: tuple[Tensor, ...]

    def full(self) -> Tensor:
        """The tensor ``(n_1, ..., n_d)``."""
        whole = self.cores[0]
        for core in self.cores[1:]:
            whole = torch.tensordot(whole, core, dims=1)
        return whole.reshape([core.shape[1] for core in self.cores])


def exact(tensor: Tensor) -> Tensor:
    """Copy a tensor to float64 on the CPU, without a graph.

    Raises:
        InputError: the tensor holds NaN or infinity.
    """
    copy = tensor.detach().to("cpu", torch.float64)
    if not copy.isfinite().all():
        raise InputError("a weight to factor holds NaN or infinity: load weights that were trained without divergence")
    return copy


def relative_error(approximation: Tensor, original: Tensor) -> float:
    """Frobenius norm of the difference over that of ``original``; 0 where both are zero."""
    difference, norm = (float(tensor.norm()) for tensor in (approximation - original, original))
    return difference / norm if norm else difference


def truncated_svd(matrix: Tensor, rank: int) -> Product:
    """The best approximation of a given rank, in the Frobenius and the spectral norm (Eckart and Young, 1936).

    The singular values are split evenly between the factors, so that both train at the same pace.

    Args:
        matrix: ``(M, N)``.
        rank: the rank, at most ``min(M, N)``.
    """
    u, s, vt = torch.linalg.svd(exact(matrix), full_matrices=False)
    root = s[:rank].sqrt()
    return Product(u[:, :rank] * root, root[:, None] * vt[:rank])


def whitened_svd(matrix: Tensor, rank: int, *, moment: Tensor, damping: float = 0.01) -> Product:
    r"""The approximation of a given rank whose *outputs* (not entries) are nearest on given inputs.

    .. math:: \min_{\hat W} E \lVert (W - \hat W) x \rVert^2 + \delta \lVert W - \hat W \rVert^2
        = \min_{\hat W} \lVert (W - \hat W) L \rVert^2, \qquad L L^T = E[x x^T] + \delta I

    so ``W L`` is truncated, and ``L`` is divided out again. On the inputs behind ``moment`` this is never worse than
    `truncated_svd`, whatever the damping: plain truncation has the smallest second term, so it cannot have a smaller
    first one.

    Args:
        matrix: ``(M, N)``.
        rank: the rank, at most ``min(M, N)``.
        moment: second moment of the inputs, ``(N, N)``, see `input_moments`.
        damping: :math:`\delta` in units of the inputs' mean square; it preserves directions that the inputs do not use.

    Raises:
        InputError: the moment has another shape, or is singular for this damping.
    """
    weight, gram = exact(matrix), exact(moment)
    if gram.shape != (weight.shape[1], weight.shape[1]):
        size = weight.shape[1]
        raise InputError(f"moment must be ({size}, {size}) for a weight with {size} inputs, got {tuple(gram.shape)}")
    scale = gram.diagonal().mean()
    root, failed = torch.linalg.cholesky_ex(gram + damping * scale * torch.eye(len(gram), dtype=gram.dtype))
    if failed or not scale > 0:
        raise InputError(
            "moment is singular: calibrate with more inputs, with inputs that are not zero, or with damping"
        )
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, s[:rank, None] * vt[:rank], upper=False, left=False)
    norm = right.norm(dim=1).sqrt()
    balance = torch.where(norm > 0, norm, 1.0)
    return Product(u[:, :rank] * balance, right / balance[:, None])


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, sweeps: int = 20, tolerance: float = 1e-7) -> Tucker2:
    """Tucker decomposition over the two channel dimensions: HOSVD, then higher-order orthogonal iteration.

    Each sweep of HOOI solves for one of the two bases with the other one fixed, so the error never rises.

    Args:
        kernel: ``(O, C, H, W)``.
        ranks: ranks ``(R, S)`` of the input and output channels.
        sweeps: the largest number of HOOI sweeps; 0 stays with HOSVD.
        tolerance: HOOI ends when a sweep lowers the relative error by less than this.

    De Lathauwer, De Moor, Vandewalle: *On the Best Rank-1 and Rank-(R1, ..., RN) Approximation of Higher-Order
    Tensors*, 2000; for convolutions: Kim et al., https://arxiv.org/abs/1511.06530
    """
    whole = exact(kernel)
    inner_rank, outer_rank = ranks
    outer, inner = _leading(unfold(whole, 0), outer_rank), _leading(unfold(whole, 1), inner_rank)
    errors: list[float] = []
    for sweep in range(sweeps + 1):
        if sweep:
            outer = _leading(unfold(torch.einsum("ochw,cr->orhw", whole, inner), 0), outer_rank)
            inner = _leading(unfold(torch.einsum("ochw,os->schw", whole, outer), 1), inner_rank)
        core = torch.einsum("ochw,os,cr->srhw", whole, outer, inner)
        errors.append(relative_error(torch.einsum("os,srhw,cr->ochw", outer, core, inner), whole))
        if sweep and errors[-2] - errors[-1] < tolerance:
            break
    return Tucker2(outer, core, inner, tuple(errors))


def canonical(
    kernel: Tensor, rank: int, *, sweeps: int = 200, tolerance: float = 1e-7, ridge: float = 1e-12, seed: int = 0
) -> Canonical:
    """CP decomposition by alternating least squares, from the leading singular vectors.

    A sweep solves for each factor in turn with the others fixed. In general there is no best approximation of a rank:
    with many components, some grow while cancelling each other, which ``ridge`` limits and ``sweeps`` ends.

    Args:
        kernel: ``(O, C, H, W)``.
        rank: ``R``.
        sweeps: the largest number of sweeps.
        tolerance: the sweeps end when one lowers the relative error by less than this.
        ridge: the ridge of each least-squares problem, in units of the mean of its diagonal.
        seed: seed of the random columns that are needed if the rank exceeds a dimension.

    Returns:
        Factors whose columns have equal norms.

    Lebedev et al.: *Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition*,
    https://arxiv.org/abs/1412.6553
    """
    whole = exact(kernel)
    generator = torch.Generator().manual_seed(seed)
    factors = [_start(unfold(whole, mode), rank, generator) for mode in range(4)]
    errors: list[float] = []
    best = list(factors)
    for _ in range(sweeps):
        for mode in range(4):
            others = [factor for other, factor in enumerate(factors) if other != mode]
            first, second, third = (factor.T @ factor for factor in others)
            gram = first * second * third
            factors[mode] = _solve(gram, _contracted(whole, factors, mode), ridge)
            if mode < 3:
                # The last factor carries the norms: unit columns keep the least-squares problems well scaled.
                factors[mode] = factors[mode] / factors[mode].norm(dim=0).clamp_min(1e-300)
        error = relative_error(factors[0] @ _columnwise(factors[1:]).T, unfold(whole, 0))
        if errors and error > errors[-1]:
            break  # only rounding or the ridge still acts: the previous sweep was the best
        errors.append(error)
        best = list(factors)
        if len(errors) > 1 and errors[-2] - errors[-1] < tolerance:
            break
    size = best[3].norm(dim=0)
    share = size**0.25
    unit = best[3] / torch.where(size > 0, size, 1.0)
    return Canonical(tuple(factor * share for factor in (*best[:3], unit)), tuple(errors))


def tensor_train(tensor: Tensor, ranks: Sequence[int]) -> Train:
    """The tensor-train decomposition by successive SVDs.

    The squared error is at most the sum of the squared errors of the ``d - 1`` truncations.

    Args:
        tensor: ``(n_1, ..., n_d)``.
        ranks: the ``d - 1`` inner ranks, as `fit_train_ranks` returns them.

    Oseledets: *Tensor-Train Decomposition*, 2011
    """
    rest = exact(tensor)
    sizes, cores, left = rest.shape, [], 1
    for size, rank in zip(sizes, ranks, strict=False):
        u, s, vt = torch.linalg.svd(rest.reshape(left * size, -1), full_matrices=False)
        cores.append(u[:, :rank].reshape(left, size, -1))
        rest = s[:rank, None] * vt[:rank]
        left = cores[-1].shape[2]
    cores.append(rest.reshape(left, sizes[-1], 1))
    return Train(_same_size(cores))


def fit_train_ranks(sizes: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Lower the ranks of a train that are larger than their neighbours can use.

    Args:
        sizes: ``(n_1, ..., n_d)``.
        ranks: the ``d - 1`` desired inner ranks.
    """
    fitted = [1, *ranks, 1]
    for at in range(1, len(sizes)):
        fitted[at] = min(fitted[at], fitted[at - 1] * sizes[at - 1])
    for at in range(len(sizes) - 1, 0, -1):
        fitted[at] = min(fitted[at], fitted[at + 1] * sizes[at])
    return fitted[1:-1]


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Unfold a tensor to a matrix ``(n_mode, rest)``, with the other dimensions in their order."""
    return tensor.movedim(mode, 0).flatten(1)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first ``rank`` left singular vectors.

    Computed from the matrix times its transpose, because the SVD of a wide matrix takes a hundred times as long. This
    only loses directions below 1e-8 of the largest singular value.
    """
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
    return vectors


def _start(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    vectors = _leading(matrix, rank)
    more = torch.randn(len(matrix), rank - vectors.shape[1], dtype=matrix.dtype, generator=generator)
    return torch.cat([vectors, more], dim=1)


def _contracted(kernel: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """The kernel's unfolding times the Khatri-Rao product of the other factors, ``(n_mode, R)``.

    That product is never formed over both channel dimensions, where it would have at least ``O C R`` entries.
    """
    outer, inner, down, across = factors
    if mode == 0:
        return unfold(kernel, 0) @ _columnwise(factors[1:])
    slices = (outer.T @ unfold(kernel, 0)).reshape(-1, *kernel.shape[1:])
    if mode == 1:
        return torch.einsum("rchw,hr,wr->cr", slices, down, across)
    windows = torch.einsum("rchw,cr->rhw", slices, inner)
    if mode == 2:
        return torch.einsum("rhw,wr->hr", windows, across)
    return torch.einsum("rhw,hr->wr", windows, down)


def _columnwise(factors: Sequence[Tensor]) -> Tensor:
    """The Khatri-Rao product ``(C H W, R)`` of ``(C, R) (H, R) (W, R)``, rows in the order of `unfold`."""
    inner, down, across = factors
    return torch.einsum("cr,hr,wr->chwr", inner, down, across).flatten(0, 2)


def _solve(gram: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """``X`` with ``X (gram + ridge) = rows``."""
    mean = gram.diagonal().mean()
    scale = torch.where(mean > 0, mean, 1.0)  # for a kernel of zeros
    solved: Tensor = torch.linalg.solve(gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype), rows.T)
    return solved.T


def _same_size(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cores with equal norms and the same product."""
    norms = [core.norm().item() for core in cores]
    if min(norms) == 0:
        return tuple(cores)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return tuple(core * (mean / norm) for core, norm in zip(cores, norms, strict=True))
