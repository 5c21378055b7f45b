"""Risk and coverage, Brier's score and the calibration of intervals against plain loops, then what they must keep."""

import math
import statistics

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.functional import (
    area_under_risk_coverage,
    brier_score,
    calibration_bins,
    excess_area_under_risk_coverage,
    expected_calibration_error,
    interval_calibration,
    interval_error,
    interval_hits,
    risk_coverage,
)

SPEC = (torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64), torch.tensor([True, False, True, False]))


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def answers(samples, seed=0, right=0.7):
    """Distinct confidences, and answers that are right more often where the confidence is high."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(samples, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(samples, generator=generator, dtype=torch.float64) < right * (0.5 + confidence)


def naive_risks(confidence, correct):
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True), key=lambda pair: -pair[0])
    return [sum(not right for _, right in pairs[:k]) / k for k in range(1, len(pairs) + 1)]


def naive_best(correct):
    """The formula of the specification."""
    errors, samples = sum(not right for right in correct.tolist()), len(correct)
    return sum(j / (samples - errors + j) for j in range(1, errors + 1)) / samples


# Risk and coverage


@pytest.mark.parametrize("samples", [1, 2, 3, 17, 200])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 2.0])
def test_areas_are_the_loops(samples, right):
    confidence, correct = answers(samples, right=right)
    risks = naive_risks(confidence, correct)
    coverage, risk = risk_coverage(confidence, correct)
    assert coverage.tolist() == pytest.approx([k / samples for k in range(1, samples + 1)], rel=1e-6)
    assert risk.tolist() == pytest.approx(risks, rel=1e-6)
    area = sum(risks) / samples
    assert area_under_risk_coverage(confidence, correct).item() == pytest.approx(area, rel=1e-6)
    excess = excess_area_under_risk_coverage(confidence, correct).item()
    assert excess == pytest.approx(area - naive_best(correct), rel=1e-5, abs=1e-7)


def test_the_hand_values_of_the_specification():
    assert area_under_risk_coverage(*SPEC).item() == pytest.approx(0.33333, abs=1e-5)
    assert excess_area_under_risk_coverage(*SPEC).item() == pytest.approx(0.125, abs=1e-7)
    assert expected_calibration_error(*SPEC, bins=10).item() == pytest.approx(0.45, abs=1e-12)
    coverage, risk = risk_coverage(*SPEC)
    assert coverage.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert risk.tolist() == pytest.approx([0.0, 1 / 2, 1 / 3, 1 / 2])


@pytest.mark.parametrize("samples", [1, 5])
def test_all_right_costs_nothing_and_all_wrong_everything(samples):
    confidence, _ = answers(samples)
    right, wrong = torch.ones(samples, dtype=torch.bool), torch.zeros(samples, dtype=torch.bool)
    assert area_under_risk_coverage(confidence, right).item() == 0
    assert excess_area_under_risk_coverage(confidence, right).item() == 0
    assert area_under_risk_coverage(confidence, wrong).item() == 1
    assert excess_area_under_risk_coverage(confidence, wrong).item() == 0


def test_areas_do_not_see_the_order_of_distinct_confidences_nor_their_scale():
    confidence, correct = answers(50)
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    for area in (area_under_risk_coverage, excess_area_under_risk_coverage):
        value = area(confidence, correct).item()
        assert area(confidence[shuffled], correct[shuffled]).item() == value
        assert area(torch.log(confidence), correct).item() == value
        assert area(confidence, correct.float()).item() == value
        assert area(confidence, correct.long()).item() == value


def test_equal_confidences_keep_their_order():
    confidence = torch.full((1000,), 0.5)
    confidence[500:] = 0.75
    correct = answers(1000, seed=1)[1]
    expected = naive_risks(torch.arange(1000, 0, -1), torch.cat([correct[500:], correct[:500]]))
    assert risk_coverage(confidence, correct)[1].tolist() == pytest.approx(expected)


def test_only_the_best_order_has_no_excess_and_the_opposite_has_the_most():
    correct = answers(30)[1]
    confidence = correct * 10.0 + torch.arange(30) / 30
    assert excess_area_under_risk_coverage(confidence, correct).item() == 0
    every = [excess_area_under_risk_coverage(draw(30, seed=seed), correct).item() for seed in range(20)]
    assert 0 < min(every) < max(every) < excess_area_under_risk_coverage(-confidence, correct).item() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_confidences_are_ranked_as_they_are(dtype):
    confidence, correct = (torch.arange(64) / 64).to(dtype), answers(64)[1]
    value = area_under_risk_coverage(confidence, correct)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(statistics.fmean(naive_risks(confidence, correct)), rel=1e-6)


def test_many_samples_lose_no_digits():
    correct = torch.arange(300_001) % 3 != 0
    confidence = torch.arange(300_001, 0, -1)
    errors, total = 0, 0.0
    for k, right in enumerate(correct.tolist(), start=1):
        errors += not right
        total += errors / k
    assert area_under_risk_coverage(confidence, correct).item() == pytest.approx(total / 300_001, rel=1e-6)


def test_no_samples_give_nan():
    none, nothing = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert area_under_risk_coverage(none, nothing).isnan()
    assert excess_area_under_risk_coverage(none, nothing).isnan()
    assert [len(part) for part in risk_coverage(none, nothing)] == [0, 0]


@pytest.mark.parametrize(("confidence", "correct"), [((3,), (4,)), ((3, 1), (3, 1)), ((3,), (3, 1)), ((), ())])
def test_other_shapes_are_refused(confidence, correct):
    with pytest.raises(InputError, match="the same shape \\(N,\\), got"):
        risk_coverage(torch.zeros(confidence), torch.zeros(correct))


def test_a_confidence_of_1_is_in_the_last_bin():
    counts, _, _ = calibration_bins(torch.tensor([1.0, 0.95]), torch.tensor([True, False]), bins=10)
    assert counts.tolist() == [0.0] * 9 + [2.0]


# Brier's score


def naive_brier(logits, target):
    total = 0.0
    for row, label in zip(logits.double().tolist(), target.tolist(), strict=True):
        exponentials = [math.exp(value - max(row)) for value in row]
        for k, value in enumerate(exponentials):
            total += (value / sum(exponentials) - (k == label)) ** 2
    return total / len(target)


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (6, 2), (1, 7), (20, 10)])
def test_brier_is_the_loop(samples, classes):
    logits = 3 * draw(samples, classes)
    target = draw(samples, classes, seed=1).argmax(dim=1)
    assert brier_score(logits, target).item() == pytest.approx(naive_brier(logits, target), rel=1e-12)


def test_brier_of_hand_values():
    even = torch.zeros(1, 4)
    assert brier_score(even, torch.tensor([2])).item() == pytest.approx(0.75**2 + 3 * 0.25**2)
    sure = torch.tensor([[1e4, -1e4, 0.0]])
    assert brier_score(sure, torch.tensor([0])).item() == 0
    assert brier_score(sure, torch.tensor([1])).item() == 2


def test_brier_of_a_batch_is_the_mean_of_its_samples_and_does_not_see_a_shift():
    logits, target = draw(8, 5), torch.arange(8) % 5
    single = [brier_score(logits[i : i + 1], target[i : i + 1]).item() for i in range(8)]
    assert brier_score(logits, target).item() == pytest.approx(sum(single) / 8, rel=1e-12)
    assert brier_score(logits + draw(8, 1, seed=4), target).item() == pytest.approx(sum(single) / 8, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_brier_reads_half_precision_in_float32(dtype):
    logits, target = draw(30, 6, dtype=dtype), torch.arange(30) % 6
    value = brier_score(logits, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(naive_brier(logits, target), rel=1e-6)


# Calibration of intervals

LEVELS = [k / 10 for k in range(1, 10)]


def naive_interval_calibration(mean, log_var, target):
    shares = []
    for level in LEVELS:
        width = statistics.NormalDist().inv_cdf((1 + level) / 2)
        inside = [
            abs(y - m) <= width * math.exp(s / 2)
            for m, s, y in zip(
                mean.flatten().tolist(), log_var.flatten().tolist(), target.flatten().tolist(), strict=True
            )
        ]
        shares.append(sum(inside) / len(inside))
    return sum(abs(share - level) for share, level in zip(shares, LEVELS, strict=True)) / 9


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (40, 1), (25, 4)])
def test_interval_calibration_is_the_loop(shape):
    mean, log_var, target = draw(*shape), draw(*shape, seed=1), 1.5 * draw(*shape, seed=2)
    expected = naive_interval_calibration(mean, log_var, target)
    assert interval_calibration(mean, log_var, target).item() == pytest.approx(expected, abs=1e-7)


def test_targets_of_the_predicted_distribution_are_calibrated_and_others_are_not():
    mean, log_var = draw(20_000, 2), draw(20_000, 2, seed=1)
    noise = torch.exp(log_var / 2) * draw(20_000, 2, seed=2)
    # The standard error of a share is at most 0.5 / sqrt(40 000) = 0.0025.
    assert interval_calibration(mean, log_var, mean + noise).item() < 0.006
    wide, narrow = (interval_calibration(mean, log_var, mean + scale * noise).item() for scale in (0.5, 2.0))
    assert wide > 0.1
    assert narrow > 0.1


def test_the_worst_values_of_interval_calibration():
    zero = torch.zeros(6, 2)
    # Every target in every interval: the mean of 1 - p; none: the mean of p. Both are 0.5.
    assert interval_calibration(zero, zero, zero).item() == pytest.approx(0.5)
    assert interval_calibration(zero, zero, zero + 10).item() == pytest.approx(0.5)


def test_a_target_on_the_bound_is_inside():
    hits = interval_hits(torch.zeros(1, 1), torch.zeros(1, 1), math.sqrt(2) * torch.erfinv(torch.tensor([[0.5]])))
    assert hits.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_other_numbers_of_levels_are_evenly_spaced():
    mean, log_var, target = draw(30, 1), draw(30, 1, seed=1), draw(30, 1, seed=2)
    hits = interval_hits(mean, log_var, target, levels=1)
    inside = ((target - mean).abs() <= 0.6744897501960817 * torch.exp(log_var / 2)).sum()
    assert hits.tolist() == [inside.item()]
    expected = abs(inside.item() / 30 - 0.5)
    assert interval_calibration(mean, log_var, target, levels=1).item() == pytest.approx(expected)
    assert interval_error(hits, 30).item() == pytest.approx(expected, rel=1e-6)


def test_extreme_log_variances_count_as_they_are():
    zero = torch.zeros(2, 1)
    for log_var, hit, missed in ((1e4, 18, 18), (50.0, 18, 18), (-50.0, 18, 0), (-1e4, 18, 0)):
        given = torch.full((2, 1), log_var)
        assert interval_hits(zero, given, zero).sum() == hit
        assert interval_hits(zero, given, zero + 1e-3).sum() == missed


def test_half_precision_gaussians_are_compared_in_float32():
    # In float16, 2048 + 1 is 2048: the target would seem to be met.
    mean, target = torch.tensor([[2048.0]], dtype=torch.float16), torch.tensor([[2049.0]])
    assert interval_hits(mean, torch.full((1, 1), -4.0, dtype=torch.float16), target).sum() == 0


def test_no_targets_give_nan_and_other_shapes_are_refused():
    assert interval_calibration(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2)).isnan()
    with pytest.raises(InputError, match="must have the same shape"):
        interval_calibration(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3))
