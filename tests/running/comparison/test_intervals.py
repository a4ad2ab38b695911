"""Means, errors and paired intervals against scipy."""

import math

import pytest
from scipy import stats

from nso_hf.running.comparison.intervals import mean_and_error, paired_difference

VALUES = {0: 0.912, 1: 0.897, 2: 0.931, 3: 0.905, 4: 0.921}
BASELINE = {0: 0.901, 1: 0.893, 2: 0.911, 3: 0.908, 4: 0.899}


def test_the_interval_is_that_of_the_paired_t_test():
    found = paired_difference(VALUES, BASELINE)
    scipys = stats.ttest_rel(list(VALUES.values()), list(BASELINE.values()))
    low, high = scipys.confidence_interval(0.95)
    # Values of 1 with rounding 1e-16.
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12, abs=1e-15)
    assert found.count == 5 and found.is_shown == (scipys.pvalue < 0.05)


def test_the_quantile_is_that_of_the_table():
    """t(0.975) of 1 and of 4 degrees of freedom: 12.7062 and 2.7764."""
    two = paired_difference({0: 0.0, 1: 2.0}, {0: 0.0, 1: 0.0})  # 1 ± 12.7062 sqrt(2) / sqrt(2)
    assert two.high == pytest.approx(1 + 12.7062, abs=1e-4)
    five = paired_difference(dict(enumerate([-1.0, 0, 0, 0, 1])), dict.fromkeys(range(5), 0.0))
    assert five.high == pytest.approx(2.7764 * (0.5 / 5) ** 0.5, abs=1e-4)


def test_only_seeds_of_both_are_paired():
    part = {seed: value for seed, value in VALUES.items() if seed != 3}
    found = paired_difference(part, BASELINE)
    without = {seed: value for seed, value in BASELINE.items() if seed != 3}
    assert found == paired_difference(part, without) and found.count == 4
    assert paired_difference({9: 1.0}, BASELINE) is None


def test_one_pair_has_no_interval_and_equal_runs_no_difference():
    alone = paired_difference({0: 1.0}, BASELINE)
    assert alone.mean == pytest.approx(0.099, abs=1e-15)
    assert math.isnan(alone.low) and not alone.is_shown
    same = paired_difference(BASELINE, BASELINE)
    assert (same.low, same.high) == (0, 0) and not same.is_shown


def test_the_standard_error_is_scipys():
    mean, error = mean_and_error(list(VALUES.values()))
    assert mean == pytest.approx(0.9132, abs=1e-15)
    assert error == pytest.approx(stats.sem(list(VALUES.values())), rel=1e-12)
    assert math.isnan(mean_and_error([1.0])[1])
