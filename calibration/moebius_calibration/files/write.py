"""Writes INT8 and FP8 files into a bundle, whole or not at all, from new plans or from those in the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.graphs import graphs_of, may_stay_float, work_of
from moebius_calibration.files.int8_cpu_file import Placement, write_int8_cpu
from moebius_calibration.files.tensorrt import quantized
from moebius_calibration.plan import Int8Plan, Target, plan_bytes, read_plan
from moebius_calibration.ranges.scheme import scheme_from
from moebius_export.errors import ExportError
from moebius_export.graph.opened import Weights
from moebius_export.precision.typed import typed
from moebius_export.precision.write import check_source, plan_path, write_precision
from moebius_export.precision.write import plans_of as precision_plans_of
from moebius_export.trajectories.measure import Say
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Manifest, Precision

PRECISION: Mapping[Target, Precision] = {
    "tensorrt": "int8",
    "tensorrt-fp8": "fp8",
    "ort-cpu": "int8_cpu",
}


def plans_of(bundle: Bundle, target: Target) -> dict[GraphName, Int8Plan]:
    """The quantization plans in a bundle, edited or not.

    Raises:
        ExportError: a plan is missing or invalid, or belongs to another graph or other float32 files.
    """
    plans: dict[GraphName, Int8Plan] = {}
    for name in graphs_of(bundle):
        if may_stay_float(name, target) and PRECISION[target] not in bundle.graph(name).files:
            continue
        command = f"moebius-export int8 {bundle.path} --target {target}"
        path = plan_path(bundle, name, PRECISION[target], command)
        plans[name] = read_plan(path)
        check_belongs(bundle, name, target, plans[name], path)
    return plans


def check_belongs(bundle: Bundle, name: GraphName, target: Target, plan: Int8Plan, path: Path) -> None:
    """Checks that a plan belongs to the graph, the target and the float32 files.

    Raises:
        ExportError: it belongs to others; the message names them.
    """
    check_source(bundle, name, path, (plan.graph, plan.graph_sha256, plan.weights_sha256))
    if plan.target != target:
        raise ExportError(f"{path}: it is a plan for {plan.target}; expected one for {target}")


def model_of(bundle: Bundle, work: GraphWork, plan: Int8Plan) -> onnx.ModelProto:
    """The graph with Q/DQ pairs, its weights inside: over the FP16 model if the bundle has one, else over float32.

    Raises:
        ExportError: the plan does not fit the graph.
    """
    needed = [
        name for node in plan.chosen if node in work.ops and not plan.weights_only for name in work.ops[node].ranged
    ]
    plan.check(work.groups, needed)
    computes, stores = {}, {}
    if "fp16" in bundle.graph(work.name).files:
        precision = precision_plans_of(bundle, "fp16")[work.name]
        precision.check(work.graph)
        computes, stores = precision.computes, precision.stores
    base = typed(work.graph, Weights(work.path.parent), computes, stores)
    return quantized(base, work.ops, plan.chosen, scheme_from(plan), work.weights, weights_only=plan.weights_only)


def write_int8(
    bundle: Bundle,
    plans: Mapping[GraphName, Int8Plan],
    works: Mapping[GraphName, GraphWork] | None,
    progress: Say,
    *,
    only: bool = False,
) -> Manifest:
    """Writes the INT8 files and their plans into the bundle, in place of older ones.

    A complete new bundle is written, with links to the other files, and exchanged with the old one.

    Args:
        bundle: with its float32 files.
        plans: one for each graph.
        works: the opened graphs; None opens them.
        progress: called with each graph.
        only: leave out the files of all other precisions, and engines. For the CPU this concerns only graphs that get
            an INT8 file.

    Raises:
        ExportError: a plan does not fit its graph.
        OutputError: the bundle cannot be written.
    """
    if any(plan.target == "ort-cpu" for plan in plans.values()):
        return _write_cpu(bundle, plans, works, progress, only)
    (precision,) = {PRECISION[plan.target] for plan in plans.values()}
    works = works or {name: work_of(bundle, name, plan.target) for name, plan in plans.items()}
    contents = {name: plan_bytes(plan) for name, plan in plans.items()}
    return write_precision(
        bundle,
        precision,
        lambda name: model_of(bundle, works[name], plans[name]),
        contents,
        only=only,
        progress=progress,
    )


def _write_cpu(
    bundle: Bundle,
    plans: Mapping[GraphName, Int8Plan],
    works: Mapping[GraphName, GraphWork] | None,
    progress: Say,
    only: bool,
) -> Manifest:
    """Writes the files for the CPU. Without INT8 nodes the U-Net's is float32, and the VAE's graphs have none."""
    placements: dict[GraphName, Placement] = {}
    for name, plan in plans.items():
        if may_stay_float(name, plan.target) and not plan.chosen:
            continue
        work = works[name] if works else work_of(bundle, name, plan.target)
        plan.check(work.groups, [])
        scheme = scheme_from(plan)
        placements[name] = Placement(frozenset(plan.chosen), scheme.ranges, scheme.smooth, plan_bytes(plan))
    return write_int8_cpu(bundle, placements, lambda name: progress(f"write {name}", 0, 0), only=only)
