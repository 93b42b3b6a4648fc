"""Plans without a search: the shipped plan of a known network, or the fixed rules alone, checked on a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moebius_export.errors import ExportError, PrecisionError
from moebius_export.graph.kinds import LowType
from moebius_export.graph.sessions import session_of
from moebius_export.precision.choose import Choice
from moebius_export.precision.kept_functions import calls_of, folded
from moebius_export.precision.plan import Plan
from moebius_export.precision.planning import VAE_GRAPHS, Planner, PlanOptions, stores_of
from moebius_export.precision.shipped import RELEASED, ShippedPlan, kept_nodes, read_shipped, stored_name
from moebius_export.precision.trials import Trials
from moebius_export.trajectories.measure import Progress, Trajectories
from moebius_export.trajectories.ranges import Ranges, observed
from moebius_export.trajectories.scenes import scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName

PICTURES, STEPS = 1, 4
"""Of the check. The strength leaves one step out, so ranges are those of three runs."""

STEP_ERROR: Mapping[LowType, float] = MappingProxyType({"fp16": 3e-2, "bf16": 2.4e-1})
"""Relative L2 error of a step above which a note is printed: the budget of an INT8 graph (3e-2). Storing the small
trained network's weights in fp16 alone costs 9.4e-3 of a first step. bf16 has 3 bits less."""

Note = Callable[[str], None]


def quick_options(**given: Any) -> PlanOptions:
    """Options of a plan without a search; `pictures` and `steps` are the check's where they are not given."""
    return PlanOptions(**{"pictures": PICTURES, "steps": STEPS, **given})


def make_plans(
    bundle: Bundle,
    options: PlanOptions,
    progress: Progress,
    note: Note,
    *,
    search: bool = False,
    shipped: Path | None = None,
) -> dict[GraphName, Plan]:
    """A plan for every graph of a bundle.

    Args:
        bundle: with its float32 files.
        options: how to plan.
        progress: called with each stage.
        note: called with messages on the plan for the user.
        search: measure which layers need float32 (minutes to hours) instead of using a shipped plan.
        shipped: file of the plan to apply, which must be a plan of this network. None takes the package's own plan
            if it is one of this network, else the fixed rules.

    Raises:
        PrecisionError: a VAE below float32 was requested and fails its check, or the plan's output is not finite.
        BundleError, ExportError, InputError: the bundle, a file, a picture or the shipped plan is not valid.
    """
    if search:
        return Planner(bundle, options, progress).run()
    return QuickPlanner(bundle, options, progress, note, shipped).run()


class QuickPlanner(Planner):
    """Applies a shipped plan and checks it.

    A layer whose values come too close to the largest number of the type stays float32, whatever the plan says. Then
    the whole plan is tried on one step.
    """

    def __init__(
        self, bundle: Bundle, options: PlanOptions, progress: Progress, note: Note, shipped: Path | None = None
    ) -> None:
        super().__init__(bundle, options, progress)
        self._note, self._unknown = note, ""
        self.plan, self.source = self._shipped(shipped)

    def run(self) -> dict[GraphName, Plan]:
        """A plan for every graph; errors as `make_plans`."""
        options = self.options
        scenes = scenes_of(self.bundle.manifest, options.steps, options.pictures, options.seed, options.data)
        self._pictures = len(scenes)
        if self._unknown:
            self._note(self._unknown)
        watched: list[GraphName] = ["unet", *(VAE_GRAPHS if options.vae != "fp32" else ())]
        seen = self._follow(watched, scenes, guided=True, decode=options.vae != "fp32")
        plans: dict[GraphName, Plan] = {"unet": self._applied("unet", seen.ranges["unet"], seen)}
        if "unet_conditional" in self.graphs:
            plans["unet_conditional"] = self._applied("unet_conditional", self._conditional_ranges(seen), None)
        for name in VAE_GRAPHS:
            self._progress(f"weights of {name}", 0, 0)
            plans[name] = self._stored(name) if options.vae == "fp32" else self._vae(name, seen)
        return {name: plans[name] for name in self.bundle.manifest.graphs}

    def _shipped(self, path: Path | None) -> tuple[ShippedPlan | None, str]:
        """The plan to apply, and a text with its origin."""
        plan = read_shipped(path or RELEASED)
        why = plan.mismatch(self._inlined("unet"))
        if not why:
            return plan, f"{'shipped' if path is None else 'given'} plan: {plan.derived}"
        if path is not None:
            raise ExportError(
                f"{path}: it is a plan of another network ({plan.network}) than {self.bundle.path}: {why}. Make one: "
                f"moebius-export precision {self.bundle.path} --to {self.options.to} --search --save-plan FILE"
            )
        self._unknown = (
            f"no shipped precision plan for this network ({why}): layers stay fp32 by fixed rules and by their ranges "
            f"alone; `moebius-export precision {self.bundle.path} --to {self.options.to} --search` measures each"
        )
        return None, "fixed rules alone"

    def _applied(self, name: GraphName, ranges: Ranges, seen: Trajectories | None) -> Plan:
        """The plan of a U-Net; its error is measured where `seen` has its runs."""
        graph, to = self.graphs[name], self.options.to
        self._progress(f"weights of {name}", 0, 0)
        weights, reasons = self._fixed(name, to, ranges)
        if self.plan is not None:
            for node, reason in kept_nodes(self.plan, graph).items():
                reasons.setdefault(node, reason)
            wide = set(self.plan.weights)
            for weight, entry in weights.items():
                if stored_name(weight) in wide and entry.type != "fp32":
                    update = {"type": "fp32", "reason": "error: as in the search of the shipped plan"}
                    weights[weight] = entry.model_copy(update=update)
        choice = Choice([])
        if seen is not None:
            self._progress("check the plan on a step", 0, 0)
            last = Trials(graph, self.paths[name].parent, seen.inputs[name][-1:], expected=seen.outputs[name][-1:])
            computes = {node: to for node in graph.nodes if graph.computes(graph.nodes[node]) and node not in reasons}
            choice.errors["plan"] = last.error(dict(computes), stores_of(weights))
            self._check_error(choice.errors["plan"])
        plan = self._plan(name, to, graph, ranges, reasons, weights, choice)
        return plan.model_copy(update={"source": self.source})

    def _check_error(self, error: float) -> None:
        to, path = self.options.to, self.bundle.path
        search = f"moebius-export precision {path} --to {to} --search"
        if error == float("inf"):
            raise PrecisionError(
                f"{path}: with this plan a step in {to} gives numbers that are not finite, though no value came near "
                f"the end of the type's range. Nothing was written; find the layers with: {search}"
            )
        if error > STEP_ERROR[to]:
            self._note(
                f"a step in {to} is off by {error:.1e}, more than the {STEP_ERROR[to]:.1e} that is expected "
                f"of it; find the layers that cause it with: {search}"
            )

    def _conditional_ranges(self, seen: Trajectories) -> Ranges:
        """Ranges of the graph without guidance, on the guided graph's inputs: no picture has to be encoded again."""
        name: GraphName = "unet_conditional"
        keep, runs = self.options.keep, seen.inputs["unet"]
        inside = self._inlined(name)
        session = session_of(observed(inside), self.paths[name].parent)
        outputs = [output.name for output in session.get_outputs()]
        wanted = [tensor.name for tensor in self.bundle.graph(name).inputs]
        found = Ranges()
        for done, inputs in enumerate(runs):
            self._progress("ranges without guidance", done, len(runs))
            values = session.run(None, {key: inputs[key] for key in wanted})
            found.add(dict(zip(outputs, values, strict=True)))
        return folded(found, self.graphs[name], keep) if calls_of(self.graphs[name], keep) else found

    def _stored(self, name: GraphName) -> Plan:
        """The plan of a float32 VAE with weights stored in the lower type; the error of its output is not measured."""
        graph, to = self.graphs[name], self.options.to
        weights, _ = self._fixed(name, to, Ranges())
        computing = [node.name for node in graph.model.graph.node if graph.computes(node)]
        reasons = dict.fromkeys(computing, "VAE: fp32 asked")
        return self._plan(name, to, graph, Ranges(), reasons, weights, Choice([])).model_copy(
            update={"source": self.source}
        )
