"""Models of one operator each, with the functions that define them, and how far the compiled kernels are from these.

As a script: compares every case with the variant that MOEBIUS_KERNELS names, and writes JSON.
"""

import json

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import TensorProto, helper

from moebius_runtime import kernels

HEADER = '<opset_import: ["" : 20], domain: "moebius">'
FUNCTIONS = {
    "FeedForward": """
FeedForward <size, image_shape, epsilon, hidden>
    (x, gain, shift, expand, expand_bias, depthwise, depthwise_bias, project) => (y) {
  normal = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, gain, shift)
  channels_first = Transpose <perm = [0, 2, 1]> (normal)
  to_image = Constant <value_ints: ints = @image_shape> ()
  image = Reshape (channels_first, to_image)
  expanded = Conv (image, expand, expand_bias)
  expanded_gate = Sigmoid (expanded)
  active = Mul (expanded, expanded_gate)
  convolved = Conv <pads = [1, 1, 1, 1], group: int = @hidden> (active, depthwise, depthwise_bias)
  value, gate = Split <axis = 1, num_outputs = 2> (convolved)
  opened = Sigmoid (gate)
  active_gate = Mul (gate, opened)
  gated = Mul (value, active_gate)
  projected = Conv (gated, project)
  flat = Constant <value = int64[3] {0, 0, -1}> ()
  in_line = Reshape (projected, flat)
  tokens = Transpose <perm = [0, 2, 1]> (in_line)
  y = Add (x, tokens)
}
""",
    "LocalLambda": """
LocalLambda <heads, size, planes_shape, margin, lambdas_shape, heads_shape>
    (query, values, summary, window) => (y) {
  channels_first = Transpose <perm = [0, 2, 1]> (values)
  to_planes = Constant <value_ints: ints = @planes_shape> ()
  planes = Reshape (channels_first, to_planes)
  one = Constant <value = int64[1] {1}> ()
  kernel = Unsqueeze (window, one)
  convolved = Conv <pads: ints = @margin> (planes, kernel)
  to_lambdas = Constant <value_ints: ints = @lambdas_shape> ()
  by_value = Reshape (convolved, to_lambdas)
  lambdas = Transpose <perm = [0, 3, 2, 1]> (by_value)
  content = Unsqueeze (summary, one)
  both = Add (lambdas, content)
  to_heads = Constant <value_ints: ints = @heads_shape> ()
  per_head = Reshape (query, to_heads)
  out = MatMul (per_head, both)
  to_tokens = Constant <value = int64[3] {0, 0, -1}> ()
  y = Reshape (out, to_tokens)
}
""",
}


def random(seed, *shape, scale=1.0):
    return (np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32)


def feed_forward(batch, height, width, channels, hidden):
    attributes = {"size": [height, width], "image_shape": [0, 0, height, width], "epsilon": 1e-5, "hidden": hidden}
    inputs = {
        "x": 0.5 + random(0, batch, height * width, channels),  # a mean that the norm has to take off
        "gain": 1 + random(1, channels, scale=0.1),
        "shift": random(2, channels, scale=0.1),
        "expand": random(3, hidden, channels, 1, 1, scale=channels**-0.5),
        "expand_bias": random(4, hidden, scale=0.1),
        "depthwise": random(5, hidden, 1, 3, 3, scale=1 / 3),
        "depthwise_bias": random(6, hidden, scale=0.1),
        "project": random(7, channels, hidden // 2, 1, 1, scale=20 * hidden**-0.5),  # so that x does not drown it
    }
    return "FeedForward", attributes, inputs


def local_lambda(batch, height, width, depth, heads, reach):
    attributes = {
        "heads": heads,
        "size": [height, width],
        "planes_shape": [-1, 1, height, width],
        "margin": [reach // 2] * 4,
        "lambdas_shape": [-1, depth, depth, height * width],
        "heads_shape": [0, 0, heads, -1],
    }
    inputs = {
        "query": random(0, batch, height * width, heads * depth),
        "values": random(1, batch, height * width, depth),
        "summary": random(2, batch, depth, depth),
        "window": random(3, depth, reach, reach, scale=1 / reach),
    }
    return "LocalLambda", attributes, inputs


# Sizes that fill no register, tile or block evenly, single rows and columns, and some of the network's.
CASES = {
    "ff 1x1": feed_forward(1, 1, 1, 1, 2),
    "ff one row": feed_forward(1, 1, 9, 3, 4),
    "ff one column": feed_forward(3, 7, 1, 5, 6),
    "ff odd": feed_forward(2, 5, 7, 24, 120),
    "ff wide": feed_forward(1, 3, 67, 17, 34),
    "ff network": feed_forward(1, 16, 16, 64, 320),
    "λ 1x1": local_lambda(1, 1, 1, 1, 1, 1),
    "λ one row": local_lambda(2, 1, 13, 4, 3, 5),
    "λ one column": local_lambda(1, 11, 1, 3, 2, 7),
    "λ odd": local_lambda(1, 9, 11, 13, 3, 5),
    "λ window beyond the picture": local_lambda(1, 6, 6, 5, 4, 15),
    "λ network": local_lambda(2, 16, 16, 40, 8, 15),
}


def model(operator, attributes, inputs, body=True, shapes=True):
    """A model of one node; without `body` it needs the kernels, without `shapes` it takes inputs of any."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape if shapes else None)
        for name, array in inputs.items()
    ]
    node = helper.make_node(operator, list(inputs), ["y"], name=f"one/{operator}", domain="moebius", **attributes)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moebius", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        made.functions.append(onnx.parser.parse_function(HEADER + FUNCTIONS[operator]))
    return made


def session(made, compiled=True, threads=2, **more):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for name, value in more.items():
        setattr(options, name, value)
    if compiled:
        options.register_custom_ops_library(str(kernels.library_path()))
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def errors():
    """Case -> relative L2 distance of the kernel from the function's body."""
    found = {}
    for name, (operator, attributes, inputs) in CASES.items():
        expected = session(model(operator, attributes, inputs), compiled=False).run(None, inputs)[0].astype(np.float64)
        got = session(model(operator, attributes, inputs)).run(None, inputs)[0]
        assert got.shape == expected.shape
        found[name] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    return found


if __name__ == "__main__":
    print(json.dumps({"variant": kernels.variant(kernels.library_path()), "errors": errors()}))
