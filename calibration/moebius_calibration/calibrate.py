"""INT8 plans of a bundle: calibrated on trajectories, searched, and judged by whole pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebius_calibration.choice.graph_work import Chosen, GraphWork, best_scheme, search_of
from moebius_calibration.choice.search import Found, Search
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.plan import Calibration, Int8Plan, Observer, Target, choice_of
from moebius_calibration.ranges.formats import FORMATS
from moebius_calibration.ranges.observe import check_scenes, collect
from moebius_calibration.ranges.scheme import Scheme
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.graph.changed_sessions import ChangedBackend
from moebius_export.precision.choose import module_path
from moebius_export.precision.plan import read_plan as read_precision_plan
from moebius_export.trajectories.measure import Say
from moebius_export.trajectories.scenes import Scene, scenes_of, seeded_scene
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.errors import OutputError
from moebius_runtime.images.metrics import psnr
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

_TIGHTER = 0.6  # of the budget, each time that a whole picture is not near enough
_ROUNDS = 10
_MOST_DB = 120.0  # in place of infinity, where pictures are equal


@dataclass(frozen=True)
class Int8Options:
    """How to calibrate and search.

    Attributes:
        target: whose form.
        data: folder of pictures and masks, see `scenes.scenes_of`; None draws them.
        pictures, steps, seed: of the trajectories.
        observer: None tries all and takes the one with the least error.
        error: most relative L2 error of a graph's output in one run.
        psnr: least PSNR in dB inside the mask, over a whole picture that was not calibrated on, against float32.
        samples: recorded runs that each trial is judged on.
        evaluations: with more products than this, those of a module are tried together.
        any_gain: try also layers that the cost model sees no gain in, as all are in a small network.
        one_timestep: calibrate on the first timestep of each picture alone, to see what trajectories buy.
        state: file that statistics are kept in between pictures, so that a stopped run can go on.
    """

    target: Target = "tensorrt"
    data: Path | None = None
    pictures: int = 8
    steps: int = 20
    seed: int = 1
    observer: Observer | None = None
    error: float = 0.03
    psnr: float = 35.0
    samples: int = 2
    evaluations: int = 400
    any_gain: bool = False
    one_timestep: bool = False
    state: Path | None = None


@dataclass
class _Graph:
    """A graph, with what was found for it."""

    work: GraphWork
    statistics: Statistics
    chosen: Chosen
    session: Switched
    search: Search
    layers: Mapping[str, list[Any]]
    found: Found


class Calibrator:
    """Makes the plans of a bundle. Its float32 files must be there."""

    def __init__(self, bundle: Bundle, options: Int8Options, say: Say) -> None:
        self.bundle, self.options, self._say = bundle, options, say
        self.works = {name: work_of(bundle, name, options.target) for name in graphs_of(bundle, options.target)}
        self.psnr: float | None = None
        self.main = main_graph(bundle)
        """It is searched."""
        others: list[GraphName] = ["unet", "unet_conditional"]
        self.follower = next((name for name in others if name in self.works and name != self.main), None)
        """The other one: it takes over what was found."""

    def run(self) -> dict[GraphName, Int8Plan]:
        """A plan for every graph.

        Raises:
            InputError: the pictures prove nothing, see `observe.check_scenes`.
            BundleError, ExportError, OutputError: the bundle, its files, values that are not finite.
        """
        options = self.options
        scenes = scenes_of(self.bundle.manifest, options.steps, options.pictures, options.seed, options.data)
        check_scenes(scenes, options.pictures, options.data)
        held_out = self._held_out()
        searched: list[GraphName] = [name for name in self.works if name != self.follower]
        seen = self._collect(searched, scenes, guided=self.main == "unet")
        graphs = {name: self._graph(name, seen[name]) for name in searched}
        self._by_pictures(graphs, held_out)
        plans = {name: self._plan(graph) for name, graph in graphs.items()}
        if self.follower is not None:
            other = self._collect([self.follower], scenes[: max(1, len(scenes) // 4)], guided=self.main != "unet")
            plans[self.follower] = self._following(other[self.follower], plans[self.main])
        return {name: plans[name] for name in self.works}

    def _held_out(self) -> Scene:
        """A picture that is not calibrated on: the next one given, or drawn."""
        options, manifest = self.options, self.bundle.manifest
        seed = options.seed + options.pictures
        if options.data is not None:
            more = scenes_of(manifest, options.steps, options.pictures + 1, options.seed, options.data)
            if len(more) > options.pictures:
                return more[-1]
        return seeded_scene(manifest, options.steps, seed)

    def _collect(
        self, names: Sequence[GraphName], scenes: Sequence[Scene], *, guided: bool
    ) -> dict[GraphName, Statistics]:
        options = self.options
        state = options.state
        if state is not None and self.follower in names:
            state = state.with_name(f"{state.name}.{self.follower}")
        watched = {name: (self.works[name].graph, self.works[name].products) for name in names}
        one = options.one_timestep
        return collect(self.bundle, watched, scenes, self._say, guided=guided, one_timestep=one, state=state)

    def _graph(self, name: GraphName, statistics: Statistics) -> _Graph:
        work, options = self.works[name], self.options
        work.fix(statistics, any_gain=options.any_gain)
        judge = work.judge(statistics, options.samples)
        chosen = best_scheme(work, statistics, judge, options.observer, self._say)
        session = work.switched(chosen.scheme)

        def say(what: str, done: int, total: int) -> None:
            self._say(f"{name}: {what}", done, total)

        search, layers = search_of(work, judge, session, options.evaluations, any_gain=options.any_gain, say=say)
        return _Graph(work, statistics, chosen, session, search, layers, search.choose(options.error))

    def _by_pictures(self, graphs: Mapping[GraphName, _Graph], scene: Scene) -> None:
        """Makes every graph's set smaller until the whole picture is near enough to float32's."""
        expected = self._fill(scene, {})
        assert expected is not None  # in float32 it came out when it was calibrated on
        budget = self.options.error
        for tries in range(_ROUNDS + 1):
            if not any(graph.found.layers for graph in graphs.values()):
                return
            switched = {name: graph.session.set(self._nodes(graph)) for name, graph in graphs.items()}
            found = self._fill(scene, switched)
            near = -np.inf if found is None else min(_MOST_DB, psnr(expected, found, scene.mask))
            self._say(f"whole picture: {near:.1f} dB", 0, 0)
            if near >= self.options.psnr:
                self.psnr = float(f"{near:.4g}")
                return
            largest = max(graph.found.error for graph in graphs.values())
            budget = 0.0 if tries + 1 >= _ROUNDS else _TIGHTER * min(budget, largest)
            for graph in graphs.values():
                graph.found = graph.search.choose(budget, None if budget else 0)

    def _fill(self, scene: Scene, sessions: Mapping[GraphName, Switched]) -> np.ndarray | None:
        """The scene filled with these graphs in INT8, uint8 [S, S, 3]; None where no picture came out."""
        made: dict[GraphName, Callable[[], Any]] = {
            name: (lambda session=session: session)  # type: ignore[misc]
            for name, session in sessions.items()
        }
        pipeline = InpaintPipeline(ChangedBackend(self.bundle, made))
        try:
            result = pipeline.inpaint(Picture(scene.picture, "RGB"), scene.mask, scene.options)
        except OutputError:
            if not sessions:
                raise
            return None
        finally:
            pipeline.backend.release()
        return result.picture.to_rgb()

    def _nodes(self, graph: _Graph) -> list[str]:
        return [product.node for layer in graph.found.layers for product in graph.layers[layer]]

    def _plan(self, graph: _Graph) -> Int8Plan:
        work, found, options = graph.work, graph.found, self.options
        products = set(self._nodes(graph))
        on = work.nodes(products)
        reasons = dict(work.fixed)
        for layer, group in graph.layers.items():
            for node in work.nodes({product.node for product in group}) - on:
                reasons[node] = found.reasons[layer]
        errors = {"all": graph.chosen.error, "plan": found.error, "budget": options.error}
        errors |= {f"all, {what}": error for what, error in graph.chosen.tried.items()}
        share = sum(work.products[name].gmac for name in products) / max(
            sum(p.gmac for p in work.products.values()), 1e-12
        )
        form = work.form.name
        verdict = (
            f"{len(on)} of {len(work.groups)} nodes in {form}, {share:.0%} of their GMAC, {found.gain:.3g} us less by "
            "the cost model"
            if on
            else f"{form} does not win here: no layer is both faster by the cost model and within the budget; this "
            "part stays in float"
        )
        plan = self._bare(work, graph.statistics, graph.chosen.observer, graph.chosen.scheme, on, reasons)
        return plan.model_copy(
            update={
                "errors": errors,
                "trials": found.trials,
                "front": found.front,
                "psnr": self.psnr if on else None,
                "verdict": verdict,
            }
        )

    def _following(self, statistics: Statistics, main: Int8Plan) -> Int8Plan:
        """The same products as in the graph that was searched, with ranges of its own."""
        assert self.follower is not None
        work, options = self.works[self.follower], self.options
        work.fix(statistics, any_gain=options.any_gain)
        on_there = {same_node(name) for name in main.chosen}
        on = {name for name in work.groups if name not in work.fixed and same_node(name) in on_there}
        reasons = {name: work.fixed.get(name, f"as in {main.graph}") for name in work.groups if name not in on}
        judge = work.judge(statistics, options.samples)
        chosen = best_scheme(work, statistics, judge, main.observer, self._say)
        error = judge.error(work.switched(chosen.scheme), [one.node for name in on for one in work.groups[name]])
        plan = self._bare(work, statistics, main.observer, chosen.scheme, on, reasons)
        verdict = (
            f"{len(on)} of {len(work.groups)} nodes in {work.form.name}, as in {main.graph}" if on else main.verdict
        )
        return plan.model_copy(update={"errors": {"all": chosen.error, "plan": error}, "verdict": verdict})

    def _bare(
        self,
        work: GraphWork,
        statistics: Statistics,
        observer: Observer,
        scheme: Scheme,
        on: set[str],
        reasons: Mapping[str, str],
    ) -> Int8Plan:
        options = self.options
        pictures = options.pictures if work.name != self.follower else max(1, options.pictures // 4)
        calibration = Calibration(
            pictures=pictures,
            steps=options.steps,
            runs=statistics.runs,
            seed=options.seed,
            data="drawn" if options.data is None else "given pictures",
        )
        return plan_of(
            self.bundle,
            work,
            observer=observer,
            calibration=calibration,
            scheme=scheme,
            on=on,
            reasons=reasons,
        )


def plan_of(
    bundle: Bundle,
    work: GraphWork,
    *,
    observer: Observer,
    calibration: Calibration,
    scheme: Scheme,
    on: set[str],
    reasons: Mapping[str, str],
) -> Int8Plan:
    """A plan that is bound to the graph's float32 files, without the search's tables."""
    open_there = {name: source for name, source in work.aliases.items() if source in scheme.ranges}
    ranges = scheme.ranges | {name: scheme.ranges[source] for name, source in open_there.items()}
    smooth = scheme.smooth | {n: scheme.smooth[source] for n, source in open_there.items() if source in scheme.smooth}
    files, file = bundle.manifest.files, bundle.graph(work.name).files["fp32"]
    return Int8Plan(
        target=work.target,
        graph=work.name,
        graph_sha256=files[file.model].sha256,
        weights_sha256=files[file.weights].sha256 if file.weights else None,
        observer=observer,
        calibration=calibration,
        nodes={name: choice_of(work.target) if name in on else "float" for name in work.groups},
        reasons={name: reasons[name] for name in work.groups if name not in on},
        ranges={name: [float(f"{end:.6g}") for end in ends] for name, ends in ranges.items()},
        smooth={name: [float(f"{x:.5g}") for x in factors] for name, factors in smooth.items()},
        shifts={name: [float(f"{x:.5g}") for x in shift] for name, shift in scheme.shifts.items() if name in on},
    )


def scheme_from(plan: Int8Plan) -> Scheme:
    """The numbers of a plan."""
    return Scheme(
        plan.target != "ort-cpu",
        {name: (low, high) for name, (low, high) in plan.ranges.items()},
        {name: np.array(factors, np.float32) for name, factors in plan.smooth.items()},
        {name: np.array(shift, np.float32) for name, shift in plan.shifts.items()},
        FORMATS[plan.target],
    )


def main_graph(bundle: Bundle) -> GraphName:
    """The graph of the U-Net that makes the bundle's pictures unless asked otherwise."""
    conditional = bundle.manifest.defaults.guidance_scale == 1 and "unet_conditional" in bundle.manifest.graphs
    return "unet_conditional" if conditional else "unet"


def graphs_of(bundle: Bundle, target: Target) -> list[GraphName]:
    """Graphs that get an INT8 file: all for TensorRT, on the CPU the U-Net, whose layers have operators in bytes."""
    return [name for name in bundle.manifest.graphs if target != "ort-cpu" or name.startswith("unet")]


def work_of(bundle: Bundle, name: GraphName, target: Target) -> GraphWork:
    """A graph of a bundle, opened as its fp16 plan opens it, if it has one: with the functions that this keeps."""
    path = bundle.model_file(name)
    file = bundle.graph(name).files.get("fp16")
    keep = read_precision_plan(bundle.path / file.plan).keep if file is not None and file.plan is not None else ()
    return GraphWork.of(name, path, target, keep)


def same_node(name: str) -> str:
    """What a node is called in the guided and in the conditional graph alike."""
    return f"{module_path(name)}/{name.partition('/')[2]}"
