"""Statistics against numbers worked out by hand."""

import pytest

from moebius_bench.measure.stats import drift, median, percentile, ratio, step_stats, summary


def test_percentiles_lie_between_two_values():
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 0.5) == 2.5
    assert percentile(values, 0.9) == pytest.approx(3.7)  # position 2.7 of 0..3
    assert percentile(values, 1) == 4
    assert percentile([7.0], 0.99) == 7
    assert median([3.0, 1.0, 2.0]) == 2
    with pytest.raises(ValueError):
        percentile([], 0.5)


def test_percentiles_agree_with_numpy():
    np = pytest.importorskip("numpy")
    values = np.random.default_rng(0).exponential(size=101).tolist()
    for share in (0.1, 0.5, 0.9, 0.99):
        assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), rel=1e-12)


def test_summary():
    found = summary([2.0, 8.0, 4.0])
    assert (found.median, found.min, found.max, found.count) == (4, 2, 8, 3)


def test_step_stats_pool_the_pictures():
    found = step_stats([[1.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 4.0]])
    assert (found.min, found.max, found.count) == (1, 4, 8)
    assert found.mean == 2
    assert found.p50 == 2
    assert found.p90 == pytest.approx(3.3)  # sorted 1 1 1 2 2 2 3 4, position 6.3
    assert found.drift == 2.5  # 3 / 1 and 4 / 2


def test_drift_is_the_last_quarter_over_the_first():
    steps = [1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 1.5, 1.5]
    assert drift([steps]) == 1.5
    assert drift([[1.0, 2.0, 3.0]]) is None  # no quarter of three steps
    assert drift([[1.0] * 7 + [2.0]]) == 1.5  # quarters of two: 1.5 / 1


def test_ratios_are_taken_round_by_round():
    """The machine slows down threefold in the second round; the ratio of neighbours does not notice."""
    found = ratio("slow", "fast", "step", [2.0, 6.0, 2.2], [1.0, 3.0, 1.0])
    assert found.rounds == [2.0, 2.0, pytest.approx(2.2)]
    assert (found.median, found.min, found.max) == (2.0, 2.0, pytest.approx(2.2))
    assert (found.above, found.below) == ("slow", "fast")
