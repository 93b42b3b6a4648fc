"""Chooses by measured errors which parts of a graph stay float32.

The graph is cut into parts: a module's products (convolutions, matrix products), and everything else in it. Each part
is tried alone in the lower type, which gives the error that it causes in the graph's output. Errors of rounding are
independent of each other, so their squares add. Parts with the largest errors are cut into their submodules and tried
again. Then parts are kept in float32, the one first that takes away most squared error for its cost, until what is left
fits the budget; the plan is then tried as a whole, and more is kept if the sum underestimated the error.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import hypot, sqrt
from typing import Literal

from moebius_export.graph.cost import node_costs
from moebius_export.graph.kinds import FloatType, LowType
from moebius_export.graph.opened import layer_of
from moebius_export.precision.trials import Trials

# What float32 costs, in microseconds of a small GPU: 25 TMAC/s in fp16 and half of that in float32, 100 GB/s.
_PER_GMAC, _PER_MBYTE = 40.0, 10.0
NodeKind = Literal["products", "rest"]
_ROUNDS = 4

EXTRA_WEIGHTS = 0.01
"""Share of the lower type's bytes that weights kept in float32 may add."""

Progress = Callable[[str], None]
Say = Progress  # its name in version 0.1


@dataclass(eq=False)  # a part is itself alone, whatever it holds
class PartTrial:
    """A part: its nodes and the weights that they read, the error it causes alone, and what float32 costs there.

    `itself` tells what is left of a module whose submodules became parts of their own: the module's own nodes.
    """

    path: str
    kind: str
    itself: bool = False
    nodes: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    gmac: float = 0.0
    mbytes: float = 0.0
    error: float = 0.0

    @property
    def name(self) -> str:
        """As a plan calls it: no other part that is ever tried has the same."""
        return f"{self.path} {'itself ' if self.itself else ''}{self.kind}"

    @property
    def holds(self) -> str:
        """Its nodes by operator, the most frequent first."""
        return ", ".join(f"{operator} {count}" for operator, count in self.operators.most_common())

    @property
    def cost(self) -> float:
        """Microseconds that float32 takes more."""
        return _PER_GMAC * self.gmac + _PER_MBYTE * self.mbytes + 1.0


@dataclass
class Choice:
    """The result: parts with their errors, the parts kept in float32, and the errors of the whole graph."""

    parts: list[PartTrial]
    kept: list[PartTrial] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def reason(self, part: PartTrial) -> str:
        """Why a part is kept."""
        return f"error: {part.name} costs {part.error:.1e} of {self.errors['blunt']:.1e}"


def module_path(name: str) -> str:
    """The module of a node, the same in the guided and the conditional graph."""
    return layer_of(name).replace(".inner.", ".").removesuffix(".inner")


def node_kind(op_type: str) -> NodeKind:
    """The kind of a node: `products` for convolutions and matrix products, `rest` for others."""
    return "products" if op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LocalLambda") else "rest"


class Chooser:
    """Chooses for one graph.

    Args:
        trials: of the graph.
        kind: the lower type.
        fixed: nodes that stay float32 anyway.
        stores: how each weight is stored in the plan at hand.
        extra: share of the weights' bytes that those stored in float32 in kept parts may add.
        progress: called with a description of each trial.
    """

    def __init__(
        self,
        trials: Trials,
        kind: LowType,
        fixed: Mapping[str, str],
        stores: Mapping[str, FloatType],
        extra: float = EXTRA_WEIGHTS,
        progress: Progress = lambda text: None,
    ) -> None:
        self.trials, self.kind, self.stores, self._extra, self._progress = trials, kind, stores, extra, progress
        self.graph = trials.graph
        computing = [node for node in self.graph.model.graph.node if self.graph.computes(node)]
        self.everything = [node.name for node in computing]
        self.open = [node.name for node in computing if node.name not in fixed]
        self._macs: dict[str, float] = defaultdict(float)
        for cost in node_costs(self.graph.model):  # those of a function's body are the call's
            name = cost.name if cost.name in self.graph.nodes else cost.name.rpartition("/")[0]
            self._macs[name] += cost.macs / 1e9
        self._readers = self._weights_by_node()

    def run(self, budget: float, evaluations: int) -> Choice:
        """Tries, cuts and keeps until the error fits the budget or everything is kept.

        Args:
            budget: relative L2 error of the graph's output that computing in less may add to that of storing weights
                in less, which no choice of this class takes away. Squares add.
            evaluations: how many trials may be spent on single parts.
        """
        choice = Choice(self._parts(self.open))
        low: FloatType = self.kind
        self._progress("everything low")
        every: dict[str, FloatType] = dict.fromkeys(self.everything, low)
        choice.errors["blunt"] = self.trials.error(every, dict.fromkeys(self.graph.storable, low))
        self._progress("weights alone")
        choice.errors["weights"] = self.trials.error({}, self.stores)
        self._progress("the fixed rules alone")
        choice.errors["rules"] = self.trials.error(dict.fromkeys(self.open, low), self.stores)
        choice.errors["plan"] = choice.errors["rules"]
        budget = choice.errors["budget"] = hypot(choice.errors["weights"], budget)
        if choice.errors["rules"] <= budget:
            choice.parts = []
            return choice
        self._try_parts(choice, evaluations)
        self._keep(choice, budget)
        return choice

    def computes(self, kept: list[PartTrial]) -> dict[str, FloatType]:
        """Type of every node of the graph where these parts are kept."""
        inside = {name for part in kept for name in part.nodes}
        low = set(self.open) - inside
        return {name: self.kind if name in low else "fp32" for name in self.everything}

    def _try_parts(self, choice: Choice, evaluations: int) -> None:
        for part in choice.parts:
            self._measure(part)
        while evaluations > len(choice.parts):
            whole = [part for part in choice.parts if part.error > 0 and len(self._cut(part)) > 1]
            if not whole:
                return
            worst = max(whole, key=lambda part: part.error)
            smaller = self._cut(worst)
            for part in smaller:
                self._measure(part)
            place = choice.parts.index(worst)
            choice.parts[place : place + 1] = smaller

    def _measure(self, part: PartTrial) -> None:
        self._progress(f"{part.name} alone")
        low: FloatType = self.kind
        stores = {name: self.stores[name] for name in part.weights if name in self.stores}
        part.error = self.trials.error(dict.fromkeys(part.nodes, low), stores)

    def _keep(self, choice: Choice, budget: float) -> None:
        target = budget
        for _ in range(_ROUNDS):
            rest = [part for part in choice.parts if part not in choice.kept]
            while rest and sqrt(sum(part.error**2 for part in rest)) > target:
                best = max(rest, key=lambda part: part.error**2 / part.cost)
                rest.remove(best)
                choice.kept.append(best)
            self._progress(f"the plan with {len(choice.kept)} parts kept")
            choice.errors["plan"] = self.trials.error(self.computes(choice.kept), self.stored(choice.kept))
            if choice.errors["plan"] <= budget or not rest:
                return
            target = 0.9 * sqrt(sum(part.error**2 for part in rest)) * budget / choice.errors["plan"]

    def stored(self, kept: list[PartTrial]) -> dict[str, FloatType]:
        """How weights are stored where these parts are kept: in float32 as long as that costs few bytes in all.

        The smallest kept parts come first, as their weights remove the most error per byte.
        """
        total = sum(self.graph.sizes[name] for name in self.graph.storable)
        room = self._extra * total
        stores = dict(self.stores)
        for part in sorted(kept, key=lambda part: self._size(part) / max(part.error, 1e-12) ** 2):
            if self._size(part) <= room:
                room -= self._size(part)
                stores.update(dict.fromkeys(part.weights, "fp32"))
        return stores

    def _size(self, part: PartTrial) -> int:
        return sum(self.graph.sizes[name] for name in part.weights)

    def _parts(self, names: list[str]) -> list[PartTrial]:
        found: dict[tuple[str, str], PartTrial] = {}
        for name in names:
            path = module_path(name)
            self._add(found, name, path, _top_depth(path))
        return list(found.values())

    def _cut(self, part: PartTrial) -> list[PartTrial]:
        """The part by submodules, one name deeper than it is now, or as deep as the first that tells them apart."""
        deepest = max(len(module_path(name).split(".")) for name in part.nodes)
        for depth in range(len(part.path.split(".")) + 1, deepest + 1):
            found: dict[tuple[str, str], PartTrial] = {}
            for name in part.nodes:
                self._add(found, name, module_path(name), depth)
            if len(found) > 1:
                return list(found.values())
        return [part]

    def _add(self, found: dict[tuple[str, str], PartTrial], name: str, path: str, depth: int) -> None:
        """Adds a node to the part of its module at that depth; a module that ends before it is there by itself."""
        node, modules = self.graph.nodes[name], path.split(".")
        key = (".".join(modules[:depth]), node_kind(node.op_type))
        part = found.setdefault(key, PartTrial(*key, itself=len(modules) < depth))
        part.nodes.append(name)
        part.operators[node.op_type] += 1
        part.weights += [weight for weight in self._readers[name] if weight not in part.weights]
        part.gmac += self._macs.get(name, 0.0)
        part.mbytes += self.graph.sizes.get(node.output[0], 0) * 2 / 1e6

    def _weights_by_node(self) -> dict[str, list[str]]:
        """Node -> weights that it reads, also through nodes that are worked out when the file is loaded."""
        found: dict[str, list[str]] = defaultdict(list)
        storable = set(self.graph.storable)
        reach: dict[str, set[str]] = {name: {name} for name in storable}
        for node in self.graph.model.graph.node:
            sources = set().union(*(reach.get(name, set()) for name in node.input))
            if node.output[0] in self.graph.constant or not self.graph.computes(node):
                for name in node.output:
                    if self.graph.is_float(name) and name in self.graph.constant:
                        reach[name] = sources
            else:
                found[node.name] = sorted(sources)
        for name in self.everything:
            found.setdefault(name, [])
        return found


def _top_depth(path: str) -> int:
    return 2 if "_block" in path.split(".")[0] or path.startswith(("encoder", "decoder")) else 1
