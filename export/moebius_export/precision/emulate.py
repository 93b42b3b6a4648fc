"""Emulates a mixed-precision file in float32, on a machine without fp16 arithmetic.

ONNX Runtime's CPU runs fp16 nodes in float32 and drops the casts that it put between them, so the rounding is lost.
Here the graph is float32 throughout, and each value of a lower type in the file passes through a cast to that type
and back, which the runtime keeps. A node computes in float32 and its result is rounded once: as TensorRT does with the
sums of products. Everything comes from the file, nothing from its plan.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from moebius_export.graph.opened import FLOATS, MOVES, with_types

_LOW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


def emulated(path: Path) -> onnx.ModelProto:
    """Returns the float32 graph that emulates a mixed-precision file, whose weights stay in their file.

    Args:
        path: a mixed-precision ONNX file with a verified hash.

    Raises:
        ExportError: the file's types contradict each other.
    """
    return emulated_model(onnx.load(str(path), load_external_data=False))


def emulated_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """As `emulated`, of a model in memory. Functions are inlined, so that each value of their bodies is rounded."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = with_types(model)
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.data_type in _LOW:
            widened[tensor.name] = f"{tensor.name}/widened"
            nodes.append(_cast(tensor.name, widened[tensor.name], TensorProto.FLOAT))
    for original in graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for index, name in enumerate(node.input):
            node.input[index] = widened.get(name, name)
        if node.op_type == "Cast" and types[original.input[0]] in FLOATS:
            nodes += _float_cast(node, types[original.output[0]])
        elif node.op_type in MOVES:
            nodes.append(node)
        else:
            after = []
            for index, name in enumerate(node.output):
                if types.get(name) in _LOW:
                    node.output[index] = f"{name}/exact"
                    after += _rounded(node.output[index], name, types[name])
            nodes += [_float_constant(node), *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _float_cast(node: onnx.NodeProto, kind: int) -> list[onnx.NodeProto]:
    if kind in _LOW:
        return _rounded(node.input[0], node.output[0], kind)
    return [helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name)]


def _float_constant(node: onnx.NodeProto) -> onnx.NodeProto:
    """A `Constant` or `ConstantOfShape` of less than float32 as one of float32."""
    for attribute in node.attribute:
        if attribute.type == attribute.TENSOR and attribute.t.data_type in _LOW:
            wide = onnx.numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide, attribute.t.name))
    return node


def _rounded(source: str, target: str, kind: int) -> list[onnx.NodeProto]:
    low = f"{target}/{TensorProto.DataType.Name(kind).lower()}"
    back = helper.make_node("Cast", [low], [target], name=f"{target}/rounded", to=TensorProto.FLOAT)
    return [_cast(source, low, kind), back]


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=target, to=kind)
