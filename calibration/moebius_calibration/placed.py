"""INT8 plans without a search: nodes from a placement file or the cost model, and one check of the error budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moebius_calibration.base import BundleCalibration
from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.graphs import may_stay_float, same_node
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.graph.gain import gain_of
from moebius_calibration.options import Int8Options
from moebius_calibration.placement import RELEASED, GraphPlacement, ShippedPlacement, read_placement
from moebius_calibration.plan import Int8Plan, Observer
from moebius_calibration.ranges.scheme import Scheme, scheme_of, with_bias_correction, with_smoothing
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.errors import ExportError, PrecisionError
from moebius_export.graph.opened import Opened, opened
from moebius_export.trajectories.measure import Say
from moebius_export.trajectories.scenes import Scene
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName

PICTURES, STEPS = 2, 10
"""The pictures that ranges are measured on without a search, and their steps."""

_LITTLE = 0.02  # of the gain
_OBSERVER: Observer = "percentile"  # of networks without a placement: the least error at full size, see docs/int8.md
_OBSERVER_VAE: Observer = (
    "minmax"  # of the small trained VAE: error 0.015 (encoder), 0.032 (decoder); percentile 0.029, 0.033
)


class PlacedCalibrator(BundleCalibration):
    """Makes the plans of a bundle from a placement.

    Args:
        bundle, options, progress: see `BundleCalibration`; `psnr` and `evaluations` are not used.
        note: called with what the user should know about the placement.
        path: a placement file, which must be one of this network. None takes the file of the package where it is one
            of this network, else every node of the U-Net that gains by the cost model.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: Int8Options,
        progress: Say,
        note: Callable[[str], None],
        path: Path | None = None,
    ) -> None:
        super().__init__(bundle, options, progress)
        self._main_nodes: frozenset[str] | None = None
        self._note, self._unknown = note, ""
        self.placement, self.source = self._read(path)

    def run(self) -> dict[GraphName, Int8Plan]:
        """A plan for every graph.

        Raises:
            PrecisionError: the error of a graph is over the budget.
            InputError: the pictures cannot be calibrated on, see `observe.check_scenes`.
            BundleError, ExportError, OutputError: the bundle, its files, values that are not finite.
        """
        scenes = self._scenes()
        if self._unknown:
            self._note(self._unknown)
        watched = [name for name in self.works if name != self.follower and self._wanted(name) != frozenset()]
        plans = self._calibrated(watched, scenes)
        if self.follower is not None:
            if self.placement is None:  # its own gains differ: it takes over the nodes, as after a search
                self._main_nodes = frozenset(same_node(node) for node in plans[self.main].chosen)
            plans |= self._calibrated([self.follower], scenes[: max(1, len(scenes) // 4)])
        return {name: plans[name] if name in plans else self._float(name) for name in self.works}

    def _read(self, path: Path | None) -> tuple[ShippedPlacement | None, str]:
        """The placement to apply, and a description of where it comes from."""
        target = self.options.target
        placement = read_placement(path or RELEASED[target])
        unet = Opened(opened(self.bundle.model_file("unet")))  # all functions inlined, whatever the FP16 plan keeps
        why = placement.mismatch(target, unet, self.works)
        search = f"moebius-export int8 {self.bundle.path} --target {target} --search"
        if not why:
            return placement, f"{'shipped' if path is None else 'given'} placement: {placement.derived}"
        if path is not None:
            raise ExportError(
                f"{path}: it is a placement for another bundle ({placement.network}) than {self.bundle.path}: {why}. "
                f"Make one: {search} --save-placement FILE"
            )
        self._unknown = (
            f"no shipped INT8 placement for this network ({why}): all layers of the U-Net that gain by the cost model "
            f"are quantized, {'and those of the VAE' if target == 'ort-cpu' else 'and the VAE stays in float'}; "
            f"`{search}` measures each layer"
        )
        return None, "all that gains by the cost model"

    def _wanted(self, name: GraphName) -> frozenset[str] | None:
        """Nodes to quantize, as `same_node` names them; None for all that gain."""
        if name == self.follower and self._main_nodes is not None:
            return self._main_nodes
        on_cpu = may_stay_float(name, self.options.target)
        if self.placement is None:
            return None if name.startswith("unet") or on_cpu else frozenset()
        placement = self.placement.of(name)
        if placement is None and on_cpu:  # no placement of the VAE is shipped: what gains is tried, and checked
            return None
        return frozenset() if placement is None else frozenset(placement.nodes)

    def _calibrated(self, names: Sequence[GraphName], scenes: Sequence[Scene]) -> dict[GraphName, Int8Plan]:
        """Plans of these graphs, with ranges measured on the scenes."""
        if not names:
            return {}
        seen = self._collect(names, scenes)
        return {name: self._plan(name, seen[name]) for name in names}

    def _plan(self, name: GraphName, statistics: Statistics) -> Int8Plan:
        """The plan of one graph, after the check of its error."""
        work, options, wanted = self.works[name], self.options, self._wanted(name)
        work.keep_in_float(statistics, options.cost_model if wanted is None else None)
        on = {
            node for node, group in work.open_groups.items() if group and (wanted is None or same_node(node) in wanted)
        }
        ops = {op.node: op for node in on for op in work.groups[node]}
        observer, scheme = self._scheme(work, statistics, None if self.placement is None else self.placement.of(name))
        reasons = {node: work.float_reasons.get(node, "placement: not in it") for node in work.groups if node not in on}
        plan = self._plan_of(work, statistics, observer, scheme, on, reasons)
        named = work.number_format.name
        if not on:
            verdict = f"{named} does not win here: no layer gains; this graph stays in float"
            return plan.model_copy(update={"verdict": verdict})
        self._progress(f"{name}: check against the error budget", 0, 0)
        session = Switched(work.graph, work.path.parent, ops, scheme, work.weights)
        evaluator = work.evaluator(statistics.samples(options.samples))
        error = evaluator.error(session, list(ops))
        if error > options.error and wanted is None and may_stay_float(name, options.target):
            smallest = self._of_little_gain(work, on)
            on -= smallest
            reasons |= dict.fromkeys(smallest, f"little gain: over the budget with it, {error:.2g}")
            ops = {op.node: op for node in on for op in work.groups[node]}
            error = evaluator.error(session, list(ops))
            plan = self._plan_of(work, statistics, observer, scheme, on, reasons)
        if error > options.error and may_stay_float(name, options.target):
            found = (
                f"{named} does not ship: with {len(on)} nodes in it this graph is off by {error:.2g}, over the budget "
                f"of {options.error:g}; it stays in float, --search finds the layers that can be {named}"
            )
            why = dict.fromkeys(on, f"over the budget: all together are off by {error:.2g}")
            plan = self._plan_of(work, statistics, observer, scheme, set(), reasons | why)
            return plan.model_copy(update={"errors": {"all": error, "budget": options.error}, "verdict": found[:1000]})
        if error > options.error:
            raise PrecisionError(
                f"{self.bundle.path}: with {len(on)} nodes in {named} {name} is off by {error:.2g}, over "
                f"--error {options.error:g} ({self.source}). Nothing was written; find the layers that can be "
                f"{named} with: moebius-export int8 {self.bundle.path} --target {options.target} --search"
            )
        share = self._share(work, set(ops))
        verdict = f"{len(on)} of {len(work.groups)} nodes in {named}, {share:.0%} of their GMAC; {self.source}"
        return plan.model_copy(update={"errors": {"plan": error, "budget": options.error}, "verdict": verdict[:1000]})

    def _of_little_gain(self, work: GraphWork, on: set[str]) -> set[str]:
        """The nodes that together bring at most 2 % of the gain, such as a first convolution of four channels.

        They save next to no time, and some of them are sensitive: all that follows depends on them.
        """
        gains = {node: gain_of(work.groups[node], self.options.cost_model) for node in on}
        room, found = _LITTLE * sum(gains.values()), set()
        for node in sorted(on, key=lambda one: (gains[one], one)):
            room -= gains[node]
            if room < 0:
                break
            found.add(node)
        return found

    def _scheme(
        self, work: GraphWork, statistics: Statistics, placement: GraphPlacement | None
    ) -> tuple[Observer, Scheme]:
        """The observer, and the numbers of a graph by it."""
        unknown = _OBSERVER_VAE if may_stay_float(work.name, self.options.target) else _OBSERVER
        observer = self.options.observer or (unknown if placement is None else placement.observer)
        ops = work.open_ops
        scheme = scheme_of(statistics, ops, observer, symmetric=work.symmetric, number_format=work.number_format)
        if placement is not None and placement.smooth is not None:
            scheme = with_smoothing(scheme, statistics, ops, work.weights, placement.smooth)
        if placement is not None and placement.bias_correction and work.symmetric:
            scheme = with_bias_correction(scheme, statistics, ops, work.weights)
        return observer, scheme

    def _float(self, name: GraphName) -> Int8Plan:
        """The plan of a graph that stays in float; nothing is calibrated for it."""
        work = self.works[name]
        reasons = dict.fromkeys(work.groups, "placement: this graph stays in float")
        scheme = Scheme(work.symmetric, {}, number_format=work.number_format)
        plan = self._plan_of(work, Statistics(), self.options.observer or _OBSERVER, scheme, set(), reasons)
        return plan.model_copy(update={"verdict": "stays in float: only a search places its layers"})
