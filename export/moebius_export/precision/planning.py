"""Plans of all graphs of a bundle, from trajectories and trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moebius_export.errors import PrecisionError
from moebius_export.graph.kinds import FloatType, LowType
from moebius_export.graph.opened import Opened, Weights, opened
from moebius_export.precision.choose import EXTRA_WEIGHTS, Choice, Chooser, module_path, node_kind
from moebius_export.precision.kept_functions import Keepable, calls_of, check_kept, folded
from moebius_export.precision.plan import Measured, NodeType, Part, Plan, WeightType
from moebius_export.precision.rules import fixed_reasons, keep_vectors, limit_of, overflowing_weights, weight_types
from moebius_export.precision.trials import Trials
from moebius_export.trajectories.measure import Progress, Trajectories, follow
from moebius_export.trajectories.ranges import Ranges
from moebius_export.trajectories.scenes import Scene, scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName

VAE_GRAPHS: tuple[GraphName, ...] = ("vae_encoder", "vae_decoder")
VAE_ERROR = 2e-3
"""Largest relative L2 error of the VAE's output by storing its weights in less, or by computing in less."""

ERROR: Mapping[LowType, float] = MappingProxyType({"fp16": 3e-3, "bf16": 2.4e-2})
"""What computing in less may add to the error of the U-Net's output in a step: bf16 has 3 bits less."""

_LARGE = 1e30  # an error that is not finite, in a file that holds finite numbers


@dataclass(frozen=True)
class PlanOptions:
    """How to plan.

    Attributes:
        to: the lower type of the U-Net.
        vae: type that the VAE computes in. Its weights are stored in `to` where that costs no more than `VAE_ERROR`.
        data: folder of pictures and masks, see `scenes.scenes_of`; None draws them.
        pictures, steps, seed: of the trajectories.
        samples: recorded runs of each graph that trials are measured on.
        error: what computing in less may add to the relative L2 error of the U-Net's output in a step; None takes the
            type's of `ERROR`. What storing the weights in less costs comes on top.
        evaluations: trials of single parts.
        extra_weights: share of the weights' bytes that those stored in float32 for their error may add.
        keep: functions that stay functions in the new files, for a plugin; their nodes have one type each.
    """

    to: LowType = "fp16"
    vae: FloatType = "fp32"
    data: Path | None = None
    pictures: int = 2
    steps: int = 20
    seed: int = 1
    samples: int = 2
    error: float | None = None
    evaluations: int = 32
    extra_weights: float = EXTRA_WEIGHTS
    keep: tuple[Keepable, ...] = ()


class Planner:
    """Makes the plans of a bundle. Its float32 files must be there."""

    def __init__(self, bundle: Bundle, options: PlanOptions, progress: Progress) -> None:
        self.bundle, self.options, self._progress = bundle, options, progress
        self.graphs: dict[GraphName, Opened] = {}
        self.paths: dict[GraphName, Path] = {}
        self._pictures = 0
        for name in bundle.manifest.graphs:
            self.paths[name] = bundle.model_file(name)
            self.graphs[name] = Opened(opened(self.paths[name], options.keep))
        check_kept(self.graphs.values(), options.keep, options.to)

    def run(self) -> dict[GraphName, Plan]:
        """A plan for every graph.

        Raises:
            PrecisionError: a VAE below float32 was requested and fails its check.
            BundleError, ExportError, InputError: the bundle, its files, the pictures.
        """
        options = self.options
        scenes = scenes_of(self.bundle.manifest, options.steps, options.pictures, options.seed, options.data)
        self._pictures = len(scenes)
        watched: list[GraphName] = ["unet", *(VAE_GRAPHS if options.vae != "fp32" else ())]
        seen = self._follow(watched, scenes, guided=True)
        plans: dict[GraphName, Plan] = {}
        plans["unet"], choice = self._unet(seen)
        if "unet_conditional" in self.graphs:
            alone = self._follow(["unet_conditional"], scenes[:1], guided=False)
            plans["unet_conditional"] = self._conditional(alone, choice, plans["unet"].weights)
        for name in VAE_GRAPHS:
            plans[name] = self._vae(name, seen)
        return {name: plans[name] for name in self.bundle.manifest.graphs}

    def _follow(
        self, watched: list[GraphName], scenes: Sequence[Scene], *, guided: bool, decode: bool = True
    ) -> Trajectories:
        """Ranges of these graphs; where functions are kept, of all values in their bodies."""
        keep = self.options.keep
        kept = [name for name in watched if calls_of(self.graphs[name], keep)]
        inside = {name: self._inlined(name) for name in watched}
        seen = follow(self.bundle, inside, scenes, guided, self._progress, decode=decode)
        seen.ranges |= {name: folded(seen.ranges[name], self.graphs[name], keep) for name in kept}
        return seen

    def _inlined(self, name: GraphName) -> Opened:
        """The graph without functions, also where its plan keeps some."""
        kept = calls_of(self.graphs[name], self.options.keep)
        return Opened(opened(self.paths[name])) if kept else self.graphs[name]

    def _unet(self, seen: Trajectories) -> tuple[Plan, Choice]:
        name: GraphName = "unet"
        graph, options = self.graphs[name], self.options
        weights, fixed = self._fixed(name, options.to, seen.ranges[name])
        chooser = Chooser(
            self._trials(name, seen), options.to, fixed, stores_of(weights), options.extra_weights, self._tried
        )
        budget = ERROR[options.to] if options.error is None else options.error
        choice = chooser.run(budget, options.evaluations)
        reasons = dict(fixed)
        for part in choice.kept:
            reasons.update(dict.fromkeys(part.nodes, choice.reason(part)))
        stored = chooser.stored(choice.kept)
        for weight, entry in weights.items():
            if stored[weight] != entry.type:
                part = next(part for part in choice.kept if weight in part.weights)
                weights[weight] = entry.model_copy(update={"type": "fp32", "reason": choice.reason(part)})
        return self._plan(name, options.to, graph, seen.ranges[name], reasons, weights, choice), choice

    def _conditional(self, seen: Trajectories, choice: Choice, theirs: dict[str, WeightType]) -> Plan:
        """The plan of the conditional graph: the guided graph's layers stay float32, and those that may overflow."""
        name: GraphName = "unet_conditional"
        graph, to = self.graphs[name], self.options.to
        weights, reasons = self._fixed(name, to, seen.ranges[name])
        guided = self.graphs["unet"].nodes
        kept = {
            (module_path(node), node_kind(guided[node].op_type)): choice.reason(part)
            for part in choice.kept
            for node in part.nodes
        }
        for node in graph.model.graph.node:
            reason = kept.get((module_path(node.name), node_kind(node.op_type)))
            if reason and graph.computes(node):
                reasons.setdefault(node.name, reason)
        wide = {module_path(weight) for weight, entry in theirs.items() if entry.type == "fp32"}
        for weight, entry in weights.items():
            if module_path(weight) in wide and entry.type != "fp32":
                weights[weight] = entry.model_copy(update={"type": "fp32", "reason": "as in the guided graph"})
        low: FloatType = to
        computes = {node: low for node in graph.nodes if graph.computes(graph.nodes[node]) and node not in reasons}
        errors = {"plan": self._trials(name, seen).error(computes, stores_of(weights))}
        return self._plan(name, to, graph, seen.ranges[name], reasons, weights, Choice([], [], errors))

    def _vae(self, name: GraphName, seen: Trajectories) -> Plan:
        graph, options = self.graphs[name], self.options
        trials = self._trials(name, seen)
        kind: LowType = options.to if options.vae == "fp32" else options.vae
        ranges = seen.ranges.get(name, Ranges())
        weights, reasons = self._fixed(name, kind, ranges)
        choice = Choice([])
        computing = [node.name for node in graph.model.graph.node if graph.computes(node)]
        if options.vae == "fp32":
            choice.errors["plan"] = trials.error({}, stores_of(weights))
            if choice.errors["plan"] > VAE_ERROR:
                why = f"stored as {kind}, the VAE's output would be off by {choice.errors['plan']:.1e}"
                weights = {w: e.model_copy(update={"type": "fp32", "reason": why}) for w, e in weights.items()}
                choice.errors["plan"] = 0.0
            return self._plan(name, kind, graph, ranges, dict.fromkeys(computing, "VAE: fp32 asked"), weights, choice)
        low: FloatType = kind
        over = {node: reason for node, reason in reasons.items() if reason.startswith("overflow")}
        choice.errors["blunt"] = trials.error(dict.fromkeys(computing, low), dict.fromkeys(graph.storable, low))
        choice.errors["plan"] = trials.error({n: low for n in computing if n not in reasons}, stores_of(weights))
        if over or not choice.errors["plan"] <= VAE_ERROR:
            found = "; ".join(f"{node}: {reason}" for node, reason in list(over.items())[:3])
            found = found or f"no value overflowed, but its output is off by {choice.errors['plan']:.1e}"
            raise PrecisionError(
                f"--vae {kind}: not proven for {name} ({len(over)} nodes overflow; {found}; at most {VAE_ERROR:.0e} of "
                "error is allowed). Nothing was written; leave --vae out to keep it float32."
            )
        return self._plan(name, kind, graph, ranges, reasons, weights, choice)

    def _fixed(self, name: GraphName, kind: LowType, ranges: Ranges) -> tuple[dict[str, WeightType], dict[str, str]]:
        graph = self.graphs[name]
        weights = weight_types(graph, Weights(self.paths[name].parent), kind)
        reasons = fixed_reasons(graph, kind, ranges)
        for node in overflowing_weights(graph, weights, kind):
            reasons[node] = "overflow: it reads a weight beyond the type's largest number"
        return weights, reasons

    def _trials(self, name: GraphName, seen: Trajectories) -> Trials:
        return Trials(self.graphs[name], self.paths[name].parent, seen.samples(name, self.options.samples))

    def _tried(self, text: str) -> None:
        self._progress(f"try: {text}", 0, 0)

    def _plan(
        self,
        name: GraphName,
        kind: LowType,
        graph: Opened,
        ranges: Ranges,
        reasons: dict[str, str],
        weights: dict[str, WeightType],
        choice: Choice,
    ) -> Plan:
        options, files = self.options, self.bundle.manifest.files
        file = self.bundle.graph(name).files["fp32"]
        nodes = {}
        for node in graph.model.graph.node:
            if graph.computes(node):
                value, reason = node.output[0], reasons.get(node.name, "")
                sizes = (ranges.largest[value], ranges.rms(value)) if value in ranges.largest else (None, None)
                kept: FloatType = "fp32" if reason else kind
                nodes[node.name] = NodeType(type=kept, largest=sizes[0], rms=sizes[1], reason=reason)
        keep_vectors(graph, weights, {node: entry.type for node, entry in nodes.items()})
        return Plan(
            graph=name,
            precision=options.to,
            onnx_sha256=files[file.model].sha256,
            weights_sha256=files[file.weights].sha256 if file.weights else None,
            measured=Measured(
                pictures=self._pictures,
                steps=options.steps,
                seed=options.seed,
                data="drawn" if options.data is None else "given pictures",
            ),
            limit=limit_of(kind),
            keep=tuple(kept for kept in options.keep if calls_of(graph, (kept,))),
            errors={what: min(error, _LARGE) for what, error in choice.errors.items()},
            parts=[
                Part(
                    name=part.name,
                    holds=part.holds,
                    error=min(part.error, _LARGE),
                    gmac=part.gmac,
                    mbytes=part.mbytes,
                    kept=part in choice.kept,
                )
                for part in sorted(choice.parts, key=lambda part: -part.error)
            ],
            nodes=nodes,
            weights=weights,
        )


def stores_of(weights: dict[str, WeightType]) -> dict[str, FloatType]:
    """How each weight is stored."""
    return {name: entry.type for name, entry in weights.items()}
