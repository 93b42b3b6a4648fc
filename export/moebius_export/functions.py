"""The λ operators as ONNX model-local functions of domain `moebius`, one node per layer of the exported graph.

A function's body is made of standard operators, so every runtime loads the file; a runtime with a kernel or plugin
of that name takes the node whole. One body serves every resolution: what depends on sizes is in the node's attributes
and in two index tables among its inputs, which belong to the body and which a kernel may ignore.

The operators and their meaning are in `moebius.lambda_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx.parser
import torch

from moebius import lambda_ops
from moebius_export import layers

DOMAIN = "moebius"
VERSION = 1
# Opset 20 loads everywhere: ONNX Runtime, TensorRT 10.3 (JetPack 6) to 11, TensorRT-RTX.
OPSET = 20

_LAMBDA_SUMMARY = """
LambdaSummary (keys, values) => (summary) {
  weights = Softmax <axis = -1> (keys)
  summary = MatMul (weights, values)
}
"""

_INTERACTIVE_LAMBDA = """
InteractiveLambda <heads, heads_shape, rows_shape, tokens_shape> (query, keys, values) => (y) {
  to_heads = Constant <value_ints: ints = @heads_shape> ()
  per_head = Reshape (query, to_heads)
  one = Constant <value = int64[1] {1}> ()
  keys_of_all = Unsqueeze (keys, one)
  scores = MatMul (per_head, keys_of_all)
  to_rows = Constant <value_ints: ints = @rows_shape> ()
  rows = Reshape (scores, to_rows)
  values_of_all = Unsqueeze (values, one)
  out = MatMul (rows, values_of_all)
  to_tokens = Constant <value_ints: ints = @tokens_shape> ()
  y = Reshape (out, to_tokens)
}
"""

# Shifted kernels: see `lambda_ops.local_lambda`, which this follows line by line.
_LOCAL_LAMBDA = """
LocalLambda <heads, size, tile, depth_shape, image_shape, margin, near_shape, kernels_shape, tiles_shape, places_shape,
             bands_shape, products_shape, untiled_shape, tokens_shape>
    (query, values, summary, window, neighbours, taps) => (y) {
  to_depth = Constant <value_ints: ints = @depth_shape> ()
  per_head = Reshape (query, to_depth)
  content = MatMul (per_head, summary)

  to_image = Constant <value_ints: ints = @image_shape> ()
  image = Reshape (values, to_image)
  pads = Constant <value_ints: ints = @margin> ()
  bordered = Pad (image, pads)
  places_of_picture = Reshape (bordered, to_depth)
  gathered = Gather <axis = 1> (places_of_picture, neighbours)
  to_near = Constant <value_ints: ints = @near_shape> ()
  near = Reshape (gathered, to_near)

  flat = Constant <value = int64[2] {0, -1}> ()
  all_taps = Reshape (window, flat)
  no_tap = Constant <value = int64[4] {0, 0, 0, 1}> ()
  taps_and_zero = Pad (all_taps, no_tap)
  shifted = Gather <axis = 1> (taps_and_zero, taps)
  to_kernels = Constant <value_ints: ints = @kernels_shape> ()
  by_depth = Reshape (shifted, to_kernels)
  kernels = Transpose <perm = [1, 0, 2]> (by_depth)

  to_tiles = Constant <value_ints: ints = @tiles_shape> ()
  tiled = Reshape (query, to_tiles)
  by_place = Transpose <perm = [2, 4, 0, 1, 3, 5]> (tiled)
  to_places = Constant <value_ints: ints = @places_shape> ()
  q = Reshape (by_place, to_places)
  bands_by_place = MatMul (q, kernels)
  to_bands = Constant <value_ints: ints = @bands_shape> ()
  bands_of_tiles = Reshape (bands_by_place, to_bands)
  bands_by_tile = Transpose <perm = [1, 0, 2]> (bands_of_tiles)
  to_products = Constant <value_ints: ints = @products_shape> ()
  bands = Reshape (bands_by_tile, to_products)
  positions = MatMul (bands, near)
  to_untiled = Constant <value_ints: ints = @untiled_shape> ()
  by_tile = Reshape (positions, to_untiled)
  in_order = Transpose <perm = [0, 1, 3, 2, 4, 5]> (by_tile)
  to_tokens = Constant <value_ints: ints = @tokens_shape> ()
  position_tokens = Reshape (in_order, to_tokens)
  content_tokens = Reshape (content, to_tokens)
  y = Add (position_tokens, content_tokens)
}
"""

# The same by convolution, as the network is written: what a GPU without a kernel of its own likes best.
_LOCAL_LAMBDA_CONVOLUTION = """
LocalLambda <heads, size, planes_shape, margin_hw, lambdas_shape, heads_shape, tokens_shape>
    (query, values, summary, window) => (y) {
  channels_first = Transpose <perm = [0, 2, 1]> (values)
  to_planes = Constant <value_ints: ints = @planes_shape> ()
  planes = Reshape (channels_first, to_planes)
  one = Constant <value = int64[1] {1}> ()
  kernel = Unsqueeze (window, one)
  convolved = Conv <pads: ints = @margin_hw> (planes, kernel)
  to_lambdas = Constant <value_ints: ints = @lambdas_shape> ()
  by_value = Reshape (convolved, to_lambdas)
  lambdas = Transpose <perm = [0, 3, 2, 1]> (by_value)
  content = Unsqueeze (summary, one)
  both = Add (lambdas, content)
  to_heads = Constant <value_ints: ints = @heads_shape> ()
  per_head = Reshape (query, to_heads)
  out = MatMul (per_head, both)
  to_tokens = Constant <value_ints: ints = @tokens_shape> ()
  y = Reshape (out, to_tokens)
}
"""


FORMS = ("tiles", "convolution")
"""The exact bodies of `LocalLambda`."""


_INTEGERS = ("heads", "hidden", "groups", "first_channels", "second_channels")  # other attributes are lists


def function_protos(form: str) -> dict[str, onnx.FunctionProto]:
    """Name -> function, with the body of `LocalLambda` in one of `FORMS`."""
    bodies = layers.BODIES | {
        "LambdaSummary": _LAMBDA_SUMMARY,
        "InteractiveLambda": _INTERACTIVE_LAMBDA,
        "LocalLambda": {"tiles": _LOCAL_LAMBDA, "convolution": _LOCAL_LAMBDA_CONVOLUTION}[form],
    }
    header = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">'
    protos = {name: onnx.parser.parse_function(header + body) for name, body in bodies.items()}
    for proto in protos.values():
        for node in proto.node:  # so that a profile can say which of them it means
            node.name = node.output[0]
    return protos


def attach_functions(model: onnx.ModelProto, form: str) -> None:
    """Adds the functions that the graph's nodes call, in place."""
    called = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    model.functions.extend(proto for name, proto in sorted(function_protos(form).items()) if name in called)
    if called and DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


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
    """What `torch.onnx.export` writes for each operator of `moebius.lambda_ops`: its `custom_translation_table`."""
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
