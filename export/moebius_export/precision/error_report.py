"""Errors of a mixed-precision file against float32, module by module, in the graph's order.

Both graphs run in one session on the same inputs, the mixed-precision one emulated (see `emulate`). It sums the
squares of a value and of its difference from float32's, so that no activation leaves it. A second run gives each module
float32's values as inputs, which leaves the error that the module adds itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import NAME, FloatType, LowType
from moebius_export.graph.opened import Opened, layer_of, opened, with_types
from moebius_export.graph.sessions import session_of
from moebius_export.precision.emulate import emulated_model
from moebius_export.precision.plan import Measured
from moebius_export.precision.planning import PlanOptions
from moebius_export.trajectories.measure import Progress, follow
from moebius_export.trajectories.scenes import scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.files import atomic_write

_TYPED = "typed/"
_MARK = "compared/"


@dataclass(frozen=True)
class ModuleError:
    """The error of the last value that a module makes.

    Attributes:
        module: as in the names of nodes.
        tensor: the value.
        type: that the mixed-precision file computes it in.
        rms: root mean square in float32.
        error: relative L2 error over all runs, with all that came in before; infinite where a number is not finite.
        own: the same where the module is given float32's values of the other modules of this list.
    """

    module: str
    tensor: str
    type: FloatType
    rms: float
    error: float
    own: float


@dataclass(frozen=True)
class ErrorReport:
    """Rows of each graph in its order, and what they were measured on: `runs` of each graph from that trajectory."""

    precision: LowType
    measured: Measured
    runs: dict[GraphName, int]
    graphs: dict[GraphName, list[ModuleError]]


def measure_errors(bundle: Bundle, options: PlanOptions, progress: Progress) -> ErrorReport:
    """Compares the bundle's mixed-precision files with its float32 files on a picture that no plan was made from.

    A drawn picture and its noise have the seed after the plan's last; with `options.data` the first picture there gets
    noise of that seed. The graphs of a guided run are compared; `unet_conditional`, whose plan keeps the same modules,
    does not run in it.

    Args:
        bundle: with float32 files and files of `options.to`.
        options: `to`, `data`, `steps`, `samples`, and `seed` and `pictures` of the plan.
        progress: called with each step and graph.

    Raises:
        BundleError: a file is missing or damaged.
        ExportError, InputError: the file was not made from the float32 file; a picture is not valid.
    """
    seed = options.seed + options.pictures
    scenes = scenes_of(bundle.manifest, options.steps, 1, seed, options.data)
    for name in bundle.manifest.graphs:  # before the long work
        bundle.model_file(name)
        bundle.model_file(name, options.to)
    seen = follow(bundle, {}, scenes, True, progress)
    data = "drawn" if options.data is None else "given pictures"
    found = ErrorReport(options.to, Measured(pictures=1, steps=options.steps, seed=seed, data=data), {}, {})
    for done, name in enumerate(seen.inputs):
        progress(f"compare {name}", done, len(seen.inputs))
        samples = seen.samples(name, options.samples)
        found.runs[name] = len(samples)
        found.graphs[name] = module_errors(bundle.model_file(name), bundle.model_file(name, options.to), samples)
    return found


def module_errors(path: Path, typed: Path, samples: Sequence[Mapping[str, np.ndarray]]) -> list[ModuleError]:
    """The error of each module of one graph, in its order.

    Args:
        path: the float32 file, with a verified hash.
        typed: the mixed-precision file, with a verified hash, in the same folder.
        samples: inputs of the runs to sum over.

    Raises:
        ExportError: the file was not made from the float32 file, or there are no samples.
        BundleError: ONNX Runtime cannot load both as one.
    """
    if not samples:
        raise ExportError(f"{typed}: there are no recorded inputs to compare it on")
    graph, low = Opened(opened(path)), Opened(with_types(onnx.load(str(typed), load_external_data=False)))
    values = last_values(graph)
    if strange := [name for name in values if name not in low.types]:
        raise ExportError(f"{typed}: it has no {strange[0]}, so it was not made from {path}; write it again")
    emulated = emulated_model(low.model)
    squares = _squares(_compared(graph, emulated, values, alone=False), path.parent, samples)
    alone = _squares(_compared(graph, emulated, values, alone=True), path.parent, samples)
    return [
        ModuleError(
            module=module,
            tensor=name,
            type=_computed_in(low, name),
            rms=math.sqrt(squares[name][1] / (len(samples) * max(1, graph.sizes.get(name, 1)))),
            error=_relative(*squares[name]),
            own=_relative(*alone[name]),
        )
        for name, module in values.items()
    ]


def last_values(graph: Opened) -> dict[str, str]:
    """The last value that the nodes of each module make -> the module, in the graph's order."""
    last = {layer_of(node.name): node.output[0] for node in graph.model.graph.node if graph.computes(node)}
    modules = {value: module for module, value in last.items()}
    return {node.output[0]: modules[node.output[0]] for node in graph.model.graph.node if node.output[0] in modules}


def _squares(model: onnx.ModelProto, folder: Path, samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Value -> squares of the difference, and of the value, float64 [2], summed over the samples."""
    session = session_of(model, folder)
    names = [output.name[len(_MARK) :] for output in session.get_outputs()]
    squares = {name: np.zeros(2) for name in names}
    for sample in samples:
        for name, pair in zip(names, session.run(None, dict(sample)), strict=True):
            squares[name] += np.asarray(pair, np.float64)
    return squares


def _compared(graph: Opened, low: onnx.ModelProto, values: Collection[str], *, alone: bool) -> onnx.ModelProto:
    """Both graphs in one, and of each value [squares of the difference, squares in float32] as its only outputs.

    With `alone` the mixed-precision nodes read these values from the float32 graph.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    other = compose.add_prefix(low, _TYPED, rename_inputs=False).graph
    for node in other.node if alone else ():
        for index, name in enumerate(node.input):
            if name.startswith(_TYPED) and name[len(_TYPED) :] in values:
                node.input[index] = name[len(_TYPED) :]
    model.graph.node.extend(other.node)
    model.graph.initializer.extend(other.initializer)
    one = numpy_helper.from_array(np.array([1], np.int64), f"{_MARK}shape")
    model.graph.initializer.append(one)
    del model.graph.output[:]
    for name in values:
        mark = f"{_MARK}{name}"
        difference = f"{mark}/difference"
        model.graph.node.append(helper.make_node("Sub", [f"{_TYPED}{name}", name], [difference], name=difference))
        pair = []
        for what, source in (("error", difference), ("value", name)):
            found = f"{mark}/{what}"
            model.graph.node.append(helper.make_node("ReduceSumSquare", [source], [found], name=found, keepdims=0))
            pair.append(f"{found}/row")
            model.graph.node.append(helper.make_node("Reshape", [found, one.name], [pair[-1]], name=pair[-1]))
        model.graph.node.append(helper.make_node("Concat", pair, [mark], name=mark, axis=0))
        model.graph.output.append(helper.make_tensor_value_info(mark, TensorProto.FLOAT, [2]))
    return model


def _relative(difference: float, whole: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return math.sqrt(difference / whole) if whole else math.inf if difference else 0.0


def _computed_in(low: Opened, name: str) -> FloatType:
    """The type of the node that makes a value: an output of the graph comes from it by a cast."""
    node = low.producers[name]
    while node.op_type == "Cast":
        name = node.input[0]
        node = low.producers[name]
    return NAME[low.types[name]]


def write_report(report: ErrorReport, path: str | Path) -> None:
    """The report as JSON, whole or not at all; an error that is not finite is null.

    Raises:
        OutputError: the file cannot be written.
    """
    graphs = {
        name: [
            {key: None if value in (math.inf, -math.inf) else value for key, value in asdict(row).items()}
            for row in rows
        ]
        for name, rows in report.graphs.items()
    }
    content = {
        "schema_version": 1,
        "precision": report.precision,
        "measured": report.measured.model_dump(mode="json"),
        "runs": report.runs,
        "graphs": graphs,
    }
    with atomic_write(path) as stream:
        stream.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
