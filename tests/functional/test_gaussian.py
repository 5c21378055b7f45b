"""Formulas of diagonal Gaussians against loops and torch.distributions, then what they are minimised by."""

import math
import statistics

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from distill_lightning import InputError
from distill_lightning.functional import (
    collapse_mixture,
    gaussian_kl,
    gaussian_kl_rows,
    gaussian_nll,
    join_gaussian,
    split_gaussian,
)

SIZES = [(1, 1), (1, 3), (6, 1), (5, 2)]


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def two_gaussians(count, targets):
    return [draw(count, targets, seed=seed, scale=1.5) for seed in range(4)]


def naive_kl_of_two(teacher_mean, teacher_variance, student_mean, student_variance):
    ratio = teacher_variance / student_variance
    return 0.5 * (ratio - 1 - math.log(ratio) + (teacher_mean - student_mean) ** 2 / student_variance)


def naive_kl_rows(teacher_mean, teacher_log_var, student_mean, student_log_var):
    return [
        sum(
            naive_kl_of_two(m, math.exp(s), n, math.exp(t))
            for m, s, n, t in zip(
                *(values[i].tolist() for values in (teacher_mean, teacher_log_var, student_mean, student_log_var)),
                strict=True,
            )
        )
        for i in range(len(teacher_mean))
    ]


def deviation(log_var):
    return (log_var / 2).exp()


def check_gradients(loss, values):
    """They are finite, and those of half precision are the wide ones, rounded once."""
    narrow, wide = values.clone().requires_grad_(), values.float().requires_grad_()
    loss(narrow).backward()
    loss(wide).backward()
    assert torch.isfinite(wide.grad).all()
    # float16 itself ends at 65504, which is for a gradient scaler to mind.
    assert torch.allclose(narrow.grad.double(), wide.grad.to(values.dtype).double(), rtol=1e-6)


# split_gaussian and join_gaussian


def test_the_means_come_first_and_then_the_log_variances():
    mean, log_var = split_gaussian(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    assert mean.tolist() == [[1, 2], [5, 6]]
    assert log_var.tolist() == [[3, 4], [7, 8]]


@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (0, 4)])
def test_joining_is_the_inverse_of_splitting(shape):
    output = draw(*shape)
    assert torch.equal(join_gaussian(*split_gaussian(output)), output)


@pytest.mark.parametrize(("bounds", "expected"), [((-10.0, 10.0), [-10, 3, 10]), ((-1.0, 2.0), [-1, 2, 2])])
def test_log_variances_are_clamped_and_means_are_not(bounds, expected):
    output = torch.tensor([[-99.0, 0.0, 99.0, -50.0, 3.0, 50.0]], requires_grad=True)
    mean, log_var = split_gaussian(output, bounds=bounds)
    assert mean.tolist() == [[-99, 0, 99]]
    assert log_var.tolist() == [expected]
    (mean.sum() + log_var.sum()).backward()
    inside = float(bounds[0] < 3 < bounds[1])
    assert output.grad.tolist() == [[1, 1, 1, 0, inside, 0]]


def test_the_default_bounds_are_those_of_the_package():
    assert split_gaussian(torch.tensor([[0.0, 99.0]]))[1].item() == 10
    assert split_gaussian(torch.tensor([[0.0, -99.0]]))[1].item() == -10


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened(dtype, expected):
    assert {part.dtype for part in split_gaussian(draw(2, 4).to(dtype))} == {expected}


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 2, 2), (2, 1)])
def test_an_output_that_is_no_gaussian_is_refused(shape):
    with pytest.raises(InputError, match=r"a Gaussian's parameters are \(N, 2 d\), means and log-variances; got \("):
        split_gaussian(torch.zeros(shape))


# gaussian_nll


@pytest.mark.parametrize(("count", "targets"), SIZES)
def test_gaussian_nll_is_the_loop(count, targets):
    mean, log_var, target = (draw(count, targets, seed=seed) for seed in range(3))
    total = 0.0
    for i in range(count):
        for j in range(targets):
            normal = statistics.NormalDist(mean[i, j].item(), math.exp(log_var[i, j].item() / 2))
            total -= math.log(normal.pdf(target[i, j].item()))
    assert gaussian_nll(mean, log_var, target).item() == pytest.approx(total / count, rel=1e-12)


def test_gaussian_nll_is_a_hand_value():
    # A standard normal at 0 and at 2: (log 2 pi) / 2, and 2 more.
    nll = gaussian_nll(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([[0.0], [2.0]]))
    assert nll.item() == pytest.approx(math.log(2 * math.pi) / 2 + 1, rel=1e-6)


def test_gaussian_nll_of_a_target_in_a_column_twice_counts_twice():
    mean, log_var, target = (draw(4, 1, seed=seed) for seed in range(3))
    once = gaussian_nll(mean, log_var, target)
    assert gaussian_nll(mean.repeat(1, 2), log_var.repeat(1, 2), target.repeat(1, 2)).item() == pytest.approx(
        2 * once.item(), rel=1e-12
    )
    assert gaussian_nll(mean.repeat(2, 1), log_var.repeat(2, 1), target.repeat(2, 1)).item() == pytest.approx(
        once.item(), rel=1e-12
    )


def test_the_best_variance_for_a_label_is_the_squared_error():
    # The trap of taking the teacher's mean for a label: its variance is forgotten.
    for offset in (0.1, 1.0):
        log_var = minimised(lambda s, d=offset: gaussian_nll(torch.full_like(s, d), s, torch.zeros_like(s)))
        assert math.exp(log_var) == pytest.approx(offset**2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gaussian_nll_of_extreme_outputs_is_finite(dtype):
    output, target = torch.tensor([[1e4, -1e4, -50.0, 50.0]], dtype=dtype), torch.tensor([[-1e4, 1e4]], dtype=dtype)
    nll = gaussian_nll(*split_gaussian(output), target)
    expected = sum(
        0.5 * (s + (2 * abs(float(output[0, 0]))) ** 2 * math.exp(-s) + math.log(2 * math.pi)) for s in (-10, 10)
    )
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(expected, rel=1e-5)
    check_gradients(lambda values: gaussian_nll(*split_gaussian(values), target), output)


# gaussian_kl


@pytest.mark.parametrize(("count", "targets"), SIZES)
def test_gaussian_kl_is_the_loop(count, targets):
    gaussians = two_gaussians(count, targets)
    rows = naive_kl_rows(*gaussians)
    found = gaussian_kl_rows(*gaussians)
    assert found.shape == (count,)
    assert found.tolist() == pytest.approx(rows, rel=1e-12)
    assert gaussian_kl(*gaussians).item() == pytest.approx(sum(rows) / count, rel=1e-12)


def test_gaussian_kl_is_that_of_torch_distributions():
    teacher_mean, teacher_log_var, student_mean, student_log_var = two_gaussians(50, 3)
    divergence = kl_divergence(
        Normal(teacher_mean, deviation(teacher_log_var)), Normal(student_mean, deviation(student_log_var))
    )
    found = gaussian_kl(teacher_mean, teacher_log_var, student_mean, student_log_var)
    assert found.item() == pytest.approx(divergence.sum(dim=1).mean().item(), rel=1e-13)


def test_gaussian_kl_of_a_standard_normal_is_a_hand_value():
    # To twice the variance and a mean 1 away: (log 2 + 1/2 + 1/2 - 1) / 2.
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    assert gaussian_kl(zero, zero, one, math.log(2) * one).item() == pytest.approx(math.log(2) / 2, rel=1e-6)


def test_gaussian_kl_is_zero_only_for_equal_gaussians():
    mean, log_var, other, other_log_var = two_gaussians(20, 2)
    assert gaussian_kl(mean, log_var, mean, log_var).item() == 0
    assert (gaussian_kl_rows(mean, log_var, other, other_log_var) > 0).all()
    assert gaussian_kl(mean, log_var, mean + 1e-6, log_var).item() > 0
    assert gaussian_kl(mean, log_var, mean, log_var + 1e-6).item() > 0


def test_gaussian_kl_of_nearly_equal_variances_is_exact_in_float32():
    # s_S - s_T + exp(s_T - s_S) - 1 summed as it stands would be rounding noise here.
    zero = torch.zeros(1, 1)
    for step in (1e-2, 1e-3, -1e-3):
        assert gaussian_kl(zero, zero, zero, zero + step).item() == pytest.approx(
            (math.expm1(-step) + step) / 2, rel=1e-3
        )


def test_gaussian_kl_sees_which_side_is_the_teacher():
    teacher_mean, teacher_log_var, student_mean, student_log_var = two_gaussians(5, 2)
    forward = gaussian_kl(teacher_mean, teacher_log_var, student_mean, student_log_var).item()
    reverse = gaussian_kl(student_mean, student_log_var, teacher_mean, teacher_log_var).item()
    assert abs(forward - reverse) > 0.05


def test_gaussian_kl_does_not_see_a_shift_of_both_or_a_change_of_unit():
    teacher_mean, teacher_log_var, student_mean, student_log_var = two_gaussians(5, 2)
    plain = gaussian_kl(teacher_mean, teacher_log_var, student_mean, student_log_var).item()
    unit = 2 * math.log(57.3)
    moved = gaussian_kl(
        57.3 * teacher_mean + 3, teacher_log_var + unit, 57.3 * student_mean + 3, student_log_var + unit
    )
    assert moved.item() == pytest.approx(plain, rel=1e-12)


def test_every_row_twice_leaves_gaussian_kl_and_every_column_twice_doubles_it():
    gaussians = two_gaussians(5, 2)
    plain = gaussian_kl(*gaussians).item()
    assert gaussian_kl(*(part.repeat(2, 1) for part in gaussians)).item() == pytest.approx(plain, rel=1e-12)
    assert gaussian_kl(*(part.repeat(1, 2) for part in gaussians)).item() == pytest.approx(2 * plain, rel=1e-12)


def test_gaussian_kl_is_the_nll_of_labels_of_the_teacher_less_its_entropy():
    # E over y of the teacher of -log q_S(y), by Gauss and Hermite's quadrature, exact for a quadratic in y.
    teacher_mean, teacher_log_var, student_mean, student_log_var = two_gaussians(4, 2)
    nodes, weights = torch.tensor([-1.0, 1.0], dtype=torch.float64), (0.5, 0.5)
    nll = sum(
        weight * gaussian_nll(student_mean, student_log_var, teacher_mean + node * deviation(teacher_log_var)).item()
        for node, weight in zip(nodes, weights, strict=True)
    )
    entropy = (0.5 * (teacher_log_var + math.log(2 * math.pi * math.e))).sum(dim=1).mean().item()
    divergence = gaussian_kl(teacher_mean, teacher_log_var, student_mean, student_log_var).item()
    assert nll - entropy == pytest.approx(divergence, rel=1e-10)


def test_gaussian_kl_is_the_limit_of_training_on_the_teachers_labels():
    teacher_mean, teacher_log_var, student_mean, student_log_var = two_gaussians(3, 1)
    labels = teacher_mean + deviation(teacher_log_var) * draw(200_000, 3, 1, seed=9)
    log_probs = Normal(student_mean, deviation(student_log_var)).log_prob(labels)
    log_probs -= Normal(teacher_mean, deviation(teacher_log_var)).log_prob(labels)
    rows = -log_probs[:, :, 0]
    error = rows.std(dim=0) / math.sqrt(len(rows))
    found = gaussian_kl_rows(teacher_mean, teacher_log_var, student_mean, student_log_var)
    # Four standard errors.
    assert ((rows.mean(dim=0) - found).abs() < 4 * error).all()
    assert (error < 0.1 * found).all()


def minimised(loss):
    """The log-variance at which a loss is least, by Newton's method in one dimension."""
    log_var = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        (gradient,) = torch.autograd.grad(loss(log_var).sum(), log_var, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), log_var)
        with torch.no_grad():
            log_var -= (gradient / curvature).clamp(-1, 1)
    return log_var.item()


@pytest.mark.slow
@pytest.mark.parametrize(("variance", "offset"), [(1.0, 1.0), (1.0, 0.1), (0.25, 2.0), (4.0, 0.0)])
def test_the_best_student_variance_is_the_teachers_and_the_squared_offset(variance, offset):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    teacher = zero, zero + math.log(variance)
    forward = minimised(lambda s: gaussian_kl(*teacher, zero + offset, s))
    assert math.exp(forward) == pytest.approx(variance + offset**2, rel=1e-9)
    # The other direction is blind to the offset.
    reverse = minimised(lambda s: gaussian_kl(zero + offset, s, *teacher))
    assert math.exp(reverse) == pytest.approx(variance, rel=1e-9)


def test_with_equal_fixed_variances_the_gradient_is_that_of_the_squared_error():
    teacher_mean, log_var, _, _ = two_gaussians(5, 3)
    log_var = torch.full_like(log_var, math.log(0.7))
    first, second = draw(5, 3, seed=7).requires_grad_(), draw(5, 3, seed=7).requires_grad_()
    gaussian_kl(teacher_mean, log_var, first, log_var).backward()
    ((second - teacher_mean).square().sum(dim=1).mean() / (2 * 0.7)).backward()
    assert torch.allclose(first.grad, second.grad, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("swapped", [False, True])
def test_gaussian_kl_of_extreme_outputs_is_finite(dtype, swapped):
    teacher = torch.tensor([[1e4, -1e4, -50.0, 50.0], [0, 0, 50, -50]], dtype=dtype)
    student = torch.tensor([[-1e4, 1e4, 50.0, -50.0], [0, 0, -50, 50]], dtype=dtype)
    if swapped:
        teacher, student = student, teacher
    divergence = gaussian_kl(*split_gaussian(teacher), *split_gaussian(student))
    distance = 2 * abs(float(teacher[0, 0]))
    rows = [naive_kl_of_two(distance, math.exp(s), 0, math.exp(-s)) for s in (-10, 10)]
    rows += [naive_kl_of_two(0, math.exp(s), 0, math.exp(-s)) for s in (-10, 10)]
    assert divergence.item() == pytest.approx(sum(rows) / 2, rel=1e-5)
    check_gradients(lambda values: gaussian_kl(*split_gaussian(teacher), *split_gaussian(values)), student)


def test_half_precision_gives_the_divergence_of_the_same_numbers_in_float32():
    gaussians = [part.half() for part in two_gaussians(6, 2)]
    found = gaussian_kl(*gaussians)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(gaussian_kl(*(part.double() for part in gaussians)).item(), rel=1e-5)


def test_gradients_reach_all_four_and_the_mean_by_its_formula():
    parts = [part.requires_grad_() for part in two_gaussians(4, 2)]
    gaussian_kl(*parts).backward()
    teacher_mean, _, student_mean, student_log_var = (part.detach() for part in parts)
    expected = (student_mean - teacher_mean) / student_log_var.exp() / 4
    assert torch.allclose(parts[2].grad, expected, rtol=1e-12)
    assert torch.allclose(parts[0].grad, -expected, rtol=1e-12)
    assert all(part.grad.abs().sum() > 0 for part in parts)


@pytest.mark.parametrize("formula", [gaussian_kl, gaussian_kl_rows])
@pytest.mark.parametrize("odd", range(4))
def test_gaussian_kl_refuses_other_shapes(formula, odd):
    parts = [torch.zeros(4, 2) for _ in range(4)]
    parts[odd] = torch.zeros(4, 1)
    with pytest.raises(
        InputError, match="gaussian_kl: means, log-variances and targets must have the same shape, got "
    ):
        formula(*parts)


@pytest.mark.parametrize("odd", range(3))
def test_gaussian_nll_refuses_other_shapes(odd):
    # A target (N,) against means (N, 1) would be compared all with all.
    parts = [torch.zeros(4, 1) for _ in range(3)]
    parts[odd] = torch.zeros(4)
    with pytest.raises(InputError, match=r"gaussian_nll: means, .* must have the same shape, got .*\(4,\)"):
        gaussian_nll(*parts)


# collapse_mixture


def members(count=5, samples=4, targets=2):
    return draw(count, samples, targets, seed=3), draw(count, samples, targets, seed=4).exp()


WEIGHTS = [None, [1, 1, 1, 1, 1], [0.1, 2, 0, 3, 0.9]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_collapse_mixture_is_the_loop(weights):
    means, variances = members()
    shares = [1 / 5] * 5 if weights is None else [weight / sum(weights) for weight in weights]
    mean, variance = collapse_mixture(means, variances, weights=weights)
    assert mean.shape == variance.shape == (4, 2)
    for i in range(4):
        for j in range(2):
            first = sum(w * means[k, i, j].item() for k, w in enumerate(shares))
            second = sum(w * (variances[k, i, j].item() + means[k, i, j].item() ** 2) for k, w in enumerate(shares))
            assert mean[i, j].item() == pytest.approx(first, rel=1e-12)
            assert variance[i, j].item() == pytest.approx(second - first**2, rel=1e-10)


def test_the_variance_is_the_mean_one_and_the_population_variance_of_the_means():
    means, variances = members()
    _, variance = collapse_mixture(means, variances)
    assert torch.allclose(variance, variances.mean(dim=0) + means.var(dim=0, unbiased=False), rtol=1e-12)
    assert (variances.mean(dim=0) + means.var(dim=0) - variance).abs().min() > 0.02


def test_a_single_member_is_the_mixture():
    means, variances = members(1)
    mean, variance = collapse_mixture(means, variances)
    assert torch.equal(mean, means[0])
    assert torch.equal(variance, variances[0])


def test_members_far_from_zero_keep_their_variance_in_float32():
    # The mean of the squares less the squared mean would be rounding noise here.
    means = torch.tensor([[[1000.0]], [[1000.5]]])
    _, variance = collapse_mixture(means, torch.full_like(means, 1e-3))
    assert variance.item() == pytest.approx(1e-3 + 0.0625, rel=1e-5)


def test_half_precision_members_are_collapsed_in_float32():
    means, variances = (part.half() for part in members())
    mean, variance = collapse_mixture(means, variances)
    assert mean.dtype == variance.dtype == torch.float32
    expected = collapse_mixture(means.double(), variances.double())
    assert torch.allclose(mean.double(), expected[0], rtol=1e-5)
    assert torch.allclose(variance.double(), expected[1], rtol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_gradient_towards_the_mixture_is_the_mean_of_those_towards_its_members(weights):
    means, variances = members()
    shares = [1 / 5] * 5 if weights is None else [weight / sum(weights) for weight in weights]
    student = [draw(4, 2, seed=8).requires_grad_(), draw(4, 2, seed=9).requires_grad_()]
    mean, variance = collapse_mixture(means, variances, weights=weights)
    collapsed = gaussian_kl(mean, variance.log(), *student)
    singles = sum(w * gaussian_kl(m, v.log(), *student) for w, m, v in zip(shares, means, variances, strict=True))
    for one, other in zip(torch.autograd.grad(collapsed, student), torch.autograd.grad(singles, student), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)
    # The values differ by what no student can change.
    assert singles.item() > collapsed.item() + 0.01


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "2 weights for 5 teachers"),
        ([1, 1, 1, 1, -1], "must be finite, non-negative and not all zero"),
        ([0] * 5, "must be finite, non-negative and not all zero"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        collapse_mixture(*members(), weights=weights)


def test_members_of_other_shapes_are_refused():
    with pytest.raises(InputError, match="collapse_mixture: means, log-variances and targets must have the same shape"):
        collapse_mixture(torch.zeros(2, 4, 1), torch.zeros(2, 4, 2))


def test_no_members_have_no_mixture():
    none = torch.empty(0, 3, 2)
    with pytest.raises(InputError, match="at least one member"):
        collapse_mixture(none, none)
