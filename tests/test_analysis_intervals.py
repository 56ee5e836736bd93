"""Means over seeds and their intervals."""

import numpy as np
import pytest
import scipy.stats

from analysis.intervals import geometric_interval, interval, iqm


def test_intervals_of_curves_are_scipys_at_every_point():
    values = np.random.default_rng(0).normal(size=(5, 4))
    mean, low, high = interval(values)
    for i in range(4):
        expected = scipy.stats.ttest_1samp(values[:, i], 0).confidence_interval(0.95)
        assert (mean[i], low[i], high[i]) == pytest.approx((values[:, i].mean(), *expected))
    centre, low, high = interval(values, "iqm")
    np.testing.assert_allclose(centre, np.sort(values, axis=0)[1:4].mean(axis=0))
    assert (low < centre).all() and (centre < high).all() and (low >= values.min(axis=0)).all()


def test_a_geometric_interval_is_that_of_the_logs_and_never_reaches_0():
    values = np.array([[0.05, 1.0], [0.1, 2.0], [0.9, 4.0]])
    centre, low, high = geometric_interval(np.log(values))
    np.testing.assert_allclose(centre, scipy.stats.gmean(values))
    for i in range(2):
        expected = scipy.stats.ttest_1samp(np.log(values[:, i]), 0).confidence_interval(0.95)
        assert np.log((low[i], high[i])) == pytest.approx([*expected])
    assert (low > 0).all() and interval(values)[1, 0] < 0
    assert np.isnan(geometric_interval(np.log(values[:2]))[1:]).all(), "as all intervals, from three seeds on"


def test_bootstrap_intervals_cover_95_percent_of_resampled_interquartile_means_and_are_always_the_same():
    values = 3.0 ** np.arange(8)[:, None]  # skewed, so that kinds of bootstrap differ
    _, (low,), (high,) = interval(values, "iqm")
    rows = np.random.default_rng(2).integers(8, size=(20_000, 8))
    resampled = np.sort(values[rows, 0], axis=1)[:, 2:6].mean(axis=1)
    assert 0.94 < np.mean((resampled >= low) & (resampled <= high)) < 0.96
    for bound, share in ((low, 0.025), (high, 0.975)):
        assert np.mean(resampled < bound) == pytest.approx(share, abs=0.005)
    assert np.array_equal(interval(values, "iqm"), interval(values, "iqm"))


def test_an_interquartile_mean_cuts_a_quarter_rounded_down_off_both_ends():
    assert iqm(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    assert iqm(np.array([0.0, 1.0, 100.0])) == pytest.approx(101 / 3)


@pytest.mark.parametrize("aggregate", ["mean", "iqm"])
def test_there_is_no_interval_below_three_seeds_or_without_points(aggregate):
    values = np.random.default_rng(0).normal(size=(3, 4))
    assert np.isnan(interval(values[:2], aggregate)[1:]).all()
    assert np.isfinite(interval(values, aggregate)).all()
    np.testing.assert_allclose(interval(values[:2], aggregate)[0], values[:2].mean(axis=0))
    equal = interval(np.column_stack((np.full(3, 0.1), np.zeros(3), values[:, 0])), aggregate)
    assert np.isnan(equal[1:, :2]).all() and np.isfinite(equal[1:, 2]).all(), "where all agree there is none"
    assert interval(values[:, :0], aggregate).shape == (3, 0)
