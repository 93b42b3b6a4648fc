"""Models of one operator each, with the functions that define them, and how far the compiled kernels are from these.

As a script: compares every case with the variant that MOEBIUS_KERNELS names, and writes JSON.
"""

import ctypes
import json
import mmap
import os

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import TensorProto, helper

from moebius_export.graph.function_bodies import bodies
from moebius_runtime import kernels

FUNCTIONS = bodies("convolution")


def random(seed, *shape, scale=1.0):
    return (np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32)


def feed_forward(batch, height, width, channels, hidden):
    attributes = {"size": [height, width], "image_shape": [0, 0, height, width], "hidden": hidden}
    inputs = {
        "x": random(0, batch, height * width, channels),
        "expand": random(1, hidden, channels, 1, 1, scale=channels**-0.5),
        "expand_bias": random(2, hidden, scale=0.1),
        "depthwise": random(3, hidden, 1, 3, 3, scale=1 / 3),
        "depthwise_bias": random(4, hidden, scale=0.1),
        "project": random(5, channels, hidden // 2, 1, 1, scale=hidden**-0.5),
    }
    return "FeedForward", attributes, inputs


def residual_block(batch, height, width, inputs, outputs, groups, rows=1):
    """`rows` of time; with a shortcut where the channels differ."""
    attributes = {
        "groups": groups,
        "epsilon": 1e-5,
        "ones_shape": [groups],
        "groups_shape": [0, groups, -1],
        "first_channels": inputs,
        "second_channels": outputs,
    }
    arrays = {
        "x": 0.5 + random(0, batch, inputs, height, width),  # a mean that the norm has to take off
        "time": random(1, rows, outputs),
    }
    for seed, half, channels in ((10, "first", inputs), (20, "second", outputs)):
        arrays |= {
            f"{half}_gain": 1 + random(seed, channels, scale=0.1),
            f"{half}_shift": random(seed + 1, channels, scale=0.1),
            f"{half}_depthwise": random(seed + 2, channels, 1, 3, 3, scale=1 / 3),
            f"{half}_depthwise_bias": random(seed + 3, channels, scale=0.1),
            f"{half}_pointwise": random(seed + 4, outputs, channels, 1, 1, scale=2 * channels**-0.5),
            f"{half}_pointwise_bias": random(seed + 5, outputs, scale=0.1),
        }
    if inputs == outputs:
        return "ResidualBlock", attributes, arrays
    arrays["shortcut"] = random(2, outputs, inputs, 1, 1, scale=inputs**-0.5)
    arrays["shortcut_bias"] = random(3, outputs, scale=0.1)
    return "ProjectedResidualBlock", attributes, arrays


def group_norm(batch, channels, sizes, groups, epsilon=1e-3):
    attributes = {
        "groups": groups,
        "epsilon": epsilon,
        "groups_shape": [0, groups, -1, sizes[-1]],
        "row_shape": [-1, *[1] * len(sizes)],
    }
    inputs = {
        "x": 0.5 + random(0, batch, channels, *sizes),
        "gain": 1 + random(1, channels, scale=0.1),
        "shift": random(2, channels, scale=0.1),
    }
    return "GroupNorm", attributes, inputs


def local_lambda(batch, height, width, depth, heads, reach):
    attributes = {
        "heads": heads,
        "size": [height, width],
        "planes_shape": [-1, 1, height, width],
        "margin_hw": [reach // 2] * 4,
        "lambdas_shape": [-1, depth, depth, height * width],
        "heads_shape": [0, 0, heads, -1],
        "tokens_shape": [0, 0, -1],
    }
    inputs = {
        "query": random(0, batch, height * width, heads * depth),
        "values": random(1, batch, height * width, depth),
        "summary": random(2, batch, depth, depth),
        "window": random(3, depth, reach, reach, scale=1 / reach),
    }
    return "LocalLambda", attributes, inputs


def interactive_lambda(branches, batch, positions, depth, heads, tokens, width=None):
    width = width or depth
    attributes = {
        "heads": heads,
        "heads_shape": [0, 0, 0, heads, -1],
        "rows_shape": [0, 0, -1, tokens],
        "tokens_shape": [branches, -1, positions, heads * width],
    }
    inputs = {
        "query": random(0, branches, batch, positions, heads * depth),
        "keys": random(1, branches, positions, depth, tokens, scale=depth**-0.5),
        "values": random(2, branches, tokens, width),
    }
    return "InteractiveLambda", attributes, inputs


# Sizes that fill no register, tile or block evenly, single rows and columns, and some of the network's.
CASES = {
    "ff 1x1": feed_forward(1, 1, 1, 1, 2),
    "ff one row": feed_forward(1, 1, 9, 3, 4),
    "ff one column": feed_forward(3, 7, 1, 5, 6),
    "ff odd": feed_forward(2, 5, 7, 24, 120),
    "ff wide": feed_forward(1, 3, 67, 17, 34),
    "ff network": feed_forward(1, 16, 16, 64, 320),
    "rb 1x1": residual_block(1, 1, 1, 5, 5, 1),
    "rb one row": residual_block(1, 1, 9, 4, 4, 2),
    "rb one column": residual_block(3, 7, 1, 5, 5, 5, rows=3),
    "rb odd": residual_block(2, 5, 7, 24, 24, 3),
    "rb odd, time by picture": residual_block(2, 5, 7, 24, 24, 8, rows=2),
    "rb wide": residual_block(1, 3, 67, 17, 17, 1),
    "rb network": residual_block(2, 16, 16, 64, 64, 32),
    "prb 1x1": residual_block(1, 1, 1, 3, 7, 1),
    "prb one row": residual_block(2, 1, 13, 3, 9, 3, rows=2),
    "prb one column": residual_block(1, 11, 1, 10, 4, 2),
    "prb odd": residual_block(2, 5, 7, 24, 39, 3),
    "prb odd, time by picture": residual_block(2, 9, 11, 15, 5, 5, rows=2),
    "prb wide": residual_block(1, 3, 67, 17, 34, 17),
    "prb network": residual_block(2, 16, 16, 96, 64, 32),
    "gn 1x1": group_norm(1, 6, (1, 1), 2),
    "gn row": group_norm(3, 5, (9,), 5),
    "gn odd": group_norm(2, 24, (5, 7), 3),
    "gn wide": group_norm(1, 17, (3, 67), 1),
    "λ 1x1": local_lambda(1, 1, 1, 1, 1, 1),
    "λ one row": local_lambda(2, 1, 13, 4, 3, 5),
    "λ one column": local_lambda(1, 11, 1, 3, 2, 7),
    "λ odd": local_lambda(1, 9, 11, 13, 3, 5),
    "λ window beyond the picture": local_lambda(1, 6, 6, 5, 4, 15),
    "λ half a vector": local_lambda(1, 3, 5, 8, 2, 3),
    "λ a half behind two": local_lambda(1, 3, 5, 35, 9, 3),
    "λ a half behind three": local_lambda(1, 3, 5, 56, 8, 3),
    "iλ 1": interactive_lambda(1, 1, 1, 1, 1, 1),
    "iλ odd": interactive_lambda(2, 3, 7, 5, 3, 11, width=13),
    "iλ many tokens": interactive_lambda(1, 1, 67, 20, 9, 37),
    "iλ network": interactive_lambda(2, 1, 64, 40, 8, 10),
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
        made.functions.append(onnx.parser.parse_function(FUNCTIONS[operator]))
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


def guarded(array):
    """A copy that ends where the process's memory does: a byte read or written behind it ends the process."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # which keeps the memory where it is
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0):
        raise OSError("no memory without access to be had")
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def run_guarded(running, inputs, shape):
    """The session's result, of this shape; the kernel sees inputs and output at the end of memory."""
    if os.environ.get("MOEBIUS_TESTS_UNGUARDED"):  # qemu-user 7.2 reads beyond operands of scalar FMAs
        return running.run(None, inputs)[0]
    inputs = {name: guarded(array) for name, array in inputs.items()}
    y = guarded(np.full(shape, np.nan, np.float32))
    binding = running.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    running.run_with_iobinding(binding)
    return y


def errors():
    """Case -> relative L2 distance of the kernel from the function's body."""
    found = {}
    for name, (operator, attributes, inputs) in CASES.items():
        made = model(operator, attributes, inputs)
        expected = session(made, compiled=False).run(None, inputs)[0].astype(np.float64)
        got = run_guarded(session(made), inputs, expected.shape)
        found[name] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    return found


if __name__ == "__main__":
    print(json.dumps({"variant": kernels.variant(kernels.library_path()), "errors": errors()}))
