"""Histograms that grow, and what each observer makes of them."""

import numpy as np
import pytest

from moebius_calibration.ranges.observers import BINS, Histogram, Seen, range_of


def seen_of(*parts):
    """One part per timestep."""
    seen = Seen()
    for step, values in enumerate(parts):
        array = np.asarray(values, np.float32)
        seen.histogram.add(array, float(np.abs(array).max()))
        seen.steps[step] = (float(array.min()), float(array.max()))
    return seen


def test_a_histogram_does_not_depend_on_the_order():
    parts = [np.random.RandomState(i).standard_normal(1000).astype(np.float32) * 10.0**i for i in range(4)]
    tables = []
    for order in (parts, parts[::-1]):
        histogram = Histogram()
        for part in order:
            histogram.add(part, float(np.abs(part).max()))
        tables.append(histogram)
    assert tables[0].reach == tables[1].reach
    assert (tables[0].counts == tables[1].counts).all()
    assert tables[0].counts.sum() == 4000
    assert len(tables[0].centres) == BINS


def test_zeros_alone():
    assert range_of(seen_of(np.zeros(10)), "minmax", True) == (0, 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "minmean", "percentile", "entropy", "mse"])
def test_ranges_lie_within_what_was_seen(observer, symmetric):
    values = np.random.RandomState(0).standard_normal(20_000) + 1
    low, high = range_of(seen_of(values), observer, symmetric)
    assert low < 0 < high
    if symmetric:
        assert low == -high
    assert max(-low, high) <= np.abs(values).max() + 1e-6
    assert high > 2


def test_min_mean_over_timesteps():
    assert range_of(seen_of([-1, 2], [-3, 8]), "minmean", False) == (-2, 5)
    assert range_of(seen_of([-1, 2], [-3, 8]), "minmax", False) == (-3, 8)


def test_an_outlier_is_cut_off():
    values = np.r_[np.random.RandomState(0).standard_normal(100_000), 1000]
    assert range_of(seen_of(values), "entropy", True)[1] < 600
    assert range_of(seen_of(values), "percentile", True)[1] < 6
    assert range_of(seen_of(values), "minmax", True)[1] == 1000


def test_mse_is_the_best_clip():
    values = np.random.RandomState(0).standard_t(3, 50_000).astype(np.float32)
    seen = seen_of(values)

    def error(observer):
        scale = range_of(seen, observer, True)[1] / 127
        return np.square(values - np.clip(np.round(values / scale), -127, 127) * scale).mean()

    assert error("mse") <= min(error(name) for name in ("minmax", "percentile", "entropy")) * 1.01


def test_zeros_of_a_relu_do_not_decide_the_entropy():
    values = np.maximum(np.random.RandomState(0).standard_normal(200_000), 0)
    assert range_of(seen_of(values), "entropy", True)[1] > 3
