"""Graphs of standard ONNX operators alone: functions inlined, and no arithmetic on shapes that are known.

OpenVINO, ncnn and TVM read no model-local functions. ONNX Runtime and TensorRT read both forms of a graph, but the
compiled kernels of `moebius_runtime.kernels` need the functions.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from moebius_export.errors import ExportError
from moebius_export.graph.cost import function_calls
from moebius_export.graph.opened import opened_model, with_types

INLINE_RULE = "inline_functions"
"""The name of this rewrite in a manifest."""

_STANDARD = ("", "ai.onnx")


def standard_only(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Returns an equal model of standard operators, and the number of function calls that were inlined.

    `Shape` of a value with static dimensions becomes a constant, and `Identity` nodes between values are dropped.
    Nodes of a function's body are called CALL/NODE. Weights in another file stay there.

    Args:
        model: its weights are not read. It is not changed.

    Raises:
        ExportError: control flow, contradicting types, or an operator of another domain that is no function.
    """
    calls = len(function_calls(model))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    result = opened_model(copy)
    if foreign := sorted({f"{node.domain}::{node.op_type}" for node in result.graph.node} - _known(result)):
        raise ExportError(
            f"the graph has operators that are neither standard nor functions: {', '.join(foreign)}; such a file runs "
            "in ONNX Runtime alone"
        )
    _shapes_to_constants(result.graph)
    _drop_identities(result.graph)
    opsets = [entry for entry in result.opset_import if entry.domain in _STANDARD]
    del result.opset_import[:]
    result.opset_import.extend(opsets)
    del result.graph.value_info[:]  # of values that are gone too
    return with_types(result), calls


def _known(model: onnx.ModelProto) -> set[str]:
    return {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain in _STANDARD}


def _shapes_to_constants(graph: onnx.GraphProto) -> None:
    """Replaces `Shape` nodes of values with static dimensions by int64 initializers, in place."""
    static = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dimensions = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dimensions):
            static[value.name] = [d.dim_value for d in dimensions]
    kept = []
    for node in graph.node:
        if node.op_type != "Shape" or node.input[0] not in static:
            kept.append(node)
            continue
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        dims = static[node.input[0]][ends.get("start", 0) : ends.get("end")]
        graph.initializer.append(numpy_helper.from_array(np.array(dims, np.int64), node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _drop_identities(graph: onnx.GraphProto) -> None:
    """Drops `Identity` nodes whose output is not the graph's, in place."""
    outputs = {value.name for value in graph.output}
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = source.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
