"""The numbers of a quantized graph: which observer, and whether SmoothQuant and bias correction lower the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from moebius_calibration.choice.evaluator import Evaluator
from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.plan import Observer
from moebius_calibration.ranges.formats import INT8
from moebius_calibration.ranges.scheme import Scheme, scheme_of, with_bias_correction, with_smoothing
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.trajectories.measure import Say

OBSERVERS: tuple[Observer, ...] = get_args(Observer)
_FOR_FP8: tuple[Observer, ...] = ("minmax", "minmean", "percentile")
ALPHAS = (0.5, 0.8)
"""Strengths of SmoothQuant that are tried; one is taken only where it lowers the error."""


@dataclass
class BestScheme:
    """The scheme of least error with every open node quantized, that error, and the error of each scheme tried."""

    observer: Observer
    scheme: Scheme
    error: float
    tried: dict[str, float]


def best_scheme(
    work: GraphWork,
    statistics: Statistics,
    evaluator: Evaluator,
    observer: Observer | None,
    progress: Say,
) -> BestScheme:
    """Tries observers, then SmoothQuant, then bias correction, each on top of the best so far.

    Args:
        work, statistics, evaluator: of the graph.
        observer: the only one to try; None tries all, but in FP8 not `entropy` and `mse`, which assume equal steps.
        progress: called with each trial.
    """
    tried: dict[str, float] = {}

    def error(what: str, scheme: Scheme) -> float:
        progress(f"{work.name}: {what}", 0, 0)
        tried[what] = evaluator.error(work.switched(scheme), list(work.open_ops))
        return tried[what]

    best: BestScheme | None = None
    several = OBSERVERS if work.number_format is INT8 else _FOR_FP8
    for name in several if observer is None else (observer,):
        scheme = scheme_of(statistics, work.open_ops, name, symmetric=work.symmetric, number_format=work.number_format)
        found = error(name, scheme)
        if best is None or found < best.error:
            best = BestScheme(name, scheme, found, tried)
    assert best is not None  # there is at least one observer
    plain = best.scheme
    for alpha in ALPHAS:
        scheme = with_smoothing(plain, statistics, work.open_ops, work.weights, alpha)
        if scheme.smooth.keys() != plain.smooth.keys() and (found := error(f"smooth {alpha:g}", scheme)) < best.error:
            best = BestScheme(best.observer, scheme, found, tried)
    if not work.symmetric:  # the CPU operators have no bias correction
        return best
    scheme = with_bias_correction(best.scheme, statistics, work.open_ops, work.weights)
    if scheme.bias_correction and (found := error("bias correction", scheme)) < best.error:
        best = BestScheme(best.observer, scheme, found, tried)
    return best
