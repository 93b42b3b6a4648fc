"""The search for the layers to quantize: each is tried alone, then sets of them, up to the largest within a budget.

Rounding errors are independent of each other, so their squares add. Layers are ordered by squared error per time
saved, and each set is a prefix of that order. The error of a set is measured, not summed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moebius_calibration.choice.evaluator import Evaluator
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.graph.gain import Rates, gain_of
from moebius_calibration.graph.linear_ops import LinearOp
from moebius_calibration.plan import Point, Target, Trial
from moebius_export.trajectories.measure import Say

_FRONT = 8  # sets that are measured in any case


@dataclass
class Found:
    """The quantized layers, why the others are not, and the tables of trials and of the Pareto front."""

    layers: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    front: list[Point] = field(default_factory=list)
    error: float = 0.0
    gain: float = 0.0


class Search:
    """The search over the layers of one graph.

    Args:
        evaluator, session: of the graph; the session has a switch for each operator of the layers.
        layers: name -> operators that are quantized together.
        rates: cost model of the device.
        progress: called with each trial.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        session: Switched,
        layers: Mapping[str, Sequence[LinearOp]],
        rates: Rates,
        progress: Say,
    ) -> None:
        self.layers = layers
        self._evaluator, self._session, self._progress = evaluator, session, progress
        self._gains = {name: float(f"{gain_of(ops, rates):.6g}") for name, ops in layers.items()}
        self._gmac = {name: sum(op.gmac for op in ops) for name, ops in layers.items()}
        self._known: dict[frozenset[str], float] = {frozenset(): 0.0}
        self.found = Found()
        self._order: list[str] = []

    def error(self, layers: Collection[str]) -> float:
        """The error with these layers quantized together."""
        key = frozenset(layers)
        if key not in self._known:
            nodes = [op.node for name in layers for op in self.layers[name]]
            self._known[key] = self._evaluator.error(self._session, nodes)
        return self._known[key]

    def trials(self) -> None:
        """Tries each layer that could save time alone, and sorts them."""
        errors = {}
        worth = [name for name in self.layers if self._gains[name] > 0]
        for name in self.layers:
            if name not in worth:
                self.found.reasons[name] = (
                    f"no gain: INT8 would take {-self._gains[name]:.3g} us more by the cost model"
                )
        for done, name in enumerate(worth):
            self._progress(f"try {name}", done, len(worth))
            errors[name] = self.error([name])
        self._order = sorted(worth, key=lambda name: (errors[name] ** 2 / self._gains[name], name))
        self.found.trials = [
            Trial(name=name, error=errors[name], gain=self._gains[name], gmac=float(f"{self._gmac[name]:.6g}"))
            for name in self._order
        ]
        for share in np.linspace(0, len(self._order), _FRONT + 1):
            self.error(self._order[: round(share)])

    def choose(self, budget: float, most: int | None = None) -> Found:
        """The largest set within the budget.

        Args:
            budget: relative L2 error of the graph's output.
            most: number of layers at most; None for all.
        """
        low, high = 0, len(self._order) if most is None else min(most, len(self._order))
        if self.error(self._order[:high]) <= budget:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            self._progress(f"try {middle} layers", 0, 0)
            low, high = (middle, high) if self.error(self._order[:middle]) <= budget else (low, middle)
        found, chosen = self.found, self._order[:low]
        found.layers, found.error, found.gain = chosen, self.error(chosen), sum(self._gains[name] for name in chosen)
        alone = {trial.name: trial.error for trial in found.trials}
        for name in self._order[:low]:
            found.reasons.pop(name, None)
        for name in self._order[low:]:
            found.reasons[name] = f"error: alone it adds {alone[name]:.2g}, and the budget is {budget:.2g}"
        found.front = self._points()
        return found

    def _points(self) -> list[Point]:
        """The Pareto front of the sets that were measured: no other has a lower error and a larger gain."""
        whole = sum(self._gmac.values()) or 1.0
        points = []
        for count in range(len(self._order) + 1):
            names = self._order[:count]
            if frozenset(names) in self._known:
                gain = float(f"{sum(self._gains[name] for name in names):.6g}")
                share = float(f"{min(1.0, sum(self._gmac[name] for name in names) / whole):.4f}")
                points.append(Point(layers=count, error=self._known[frozenset(names)], gain=gain, share=share))
        return [
            point
            for point in points
            if not any(o.error <= point.error and o.gain > point.gain for o in points if o is not point)
        ]


def layers_of(groups: Mapping[str, Sequence[LinearOp]], most: int, target: Target) -> dict[str, list[LinearOp]]:
    """What is tried together: each node, or for TensorRT above `most` nodes those of a module, shortcuts apart."""
    if target == "ort-cpu" or len(groups) <= most:
        return {name: list(group) for name, group in groups.items()}
    found: dict[str, list[LinearOp]] = {}
    for name, group in groups.items():
        above = name.rpartition("/")[0] or name
        found.setdefault(name if name.endswith("/skip") else above, []).extend(group)
    return found
