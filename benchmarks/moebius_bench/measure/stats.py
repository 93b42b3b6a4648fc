"""Summaries of timings, and ratios of variants of the same rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

import numpy as np

from moebius_bench.measure.results import Ratio, StepStats, Summary


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linearly interpolated; `ValueError` for no values."""
    if not values:
        raise ValueError("a percentile of no values")
    return float(np.quantile(values, share))


def summary(values: Sequence[float]) -> Summary:
    """Median, extremes and number of values."""
    return Summary(median=median(values), min=min(values), max=max(values), count=len(values))


def step_stats(pictures: Sequence[Sequence[float]]) -> StepStats:
    """Statistics over the denoising steps of several pictures, warm-up left out by the caller.

    Args:
        pictures: seconds of each step, in order, one list per picture.
    """
    steps = [seconds for picture in pictures for seconds in picture]
    return StepStats(
        min=min(steps),
        p50=percentile(steps, 0.5),
        p90=percentile(steps, 0.9),
        p99=percentile(steps, 0.99),
        max=max(steps),
        mean=math.fsum(steps) / len(steps),
        drift=drift(pictures),
        count=len(steps),
    )


def drift(pictures: Sequence[Sequence[float]]) -> float | None:
    """How much slower the end is: mean of the last quarter of steps over that of the first, median over pictures.

    1.0 is steady; above it the machine slows down, as a hot one does. None for pictures of fewer than four steps.
    """
    drifts = []
    for steps in pictures:
        if quarter := len(steps) // 4:
            drifts.append(math.fsum(steps[-quarter:]) / math.fsum(steps[:quarter]))
    return median(drifts) if drifts else None


def ratio(
    slower: str, faster: str, what: Literal["step", "total"], above: Sequence[float], below: Sequence[float]
) -> Ratio:
    """`above` over `below`, round by round: adjacent runs see the same machine state, so their ratio varies less.

    Args:
        slower: the variant whose seconds are `above`; it need not turn out slower.
        faster: the variant whose seconds are `below`.
        what: `step` or `total`.
        above: seconds of each round.
        below: seconds of the same rounds.
    """
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(
        above=slower,
        below=faster,
        what=what,
        median=median(ratios),
        min=min(ratios),
        max=max(ratios),
        rounds=ratios,
    )
