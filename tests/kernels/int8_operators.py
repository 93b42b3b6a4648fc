"""Models of one operator in bytes each, and how far the compiled kernels are from the functions that define these.

As a script: compares every case with the variant that MOEBIUS_KERNELS names, and writes JSON.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from moebius_export.int8_bodies import bodies
from moebius_runtime import kernels

_spec = importlib.util.spec_from_file_location("operators", Path(__file__).with_name("operators.py"))
operators = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(operators)
random = operators.random
FUNCTIONS = bodies()


def quantiser(name, seed, channels, low, high):
    """Each channel with a range of its own around [low, high]."""
    factor = np.random.RandomState(seed).uniform(0.7, 1.3, channels)
    scale = factor * (high - low) / 255
    return {
        f"{name}_inverse": (1 / scale).astype(np.float32),
        f"{name}_zero": np.round(-low / scale).astype(np.float32),
    }


def product(name, seed, outputs, inputs, packed, dims=()):
    weight = np.random.RandomState(seed).randint(-127, 128, (outputs, inputs)).astype(np.int8)
    arrays = {
        f"{name}_scale": (0.01 + np.abs(random(seed + 1, outputs))) / (127 * 64 * inputs**0.5),
        f"{name}_offset": random(seed + 2, outputs, scale=0.3),
    }
    if packed:
        rows = np.zeros((-(-outputs // 16) * 16, inputs), np.int8)
        rows[:outputs] = weight
        weight = rows.reshape(-1, 16, inputs // 4, 4).transpose(0, 2, 1, 3)
    else:
        weight = weight.reshape(outputs, inputs, *dims)
    return {name: np.ascontiguousarray(weight)} | arrays


def linear(batch, tokens, inputs, outputs, to_picture=False):
    arrays = {"x": random(0, batch, tokens, inputs)} | quantiser("x", 1, inputs, -2.5, 2.5)
    arrays |= product("weight", 2, outputs, inputs, packed=not to_picture)
    return "Int8LinearToPicture" if to_picture else "Int8Linear", {}, arrays


def rows(tokens, inputs, outputs):
    operator, attributes, arrays = linear(1, tokens, inputs, outputs)
    return operator, attributes, arrays | {"x": arrays["x"][0]}


def feed_forward(batch, height, width, channels, hidden):
    operator, attributes, plain = operators.feed_forward(batch, height, width, channels, hidden)
    arrays = {"x": plain["x"]} | quantiser("x", 1, channels, -2.5, 2.5)
    arrays |= product("expand", 2, hidden, channels, packed=True)
    arrays |= {name: plain[name] for name in ("depthwise", "depthwise_bias")}
    arrays |= quantiser("gated", 6, hidden // 2, -0.4, 0.6)
    arrays |= product("project", 7, channels, hidden // 2, packed=True)
    return f"Int8{operator}", attributes, arrays


def residual_block(batch, height, width, inputs, outputs, groups, rows=1):
    operator, attributes, plain = operators.residual_block(batch, height, width, inputs, outputs, groups, rows)
    arrays = {name: plain[name] for name in ("x", "time")}
    for seed, half, channels in ((10, "first", inputs), (20, "second", outputs)):
        arrays |= {f"{half}_{name}": plain[f"{half}_{name}"] for name in ("gain", "shift", "depthwise")}
        arrays[f"{half}_depthwise_bias"] = plain[f"{half}_depthwise_bias"]
        arrays |= quantiser(half, seed, channels, 0, 1.5)
        arrays |= product(f"{half}_pointwise", seed, outputs, channels, packed=False, dims=(1, 1))
    if inputs != outputs:
        arrays |= quantiser("shortcut", 2, inputs, -2.5, 3.5)
        arrays |= product("shortcut", 3, outputs, inputs, packed=False, dims=(1, 1))
    return f"Int8{operator}", attributes, arrays


def convolution(batch, height, width, inputs, outputs, enlarged):
    arrays = {"x": random(0, batch, inputs, height, width)} | quantiser("x", 1, inputs, -2.5, 3)
    if not enlarged:
        arrays |= product("weight", 2, outputs, 9 * inputs, packed=False)
        arrays["weight"] = arrays["weight"].reshape(outputs, 3, 3, inputs)
        return "Int8DownsampleConv3x3", {}, arrays
    arrays |= product("weight", 2, 4 * outputs, 4 * inputs, packed=False)
    arrays["weight"] = arrays["weight"].reshape(4, outputs, 2, 2, inputs)
    arrays |= {f"weight_{name}": arrays[f"weight_{name}"].reshape(4, outputs) for name in ("scale", "offset")}
    return "Int8UpsampleConv3x3", {"phases_shape": [0, -1, height, width]}, arrays


def upsample(*sizes):
    return convolution(*sizes, enlarged=True)


def downsample(*sizes):
    return convolution(*sizes, enlarged=False)


# Sizes that fill no register, tile or block evenly, single rows and columns, and some of the network's.
CASES = {
    "linear 1": linear(1, 1, 4, 1),
    "linear odd": linear(2, 13, 20, 37),
    "linear rows": rows(13, 20, 37),
    "linear wide": linear(1, 131, 68, 40),
    "linear network": linear(2, 256, 320, 400),
    "picture 1": linear(1, 1, 4, 1, to_picture=True),
    "picture odd": linear(3, 13, 20, 37, to_picture=True),
    "picture wide": linear(1, 131, 68, 15, to_picture=True),
    "picture network": linear(2, 256, 320, 320, to_picture=True),
    "down 1x1": downsample(1, 1, 1, 4, 3),
    "down odd": downsample(2, 5, 7, 12, 17),
    "down one row": downsample(1, 1, 70, 4, 5),
    "down one column": downsample(1, 9, 1, 4, 5),
    "down network": downsample(2, 32, 32, 64, 64),
    "up 1x1": upsample(1, 1, 1, 4, 3),
    "up odd": upsample(2, 5, 7, 12, 17),
    "up one row": upsample(1, 1, 37, 4, 5),
    "up one column": upsample(1, 9, 1, 4, 5),
    "up network": upsample(2, 16, 16, 64, 64),
    "ff 1x1": feed_forward(1, 1, 1, 4, 32),
    "ff one row": feed_forward(1, 1, 9, 8, 32),
    "ff one column": feed_forward(3, 7, 1, 12, 96),
    "ff odd": feed_forward(2, 5, 7, 24, 160),
    "ff wide": feed_forward(1, 5, 67, 20, 288),
    "ff network": feed_forward(2, 16, 16, 64, 320),
    "rb 1x1": residual_block(1, 1, 1, 8, 8, 1),
    "rb one row": residual_block(1, 1, 9, 4, 4, 2),
    "rb one column": residual_block(3, 7, 1, 20, 20, 5, rows=3),
    "rb odd": residual_block(2, 5, 7, 24, 24, 3),
    "rb wide": residual_block(1, 3, 67, 20, 20, 1),
    "rb network": residual_block(2, 16, 16, 64, 64, 32),
    "prb 1x1": residual_block(1, 1, 1, 4, 8, 1),
    "prb one row": residual_block(2, 1, 13, 8, 12, 4, rows=2),
    "prb odd": residual_block(2, 5, 7, 24, 36, 3),
    "prb odd, time by picture": residual_block(2, 9, 11, 20, 8, 4, rows=2),
    "prb wide": residual_block(1, 3, 67, 20, 36, 4),
    "prb network": residual_block(2, 16, 16, 96, 64, 32),
}


def model(operator, attributes, inputs, body=True, shapes=True):
    """A model of one node; without `body` it needs the kernels, without `shapes` it takes inputs of any."""
    kinds = {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.float32): TensorProto.FLOAT}
    values = [
        helper.make_tensor_value_info(name, kinds[array.dtype], array.shape if shapes else None)
        for name, array in inputs.items()
    ]
    node = helper.make_node(operator, list(inputs), ["y"], name=f"one/{operator}", domain="moebius", **attributes)
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moebius", 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        made.functions.append(onnx.parser.parse_function(FUNCTIONS[operator]))
    return made


def ordered(operator, inputs):
    """The inputs in the function's order, which is that of the node."""
    proto = onnx.parser.parse_function(FUNCTIONS[operator])
    assert set(proto.input) == set(inputs)
    return {name: inputs[name] for name in proto.input}


CASES = {name: (case[0], case[1], ordered(case[0], case[2])) for name, case in CASES.items()}


def errors():
    """Case -> relative L2 distance of the kernel from the function's body."""
    found = {}
    for name, (operator, attributes, inputs) in CASES.items():
        made = model(operator, attributes, inputs)
        expected = operators.session(made, compiled=False).run(None, inputs)[0].astype(np.float64)
        got = operators.run_guarded(operators.session(made), inputs, expected.shape)
        found[name] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    return found


if __name__ == "__main__":
    print(json.dumps({"variant": kernels.variant(kernels.library_path()), "errors": errors()}))
