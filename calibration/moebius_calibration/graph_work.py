"""One graph on its way to an INT8 plan: its products, statistics, scheme and search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from moebius_calibration.gain import RATES, gain_of
from moebius_calibration.plan import Observer, Target
from moebius_calibration.products import Product, constant_values, products_of
from moebius_calibration.scheme import Scheme, constant_activations, scheme_of, with_shifts, with_smoothing
from moebius_calibration.search import Judge, Search, layers_of
from moebius_calibration.simulate import Switched
from moebius_calibration.statistics import Statistics
from moebius_export.precision.graph import Opened
from moebius_export.precision.measure import Say
from moebius_export.precision.sessions import session_of
from moebius_runtime.manifest import GraphName

OBSERVERS: tuple[Observer, ...] = get_args(Observer)
ALPHAS = (0.5, 0.8)
"""Strengths of SmoothQuant that are tried; what lowers no error is not taken."""


@dataclass
class GraphWork:
    """What is known of a graph. `fixed`: products that stay in float, and why; `open`: those that may be in INT8."""

    name: GraphName
    path: Path
    graph: Opened
    products: dict[str, Product]
    fixed: dict[str, str] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, name: GraphName, path: Path, graph: Opened) -> GraphWork:
        """The graph of a float32 file, opened; its weights are mapped, not loaded."""
        products = products_of(graph)
        wanted = [p.weight.value for p in products.values() if p.weight is not None]
        return cls(name, path, graph, products, {}, constant_values(graph, path.parent, list(dict.fromkeys(wanted))))

    @property
    def open(self) -> dict[str, Product]:
        """Products that may be in INT8."""
        return {name: product for name, product in self.products.items() if name not in self.fixed}

    def fix(self, statistics: Statistics, target: Target, *, any_gain: bool = False) -> None:
        """Finds out which products cannot be in INT8, or would be no faster, whatever the error."""
        for name, value in constant_activations(statistics, self.products).items():
            self.fixed[name] = f"constant: {value} had one value in every picture, which gives no range"
        for name, product in self.products.items():
            gain = gain_of([product], RATES[target])
            if gain <= 0 and not any_gain:
                self.fixed.setdefault(name, f"no gain: INT8 would take {-gain:.3g} us more by the cost model")

    def judge(self, statistics: Statistics, samples: int) -> Judge:
        """Of this graph, on runs of the calibration."""
        plain = session_of(self.graph.model, self.path.parent)
        return Judge(statistics.samples(samples), lambda inputs: plain.run(None, dict(inputs))[0])

    def switched(self, scheme: Scheme) -> Switched:
        """The session that simulates a scheme."""
        return Switched(self.graph, self.path.parent, self.open, scheme, self.weights)


@dataclass
class Chosen:
    """The scheme of a graph that has the least error with everything in INT8, and that error."""

    observer: Observer
    scheme: Scheme
    error: float
    tried: dict[str, float]


def best_scheme(
    work: GraphWork,
    statistics: Statistics,
    judge: Judge,
    observer: Observer | None,
    *,
    symmetric: bool,
    say: Say,
) -> Chosen:
    """Tries observers, then SmoothQuant, then bias correction, each on top of the best before.

    Args:
        work: of the graph.
        statistics: of it.
        judge: of it.
        observer: the only one to try; None tries all.
        symmetric: as the target has it.
        say: told each trial.
    """
    tried: dict[str, float] = {}

    def error(what: str, scheme: Scheme) -> float:
        say(f"{work.name}: {what}", 0, 0)
        tried[what] = judge.error(work.switched(scheme), list(work.open))
        return tried[what]

    best: Chosen | None = None
    for name in OBSERVERS if observer is None else (observer,):
        scheme = scheme_of(statistics, work.open, name, symmetric=symmetric)
        found = error(name, scheme)
        if best is None or found < best.error:
            best = Chosen(name, scheme, found, tried)
    assert best is not None  # there is at least one observer
    plain = best.scheme
    for alpha in ALPHAS:
        scheme = with_smoothing(plain, statistics, work.open, work.weights, alpha)
        if scheme.smooth.keys() != plain.smooth.keys() and (found := error(f"smooth {alpha:g}", scheme)) < best.error:
            best = Chosen(best.observer, scheme, found, tried)
    scheme = with_shifts(best.scheme, statistics, work.open, work.weights)
    if scheme.shifts and (found := error("bias correction", scheme)) < best.error:
        best = Chosen(best.observer, scheme, found, tried)
    return best


def search_of(
    work: GraphWork, judge: Judge, session: Switched, target: Target, most: int, *, any_gain: bool, say: Say
) -> tuple[Search, Mapping[str, list[Product]]]:
    """The search over a graph's layers, each tried alone; `most` as `search.layers_of`, `any_gain` as `Search`."""
    layers = layers_of(work.open, most)
    search = Search(judge, session, layers, RATES[target], say, any_gain=any_gain)
    search.trials()
    return search, layers
