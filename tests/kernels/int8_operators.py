"""Models of one operator in bytes each, and how far the compiled kernels are from the functions that define these.

As a script: compares every case with the variant that MOEBIUS_KERNELS names, and writes JSON. Sums of bytes are also
compared with an integer reference, bit by bit, where pairs of products leave 16 bits.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from moebius_export.graph.int8_bodies import bodies
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


def token_norm(x, channels):
    """Values with a mean and a spread that the norm has to take off, and its gain and shift."""
    gain, shift = 1 + random(11, channels, scale=0.1), random(12, channels, scale=0.1)
    return {"x": 0.7 + 3 * x, "gain": gain, "shift": shift}


def norm_linear(batch, tokens, inputs, outputs):
    _, _, arrays = linear(batch, tokens, inputs, outputs)
    return "Int8NormLinear", {"epsilon": 1e-2}, arrays | token_norm(arrays["x"], inputs)


def linear_added(batch, height, width, inputs, outputs):
    _, _, arrays = linear(batch, height * width, inputs, outputs, to_picture=True)
    return "Int8LinearAddedToPicture", {}, arrays | {"skip": random(5, batch, outputs, height, width)}


def linear_of_picture(batch, height, width, inputs, outputs, groups):
    _, _, arrays = linear(batch, height * width, inputs, outputs)
    shapes = {"ones_shape": [groups], "groups_shape": [0, groups, -1], "rows_shape": [0, inputs, -1]}
    x = 0.7 + 3 * random(0, batch, inputs, height, width)
    return "Int8LinearOfPicture", {"groups": groups, "epsilon": 1e-2, **shapes}, arrays | {"x": x}


def norm_feed_forward(batch, height, width, channels, hidden):
    _, attributes, arrays = feed_forward(batch, height, width, channels, hidden)
    return "Int8NormFeedForward", attributes | {"epsilon": 1e-2}, arrays | token_norm(arrays["x"], channels)


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


def convolution(batch, height, width, inputs, outputs, operator):
    arrays = {"x": random(0, batch, inputs, height, width)} | quantiser("x", 1, inputs, -2.5, 3)
    if operator != "Int8UpsampleConv3x3":
        arrays |= product("weight", 2, outputs, 9 * inputs, packed=False)
        arrays["weight"] = arrays["weight"].reshape(outputs, 3, 3, inputs)
        return operator, {"pads": [1, 1, 1, 1]} if operator == "Int8DownsampleConv3x3" else {}, arrays
    arrays |= product("weight", 2, 4 * outputs, 4 * inputs, packed=False)
    arrays["weight"] = arrays["weight"].reshape(4, outputs, 2, 2, inputs)
    arrays |= {f"weight_{name}": arrays[f"weight_{name}"].reshape(4, outputs) for name in ("scale", "offset")}
    return operator, {"phases_shape": [0, -1, height, width]}, arrays


def upsample(*sizes):
    return convolution(*sizes, operator="Int8UpsampleConv3x3")


def downsample(*sizes):
    return convolution(*sizes, operator="Int8DownsampleConv3x3")


def downsample_below(*sizes):
    """As in the VAE: padded below and to the right only."""
    operator, _, arrays = downsample(*sizes)
    return operator, {"pads": [0, 0, 1, 1]}, arrays


def same_size(*sizes):
    return convolution(*sizes, operator="Int8Conv3x3")


def norm_conv(batch, height, width, inputs, outputs, groups):
    _, _, arrays = same_size(batch, height, width, inputs, outputs)
    _, attributes, plain = operators.group_norm(batch, inputs, (height, width), groups)
    arrays |= quantiser("x", 1, inputs, -0.3, 3)
    return "Int8NormConv3x3", attributes, arrays | plain


def pointwise(batch, height, width, inputs, outputs):
    _, _, arrays = same_size(batch, height, width, inputs, outputs)
    return "Int8Conv1x1", {}, arrays | product("weight", 2, outputs, inputs, packed=False, dims=(1, 1))


# Sizes that fill no register, tile or block evenly, single rows and columns, and some of the network's.
CASES = {
    "linear 1": linear(1, 1, 4, 1),
    "linear odd": linear(2, 13, 20, 37),
    "linear rows": rows(13, 20, 37),
    "linear wide": linear(1, 131, 68, 40),
    "linear network": linear(2, 256, 320, 400),
    "normed 1": norm_linear(1, 1, 4, 1),
    "normed odd": norm_linear(2, 13, 20, 37),
    "normed network": norm_linear(2, 256, 320, 400),
    "of picture 1": linear_of_picture(1, 1, 1, 4, 1, 1),
    "of picture odd": linear_of_picture(2, 5, 7, 12, 17, 3),
    "of picture wide": linear_of_picture(1, 3, 67, 68, 40, 4),
    "of picture network": linear_of_picture(2, 16, 16, 320, 320, 32),
    "added 1": linear_added(1, 1, 1, 4, 1),
    "added odd": linear_added(3, 5, 7, 20, 37),
    "added network": linear_added(2, 16, 16, 320, 320),
    "picture 1": linear(1, 1, 4, 1, to_picture=True),
    "picture odd": linear(3, 13, 20, 37, to_picture=True),
    "picture wide": linear(1, 131, 68, 15, to_picture=True),
    "picture network": linear(2, 256, 320, 320, to_picture=True),
    "down 1x1": downsample(1, 1, 1, 4, 3),
    "down odd": downsample(2, 5, 7, 12, 17),
    "down one row": downsample(1, 1, 70, 4, 5),
    "down one column": downsample(1, 9, 1, 4, 5),
    "down network": downsample(2, 32, 32, 64, 64),
    "down below 2x2": downsample_below(1, 2, 2, 4, 3),
    "down below odd": downsample_below(2, 5, 7, 12, 17),
    "down below VAE": downsample_below(1, 32, 34, 64, 64),
    "pointwise 1x1": pointwise(1, 1, 1, 4, 3),
    "pointwise odd": pointwise(2, 5, 7, 12, 17),
    "pointwise VAE": pointwise(1, 64, 65, 68, 40),
    "norm conv 1x1": norm_conv(1, 1, 1, 4, 3, 1),
    "norm conv odd": norm_conv(2, 5, 7, 12, 17, 3),
    "norm conv VAE": norm_conv(1, 32, 33, 128, 64, 32),
    "conv 1x1": same_size(1, 1, 1, 4, 3),
    "conv odd": same_size(2, 5, 7, 12, 17),
    "conv one row": same_size(1, 1, 70, 4, 5),
    "conv one column": same_size(1, 9, 1, 4, 5),
    "conv VAE": same_size(1, 32, 33, 128, 64),
    "up 1x1": upsample(1, 1, 1, 4, 3),
    "up odd": upsample(2, 5, 7, 12, 17),
    "up one row": upsample(1, 1, 37, 4, 5),
    "up one column": upsample(1, 9, 1, 4, 5),
    "up network": upsample(2, 16, 16, 64, 64),
    "norm ff 1x1": norm_feed_forward(1, 1, 1, 4, 32),
    "norm ff odd": norm_feed_forward(2, 5, 7, 24, 160),
    "norm ff network": norm_feed_forward(2, 16, 16, 64, 320),
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


# Activations and weights of four channels that come together in one 32-bit lane. Where an instruction adds pairs of
# products in 16 bits that saturate (vpmaddubsw), the second to fourth give another sum than whole numbers do.
PATTERNS = {
    "random": (None, None),
    "all positive": ((255, 255, 255, 255), (127, 127, 127, 127)),
    "all negative": ((255, 255, 255, 255), (-128, -128, -128, -128)),
    "pairs that cancel": ((255, 255, 255, 255), (127, 127, -128, -128)),
    "every second": ((255, 0, 255, 0), (127, -128, 127, -128)),
}


def saturated(rows, weights):
    """What `vpmaddubsw` makes of it: [tokens, inputs] times [outputs, inputs], pairs of products within 16 bits."""
    pairs = rows[:, None, :].astype(np.int64) * weights[None].astype(np.int64)
    pairs = pairs.reshape(*pairs.shape[:2], -1, 2).sum(axis=3)  # [tokens, outputs, inputs / 2]
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=2)


def whole_numbers(pattern, seed, shape, outputs, depth):
    """Activations uint8 of a shape, channels last, and weights int8 [outputs, depth]."""
    of_rows, of_weights = PATTERNS[pattern]
    rng = np.random.RandomState(seed)
    if of_rows is None:
        return rng.randint(0, 256, shape).astype(np.uint8), rng.randint(-128, 128, (outputs, depth)).astype(np.int8)
    return np.resize(np.uint8(of_rows), shape), np.resize(np.array(of_weights, np.int8), (outputs, depth))


def unscaled(outputs, channels):
    """Quantiser and scales that change no number."""
    one = np.ones(channels, np.float32), np.ones(outputs, np.float32)
    zero = np.zeros(channels, np.float32), np.zeros(outputs, np.float32)
    return {"x_inverse": one[0], "x_zero": zero[0], "weight_scale": one[1], "weight_offset": zero[1]}


def patches(picture, offsets, places, step):
    """[h, w, c], 0 outside -> [places h * places w, taps * c]: pixels at `step` times each place + offsets."""
    padded = np.pad(picture, ((1, 2), (1, 2), (0, 0)))
    rows = [
        np.concatenate([padded[step * i + dy + 1, step * j + dx + 1] for dy, dx in offsets])
        for i in range(places[0])
        for j in range(places[1])
    ]
    return np.stack(rows)


def exact_linear(pattern, tokens, inputs, outputs, to_picture):
    rows, weight = whole_numbers(pattern, 1, (tokens, inputs), outputs, inputs)
    expected = rows.astype(np.int64) @ weight.T.astype(np.int64)
    stored = weight
    if not to_picture:
        padded = np.zeros((-(-outputs // 16) * 16, inputs), np.int8)
        padded[:outputs] = weight
        stored = padded.reshape(-1, 16, inputs // 4, 4).transpose(0, 2, 1, 3)
    arrays = {"x": rows[None].astype(np.float32), "weight": np.ascontiguousarray(stored)}
    operator = "Int8LinearToPicture" if to_picture else "Int8Linear"
    return operator, {}, arrays | unscaled(outputs, inputs), expected.T[None] if to_picture else expected[None]


def exact_conv(pattern, height, width, inputs, outputs, stride):
    picture, weight = whole_numbers(pattern, 2, (height, width, inputs), outputs, 9 * inputs)
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    places = -(-height // stride), -(-width // stride)
    sums = patches(picture, offsets, places, stride).astype(np.int64) @ weight.T.astype(np.int64)  # [places, outputs]
    arrays = {"x": picture.transpose(2, 0, 1)[None].astype(np.float32), "weight": weight.reshape(outputs, 3, 3, inputs)}
    expected = sums.T.reshape(1, outputs, *places)
    operator = "Int8Conv3x3" if stride == 1 else "Int8DownsampleConv3x3"
    return operator, {} if stride == 1 else {"pads": [1, 1, 1, 1]}, arrays | unscaled(outputs, inputs), expected


def exact_up(pattern, height, width, inputs, outputs):
    picture, weight = whole_numbers(pattern, 3, (height, width, inputs), 4 * outputs, 4 * inputs)
    by_place = weight.reshape(4, outputs, 4 * inputs)
    expected = np.zeros((outputs, 2 * height, 2 * width), np.int64)
    for a in (0, 1):
        for b in (0, 1):
            offsets = [(a - 1 + dy, b - 1 + dx) for dy in (0, 1) for dx in (0, 1)]
            seen, taps = patches(picture, offsets, (height, width), 1), by_place[2 * a + b]
            sums = seen.astype(np.int64) @ taps.T.astype(np.int64)  # [places, outputs]
            expected[:, a::2, b::2] = sums.T.reshape(outputs, height, width)
    arrays = {"x": picture.transpose(2, 0, 1)[None].astype(np.float32)}
    arrays |= unscaled(outputs, inputs) | {"weight": by_place.reshape(4, outputs, 2, 2, inputs)}
    arrays |= {f"weight_{name}": np.tile(arrays[f"weight_{name}"], (4, 1)) for name in ("scale", "offset")}
    return "Int8UpsampleConv3x3", {"phases_shape": [0, -1, height, width]}, arrays, expected[None]


EXACT = {
    "linear": lambda pattern: exact_linear(pattern, 37, 68, 40, to_picture=False),
    "linear deep": lambda pattern: exact_linear(pattern, 13, 2560, 33, to_picture=False),
    "picture": lambda pattern: exact_linear(pattern, 37, 68, 15, to_picture=True),
    "picture deep": lambda pattern: exact_linear(pattern, 33, 2560, 13, to_picture=True),
    "conv": lambda pattern: exact_conv(pattern, 5, 37, 12, 17, stride=1),
    "conv deep": lambda pattern: exact_conv(pattern, 3, 5, 512, 13, stride=1),
    "down": lambda pattern: exact_conv(pattern, 5, 37, 12, 17, stride=2),
    "up": lambda pattern: exact_up(pattern, 5, 37, 12, 17),
}


def differences():
    """Case and pattern -> how many numbers are not those of the integer reference, as float32."""
    found = {}
    for case, make in EXACT.items():
        for pattern in PATTERNS:
            operator, attributes, arrays, expected = make(pattern)
            inputs = ordered(operator, arrays)
            got = operators.run_guarded(operators.session(model(operator, attributes, inputs)), inputs, expected.shape)
            found[f"{case}, {pattern}"] = int((got != expected.astype(np.float32)).sum())
    return found


if __name__ == "__main__":
    found = {"variant": kernels.variant(kernels.library_path()), "errors": errors(), "differences": differences()}
    print(json.dumps(found))
