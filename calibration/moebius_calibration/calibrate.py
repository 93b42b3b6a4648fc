"""The search: measures which layers of a bundle can be INT8, and checks the result on a whole picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebius_calibration.base import BundleCalibration
from moebius_calibration.choice.best_scheme import BestScheme, best_scheme
from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.graphs import same_node
from moebius_calibration.choice.search import Found, Search, layers_of
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.options import Int8Options as Int8Options  # its path in version 0.1
from moebius_calibration.plan import Int8Plan
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.graph.sessions import ChangedBackend
from moebius_export.trajectories.scenes import Scene, scenes_of, seeded_scene
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.errors import OutputError
from moebius_runtime.images.metrics import psnr
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

_TIGHTER = 0.6  # of the budget, each time that a whole picture is not near enough
_ROUNDS = 10
_MOST_DB = 120.0  # in place of infinity, where pictures are equal


@dataclass
class _Graph:
    """A graph, with what was found for it."""

    work: GraphWork
    statistics: Statistics
    best: BestScheme
    session: Switched
    search: Search
    found: Found

    @property
    def ops(self) -> list[str]:
        """Operators that are quantized."""
        return [op.node for layer in self.found.layers for op in self.search.layers[layer]]


class Calibrator(BundleCalibration):
    """Makes the plans of a bundle by a search."""

    psnr: float | None = None
    """Of the whole picture, in dB inside the mask, once it is near enough to float32."""

    def run(self) -> dict[GraphName, Int8Plan]:
        """A plan for every graph.

        Raises:
            InputError: the pictures cannot be calibrated on, see `observe.check_scenes`.
            BundleError, ExportError, OutputError: the bundle, its files, values that are not finite.
        """
        scenes = self._scenes()
        held_out = self._held_out()
        searched: list[GraphName] = [name for name in self.works if name != self.follower]
        seen = self._collect(searched, scenes)
        graphs = {name: self._search(name, seen[name]) for name in searched}
        self._tighten(graphs, held_out)
        plans = {name: self._plan(graph) for name, graph in graphs.items()}
        if self.follower is not None:
            other = self._collect([self.follower], scenes[: max(1, len(scenes) // 4)])
            plans[self.follower] = self._follow(self.works[self.follower], other[self.follower], plans[self.main])
        return {name: plans[name] for name in self.works}

    def _held_out(self) -> Scene:
        """A picture that is not calibrated on: the next one given, or drawn."""
        options, manifest = self.options, self.bundle.manifest
        if options.data is not None:
            more = scenes_of(manifest, options.steps, options.pictures + 1, options.seed, options.data)
            if len(more) > options.pictures:
                return more[-1]
        return seeded_scene(manifest, options.steps, options.seed + options.pictures)

    def _search(self, name: GraphName, statistics: Statistics) -> _Graph:
        """Chooses the numbers of a graph, then its layers within the error budget."""
        work, options = self.works[name], self.options
        work.keep_in_float(statistics, options.cost_model)
        evaluator = work.evaluator(statistics.samples(options.samples))
        best = best_scheme(work, statistics, evaluator, options.observer, self._progress)
        session = work.switched(best.scheme)

        def progress(what: str, done: int, total: int) -> None:
            self._progress(f"{name}: {what}", done, total)

        layers = layers_of(work.open_groups, options.evaluations, work.target)
        search = Search(evaluator, session, layers, options.cost_model, progress)
        search.trials()
        return _Graph(work, statistics, best, session, search, search.choose(options.error))

    def _tighten(self, graphs: Mapping[GraphName, _Graph], scene: Scene) -> None:
        """Shrinks the error budget of all graphs until a whole picture is near enough to float32's."""
        expected = self._fill(scene, {})
        assert expected is not None  # in float32 an unusable picture raises
        budget = self.options.error
        for tries in range(_ROUNDS + 1):
            if not any(graph.found.layers for graph in graphs.values()):
                return
            found = self._fill(scene, {name: graph.session.set(graph.ops) for name, graph in graphs.items()})
            near = -np.inf if found is None else min(_MOST_DB, psnr(expected, found, scene.mask))
            self._progress(f"whole picture: {near:.1f} dB", 0, 0)
            if near >= self.options.psnr:
                self.psnr = float(f"{near:.4g}")
                return
            largest = max(graph.found.error for graph in graphs.values())
            budget = 0.0 if tries + 1 >= _ROUNDS else _TIGHTER * min(budget, largest)
            for graph in graphs.values():
                graph.found = graph.search.choose(budget, None if budget else 0)

    def _fill(self, scene: Scene, sessions: Mapping[GraphName, Switched]) -> np.ndarray | None:
        """The inpainted scene, uint8 [S, S, 3], with these graphs quantized; None where values are not finite."""
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

    def _plan(self, graph: _Graph) -> Int8Plan:
        """The plan of a graph that was searched."""
        work, found, best = graph.work, graph.found, graph.best
        ops = set(graph.ops)
        on = work.nodes(ops)
        reasons = dict(work.float_reasons)
        for layer, group in graph.search.layers.items():
            for node in work.nodes({op.node for op in group}) - on:
                reasons[node] = found.reasons[layer]
        errors = {"all": best.error, "plan": found.error, "budget": self.options.error}
        errors |= {f"all, {what}": error for what, error in best.tried.items()}
        named = work.number_format.name
        if on:
            verdict = (
                f"{len(on)} of {len(work.groups)} nodes in {named}, {self._share(work, ops):.0%} of their GMAC, "
                f"{found.gain:.3g} us less by the cost model"
            )
        else:
            verdict = (
                f"{named} does not win here: no layer is both faster by the cost model and within the error budget; "
                "this graph stays in float"
            )
        plan = self._plan_of(work, graph.statistics, best.observer, best.scheme, on, reasons)
        update = {"errors": errors, "trials": found.trials, "front": found.front, "verdict": verdict}
        return plan.model_copy(update={**update, "psnr": self.psnr if on else None})

    def _follow(self, work: GraphWork, statistics: Statistics, main: Int8Plan) -> Int8Plan:
        """The plan of the other U-Net graph: the nodes of the searched one, with ranges of its own."""
        work.keep_in_float(statistics, self.options.cost_model)
        on_there = {same_node(name) for name in main.chosen}
        on = {name for name in work.groups if name not in work.float_reasons and same_node(name) in on_there}
        reasons = {name: work.float_reasons.get(name, f"as in {main.graph}") for name in work.groups if name not in on}
        evaluator = work.evaluator(statistics.samples(self.options.samples))
        best = best_scheme(work, statistics, evaluator, main.observer, self._progress)
        error = evaluator.error(work.switched(best.scheme), [op.node for name in on for op in work.groups[name]])
        plan = self._plan_of(work, statistics, main.observer, best.scheme, on, reasons)
        nodes = f"{len(on)} of {len(work.groups)} nodes in {work.number_format.name}, as in {main.graph}"
        errors = {"all": best.error, "plan": error}
        return plan.model_copy(update={"errors": errors, "verdict": nodes if on else main.verdict})
