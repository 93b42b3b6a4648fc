"""The graphs of a bundle that get INT8 files: which they are, how they are opened, and how a plan is bound to them."""

from __future__ import annotations

from collections.abc import Mapping

from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.plan import Calibration, Int8Plan, Observer, Target, choice_of
from moebius_calibration.ranges.scheme import Scheme
from moebius_export.precision.choose import module_path
from moebius_export.precision.plan import read_plan as read_precision_plan
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName


def main_graph(bundle: Bundle) -> GraphName:
    """The U-Net graph that makes the bundle's pictures by default: the conditional one where guidance is off."""
    conditional = bundle.manifest.defaults.guidance_scale == 1 and "unet_conditional" in bundle.manifest.graphs
    return "unet_conditional" if conditional else "unet"


def graphs_of(bundle: Bundle) -> list[GraphName]:
    """Graphs that can get an INT8 file: all."""
    return list(bundle.manifest.graphs)


def may_stay_float(name: GraphName, target: Target) -> bool:
    """Whether a graph ships in float alone where its INT8 form is slower or over the error budget.

    On the CPU that holds for the VAE: the network takes another few seconds, and the bundle needs no copy of a file.
    """
    return target == "ort-cpu" and not name.startswith("unet")


def work_of(bundle: Bundle, name: GraphName, target: Target) -> GraphWork:
    """Opens a graph of a bundle; where it has an FP16 plan, with the functions that this plan keeps."""
    path = bundle.model_file(name)
    file = bundle.graph(name).files.get("fp16")
    keep = read_precision_plan(bundle.path / file.plan).keep if file is not None and file.plan is not None else ()
    return GraphWork.of(name, path, target, keep)


def same_node(name: str) -> str:
    """The name of a node that the guided and the conditional graph share."""
    return f"{module_path(name)}/{name.partition('/')[2]}"


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
    """A quantization plan that is bound to the graph's float32 files, without the tables of a search.

    Args:
        bundle, work: the bundle and its opened graph.
        observer, calibration: where the ranges come from.
        scheme: ranges, smoothing factors and bias corrections.
        on: nodes in INT8.
        reasons: why each other node stays in float.
    """
    # Ranges are measured on one value and listed under each name that the target's operators give it.
    measured = {name: source for name, source in work.aliases.items() if source in scheme.ranges}
    ranges = scheme.ranges | {name: scheme.ranges[source] for name, source in measured.items()}
    smooth = scheme.smooth | {n: scheme.smooth[source] for n, source in measured.items() if source in scheme.smooth}
    files, file = bundle.manifest.files, bundle.graph(work.name).files["fp32"]
    corrections = {name: values for name, values in scheme.bias_correction.items() if name in on}
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
        bias_correction={name: [float(f"{x:.5g}") for x in values] for name, values in corrections.items()},
    )
