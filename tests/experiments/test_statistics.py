"""The statistics against scipy's own, another way to compute them, and simulation."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from tinycnn.experiments.statistics import (
    UNKNOWN,
    Estimate,
    detectable_difference,
    error_of_difference,
    holm,
    pooled_std,
    t_test,
)


def test_students_t_test_of_two_samples_is_scipys():
    one, other = [86.0, 86.3, 86.1, 86.2], [86.4, 86.6]
    std = pooled_std([one, other])
    error = error_of_difference(std, len(one), std, len(other))
    assert std.dof == 4
    assert t_test(statistics.fmean(one) - statistics.fmean(other), error) == pytest.approx(stats.ttest_ind(one, other).pvalue)


def test_welchs_t_test_of_two_samples_is_scipys():
    one, other = [86.0, 86.3, 86.1, 86.2], [81.4, 84.6, 85.0]
    error = error_of_difference(pooled_std([one]), len(one), pooled_std([other]), len(other))
    expected = stats.ttest_ind(one, other, equal_var=False)
    assert error.dof == pytest.approx(expected.df)
    assert t_test(statistics.fmean(one) - statistics.fmean(other), error) == pytest.approx(expected.pvalue)


def test_the_pooled_std_is_that_within_the_samples():
    samples = [[86.0, 86.3, 86.1], [80.4, 80.6], [99.0]]
    within = [value - statistics.fmean(sample) for sample in samples for value in sample]
    assert pooled_std(samples) == (pytest.approx(math.sqrt(sum(value ** 2 for value in within) / 3)), 3)
    assert pooled_std([[99.0], []]) == UNKNOWN


def test_what_is_unknown_stays_unknown():
    known = Estimate(0.3, 4)
    for error in (error_of_difference(UNKNOWN, 2, UNKNOWN, 2), error_of_difference(known, 2, UNKNOWN, 1), Estimate(0.0, 3),
                  error_of_difference(Estimate(0.0, 2), 3, Estimate(0.0, 1), 2)):
        assert math.isnan(t_test(1.0, error))
        assert math.isnan(detectable_difference(error))


@pytest.mark.parametrize(("p_values", "corrected"), [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 0.04 by itself would stay 0.04, below a smaller p value's 0.06
    ([0.03, 0.01, 0.011, 0.6], [0.06, 0.04, 0.04, 0.6]),
    ([0.5, 0.9], [1.0, 1.0]),
    ([math.nan, 0.02, 0.03], [math.nan, 0.04, 0.04]),  # what can't be tested is no comparison
    ([], [])])
def test_holms_correction(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected, nan_ok=True)


def test_holms_correction_is_that_of_the_definition():
    """Holm's procedure, step by step, rejects those at or below the level and no others."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = list(rng.uniform(0, 0.1, 6) ** 1.5)
        rejected, order = set(), sorted(range(6), key=lambda place: p_values[place])
        for rank, place in enumerate(order):
            if p_values[place] > 0.05 / (6 - rank):
                break
            rejected.add(place)
        assert {place for place, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


@pytest.mark.parametrize(("seeds", "comparisons"), [(2, 1), (3, 1), (3, 8), (10, 4)])
def test_the_detectable_difference_is_detected_with_the_power_it_promises(seeds, comparisons):
    """By simulation: two samples of normal values whose means lie so far apart."""
    dof = 2 * (seeds - 1)
    difference = detectable_difference(Estimate(math.sqrt(2 / seeds), dof), comparisons)
    rng = np.random.default_rng(1)
    one, other = rng.normal(0, 1, (20_000, seeds)), rng.normal(difference, 1, (20_000, seeds))
    p_values = stats.ttest_ind(one, other, axis=1).pvalue
    # The error is not known to the test, so the share is that over all errors it may estimate
    assert np.mean(p_values <= 0.05 / comparisons) == pytest.approx(0.8, abs=0.015)
