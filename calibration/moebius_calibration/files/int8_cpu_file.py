"""Writes INT8 files for ONNX Runtime's CPU into a bundle, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx

from moebius_calibration.files.int8_arrays import Array, Range
from moebius_calibration.files.masked_decoder import masked_decoder
from moebius_calibration.files.ort_cpu import as_int8
from moebius_calibration.graph.cpu_candidates import candidates
from moebius_export.errors import ExportError
from moebius_export.graph.opened import Weights
from moebius_export.precision.write import write_precision
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Manifest, Precision

Say = Callable[[GraphName], None]
PRECISION: Precision = "int8_cpu"


@dataclass(frozen=True)
class Placement:
    """The nodes of a graph that INT8 operators replace, with the numbers for them.

    `ranges` and `smooth`: see `moebius_calibration.files.ort_cpu.as_int8`. `plan`: the plan file that is stored beside
    the graph; None for none.
    """

    nodes: frozenset[str]
    ranges: Mapping[str, Range]
    smooth: Mapping[str, Array] = field(default_factory=dict)
    plan: bytes | None = None


def int8_cpu_model(bundle: Bundle, name: GraphName, placement: Placement) -> onnx.ModelProto:
    """A graph of the bundle with INT8 operators in place of the placed nodes; all its tensors are in memory.

    Raises:
        ExportError: the bundle has no float32 file of it, or no INT8 operator can replace a placed node.
    """
    if "fp32" not in bundle.graph(name).files:
        raise ExportError(f"{bundle.path}: {name} has no fp32 file to quantize; export the bundle again")
    path = bundle.model_file(name)
    model = onnx.load(str(path), load_external_data=False)
    found, refused = candidates(model)
    for node in sorted(placement.nodes):
        if node not in found:
            why = refused.get(node, "the graph has no such candidate")
            raise ExportError(f"{name}: {node} cannot be INT8: {why}; make it float in the plan")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    reader = Weights(path.parent)
    chosen = {node: found[node] for node in placement.nodes}
    model = as_int8(model, lambda one: reader.array(tensors[one]), chosen, placement.ranges, placement.smooth)
    for tensor in model.graph.initializer:
        if tensor.external_data:
            values = onnx.numpy_helper.from_array(reader.array(tensor).copy(), tensor.name)
            tensor.CopyFrom(values)
    return model


def write_int8_cpu(
    bundle: Bundle, placements: Mapping[GraphName, Placement], progress: Say = lambda name: None, *, only: bool = False
) -> Manifest:
    """Writes `model_int8_cpu.onnx` and so on into the bundle, in place of older ones.

    A complete new bundle is written, with links to the other files, and exchanged with the old one. Graphs of one
    folder share one weights file. The graphs of the masked decode follow the full decoder, see `masked_decoder`.

    Args:
        bundle: with its fused float32 files.
        placements: of some graphs; those that are left out have no INT8 file.
        progress: called with each graph.
        only: leave out the other files of these graphs, and engines.

    Raises:
        ExportError: a placement does not fit its graph.
        OutputError: the bundle cannot be written.
    """
    if (full := placements.get("vae_decoder")) is not None:
        parts = masked_decoder(bundle, full.nodes, full.ranges, full.smooth)
        placements = {**placements, **{name: Placement(*numbers) for name, numbers in parts.items()}}
    plans = {name: placement.plan for name, placement in placements.items()}
    return write_precision(
        bundle,
        PRECISION,
        lambda name: int8_cpu_model(bundle, name, placements[name]),
        plans,
        only=only,
        progress=lambda stage, done, total: progress(stage.removeprefix("write ")),  # type: ignore[arg-type]
    )
