import time

import pytest

from moebius_bench.measure.power import Watch, energy


def test_energy_is_the_integral_between_two_moments():
    samples = [(0.0, 10.0), (1.0, 20.0), (3.0, 20.0), (4.0, 0.0)]
    assert energy(samples, 0.0, 4.0) == pytest.approx(15 + 40 + 10)
    assert energy(samples, 0.5, 1.0) == pytest.approx((15 + 20) / 2 * 0.5)
    assert energy(samples, 1.5, 1.6) == pytest.approx(2.0)  # between two samples
    assert energy(samples, 3.5, 4.0) == pytest.approx(10 * 0.5 / 2)


def test_energy_is_not_extrapolated():
    samples = [(1.0, 10.0), (2.0, 10.0)]
    assert energy(samples, 0.9, 1.5) is None
    assert energy(samples, 1.5, 2.1) is None
    assert energy(samples[:1], 1.0, 1.0) is None
    assert energy([], 0.0, 1.0) is None


def test_a_watch_reads_until_its_block_ends():
    with Watch(lambda: 5.0, period=0.01) as watch:
        time.sleep(0.1)
    count = len(watch.samples)
    assert count >= 3
    times = [moment for moment, _ in watch.samples]
    assert times == sorted(times)
    time.sleep(0.05)
    assert len(watch.samples) == count


def test_a_watch_without_sensors_has_nothing():
    with Watch(None) as watch:
        pass
    assert (watch.samples, watch.peak) == ([], None)
