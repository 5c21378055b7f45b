"""Numbers in tables: so many decimals, and what has diverged in scientific notation."""

import statistics

import pytest

from distill_lightning.compression.report.cells import spread
from distill_lightning.pages import fixed
from distill_lightning.studies.compare.report import _spread as _of_sets
from distill_lightning.studies.compare.task import Column


@pytest.mark.parametrize("value", [0.0, 0.0004, 1.0005, -3.25, 999999.0, -12345.678])
@pytest.mark.parametrize("digits", [0, 2, 3])
def test_ordinary_numbers_have_their_decimals(value, digits):
    assert float(fixed(value, digits)) == pytest.approx(value, abs=0.5001 * 10**-digits)
    assert len(fixed(value, digits).partition(".")[2]) == digits
    # Zero has no sign.
    assert fixed(-(10**-9), digits) == f"{0:.{digits}f}"


@pytest.mark.parametrize("value", [1e6, 603652620288.0, -2.5e9])
def test_what_has_diverged_is_short_and_keeps_three_digits(value):
    assert len(fixed(value, 3)) <= 9
    assert float(fixed(value, 3)) == pytest.approx(value, rel=5e-3)


def test_signs():
    assert (fixed(1.5, 1, sign="+"), fixed(-1.5, 1, sign="+"), fixed(2e7, 1, sign="+")) == ("+1.5", "-1.5", "+2.00e+07")


def test_tables_of_both_studies_write_them_so():
    values = [603652620288.0, 703652620288.0]
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    expected = f"{mean:.2e} ± {deviation:.2e}"
    assert _of_sets(Column("nll", "NLL"), [values]) == expected
    assert spread(values, 1, seeds=1) == expected
    assert _of_sets(Column("accuracy", "test %", 100, 2), [[0.5, 0.75]]) == "62.50 ± 17.68"
    assert spread([0.5, 0.75], 100, seeds=1) == "62.50 ± 17.68"
