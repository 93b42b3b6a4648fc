"""What the search and the shipped placement share: the bundle's graphs, their statistics, and bare plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.graphs import graphs_of, main_graph, plan_of, same_node, work_of
from moebius_calibration.options import Int8Options
from moebius_calibration.plan import Calibration, Int8Plan, Observer
from moebius_calibration.ranges.observe import check_scenes, collect
from moebius_calibration.ranges.scheme import Scheme
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.trajectories.measure import Say
from moebius_export.trajectories.scenes import Scene, scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName


class BundleCalibration:
    """The graphs of a bundle during a calibration.

    Args:
        bundle: with its float32 files.
        options: how to calibrate.
        progress: called with each stage, and its steps done and in total.

    Attributes:
        works: the opened graphs.
        main: the U-Net graph that nodes are chosen for.
        follower: the other U-Net graph, which takes over the nodes of `main`; None where there is none.
    """

    def __init__(self, bundle: Bundle, options: Int8Options, progress: Say) -> None:
        self.bundle, self.options, self._progress = bundle, options, progress
        self.works = {name: work_of(bundle, name, options.target) for name in graphs_of(bundle)}
        for work in self.works.values():
            work.float_reasons |= {
                node: options.slower[same_node(node)]
                for node in work.groups
                if same_node(node) in options.slower and node not in work.float_reasons
            }
        self.main = main_graph(bundle)
        others: list[GraphName] = ["unet", "unet_conditional"]
        self.follower = next((name for name in others if name in self.works and name != self.main), None)

    def _scenes(self) -> list[Scene]:
        """The pictures to calibrate on.

        Raises:
            InputError: the pictures cannot be calibrated on, see `observe.check_scenes`.
        """
        options = self.options
        scenes = scenes_of(self.bundle.manifest, options.steps, options.pictures, options.seed, options.data)
        check_scenes(scenes, options.pictures, options.data)
        return scenes

    def _pictures(self, name: GraphName) -> int:
        """The number of pictures that a graph is calibrated on: a quarter of all for the follower."""
        return self.options.pictures if name != self.follower else max(1, self.options.pictures // 4)

    def _collect(self, names: Sequence[GraphName], scenes: Sequence[Scene]) -> dict[GraphName, Statistics]:
        """Statistics of `main` with the VAE, or of the follower alone: each by runs of the kind it is made for."""
        state = self.options.state
        followed = self.follower in names
        if state is not None and followed:
            state = state.with_name(f"{state.name}.{self.follower}")
        watched = {name: (self.works[name].graph, self.works[name].ops) for name in names}
        guided = (self.main == "unet") != followed
        return collect(self.bundle, watched, scenes, self._progress, guided=guided, state=state)

    def _plan_of(
        self,
        work: GraphWork,
        statistics: Statistics,
        observer: Observer,
        scheme: Scheme,
        on: set[str],
        reasons: Mapping[str, str],
    ) -> Int8Plan:
        """See `graphs.plan_of`."""
        options = self.options
        calibration = Calibration(
            pictures=self._pictures(work.name),
            steps=options.steps,
            runs=statistics.runs,
            seed=options.seed,
            data="drawn" if options.data is None else "given pictures",
        )
        return plan_of(
            self.bundle, work, observer=observer, calibration=calibration, scheme=scheme, on=on, reasons=reasons
        )

    def _share(self, work: GraphWork, ops: set[str]) -> float:
        """The share of these operators in the MACs of all that could be quantized."""
        return sum(work.ops[name].gmac for name in ops) / max(sum(op.gmac for op in work.ops.values()), 1e-12)
