"""Weights alone as bytes: for downloads and small boards. Activations stay float, so nothing is calibrated."""

from __future__ import annotations

from collections.abc import Sequence

from moebius_calibration.calibrate import Int8Options, plan_of, same_node, work_of
from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.search import Judge, Search, layers_of
from moebius_calibration.graph.gain import Rates
from moebius_calibration.plan import Calibration, Int8Plan
from moebius_calibration.ranges.scheme import Scheme
from moebius_export.errors import ExportError
from moebius_export.graph.changed_sessions import session_of
from moebius_export.trajectories.measure import Say, Trajectories, follow
from moebius_export.trajectories.scenes import scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName

FEWEST = 1024
"""Weights of fewer numbers stay as they are: bytes would save next to nothing."""

_RATES = Rates(0.0, 0.0, 10.0)  # only what is read counts: 10 us per MB


def weight_plans(bundle: Bundle, options: Int8Options, say: Say) -> dict[GraphName, Int8Plan]:
    """A plan for every graph that stores its products' weights as bytes, as many as the error budget allows.

    Only where all of them together exceed the budget is each tried alone.

    Args:
        bundle: with its float32 files.
        options: `error`, `samples`, `evaluations`, and of the one picture that the error is measured on `data`,
            `steps` and `seed`.
        say: told each step and trial.

    Raises:
        ExportError: the target is not TensorRT, whose form has such weights.
        BundleError, InputError, OutputError: the bundle, the picture.
    """
    if options.target == "tensorrt-fp8":
        raise ExportError(
            "--weights-only with --target tensorrt-fp8: a weight of FP8 is as large as one of INT8 and less exact; use "
            "--target tensorrt"
        )
    if options.target != "tensorrt":
        raise ExportError(
            f"--weights-only with --target {options.target}: ONNX Runtime's CPU would widen such weights in every run; "
            "use --target tensorrt, or leave --weights-only out"
        )
    scenes = scenes_of(bundle.manifest, options.steps, 1, options.seed, options.data)
    works = {name: work_of(bundle, name, options.target) for name in bundle.manifest.graphs}
    seen = follow(bundle, {}, scenes, True, say)
    plans: dict[GraphName, Int8Plan] = {}
    for name in [name for name in works if name != "unet_conditional"]:
        plans[name] = _plan(bundle, works[name], options, seen, say, None)
    if "unet_conditional" in works:
        alone = follow(bundle, {}, scenes, False, say)
        same = [same_node(node) for node in plans["unet"].chosen]
        plans["unet_conditional"] = _plan(bundle, works["unet_conditional"], options, alone, say, same)
    return {name: plans[name] for name in bundle.manifest.graphs}


def _plan(
    bundle: Bundle,
    work: GraphWork,
    options: Int8Options,
    seen: Trajectories,
    say: Say,
    same: Sequence[str] | None,
) -> Int8Plan:
    """Of one graph; `same`: the nodes to take, as `same_node` calls them, in place of a search."""
    say(f"{work.name}: all weights as bytes", 0, 0)
    for node, (product,) in work.groups.items():
        if product.weight is None:
            work.fixed[node] = "no weight: it multiplies two activations"
        elif product.weights < FEWEST:
            work.fixed[node] = f"small: its weight has only {product.weights} numbers"
    scheme = Scheme(True, {})
    plain = session_of(work.graph.model, work.path.parent)
    judge = Judge(seen.samples(work.name, options.samples), lambda inputs: plain.run(None, dict(inputs))[0])
    session = work.switched(scheme, weights_only=True)
    errors = {"all": judge.error(session, list(work.open)), "budget": options.error}
    reasons, tables = dict(work.fixed), {}
    if same is None and errors["all"] <= options.error:
        on = set(work.open)
    elif same is None:
        open_groups = {node: group for node, group in work.groups.items() if node not in work.fixed}
        layers = layers_of(open_groups, options.evaluations, work.target)
        search = Search(
            judge, session, layers, _RATES, lambda what, done, total: say(f"{work.name}: {what}", done, total)
        )
        search.trials()
        found = search.choose(options.error)
        on = {product.node for layer in found.layers for product in layers[layer]}
        for layer, group in layers.items():
            reasons |= {product.node: found.reasons[layer] for product in group if product.node not in on}
        tables = {"trials": found.trials, "front": found.front}
    else:
        on = {node for node in work.open if same_node(node) in same}
        reasons |= {node: "as in the guided graph" for node in work.open if node not in on}
    errors["plan"] = judge.error(session, on)
    saved = sum(work.products[node].weights for node in on)
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
