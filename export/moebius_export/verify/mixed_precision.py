"""Checks mixed-precision files: emulated output, types against the plan, weights against the float32 file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from moebius_export.errors import ExportError
from moebius_export.graph.cost import CostError, macs_by_dtype, node_costs
from moebius_export.graph.kinds import ELEMENT, NAME, round_trip
from moebius_export.graph.opened import Opened, Weights, opened, with_types
from moebius_export.graph.sessions import session_of
from moebius_export.precision.emulate import emulated
from moebius_export.precision.plan import read_plan
from moebius_export.precision.rules import is_statistic
from moebius_export.verify.results import Check, Placement, verdict
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision

EMULATED: tuple[Precision, ...] = ("fp16", "bf16")
"""Precisions that ONNX Runtime's CPU cannot compute in, so they are emulated."""


def emulated_session(path: Path) -> Any:
    """A session that emulates a mixed-precision file. Raises `BundleError` or `ExportError` if it cannot be made."""
    return session_of(emulated(path), path.parent)


def emulated_sessions(bundle: Bundle, precision: Precision) -> Mapping[GraphName, Callable[[], Any]]:
    """Functions that create the emulated session of each graph with a file of the precision."""

    def make(name: GraphName) -> Any:
        return emulated_session(bundle.model_file(name, precision))

    return {name: partial(make, name) for name, info in bundle.manifest.graphs.items() if precision in info.files}


def mixed_precision_checks(
    subject: str, bundle: Bundle, graph: GraphName, precision: Precision
) -> tuple[list[Check], Placement | None]:
    """Checks a mixed-precision file without running it.

    Returns:
        The checks: the inputs of every node have one type; the statistics of norms are float32; the types match the
        plan; the weights are those of the float32 file, rounded. And the share of the MACs by type.
    """
    path = bundle.model_file(graph, precision)
    model = with_types(onnx.load(str(path), load_external_data=False))
    file = Opened(model)
    checks = [verdict("placement", subject, "inputs of one type", _disagreement(file))]
    checks.append(verdict("placement", subject, "norm statistics in fp32", _low_statistic(file)))
    planned = bundle.graph(graph).files[precision].plan
    if planned is None:
        checks.append(Check("placement", subject, "types of the plan", "not run", detail="the file has no plan"))
    else:
        checks.append(verdict("placement", subject, "types of the plan", _unplanned(file, bundle.path / planned)))
    checks.append(_weights_check(subject, bundle, graph, path, file))
    try:
        macs = macs_by_dtype(node_costs(model))
    except CostError as error:
        checks.append(Check("placement", subject, "MACs", "not run", detail=str(error)))
        return checks, None
    total = max(1, sum(macs.values()))
    rows = [
        ("the mixed-precision file", kind.lower(), count / 1e9, count / total) for kind, count in sorted(macs.items())
    ]
    return checks, Placement(subject, rows, 0.0)


def _disagreement(file: Opened) -> str | None:
    """Describes the first node whose inputs have different types."""
    for node in file.model.graph.node:
        if not node.output or not file.is_float(node.output[0]) or node.op_type == "Cast":
            continue
        kinds = {file.types[node.input[index]] for index in file.float_inputs(node)} | {file.types[node.output[0]]}
        if len(kinds) > 1:
            return f"{node.name} mixes {', '.join(sorted(TensorProto.DataType.Name(kind) for kind in kinds))}"
    return None


def _low_statistic(file: Opened) -> str | None:
    """Describes the first node of a norm's statistics that is not float32.

    The emulation rounds only the result of such a node, while a device may round every sum inside.
    """
    low = [
        node
        for node in file.model.graph.node
        if file.computes(node) and is_statistic(node) and file.types[node.output[0]] != TensorProto.FLOAT
    ]
    if not low:
        return None
    more = f" and {len(low) - 1} more" if len(low) > 1 else ""
    kind = _called(file.types[low[0].output[0]])
    return f"{low[0].name}{more} in {kind}, whose sums are not emulated: set the type to fp32 in the plan and --reapply"


def _unplanned(file: Opened, path: Path) -> str | None:
    """Describes the first node or weight whose type differs from the plan."""
    try:
        plan = read_plan(path)
    except ExportError as error:
        return str(error)
    for name, kind in plan.computes.items():
        node = file.nodes.get(name)
        if node is None:
            return f"the plan names {name}, which is not in the file"
        if file.types[node.output[0]] != ELEMENT[kind]:
            return f"{name} is {_called(file.types[node.output[0]])}, the plan says {kind}"
    for name, kind in plan.stores.items():
        if name not in file.stored or file.types[name] != ELEMENT[kind]:
            return f"weight {name} is {_called(file.types.get(name, 0))}, the plan says {kind}"
    return None


def _called(kind: int) -> str:
    return NAME.get(kind, TensorProto.DataType.Name(kind))


def _weights_check(subject: str, bundle: Bundle, graph: GraphName, path: Path, file: Opened) -> Check:
    name = "equal the fp32 file's, rounded"
    if "fp32" not in bundle.graph(graph).files:
        words = "the bundle has no fp32 file to compare with: the weights are checked by the output alone"
        return Check("weights", subject, name, "note", detail=words)
    source = bundle.model_file(graph)
    kept = [function.name for function in file.model.functions]
    original, there = Opened(opened(source, kept)), Weights(source.parent)
    stored = Weights(path.parent)
    wrong = []
    for weight, tensor in file.stored.items():
        if weight not in original.stored:
            wrong.append(f"{weight} is not in the fp32 file")
            continue
        got, expected = stored.array(tensor), there.array(original.stored[weight])
        kind = NAME.get(tensor.data_type)
        if kind is not None:
            expected = round_trip(np.asarray(expected, np.float32), kind)
        if not np.array_equal(np.asarray(got, expected.dtype), expected):
            wrong.append(weight)
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return verdict("weights", subject, name, f"{', '.join(wrong[:3])}{more}" if wrong else None)


TYPED, typed_checks = EMULATED, mixed_precision_checks  # their names in version 0.1
