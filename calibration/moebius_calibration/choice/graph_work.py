"""One graph on its way to an INT8 plan: its products, statistics, scheme and search."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import onnx

from moebius_calibration.choice.search import Judge, Search, layers_of
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.graph.cpu_candidates import Candidate, candidates
from moebius_calibration.graph.gain import RATES, gain_of
from moebius_calibration.graph.linear_ops import Product, constant_values, products_of, source_of
from moebius_calibration.plan import Observer, Target
from moebius_calibration.ranges.formats import FORMATS, INT8, Format
from moebius_calibration.ranges.scheme import Scheme, constant_activations, scheme_of, with_shifts, with_smoothing
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.graph.changed_sessions import session_of
from moebius_export.graph.opened import Opened, opened
from moebius_export.trajectories.measure import Say
from moebius_runtime.bundle.manifest import GraphName

OBSERVERS: tuple[Observer, ...] = get_args(Observer)
_FOR_FP8: tuple[Observer, ...] = ("minmax", "minmean", "percentile")
ALPHAS = (0.5, 0.8)
"""Strengths of SmoothQuant that are tried; what lowers no error is not taken."""


@dataclass
class GraphWork:
    """What is known of a graph.

    Attributes:
        name, path, graph: its float32 file, opened.
        target: whose form it is to get.
        groups: what a plan has a choice for, by node: the products that go with it.
        weights: numbers of the products' weights, by the name of the value.
        fixed: nodes that stay in float, and why.
        aliases: names that the target's form has for activations -> the value that the range is measured on.
    """

    name: GraphName
    path: Path
    graph: Opened
    target: Target
    groups: dict[str, list[Product]]
    weights: dict[str, np.ndarray]
    fixed: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: GraphName, path: Path, target: Target, keep: Collection[str] = ()) -> GraphWork:
        """The graph of a float32 file; its weights are mapped, not loaded.

        `keep`: functions that stay functions, as the fp16 plan has it; for TensorRT alone.
        """
        graph = Opened(opened(path, () if target == "ort-cpu" else keep))
        products = products_of(graph)
        groups = {node: [product] for node, product in products.items()}
        fixed: dict[str, str] = {}
        aliases: dict[str, str] = {}
        if target == "ort-cpu":
            found, fixed = candidates(onnx.load(str(path), load_external_data=False))
            groups = {node: _products_of(candidate, products, graph) for node, candidate in found.items()}
            fixed |= {
                node: "its products are not among those of the inlined graph" for node in groups if not groups[node]
            }
            groups |= {node: [] for node in fixed}
            aliases = {
                value: source_of(graph, value) for candidate in found.values() for value in candidate.activations
            }
        own = [product for group in groups.values() for product in group]
        wanted = list(dict.fromkeys(product.weight.value for product in own if product.weight is not None))
        weights = constant_values(graph, path.parent, wanted)
        return cls(name, path, graph, target, groups, weights, fixed, aliases)

    @property
    def products(self) -> dict[str, Product]:
        """All products that a choice is about."""
        return {product.node: product for group in self.groups.values() for product in group}

    @property
    def open(self) -> dict[str, Product]:
        """Products that may be in INT8."""
        return {
            product.node: product for node, group in self.groups.items() if node not in self.fixed for product in group
        }

    @property
    def symmetric(self) -> bool:
        """Whether the target's activations are."""
        return self.target != "ort-cpu"

    @property
    def form(self) -> Format:
        """What the target's bytes hold."""
        return FORMATS[self.target]

    def nodes(self, products: Collection[str]) -> set[str]:
        """The nodes whose products these are."""
        return {
            node for node, group in self.groups.items() if group and all(product.node in products for product in group)
        }

    def fix(self, statistics: Statistics, *, any_gain: bool = False) -> None:
        """Finds out which nodes cannot be in INT8, or would be no faster, whatever the error."""
        flat = constant_activations(statistics, self.products)
        for node, group in self.groups.items():
            if constant := [flat[product.node] for product in group if product.node in flat]:
                what = f"constant: {constant[0]} had one value in every picture, which gives no range"
                self.fixed.setdefault(node, what)
            gain = gain_of(group, RATES[self.target])
            if gain <= 0 and not any_gain:
                self.fixed.setdefault(node, f"no gain: INT8 would take {-gain:.3g} us more by the cost model")

    def judge(self, statistics: Statistics, samples: int) -> Judge:
        """Of this graph, on runs of the calibration."""
        plain = session_of(self.graph.model, self.path.parent)
        return Judge(statistics.samples(samples), lambda inputs: plain.run(None, dict(inputs))[0])

    def switched(self, scheme: Scheme, weights_only: bool = False) -> Switched:
        """The session that simulates a scheme."""
        return Switched(self.graph, self.path.parent, self.open, scheme, self.weights, weights_only)


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
    say: Say,
) -> Chosen:
    """Tries observers, then SmoothQuant, then bias correction, each on top of the best before.

    Args:
        work: of the graph.
        statistics: of it.
        judge: of it.
        observer: the only one to try; None tries all, but in FP8 not `entropy` and `mse`, which are of equal steps.
        say: told each trial.
    """
    tried: dict[str, float] = {}

    def error(what: str, scheme: Scheme) -> float:
        say(f"{work.name}: {what}", 0, 0)
        tried[what] = judge.error(work.switched(scheme), list(work.open))
        return tried[what]

    best: Chosen | None = None
    several = OBSERVERS if work.form is INT8 else _FOR_FP8
    for name in several if observer is None else (observer,):
        scheme = scheme_of(statistics, work.open, name, symmetric=work.symmetric, form=work.form)
        found = error(name, scheme)
        if best is None or found < best.error:
            best = Chosen(name, scheme, found, tried)
    assert best is not None  # there is at least one observer
    plain = best.scheme
    for alpha in ALPHAS:
        scheme = with_smoothing(plain, statistics, work.open, work.weights, alpha)
        if scheme.smooth.keys() != plain.smooth.keys() and (found := error(f"smooth {alpha:g}", scheme)) < best.error:
            best = Chosen(best.observer, scheme, found, tried)
    if not work.symmetric:  # the CPU's operators have no place for shifts
        return best
    scheme = with_shifts(best.scheme, statistics, work.open, work.weights)
    if scheme.shifts and (found := error("bias correction", scheme)) < best.error:
        best = Chosen(best.observer, scheme, found, tried)
    return best


def search_of(
    work: GraphWork, judge: Judge, session: Switched, most: int, *, any_gain: bool, say: Say
) -> tuple[Search, Mapping[str, list[Product]]]:
    """The search over a graph's layers, each tried alone; `most` as `search.layers_of`, `any_gain` as `Search`."""
    layers = layers_of({n: g for n, g in work.groups.items() if n not in work.fixed}, most, work.target)
    search = Search(judge, session, layers, RATES[work.target], say, any_gain=any_gain)
    search.trials()
    return search, layers


def _products_of(candidate: Candidate, products: Mapping[str, Product], graph: Opened) -> list[Product]:
    """The products that become bytes with a node of the CPU's form: of its weights, or of what is made of them."""
    found = []
    for name, product in products.items():
        if product.weight is None or not (name == candidate.node or name.startswith(f"{candidate.node}/")):
            continue
        if product.weight.value in candidate.weights or product.weight.value not in graph.stored:
            found.append(product)
    return found
