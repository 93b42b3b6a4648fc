"""The λ operators as ONNX model-local functions of domain `moebius`, one node per layer of the exported graph.

A runtime with a kernel or plugin of that name runs the node as one operator; others run the function's body
(`moebius_export.graph.function_bodies`). The index tables among a node's inputs belong to the body.

The operators and their meaning are in `moebius.network.lambda_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx.parser
import torch

from moebius.network import lambda_ops
from moebius_export.graph import layers
from moebius_export.graph.function_bodies import DOMAIN, FORMS, OPSET, VERSION, bodies

__all__ = ["DOMAIN", "FORMS", "OPSET", "VERSION", "attach_functions", "function_protos", "translations"]

_INTEGERS = ("heads", "hidden", "groups", "first_channels", "second_channels")  # other attributes are lists


def function_protos(form: str, *, open_sizes: bool = False) -> dict[str, onnx.FunctionProto]:
    """Name -> function, with the body of `LocalLambda` in one of `FORMS`; `open_sizes` as in `bodies`."""
    protos = {name: onnx.parser.parse_function(text) for name, text in bodies(form, open_sizes=open_sizes).items()}
    for proto in protos.values():
        for node in proto.node:  # names for profiles
            node.name = node.output[0]
    return protos


def attach_functions(model: onnx.ModelProto, form: str) -> None:
    """Adds the functions that the graph's nodes call, in place."""
    called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    open_sizes = any(_has_open_size(node) for node in model.graph.node)
    protos = function_protos(form, open_sizes=open_sizes)
    model.functions.extend(proto for name, proto in sorted(protos.items()) if name in called)
    if called and DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


def _has_open_size(node: onnx.NodeProto) -> bool:
    """Whether an upsampling leaves its picture's size open."""
    shapes = (attribute.ints for attribute in node.attribute if attribute.name == "phases_shape")
    return node.op_type == "UpsampleConv3x3" and any(layers.OPEN in shape[2:] for shape in shapes)


def _operator(function: onnx.FunctionProto) -> Any:
    """The function as an operator that onnxscript can write a call of."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    parameter = OpSchema.FormalParameter
    kinds = dict.fromkeys(_INTEGERS, OpSchema.AttrType.INT) | {"epsilon": OpSchema.AttrType.FLOAT}
    indices = ("neighbours", "taps")
    schema = OpSchema(
        function.name,
        DOMAIN,
        VERSION,
        inputs=[parameter(name, "tensor(int64)" if name in indices else "T") for name in function.input],
        outputs=[parameter(name, "T") for name in function.output],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "numbers")],
        attributes=[
            OpSchema.Attribute(name, kinds.get(name, OpSchema.AttrType.INTS), "", required=True)
            for name in function.attribute
        ],
    )
    return Op(Opset(DOMAIN, VERSION), function.name, schema)


def translations(form: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` writes for each operator of `moebius.network.lambda_ops`: its
    `custom_translation_table`."""
    from onnxscript import opset20 as op

    operators = {name: _operator(proto) for name, proto in function_protos(form).items()}
    local_op, interactive_op = operators["LocalLambda"], operators["InteractiveLambda"]

    def table(indices: torch.Tensor) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(indices.numpy()))

    def summary(keys: Any, values: Any) -> Any:
        return operators["LambdaSummary"](keys, values)

    def interactive(query: Any, keys: Any, values: Any) -> Any:
        branches, positions, depth, tokens = keys.shape
        heads = query.shape[3] // depth
        return interactive_op(
            query,
            keys,
            values,
            heads=heads,
            heads_shape=[0, 0, 0, heads, -1],
            rows_shape=[0, 0, -1, tokens],
            tokens_shape=[branches, -1, positions, heads * values.shape[2]],
        )

    def local(query: Any, values: Any, summary: Any, window: Any, size: Sequence[int], tile: Sequence[int]) -> Any:
        depth, reach, _ = window.shape
        heads = query.shape[2] // depth
        common = {"heads": heads, "size": list(size)}
        if form == "convolution":
            shapes = convolution_shapes(size, heads, depth, reach)
            return local_op(query, values, summary, window, **common, **shapes)
        shapes = tile_shapes(size, tile, heads, depth, reach)
        around = table(lambda_ops.neighbourhoods(*size, *tile, reach))
        taps = table(lambda_ops.window_places(*tile, reach))
        return local_op(query, values, summary, window, around, taps, **common, tile=list(tile), **shapes)

    return layers.translations(operators) | {
        torch.ops.moebius.lambda_summary.default: summary,
        torch.ops.moebius.interactive_lambda.default: interactive,
        torch.ops.moebius.local_lambda.default: local,
    }


def tile_shapes(size: Sequence[int], tile: Sequence[int], heads: int, depth: int, reach: int) -> dict[str, list[int]]:
    """The shape attributes of `LocalLambda` in the form "tiles"; 0 and -1 as Reshape means them."""
    (height, width), (tall, wide) = size, tile
    rows, columns, places = height // tall, width // wide, tall * wide
    near = (tall + reach - 1) * (wide + reach - 1)
    pad, channels = reach // 2, heads * depth
    return {
        "depth_shape": [0, -1, depth],
        "image_shape": [0, height, width, depth],
        "margin": [0, pad, pad, 0, 0, pad, pad, 0],
        "near_shape": [-1, near, depth],
        "kernels_shape": [0, places, near],
        "tiles_shape": [-1, rows, tall, columns, wide, channels],
        "places_shape": [places, -1, depth],
        "bands_shape": [places, -1, heads * near],
        "products_shape": [-1, places * heads, near],
        "untiled_shape": [-1, rows, columns, tall, wide, channels],
        "tokens_shape": [-1, height * width, channels],
    }


def convolution_shapes(size: Sequence[int], heads: int, depth: int, reach: int) -> dict[str, list[int]]:
    """The shape attributes of `LocalLambda` in the form "convolution"."""
    height, width = size
    return {
        "planes_shape": [-1, 1, height, width],
        "margin_hw": [reach // 2] * 4,
        "lambdas_shape": [-1, depth, depth, height * width],
        "heads_shape": [0, 0, heads, -1],
        "tokens_shape": [0, 0, -1],
    }
