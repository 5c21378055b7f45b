"""Gaussian, method by method, against naive references in loops and double precision."""

import math

import pytest
import torch
from torch import nn

from distill_lightning import Batch, Gaussian, InputError
from distill_lightning.choices import from_plain, plain

MASKS = [[True, False, True, True], [False, False, True, False], [False] * 4]


def draw(*shape, seed=0, scale=1.5, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def batch_of(target, counted=None):
    counted = None if counted is None else torch.tensor(counted)
    return Batch(torch.zeros(len(target), 1), target, counted=counted)


def gaussians_of(output, *, bounds=(-10, 10), variance=None):
    """Lists of (mean, variance) of each row, one for each target."""
    d = output.shape[1] if variance is not None and output.shape[1] == TARGETS else output.shape[1] // 2
    rows = output.double().tolist()
    if variance is not None:
        return [[(row[j], variance) for j in range(d)] for row in rows]
    return [[(row[j], math.exp(min(max(row[d + j], bounds[0]), bounds[1]))) for j in range(d)] for row in rows]


TARGETS = 3


def nll_of(row, target):
    return sum(
        (math.log(v) + (y - m) ** 2 / v + math.log(2 * math.pi)) / 2 for (m, v), y in zip(row, target, strict=True)
    )


def divergence_of(first, second):
    return sum(
        (math.log(v2 / v1) + v1 / v2 + (m1 - m2) ** 2 / v2 - 1) / 2
        for (m1, v1), (m2, v2) in zip(first, second, strict=True)
    )


def mixture_of(members, weights):
    """Mean and variance of each target, of the members' rows."""
    weights = [1.0] * len(members) if weights is None else weights
    shares = [weight / sum(weights) for weight in weights]
    found = []
    for pairs in zip(*members, strict=True):
        mean = sum(w * m for w, (m, _) in zip(shares, pairs, strict=True))
        found.append((mean, sum(w * (v + m**2) for w, (m, v) in zip(shares, pairs, strict=True)) - mean**2))
    return found


def mean_of(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# The targets' likelihood


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (-0.5, 0.5)])
def test_the_labels_loss_is_the_naive_likelihood(count, targets, bounds):
    output, target = draw(count, 2 * targets), draw(count, targets, seed=1)
    rows = zip(gaussians_of(output, bounds=bounds), target.tolist(), strict=True)
    means = Gaussian(targets, log_var_bounds=bounds)
    assert float(means.label_loss(output, batch_of(target))) == pytest.approx(
        mean_of(nll_of(*row) for row in rows), rel=1e-5
    )


@pytest.mark.parametrize("counted", [None, *MASKS])
@pytest.mark.parametrize("columns", [TARGETS, 2 * TARGETS])
def test_with_a_fixed_variance_the_means_alone_count(columns, counted):
    output, target = draw(4, columns).requires_grad_(), draw(4, TARGETS, seed=1)
    rows = zip(gaussians_of(output.detach(), variance=0.3), target.tolist(), counted or [True] * 4, strict=True)
    expected = mean_of(nll_of(row, values) for row, values, counts in rows if counts)
    loss = Gaussian(TARGETS, fixed_variance=0.3).label_loss(output, batch_of(target, counted))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert not output.grad[:, TARGETS:].any()


@pytest.mark.parametrize("counted", MASKS)
def test_losses_are_the_means_over_the_samples_that_count(counted):
    output, target, distribution = draw(4, 6), draw(4, TARGETS, seed=1), draw(4, 6, seed=2)
    means, batch = Gaussian(TARGETS), batch_of(target, counted)
    students, teachers = gaussians_of(output), gaussians_of(distribution)
    rows = [row for row in range(4) if counted[row]]
    assert float(means.label_loss(output, batch)) == pytest.approx(
        mean_of(nll_of(students[row], target[row].tolist()) for row in rows), rel=1e-5
    )
    assert float(means.divergence(output, distribution, batch)) == pytest.approx(
        mean_of(divergence_of(teachers[row], students[row]) for row in rows), rel=1e-5
    )


def test_what_does_not_count_may_be_anything_and_has_no_gradient():
    output, target, counted = draw(4, 6).requires_grad_(), draw(4, TARGETS, seed=1), [True, False, True, True]
    expected = mean_of(nll_of(gaussians_of(output.detach())[row], target[row].tolist()) for row in (0, 2, 3))
    target[1] = math.nan
    loss = Gaussian(TARGETS).label_loss(output, batch_of(target, counted))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (output.grad.abs().sum(dim=1) > 0).tolist() == counted


def test_where_nothing_counts_the_gradient_is_zero():
    output, target, distribution = draw(4, 6).requires_grad_(), torch.full((4, TARGETS), math.nan), draw(4, 6, seed=2)
    means, batch = Gaussian(TARGETS), batch_of(target, [False] * 4)
    losses = [means.label_loss(output, batch), means.divergence(output, distribution, batch)]
    sum(losses).backward()
    assert [float(loss) for loss in losses] == [0, 0]
    assert not output.grad.any()


# Divergences


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (-0.5, 0.5)])
def test_divergences_are_the_naive_ones(count, targets, bounds):
    output, distribution = draw(count, 2 * targets), draw(count, 2 * targets, seed=1)
    means = Gaussian(targets, log_var_bounds=bounds)
    pairs = zip(gaussians_of(distribution), gaussians_of(output, bounds=bounds), strict=True)
    expected = [divergence_of(*pair) for pair in pairs]
    rows = means.divergence_rows(output, distribution)
    assert rows.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    batch = batch_of(draw(count, targets))
    assert float(means.divergence(output, distribution, batch)) == pytest.approx(mean_of(expected), rel=1e-4)
    # Softened logits have no counterpart here.
    assert torch.equal(rows, means.divergence_rows(output, distribution, temperature=4.0))


def test_a_student_of_means_has_its_fixed_variance_in_the_divergence():
    output, distribution = draw(4, TARGETS), draw(4, 2 * TARGETS, seed=1)
    pairs = zip(gaussians_of(distribution), gaussians_of(output, variance=0.3), strict=True)
    rows = Gaussian(TARGETS, fixed_variance=0.3).divergence_rows(output, distribution)
    assert rows.tolist() == pytest.approx([divergence_of(*pair) for pair in pairs], rel=1e-4)


@pytest.mark.parametrize("variance", [None, 0.3])
@pytest.mark.parametrize("columns", [TARGETS, 2 * TARGETS])
def test_at_a_point_it_is_the_squared_error_of_the_means(columns, variance):
    output, distribution = draw(4, columns), draw(4, 2 * TARGETS, seed=1)
    expected = [
        sum((output[n, j] - distribution[n, j]) ** 2 for j in range(TARGETS)) / (2 * (variance or 1)) for n in range(4)
    ]
    rows = Gaussian(TARGETS, fixed_variance=variance).point_divergence_rows(output, distribution)
    assert rows.tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    output, distribution, batch = draw(4, 6, dtype=dtype), draw(4, 6, seed=1), batch_of(draw(4, 3, seed=2))
    for means in (Gaussian(TARGETS), Gaussian(TARGETS, fixed_variance=0.3)):
        for method in (
            lambda output, means=means: means.label_loss(output, batch),
            lambda output, means=means: means.divergence(output, distribution, batch),
            lambda output, means=means: means.divergence_rows(output, distribution),
            lambda output, means=means: means.point_divergence_rows(output, distribution),
            lambda output, means=means: means.collapse([output, output.flip(0)]),
            lambda output, means=means: means.prediction(output),
            lambda output, means=means: means.teacher_prediction(output),
        ):
            assert method(output).dtype == torch.float32
            torch.testing.assert_close(method(output).double(), method(output.double()).double(), rtol=1e-5, atol=1e-6)


# Ensembles


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (-0.5, 0.5)])
@pytest.mark.parametrize(("members", "weights"), [(1, None), (3, None), (3, [1.0, 3.0, 0.5])])
def test_an_ensemble_is_the_mixtures_mean_and_variance(members, weights, targets, bounds):
    outputs = [draw(4, 2 * targets, seed=m, dtype=torch.float64) for m in range(members)]
    found = gaussians_of(Gaussian(targets, log_var_bounds=bounds).collapse(outputs, weights=weights))
    rows = zip(*(gaussians_of(output, bounds=bounds) for output in outputs), strict=True)
    for row, together in zip(found, rows, strict=True):
        expected = mixture_of(together, weights)
        assert [part for pair in row for part in pair] == pytest.approx(
            [p for pair in expected for p in pair], rel=1e-9
        )


@pytest.mark.parametrize(("given", "variances"), [(0.7, [0.7] * 3), ([0.5, 2.0, 0.1], [0.5, 2.0, 0.1]), (2, [2] * 3)])
def test_the_given_variance_is_that_of_teachers_of_means(given, variances):
    whole, alone = draw(4, 6, dtype=torch.float64), draw(4, 3, seed=1, dtype=torch.float64)
    told = torch.cat([alone, torch.tensor(variances, dtype=torch.float64).log().expand(4, 3)], dim=1)
    means = Gaussian(TARGETS, teacher_variance=given)
    torch.testing.assert_close(
        means.collapse([whole, alone], weights=[1.0, 2.0]),
        Gaussian(TARGETS).collapse([whole, told], weights=[1.0, 2.0]),
        rtol=1e-6, atol=1e-7,
    )  # fmt: skip
    torch.testing.assert_close(means.teacher_prediction(alone), told, rtol=1e-6, atol=1e-7)
    # Those that give log-variances, too, are taken at their word.
    torch.testing.assert_close(means.teacher_prediction(whole), whole)


def test_a_teachers_prediction_is_within_the_bounds():
    output = draw(4, 6, scale=5)
    found = Gaussian(TARGETS, log_var_bounds=(-0.5, 0.5)).teacher_prediction(output)
    torch.testing.assert_close(found[:, 3:], output[:, 3:].clamp(-0.5, 0.5))
    assert torch.equal(found[:, :3], output[:, :3])


def test_uncertainty_is_the_total_variance():
    distribution = draw(4, 6)
    expected = [sum(v for _, v in row) for row in gaussians_of(distribution)]
    assert Gaussian(TARGETS).uncertainty(distribution).tolist() == pytest.approx(expected, rel=1e-5)


# In the form of metrics and logs


def test_predictions_are_within_the_bounds():
    output = draw(4, 6, scale=5)
    found = Gaussian(TARGETS, log_var_bounds=(-0.5, 0.5)).prediction(output)
    assert torch.equal(found, torch.cat([output[:, :3], output[:, 3:].clamp(-0.5, 0.5)], dim=1))
    for columns in (3, 6):
        found = Gaussian(TARGETS, fixed_variance=0.3).prediction(output[:, :columns])
        assert torch.equal(found, torch.cat([output[:, :3], torch.full((4, 3), math.log(0.3))], dim=1))


def test_a_distribution_is_a_prediction():
    distribution = draw(4, 6)
    assert torch.equal(Gaussian(TARGETS).as_prediction(distribution), distribution)


@pytest.mark.parametrize("counted", [None, *MASKS])
@pytest.mark.parametrize("variance", [None, 0.3])
def test_the_comparison_is_of_mean_deviations(counted, variance):
    output, distribution = draw(4, 6), draw(4, 6, seed=1)
    mask = None if counted is None else torch.tensor(counted)
    found = Gaussian(TARGETS, fixed_variance=variance).comparison(output, distribution, mask)
    rows = [row for row in range(4) if counted is None or counted[row]]
    pairs = {"student": gaussians_of(output, variance=variance), "teacher": gaussians_of(distribution)}
    expected = {
        f"{who}_deviation": mean_of(math.sqrt(v) for row in rows for _, v in gaussians[row])
        for who, gaussians in pairs.items()
    }
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def test_the_metrics_are_those_of_regressions():
    output, target = draw(4, 6), draw(4, 3, seed=1)
    found = Gaussian(TARGETS).metrics()(output, target)
    assert set(found) == {"mae", "rmse", "nll", "calibration_error"}
    rows = zip(gaussians_of(output), target.tolist(), strict=True)
    assert float(found["nll"]) == pytest.approx(mean_of(nll_of(*row) for row in rows), rel=1e-5)


def test_the_comparison_with_teachers_is_the_naive_divergence():
    output, distribution = draw(4, 6), draw(4, 6, seed=1)
    found = Gaussian(TARGETS).teacher_metrics()(output, distribution)
    pairs = zip(gaussians_of(distribution), gaussians_of(output), strict=True)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"teacher_kl": mean_of(divergence_of(*pair) for pair in pairs)}, rel=1e-4
    )


# What counts


@pytest.mark.parametrize("counted", [None, *MASKS])
def test_selected_are_the_samples_that_count(counted):
    output, target = draw(4, 6), draw(4, 3, seed=1)
    means, batch = Gaussian(TARGETS), batch_of(target, counted)
    mask = means.counted(output, batch)
    assert (None if mask is None else mask.tolist()) == counted
    rows, targets = means.select(output, target, mask)
    kept = torch.tensor([True] * 4 if counted is None else counted)
    assert torch.equal(rows, output[kept])
    assert torch.equal(targets, target[kept])


# Options and refusals


def test_an_output_comes_back_from_its_plain_values():
    for means in (
        Gaussian(2),
        Gaussian(2, log_var_bounds=(-4.0, 3.0), teacher_variance=[0.5, 2.0], fixed_variance=0.3),
    ):
        assert from_plain(plain(means)) == means


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"log_var_bounds": (10.0, -10.0)}, r"log_var_bounds must be \(smallest, largest\), got \(10.0, -10.0\)"),
        ({"log_var_bounds": (1.0, 1.0)}, r"log_var_bounds must be \(smallest, largest\)"),
        ({"log_var_bounds": (math.nan, 1.0)}, r"log_var_bounds must be \(smallest, largest\)"),
        ({"teacher_variance": 0.0}, "teacher_variance must be positive, one number or one for each of 2: 0.0"),
        ({"teacher_variance": [1.0, -1.0]}, "teacher_variance must be positive, one number or one for each of 2"),
        ({"teacher_variance": [1.0]}, r"teacher_variance must be positive, one number or one for each of 2: \[1.0\]"),
        ({"fixed_variance": 0.0}, "fixed_variance must be positive, got 0.0"),
        ({"fixed_variance": math.nan}, "fixed_variance must be a finite number, got nan"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Gaussian(**({"num_targets": 2} | options))


@pytest.mark.parametrize("shape", [(4, 3), (4, 4), (4,), (4, 5, 6)])
def test_students_that_do_not_fit_are_refused(shape):
    with pytest.raises(
        InputError, match=r"student \(Linear\) has an output of shape .* where num_targets=3 needs \(N, 6\)"
    ):
        Gaussian(TARGETS).check("student", nn.Linear(1, 1), shape)
    assert Gaussian(TARGETS).check("student", nn.Linear(1, 1), (4, 6)) is None


def test_a_student_of_means_fits_with_a_fixed_variance():
    means = Gaussian(TARGETS, fixed_variance=1.0)
    for columns in (3, 6):
        assert means.check("student", nn.Linear(1, 1), (4, columns)) is None
    with pytest.raises(InputError, match=r"needs \(N, 6\)"):
        means.check("student", nn.Linear(1, 1), (4, 4))


@pytest.mark.parametrize("fixed_variance", [None, 1.0])
def test_a_teacher_of_means_needs_its_variance(fixed_variance):
    means = Gaussian(TARGETS, fixed_variance=fixed_variance)
    with pytest.raises(InputError, match=r"teacher 0 \(Linear\) .* \(4, 3\), means alone: give their teacher_variance"):
        means.check_teacher("teacher 0", nn.Linear(1, 1), (4, 3))
    assert means.check_teacher("teacher 0", nn.Linear(1, 1), (4, 6)) is None
    told = Gaussian(TARGETS, fixed_variance=fixed_variance, teacher_variance=1.0)
    assert told.check_teacher("teacher 0", nn.Linear(1, 1), (4, 3)) is None
    with pytest.raises(InputError, match=r"teacher 0 \(Linear\) has an output of shape \(4, 4\)"):
        told.check_teacher("teacher 0", nn.Linear(1, 1), (4, 4))


def test_a_rule_for_probabilities_is_refused():
    means = Gaussian(TARGETS)
    assert means.check_rule("probabilities") is None
    for ask in (means.check_rule, lambda combine: means.collapse([draw(4, 6)], combine=combine)):
        with pytest.raises(InputError, match="collapsed to one Gaussian: combine has no meaning there"):
            ask("logits")


@pytest.mark.parametrize("target", [torch.zeros(4), torch.zeros(4, 2)])
def test_targets_of_another_shape_are_refused(target):
    with pytest.raises(InputError, match="must have the same shape"):
        Gaussian(TARGETS).label_loss(draw(4, 6), batch_of(target))
