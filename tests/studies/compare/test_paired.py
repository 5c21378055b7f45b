"""What differences come to: intervals that hold the truth as often as they say, and verdicts that say no more."""

import csv
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from distill_lightning.pages import csv_text
from distill_lightning.studies.compare.intervals import interval_of
from distill_lightning.studies.compare.paired import Paired, legend, pair, paired_rows
from distill_lightning.studies.compare.task import Column

NLL = Column("nll", "NLL", mode="min")
ACCURACY = Column("test_accuracy", "test %", 100, 2)


def test_the_interval_of_one_set_is_that_of_a_t_test():
    values = [0.3, -0.1, 0.9, 0.4]
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval_of([values])
    assert (found.mean, found.low, found.high) == pytest.approx((sum(values) / 4, wanted.low, wanted.high))
    assert found.within == found.deviation == pytest.approx(statistics.stdev(values))
    assert math.isnan(found.between)


@pytest.mark.parametrize("sets", [[[1.0, 2.0, 4.0], [5.0, 7.0, 9.0], [2.0, 2.5, 3.0]], [[1.0, 2.0], [4.0, 8.0, 6.0]]])
def test_the_interval_of_several_sets_is_that_of_their_means(sets):
    means = [sum(values) / len(values) for values in sets]
    wanted = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    found = interval_of(sets)
    assert (found.mean, found.low, found.high) == pytest.approx((sum(means) / len(means), wanted.low, wanted.high))
    # An analysis of variance, step by step.
    squares, freedom = 0.0, 0
    for values, mean in zip(sets, means, strict=True):
        for value in values:
            squares += (value - mean) ** 2
        freedom += len(values) - 1
    within = squares / freedom
    spread = sum((mean - found.mean) ** 2 for mean in means) / (len(means) - 1)
    between = spread - within * sum(1 / len(values) for values in sets) / len(sets)
    assert found.within == pytest.approx(math.sqrt(within))
    assert found.between == pytest.approx(math.sqrt(max(between, 0)))
    assert found.deviation == pytest.approx(math.sqrt(max(between, 0) + within))


def test_what_too_few_values_tell_is_not_known():
    assert not interval_of([[1.0]]).is_known
    assert math.isnan(interval_of([[1.0]]).deviation)
    # One seed under each of two sets: an interval, and no way to say whose the variance is.
    found = interval_of([[1.0], [3.0]])
    assert found.is_known
    assert (found.mean, found.deviation) == pytest.approx((2, math.sqrt(2)))
    assert math.isnan(found.between)
    unknown = interval_of([[1.0, math.nan]])
    assert all(map(math.isnan, (unknown.mean, unknown.low, unknown.deviation)))
    assert not unknown.holds(0)


def test_sets_that_lie_no_further_apart_than_their_seeds_explain_have_no_variance_of_their_own():
    assert interval_of([[1.0, 3.0], [1.5, 2.5]]).between == 0


@pytest.mark.parametrize(
    ("sets", "seeds", "between", "within"), [(1, 3, 0.0, 1.0), (3, 5, 0.0, 1.0), (3, 5, 1.0, 0.5), (4, 2, 2.0, 0.1)]
)
def test_95_of_100_intervals_hold_the_truth(sets, seeds, between, within):
    generator = np.random.default_rng(0)
    draws = 4000
    values = generator.normal(0.7, between, (draws, sets, 1)) + generator.normal(0, within, (draws, sets, seeds))
    found = [interval_of(draw) for draw in values.tolist()]
    held = sum(each.holds(0.7) for each in found)
    # Three standard deviations of a binomial distribution.
    assert abs(held - 0.95 * draws) < 3 * math.sqrt(draws * 0.95 * 0.05)
    if sets > 1:
        variance = np.mean([each.within**2 for each in found])
        assert variance == pytest.approx(within**2, rel=0.05)
        assert np.mean([each.between**2 for each in found]) == pytest.approx(between**2, rel=0.1, abs=0.15 * within**2)


def test_the_seeds_of_one_set_are_no_independent_draws():
    """What an interval over the seeds of one set of teachers promises, where teachers matter, does not hold."""
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, (1000, 1)) + generator.normal(0, 1, (1000, 5))
    assert sum(interval_of([draw]).holds(0) for draw in values.tolist()) < 850


def paired(*sets, column=NLL):
    return Paired("row", column, sets)


def test_a_cell_says_what_is_known():
    # Of four values with a standard error of 1, 97.5 % of Student's t is 3.182.
    spread = (-math.sqrt(3), -math.sqrt(3), math.sqrt(3), math.sqrt(3))
    assert paired(tuple(-3.1 + each for each in spread)).cell() == "≈ -3.100 [-6.282, +0.082]"
    assert paired(tuple(-3.2 + each for each in spread)).cell() == "-3.200 [-6.382, -0.018]"
    # What is equal to the baseline is not told apart from it; what is better by the same with every seed, is.
    assert paired((0.0, 0.0)).cell() == "≈ +0.000 [+0.000, +0.000]"
    assert paired((-0.5, -0.5)).cell() == "-0.500 [-0.500, -0.500]"
    unknown = paired((0.1, math.nan))
    assert unknown.cell() == "-"
    (line,) = csv.DictReader(csv_text([unknown.line()]).splitlines())
    assert (line["pairs"], line["better"], line["within_noise"]) == ("2", "", "")


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (paired((0.007, 0.008, 0.009), column=ACCURACY), "better than alone by 0.80 [0.55, 1.05]"),
        (paired((-0.007, -0.008, -0.009), column=ACCURACY), "worse than alone by 0.80 [0.55, 1.05]"),
        (paired((-0.07, -0.08, -0.09)), "better than alone by 0.080 [0.055, 0.105]"),
        (paired((0.07, 0.08, 0.09)), "worse than alone by 0.080 [0.055, 0.105]"),
        (paired((0.07, -0.08, 0.01)), "not told apart from alone: +0.000 [-0.188, +0.188]"),
        (
            paired((0.01, 0.02), (0.04, 0.05), column=ACCURACY),
            "not told apart from alone: +3.00 [-16.06, +22.06]; of that, sd 2.06 between sets of teachers, "
            "0.71 between seeds",
        ),
        (paired((0.1, math.nan, 0.1)), "cannot be compared with alone: 1 of 3 pairs has no scores"),
    ],
)
def test_a_verdict_says_no_more_than_the_interval(difference, verdict):
    assert difference.verdict() == verdict


def test_rows_are_paired_by_set_and_seed_with_the_row_that_is_asked_for():
    values = {
        name: {(s, seed): {"nll": base + s + seed * shift, "test_accuracy": 0.5} for s in (1, 2) for seed in (7, 8, 9)}
        for name, base, shift in (("alone", 1.0, 0.5), ("kd", 0.0, 0.5), ("feed", 0.0, 0.25))
    }
    rows = pair(values, [NLL, ACCURACY], "kd")
    assert [row[0].method for row in rows] == ["alone", "feed"]
    assert [each.differences for each in rows[0]] == [((1.0,) * 3,) * 2, ((0.0,) * 3,) * 2]
    assert rows[1][0].differences == ((-1.75, -2.0, -2.25),) * 2
    assert (rows[1][0].pairs, rows[1][0].better, rows[0][0].better) == (6, 6, 0)
    header, _, feed = paired_rows(rows, [NLL])
    assert header == ["minus kd, 2 sets of teachers, 3 seeds each", "NLL"]
    # The sets agree to the last digit: there is no variance between them, and that within them is not asked.
    assert feed == ["feed", "-2.000 [-2.000, -2.000]"]
    assert "the 2 sets' means with 1 degree of freedom" in " ".join(legend(rows).split())
    one_set = {name: {key: line for key, line in own.items() if key[0] == 1} for name, own in values.items()}
    assert "the differences with 2 degrees of freedom" in " ".join(legend(pair(one_set, [NLL], "alone")).split())
    single = {name: {(1, 7): line[1, 7]} for name, line in values.items()}
    assert pair(single, [NLL], "alone") == []
