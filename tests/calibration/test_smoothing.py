"""SmoothQuant's ranges: those of the divided activation, each end by itself."""

import numpy as np
import pytest

from moebius_calibration.observers import range_of
from moebius_calibration.products import Operand, Product
from moebius_calibration.scheme import scheme_of, with_smoothing
from moebius_calibration.statistics import Statistics

CHANNELS = 8
OFFSETS = {
    "both signs": 0.0,
    "mostly below 0": -2.0,
    "mostly above 0": 2.0,
    "all below 0": -1e3,
    "all above 0": 1e3,
}


LINEAR = Product(
    "linear",
    "MatMul",
    (Operand(0, "x", False, "x", 1), Operand(1, "w", True, "w", 1)),
    gmac=0.0,
    elements=0,
    weights=0,
)


def seen(values, runs=3):
    """Statistics of an activation [rows, channels] over some runs, as `observe.observed` gives them."""
    statistics = Statistics()
    for step, part in enumerate(np.array_split(values, runs)):
        statistics.add(
            step,
            {
                "range:x": np.array([part.min(), part.max(), np.square(part).mean()]),
                "sample:x": part.ravel(),
                "channels:x": np.stack([part.min(axis=0), part.max(axis=0), part.mean(axis=0)]),
            },
        )
    return statistics


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", OFFSETS)
def test_each_end_is_that_of_the_divided_activation(case, symmetric, alpha):
    """The channels with the lowest and the highest value have different factors: one ratio would be wrong for one."""
    rng = np.random.RandomState(len(case))
    spread = rng.uniform(0.1, 8, CHANNELS)
    values = (rng.standard_normal((60, CHANNELS)) * spread + OFFSETS[case] * rng.uniform(0.5, 1, CHANNELS)).astype(
        np.float32
    )
    weight = (rng.standard_normal((CHANNELS, 5)) * rng.uniform(0.1, 4, (CHANNELS, 1))).astype(np.float32)
    statistics = seen(values)
    products, weights = {"linear": LINEAR}, {"w": weight}
    plain = scheme_of(statistics, products, "minmax", symmetric=symmetric)
    smooth = with_smoothing(plain, statistics, products, weights, alpha)
    divided = values / smooth.smooth["x"]
    low, high = min(float(divided.min()), 0.0), max(float(divided.max()), 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    assert smooth.ranges["x"] == pytest.approx((low, high), rel=1e-5)
    assert np.ptp(smooth.smooth["x"]) > 0.5  # else the case proves nothing


def test_a_clipped_range_stays_clipped_by_the_same_share():
    rng = np.random.RandomState(0)
    values = rng.standard_normal((50_000, CHANNELS)).astype(np.float32)
    values[:, 0] *= 4
    statistics = seen(values)
    products, weights = {"linear": LINEAR}, {"w": rng.standard_normal((CHANNELS, 5)).astype(np.float32)}
    plain = scheme_of(statistics, products, "percentile", symmetric=False)
    whole = range_of(statistics.seen["x"], "minmax", False)
    assert plain.ranges["x"][0] > whole[0]
    smooth = with_smoothing(plain, statistics, products, weights, 0.5)
    divided = values / smooth.smooth["x"]
    shares = (plain.ranges["x"][0] / whole[0], plain.ranges["x"][1] / whole[1])
    expected = (float(divided.min()) * shares[0], float(divided.max()) * shares[1])
    assert smooth.ranges["x"] == pytest.approx(expected, rel=1e-5)
