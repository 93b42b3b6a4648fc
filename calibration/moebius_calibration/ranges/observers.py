"""Observers: the range that an activation is quantized in, from its statistics.

`onnxruntime.quantization.calibrate` does not serve here. Its collectors keep whole activations in memory and rescale
histograms, so their result depends on how runs are grouped and a stopped calibration could not resume to the same plan.
It has no search for the least square error, and its entropy counts the exact zeros of a ReLU, which outweigh the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moebius_calibration.plan import Observer

Counts = npt.NDArray[np.int64]

BINS = 2048
"""Number of bins of a histogram, half of them below 0."""

PERCENTILE = 99.99
_LEVELS = 128  # of the magnitude of a signed byte
_RARE = 1e-9
_CLIPS = np.geomspace(0.1, 1.0, 64)  # shares of the whole range that are tried for the least square error


@dataclass
class Histogram:
    """Counts of values in `BINS` equal bins over [-reach, reach]. `reach` is a power of two and grows when it must.

    To grow, adjacent bins are merged in pairs, so counts stay exact and do not depend on how the values were grouped.
    """

    reach: float = 0.0
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: npt.NDArray[np.float32], largest: float) -> None:
        """Counts finite values whose magnitude is at most `largest`."""
        need = 2.0 ** np.ceil(np.log2(largest)) if largest > 0 else 0.0
        if need == 0.0 and self.reach == 0.0:
            need = 2.0**-126
        if self.reach == 0.0:
            self.reach = float(need)
        while self.reach < need:
            self._double()
        indices = np.floor(values.astype(np.float64) * (BINS / (2 * self.reach))).astype(np.int64) + BINS // 2
        self.counts += np.bincount(np.clip(indices, 0, BINS - 1), minlength=BINS)

    def _double(self) -> None:
        grown = np.zeros_like(self.counts)
        quarter = BINS // 4
        grown[quarter : BINS - quarter] = self.counts.reshape(-1, 2).sum(axis=1)
        self.reach, self.counts = 2 * self.reach, grown

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The centre of each bin."""
        return np.asarray((np.arange(BINS) - BINS // 2 + 0.5) * (2 * self.reach / BINS), np.float64)


@dataclass
class Seen:
    """Statistics of one activation; `steps` has the lowest and highest value at each timestep."""

    histogram: Histogram = field(default_factory=Histogram)
    steps: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def low(self) -> float:
        """The lowest value over all timesteps."""
        return min(low for low, _ in self.steps.values())

    @property
    def high(self) -> float:
        """The highest value over all timesteps."""
        return max(high for _, high in self.steps.values())


def range_of(seen: Seen, observer: Observer, symmetric: bool) -> tuple[float, float]:
    """The range of an activation, within its observed values.

    Args:
        seen: with at least one run.
        observer: `minmax`: all observed values. `minmean`: the mean over timesteps of each one's lowest and highest
            value. `percentile`: 99.99 % of the values. `entropy`: the clip whose quantized distribution has the least
            Kullback-Leibler divergence, as in TensorRT's calibrator. `mse`: the clip of least mean square error.
        symmetric: around 0, as TensorRT requires; else the ends are independent where the observer allows it.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if observer == "minmax":
        found = low, high
    elif observer == "minmean":
        ends = np.array(list(seen.steps.values()), np.float64).mean(axis=0)
        found = min(float(ends[0]), 0.0), max(float(ends[1]), 0.0)
    elif observer == "percentile":
        found = _percentile(seen.histogram, symmetric)
    else:
        clip = _entropy_clip(seen.histogram) if observer == "entropy" else None
        found = _mse_range(seen.histogram, low, high, symmetric) if clip is None else (-clip, clip)
    found = max(found[0], low), min(found[1], high)
    if not symmetric:
        return found
    largest = max(-found[0], found[1])
    return -largest, largest


def _percentile(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    counts = _folded(histogram) if symmetric else histogram.counts
    total = np.cumsum(counts)
    outside = (100 - PERCENTILE) / 100 * total[-1]
    width = 2 * histogram.reach / BINS
    if symmetric:
        largest = (int(np.searchsorted(total, total[-1] - outside)) + 1) * width
        return -largest, largest
    first = int(np.searchsorted(total, outside / 2, side="right"))
    last = int(np.searchsorted(total, total[-1] - outside / 2)) + 1
    return min(first * width - histogram.reach, 0.0), max(last * width - histogram.reach, 0.0)


def _folded(histogram: Histogram) -> Counts:
    """Counts of magnitudes, from 0 up."""
    half = BINS // 2
    return histogram.counts[half:] + histogram.counts[:half][::-1]


def _mse_range(histogram: Histogram, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    values, counts = histogram.centres, histogram.counts
    best, found = np.inf, (low, high)
    for share in _CLIPS:
        if symmetric:
            largest = share * max(-low, high)
            ends, levels = (-largest, largest), 254
        else:
            ends, levels = (share * low, share * high), 255
        step = (ends[1] - ends[0]) / levels
        if step <= 0:
            continue
        quantized = np.round(np.clip(values, *ends) / step) * step
        error = float((counts * np.square(values - quantized)).sum())
        if error < best:
            best, found = error, (float(ends[0]), float(ends[1]))
    return found


def _entropy_clip(histogram: Histogram) -> float:
    counts = _folded(histogram).astype(np.float64)
    counts[0] = counts[1]  # exact zeros (of a ReLU) are exact under any clip
    filled = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 1
    width = 2 * histogram.reach / BINS
    best, found = np.inf, filled
    for kept in range(min(_LEVELS, filled), filled + 1):
        reference = counts[:kept].copy()
        reference[-1] += counts[kept:].sum()  # clipped values become the largest level
        groups = np.minimum(np.arange(kept) * _LEVELS // kept, _LEVELS - 1)
        full = counts[:kept] > 0
        sums = np.bincount(groups, counts[:kept], _LEVELS)
        sizes = np.bincount(groups[full], minlength=_LEVELS)
        quantized = np.where(full, sums[groups] / np.maximum(sizes[groups], 1), 0.0)
        divergence = _divergence(reference, quantized)
        if divergence < best:
            best, found = divergence, kept
    return found * width


def _divergence(reference: npt.NDArray[np.float64], quantized: npt.NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence; bins that are empty in `quantized` count as `_RARE`."""
    seen = reference > 0
    if not quantized.sum():
        return np.inf
    p = reference[seen] / reference.sum()
    q = np.maximum(quantized[seen] / quantized.sum(), _RARE)
    return float((p * np.log(p / q)).sum())
