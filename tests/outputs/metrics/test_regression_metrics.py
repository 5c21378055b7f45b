"""The metrics of Gaussian outputs against plain loops over several batches."""

import math
import statistics

import pytest
import torch
from torchmetrics import MetricCollection

from distill_lightning import InputError
from distill_lightning.functional import gaussian_kl, interval_calibration
from distill_lightning.outputs.metrics import (
    AngularError,
    GaussianDivergence,
    GaussianMeanAbsoluteError,
    GaussianNegativeLogLikelihood,
    GaussianRootMeanSquaredError,
    IntervalCalibration,
    regression_metrics,
)

SIZES = [[1], [5], [4, 4, 4], [7, 1, 3]]


def batches(sizes, targets=2, seed=0):
    """Some batches of means and log-variances, and of targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 2 * targets, generator=generator), torch.randn(size, targets, generator=generator))
        for size in sizes
    ]


def value_of(metric, pairs):
    for pair in pairs:
        metric.update(*pair)
    return metric.compute()


def rows_of(pairs):
    """Every target of every sample: sample, mean, log-variance, target."""
    found = []
    for output, target in pairs:
        d = target.shape[1]
        for row, values in zip(output.tolist(), target.tolist(), strict=True):
            found += [list(zip(row[:d], row[d:], values, strict=True))]
    return found


def naive(pairs):
    rows = rows_of(pairs)
    errors = [y - m for row in rows for m, _, y in row]
    nll = [sum(0.5 * (s + (y - m) ** 2 / math.exp(s) + math.log(2 * math.pi)) for m, s, y in row) for row in rows]
    off = []
    for level in (k / 10 for k in range(1, 10)):
        z = statistics.NormalDist().inv_cdf((1 + level) / 2)
        inside = [abs(y - m) / math.exp(s / 2) <= z for row in rows for m, s, y in row]
        off.append(abs(sum(inside) / len(inside) - level))
    return {
        "mae": statistics.fmean(abs(error) for error in errors),
        "rmse": math.sqrt(statistics.fmean(error**2 for error in errors)),
        "nll": statistics.fmean(nll),
        "calibration_error": statistics.fmean(off),
    }


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("targets", [1, 2, 5])
def test_the_metrics_of_a_regression_are_the_loops(sizes, targets):
    pairs = batches(sizes, targets)
    metrics = regression_metrics(targets)
    assert isinstance(metrics, MetricCollection)
    values = {name: value.item() for name, value in value_of(metrics, pairs).items()}
    assert values == pytest.approx(naive(pairs), rel=1e-5)


def test_the_likelihood_is_that_of_torchs_normal():
    output, target = batches([50], 3)[0]
    normal = torch.distributions.Normal(output[:, :3], torch.exp(output[:, 3:] / 2))
    expected = -normal.log_prob(target).sum(dim=1).mean().item()
    assert value_of(regression_metrics(3), [(output, target)])["nll"].item() == pytest.approx(expected, rel=1e-5)


def test_a_standard_normal_at_its_mean_costs_the_constant():
    values = value_of(regression_metrics(2), [(torch.zeros(1, 4), torch.zeros(1, 2))])
    assert values["nll"].item() == pytest.approx(math.log(2 * math.pi), rel=1e-6)
    assert values["mae"].item() == values["rmse"].item() == 0
    assert values["calibration_error"].item() == pytest.approx(0.5)


def test_the_metrics_do_not_see_how_samples_are_batched():
    output, target = batches([60])[0]
    whole = value_of(regression_metrics(2), [(output, target)])
    split = value_of(regression_metrics(2), zip(output.split(7), target.split(7), strict=True))
    for name, value in whole.items():
        assert split[name].item() == pytest.approx(value.item(), rel=1e-5), name
    expected = interval_calibration(output[:, :2], output[:, 2:], target).item()
    assert whole["calibration_error"].item() == pytest.approx(expected)


def test_errors_do_not_see_the_variances_and_calibration_does():
    output, target = batches([80])[0]
    wider = output + torch.tensor([0.0, 0.0, 3.0, 3.0])
    one, other = (value_of(regression_metrics(2), [(given, target)]) for given in (output, wider))
    assert one["mae"] == other["mae"]
    assert one["rmse"] == other["rmse"]
    assert other["calibration_error"] > one["calibration_error"] + 0.05


def test_log_variances_are_never_clamped():
    for log_var in (-50.0, -20.0, 20.0, 50.0):
        output = torch.tensor([[0.0, log_var]])
        value = value_of(regression_metrics(1), [(output, torch.tensor([[2.0]]))])["nll"].item()
        expected = 0.5 * (log_var + 4 * math.exp(-log_var) + math.log(2 * math.pi))
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_read_in_float32(dtype):
    pairs = [(1000 + output.to(dtype), target + 1000) for output, target in batches([9, 4])]
    pairs = [(torch.cat([output[:, :2], output[:, 2:] - 1000], dim=1), target) for output, target in pairs]
    values = value_of(regression_metrics(2), pairs)
    assert all(value.dtype == torch.float32 for value in values.values())
    found = {name: value.item() for name, value in values.items()}
    assert found == pytest.approx(naive(pairs), rel=1e-4)


def divergence_pairs(sizes):
    return [(output, torch.cat([target, target.roll(1, 0)], dim=1)) for output, target in batches(sizes)]


def gaze_pairs(sizes):
    return [(output[:, :2], target) for output, target in batches(sizes)]


EVERY = [
    (lambda: GaussianMeanAbsoluteError(num_targets=2), batches),
    (lambda: GaussianRootMeanSquaredError(num_targets=2), batches),
    (lambda: GaussianNegativeLogLikelihood(num_targets=2), batches),
    (lambda: IntervalCalibration(num_targets=2), batches),
    (GaussianDivergence, divergence_pairs),
    (AngularError, gaze_pairs),
]


@pytest.mark.parametrize(("metric", "pairs_of"), EVERY)
def test_a_batch_without_samples_changes_nothing(metric, pairs_of):
    pairs = pairs_of([6, 3])
    none = tuple(part[:0] for part in pairs[0])
    expected = value_of(metric(), pairs).item()
    assert value_of(metric(), [none, pairs[0], none, pairs[1], none]).item() == expected
    assert value_of(metric(), [none]).isnan()


@pytest.mark.parametrize(("metric", "pairs_of"), EVERY)
def test_states_of_two_processes_add_up_and_reset_forgets(metric, pairs_of):
    pairs = pairs_of([6, 3])
    first, second, merged = metric(), metric(), metric()
    first.update(*pairs[0])
    second.update(*pairs[1])
    for name, reduction in merged._reductions.items():
        assert getattr(first, name).dtype in (torch.float32, torch.long)
        setattr(merged, name, reduction(torch.stack([getattr(first, name), getattr(second, name)])))
    merged._update_count = 1
    both = value_of(metric(), pairs).item()
    assert merged.compute().item() == pytest.approx(both, rel=1e-6)
    first.reset()
    assert value_of(first, pairs).item() == pytest.approx(both, rel=1e-6)
    assert metric().higher_is_better is False


@pytest.mark.parametrize(
    ("output", "target"), [((3, 2), (3,)), ((3, 2), (3, 2)), ((3, 4), (3, 2)), ((3, 2), (4, 1)), ((3, 1), (3, 1))]
)
def test_what_does_not_fit_is_refused(output, target):
    message = "num_targets=1 needs outputs \\(N, 2\\), means and log-variances, and targets \\(N, 1\\); got "
    for metric in regression_metrics(1).values():
        with pytest.raises(InputError, match=message):
            metric.update(torch.zeros(output), torch.zeros(target))


def test_a_regression_of_nothing_is_refused():
    with pytest.raises(InputError, match="num_targets must be at least 1, got 0"):
        regression_metrics(0)


# GaussianDivergence


@pytest.mark.parametrize("sizes", SIZES)
def test_the_divergence_is_torchs(sizes):
    pairs = divergence_pairs(sizes)
    student, teacher = (torch.cat(parts) for parts in zip(*pairs, strict=True))

    def normal(output):
        return torch.distributions.Normal(output[:, :2], torch.exp(output[:, 2:] / 2))

    expected = torch.distributions.kl_divergence(normal(teacher), normal(student)).sum(dim=1).mean().item()
    value = value_of(GaussianDivergence(), pairs).item()
    assert value == pytest.approx(expected, rel=1e-4)
    by_the_formula = gaussian_kl(*teacher.chunk(2, dim=1), *student.chunk(2, dim=1)).item()
    assert value == pytest.approx(by_the_formula, rel=1e-5)
    if sizes != [1]:
        swapped = value_of(GaussianDivergence(), [(teacher, student) for student, teacher in pairs]).item()
        assert value != pytest.approx(swapped, rel=1e-3)


def test_the_divergence_from_oneself_is_zero_and_log_variances_are_not_clamped():
    output = batches([20])[0][0]
    assert value_of(GaussianDivergence(), [(output, output)]).item() == 0
    student, teacher = torch.tensor([[0.0, -20.0]]), torch.tensor([[1.0, -20.0]])
    assert value_of(GaussianDivergence(), [(student, teacher)]).item() == pytest.approx(math.exp(20) / 2, rel=1e-5)


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(InputError, match="a Gaussian's parameters are"):
        GaussianDivergence().update(torch.zeros(2, 3), torch.zeros(2, 3))


# AngularError


def naive_angle(one, other):
    first, second = ((-math.cos(p) * math.sin(y), -math.sin(p), -math.cos(p) * math.cos(y)) for p, y in (one, other))
    return math.acos(max(-1.0, min(1.0, sum(a * b for a, b in zip(first, second, strict=True)))))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("columns", [2, 4])
def test_the_angular_error_is_the_loop(sizes, columns):
    pairs = [(output[:, :columns], target) for output, target in batches(sizes)]
    angles = [
        naive_angle(row[:2], values)
        for output, target in pairs
        for row, values in zip(output.tolist(), target.tolist(), strict=True)
    ]
    expected = statistics.fmean(angles)
    assert value_of(AngularError(unit="radians"), pairs).item() == pytest.approx(expected, rel=1e-4)
    assert value_of(AngularError(), pairs).item() == pytest.approx(math.degrees(expected), rel=1e-4)


def test_angles_of_equal_and_orthogonal_directions():
    gaze = 3 * torch.rand(20_000, 2) - 1.5
    assert value_of(AngularError(), [(gaze, gaze)]).item() == pytest.approx(0, abs=1e-4)
    across = [(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.pi / 2]]))]
    assert value_of(AngularError(), across).item() == pytest.approx(90, abs=1e-4)


def test_the_angular_error_is_symmetric():
    first, second = (torch.randn(30, 2) for _ in range(2))
    value = value_of(AngularError(), [(first, second)]).item()
    assert value_of(AngularError(), [(second, first)]).item() == pytest.approx(value, rel=1e-6)


def test_wrong_shapes_and_units_are_refused():
    with pytest.raises(InputError, match="needs predictions \\(N, 2\\), pitch and yaw, or \\(N, 4\\)"):
        AngularError().update(torch.zeros(3, 3), torch.zeros(3, 2))
    with pytest.raises(InputError, match="pitch and yaw in radians; got"):
        AngularError().update(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(InputError, match="unit must be 'degrees' or 'radians', got 'grad'"):
        AngularError(unit="grad")
