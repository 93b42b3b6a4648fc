"""Weight-only quantization: INT8 weights and float activations, for small downloads. Nothing is calibrated."""

from __future__ import annotations

from collections.abc import Sequence

from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.graphs import plan_of, same_node, work_of
from moebius_calibration.choice.search import Search, layers_of
from moebius_calibration.graph.gain import Rates
from moebius_calibration.options import Int8Options
from moebius_calibration.plan import Calibration, Int8Plan
from moebius_calibration.ranges.scheme import Scheme
from moebius_export.errors import ExportError
from moebius_export.trajectories.measure import Say, Trajectories, follow
from moebius_export.trajectories.scenes import scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName

FEWEST = 1024
"""Weights with fewer values stay in float: INT8 would save next to nothing."""

_RATES = Rates(0.0, 0.0, 10.0)  # only the traffic of weights counts: 10 us per MB


def weight_plans(bundle: Bundle, options: Int8Options, progress: Say) -> dict[GraphName, Int8Plan]:
    """A plan for every graph with as many INT8 weights as the error budget allows.

    Each layer is tried alone only where all of them together exceed the budget.

    Args:
        bundle: with its float32 files.
        options: `error`, `samples`, `evaluations`; and `data`, `steps`, `seed` of the picture that the error is
            measured on.
        say: told each step and trial.

    Raises:
        ExportError: the target is not `tensorrt`.
        BundleError, InputError, OutputError: the bundle, the picture.
    """
    if options.target == "tensorrt-fp8":
        raise ExportError(
            "--weights-only with --target tensorrt-fp8: an FP8 weight is as large as an INT8 weight and less exact; "
            "use --target tensorrt"
        )
    if options.target != "tensorrt":
        raise ExportError(
            f"--weights-only with --target {options.target}: ONNX Runtime's CPU would widen such weights in "
            "every run; use --target tensorrt, or leave --weights-only out"
        )
    scenes = scenes_of(bundle.manifest, options.steps, 1, options.seed, options.data)
    works = {name: work_of(bundle, name, options.target) for name in bundle.manifest.graphs}
    seen = follow(bundle, {}, scenes, True, progress)
    plans: dict[GraphName, Int8Plan] = {}
    for name in [name for name in works if name != "unet_conditional"]:
        plans[name] = _plan(bundle, works[name], options, seen, progress, None)
    if "unet_conditional" in works:
        alone = follow(bundle, {}, scenes, False, progress)
        same = [same_node(node) for node in plans["unet"].chosen]
        plans["unet_conditional"] = _plan(bundle, works["unet_conditional"], options, alone, progress, same)
    return {name: plans[name] for name in bundle.manifest.graphs}


def _plan(
    bundle: Bundle,
    work: GraphWork,
    options: Int8Options,
    seen: Trajectories,
    progress: Say,
    same: Sequence[str] | None,
) -> Int8Plan:
    """The plan of one graph; `same`: the nodes to quantize, as `same_node` names them, in place of a search."""
    progress(f"{work.name}: all weights in INT8", 0, 0)
    for node, (op,) in work.groups.items():
        if op.weight is None:
            work.float_reasons[node] = "no weight: it multiplies two activations"
        elif op.weights < FEWEST:
            work.float_reasons[node] = f"small: its weight has only {op.weights} values"
    scheme = Scheme(True, {})
    evaluator = work.evaluator(seen.samples(work.name, options.samples))
    session = work.switched(scheme, weights_only=True)
    errors = {"all": evaluator.error(session, list(work.open_ops)), "budget": options.error}
    reasons, tables = dict(work.float_reasons), {}
    if same is None and errors["all"] <= options.error:
        on = set(work.open_ops)
    elif same is None:
        layers = layers_of(work.open_groups, options.evaluations, work.target)
        search = Search(
            evaluator, session, layers, _RATES, lambda what, done, total: progress(f"{work.name}: {what}", done, total)
        )
        search.trials()
        found = search.choose(options.error)
        on = {op.node for layer in found.layers for op in layers[layer]}
        for layer, group in layers.items():
            reasons |= {op.node: found.reasons[layer] for op in group if op.node not in on}
        tables = {"trials": found.trials, "front": found.front}
    else:
        on = {node for node in work.open_ops if same_node(node) in same}
        reasons |= {node: "as in the guided graph" for node in work.open_ops if node not in on}
    errors["plan"] = evaluator.error(session, on)
    saved = sum(work.ops[node].weights for node in on)
    plan = plan_of(
        bundle,
        work,
        observer="minmax",
        calibration=Calibration(pictures=1, steps=options.steps, runs=0, seed=options.seed),
        scheme=scheme,
        on=on,
        reasons=reasons,
    )
    verdict = f"weights of {len(on)} of {len(work.groups)} nodes as bytes, {saved / 1e6:.3g} million numbers"
    return plan.model_copy(update={"weights_only": True, "errors": errors, "verdict": verdict, **tables})
