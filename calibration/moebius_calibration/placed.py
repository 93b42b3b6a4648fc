"""INT8 plans without a search: nodes by a shipped placement or by the cost model alone, ranges by calibration, and one
evaluation of each graph against the error budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moebius_calibration.calibrate import Calibrator, Int8Options, same_node
from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.placement import RELEASED, GraphPlacement, ShippedPlacement, read_placement
from moebius_calibration.plan import Int8Plan, Observer
from moebius_calibration.ranges.observe import check_scenes
from moebius_calibration.ranges.scheme import Scheme, scheme_of, with_shifts, with_smoothing
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.errors import ExportError, PrecisionError
from moebius_export.graph.opened import Opened, opened
from moebius_export.trajectories.measure import Say
from moebius_export.trajectories.scenes import Scene, scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName

PICTURES, STEPS = 2, 10
"""What ranges are measured on where nothing is searched."""

_OBSERVER: Observer = "percentile"  # of networks without a placement: the least error at full size, see docs/int8.md


class PlacedCalibrator(Calibrator):
    """Makes the plans of a bundle by a placement that was found before.

    Args:
        bundle: with its float32 files.
        options: as of a search; `psnr` and `evaluations` are not used, as no whole picture is made and nothing tried.
        say: told each stage.
        note: told what the user should know of the placement.
        path: file of the placement to apply, which must be one of this network. None takes the one that comes with the
            package where it is one of this network, else the products of the U-Net that the cost model sees a gain in.
    """

    def __init__(
        self,
        bundle: Bundle,
        options: Int8Options,
        say: Say,
        note: Callable[[str], None],
        path: Path | None = None,
    ) -> None:
        super().__init__(bundle, options, say)
        self._main_nodes: frozenset[str] | None = None
        self._note, self._unknown = note, ""
        self.placement, self.source = self._shipped(path)

    def run(self) -> dict[GraphName, Int8Plan]:
        """A plan for every graph.

        Raises:
            PrecisionError: a graph's error is over the budget.
            InputError: the pictures prove nothing, see `observe.check_scenes`.
            BundleError, ExportError, OutputError: the bundle, its files, values that are not finite.
        """
        options = self.options
        scenes = scenes_of(self.bundle.manifest, options.steps, options.pictures, options.seed, options.data)
        check_scenes(scenes, options.pictures, options.data)
        if self._unknown:
            self._note(self._unknown)
        watched = [name for name in self.works if name != self.follower and self._wanted(name) != frozenset()]
        plans = self._by_ranges(watched, scenes, guided=self.main == "unet")
        if self.follower is not None:
            if self.placement is None:  # its own gains are others: it takes over the nodes, as after a search
                self._main_nodes = frozenset(same_node(node) for node in plans[self.main].chosen)
            few = scenes[: max(1, len(scenes) // 4)]
            plans |= self._by_ranges([self.follower], few, guided=self.main != "unet")
        return {name: plans[name] if name in plans else self._float(name) for name in self.works}

    def _shipped(self, path: Path | None) -> tuple[ShippedPlacement | None, str]:
        """The placement to apply, and where it is from, in words."""
        target = self.options.target
        placement = read_placement(path or RELEASED[target])
        unet = Opened(opened(self.bundle.model_file("unet")))  # without the functions that a plan may keep
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
            f"no shipped INT8 placement for this network ({why}): all layers of the U-Net that gain by the cost model, "
            f"the VAE in float; `{search}` measures each layer"
        )
        return None, "all that gains by the cost model"

    def _wanted(self, name: GraphName) -> frozenset[str] | None:
        """Nodes to place, as `same_node` calls them; None for all that gain."""
        if name == self.follower and self._main_nodes is not None:
            return self._main_nodes
        if self.placement is None:
            return None if name.startswith("unet") else frozenset()
        placement = self.placement.of(name)
        return frozenset() if placement is None else frozenset(placement.nodes)

    def _by_ranges(
        self, names: Sequence[GraphName], scenes: Sequence[Scene], *, guided: bool
    ) -> dict[GraphName, Int8Plan]:
        if not names:
            return {}
        seen = self._collect(list(names), scenes, guided=guided)
        return {name: self._placed(name, seen[name]) for name in names}

    def _placed(self, name: GraphName, statistics: Statistics) -> Int8Plan:
        """The plan of a graph whose ranges are known."""
        work, options, wanted = self.works[name], self.options, self._wanted(name)
        work.fix(statistics, any_gain=options.any_gain or wanted is not None)
        on = {
            node
            for node, group in work.groups.items()
            if group and node not in work.fixed and (wanted is None or same_node(node) in wanted)
        }
        products = {product.node: product for node in on for product in work.groups[node]}
        observer, scheme = self._scheme(work, statistics, None if self.placement is None else self.placement.of(name))
        reasons = {node: work.fixed.get(node, "placement: not in it") for node in work.groups if node not in on}
        plan = self._bare(work, statistics, observer, scheme, on, reasons)
        if not on:
            verdict = f"{work.form.name} does not win here: the cost model sees no gain in any layer; it stays in float"
            return plan.model_copy(update={"verdict": verdict})
        self._say(f"{name}: check against the error budget", 0, 0)
        session = Switched(work.graph, work.path.parent, products, scheme, work.weights)
        error = work.judge(statistics, options.samples).error(session, list(products))
        if error > options.error:
            raise PrecisionError(
                f"{self.bundle.path}: with {len(on)} nodes in {work.form.name} {name} is off by {error:.2g}, over "
                f"--error {options.error:g} ({self.source}). Nothing was written; find the layers that can be "
                f"{work.form.name} with: moebius-export int8 {self.bundle.path} --target {options.target} --search"
            )
        gmac = sum(product.gmac for product in products.values())
        share = gmac / max(sum(product.gmac for product in work.products.values()), 1e-12)
        verdict = f"{len(on)} of {len(work.groups)} nodes in {work.form.name}, {share:.0%} of their GMAC; {self.source}"
        errors = {"plan": error, "budget": options.error}
        return plan.model_copy(update={"errors": errors, "verdict": verdict[:1000]})

    def _scheme(
        self, work: GraphWork, statistics: Statistics, placement: GraphPlacement | None
    ) -> tuple[Observer, Scheme]:
        """The observer, and the numbers of a graph by it."""
        observer = self.options.observer or (_OBSERVER if placement is None else placement.observer)
        scheme = scheme_of(statistics, work.open, observer, symmetric=work.symmetric, form=work.form)
        if placement is not None and placement.smooth is not None:
            scheme = with_smoothing(scheme, statistics, work.open, work.weights, placement.smooth)
        if placement is not None and placement.bias_correction and work.symmetric:
            scheme = with_shifts(scheme, statistics, work.open, work.weights)
        return observer, scheme

    def _float(self, name: GraphName) -> Int8Plan:
        """A graph that stays in float: nothing is calibrated for it."""
        work = self.works[name]
        reasons = dict.fromkeys(work.groups, "placement: this graph stays in float")
        observer = self.options.observer or _OBSERVER
        plan = self._bare(work, Statistics(), observer, Scheme(work.symmetric, {}, form=work.form), set(), reasons)
        return plan.model_copy(update={"verdict": "stays in float: only a search places its layers"})
