"""Which layers to have in INT8: each is tried alone, then sets of them, until the largest within a budget is found.

Errors of rounding are independent of each other, so their squares add. Layers are put in the order of squared error
for the time that they save; each set is the first so many of them. Sets are measured, not added up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moebius_calibration.choice.simulate import Switched
from moebius_calibration.graph.gain import Rates, gain_of
from moebius_calibration.graph.linear_ops import Product
from moebius_calibration.plan import Point, Target, Trial
from moebius_export.errors import ExportError
from moebius_export.trajectories.measure import Say

Array = np.ndarray
Inputs = Mapping[str, Array]

_FRONT = 8  # sets that are measured in any case


class Judge:
    """The error that a set of products in INT8 causes in a graph's output, on recorded inputs."""

    def __init__(self, samples: Sequence[Inputs], run: Callable[[Inputs], Array]) -> None:
        if not samples:
            raise ExportError("there are no recorded inputs to try INT8 on; calibrate on more pictures")
        self._samples = samples
        self._expected = [run(sample).astype(np.float64) for sample in samples]

    def error(self, session: Switched, nodes: Collection[str]) -> float:
        """Relative L2 error over all samples, rounded to 6 digits.

        Raises:
            ExportError: the output is not finite.
        """
        session.set(nodes)
        difference = whole = 0.0
        for sample, expected in zip(self._samples, self._expected, strict=True):
            found = session.run(None, sample)[0]
            if not np.isfinite(found).all():
                raise ExportError("a layer in INT8 makes the output infinite or NaN; check the weights with `verify`")
            difference += float(np.square(found - expected).sum())
            whole += float(np.square(expected).sum())
        return float(f"{np.sqrt(difference / whole):.6g}") if whole else float(difference > 0)


@dataclass
class Found:
    """What the search found: layers in INT8, why others are not, and the tables."""

    layers: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    front: list[Point] = field(default_factory=list)
    error: float = 0.0
    gain: float = 0.0


class Search:
    """Of one graph.

    Args:
        judge: of the graph.
        session: its switched session.
        layers: what goes together: name -> products.
        rates: of the device.
        say: told each trial.
        any_gain: try also layers that save no time by the cost model.
    """

    def __init__(
        self,
        judge: Judge,
        session: Switched,
        layers: Mapping[str, Sequence[Product]],
        rates: Rates,
        say: Say,
        *,
        any_gain: bool = False,
    ) -> None:
        self._any_gain = any_gain
        self._judge, self._session, self._say = judge, session, say
        self._layers = layers
        self._gains = {name: float(f"{gain_of(products, rates):.6g}") for name, products in layers.items()}
        self._gmac = {name: sum(product.gmac for product in products) for name, products in layers.items()}
        self._known: dict[frozenset[str], float] = {frozenset(): 0.0}
        self.found = Found()
        self._order: list[str] = []

    def error(self, layers: Collection[str]) -> float:
        """Of these layers in INT8 together."""
        key = frozenset(layers)
        if key not in self._known:
            nodes = [product.node for name in layers for product in self._layers[name]]
            self._known[key] = self._judge.error(self._session, nodes)
        return self._known[key]

    def trials(self) -> None:
        """Tries each layer that could save time alone, and puts them in order."""
        errors = {}
        worth = [name for name in self._layers if self._gains[name] > 0 or self._any_gain]
        for name in self._layers:
            if name not in worth:
                self.found.reasons[name] = (
                    f"no gain: INT8 would take {-self._gains[name]:.3g} us more by the cost model"
                )
        for done, name in enumerate(worth):
            self._say(f"try {name}", done, len(worth))
            errors[name] = self.error([name])
        self._order = sorted(worth, key=lambda name: (errors[name] ** 2 / max(self._gains[name], 1e-6), name))
        self.found.trials = [
            Trial(name=name, error=errors[name], gain=self._gains[name], gmac=float(f"{self._gmac[name]:.6g}"))
            for name in self._order
        ]
        for share in np.linspace(0, len(self._order), _FRONT + 1):
            self.error(self._order[: round(share)])

    def choose(self, budget: float, most: int | None = None) -> Found:
        """The largest set within the budget, of at most `most` layers.

        Args:
            budget: relative L2 error of the graph's output.
            most: None for all.
        """
        low, high = 0, len(self._order) if most is None else min(most, len(self._order))
        if self.error(self._order[:high]) <= budget:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            self._say(f"try {middle} layers", 0, 0)
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
        """Every set that was measured, but those that another beats in error and gain."""
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


def layers_of(groups: Mapping[str, Sequence[Product]], most: int, target: Target) -> dict[str, list[Product]]:
    """What is tried together: each node, or of more than `most` (TensorRT) those of a module, shortcuts apart."""
    if target == "ort-cpu" or len(groups) <= most:
        return {name: list(group) for name, group in groups.items()}
    found: dict[str, list[Product]] = {}
    for name, group in groups.items():
        above = name.rpartition("/")[0] or name
        found.setdefault(name if name.endswith("/skip") else above, []).extend(group)
    return found
