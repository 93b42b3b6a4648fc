"""What an INT8 operator takes in with its layer, norms before it and sums behind it, and what it leaves."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from moebius_calibration.files.ort_cpu import as_int8
from moebius_calibration.graph.cpu_candidates import candidates
from moebius_export.graph.function_bodies import bodies

CHANNELS, OUTPUTS, HEIGHT, WIDTH = 64, 32, 5, 6
FUNCTIONS = bodies("convolution")

NORM = """
  normed = LayerNormalization <axis = -1, epsilon = 0.01> (x, gain, shift)
"""
LINEAR = """
  product = MatMul (normed, weight)
  y = Add (product, bias)
"""
FEED_FORWARD = f"""
  fed = moebius.FeedForward <size = [{HEIGHT}, {WIDTH}], image_shape = [0, 0, {HEIGHT}, {WIDTH}], hidden = 64>
    (normed, expand, expand_bias, depthwise, depthwise_bias, project)
  y = Add (x, fed)
"""
OF_PICTURE = """
  grouped = Reshape (x, groups_shape)
  normal = InstanceNormalization <epsilon = 0.01> (grouped, ones, zeros)
  rows = Reshape (normal, rows_shape)
  normed = Transpose <perm = [0, 2, 1]> (rows)
"""
TO_PICTURE = """
  turned = Transpose <perm = [0, 2, 1]> (x)
  product = MatMul (by_output, turned)
  biased = Add (product, column)
  image = Reshape (biased, image_shape)
  y = Add (skip, image)
"""
NORM_CONV = f"""
  normed = moebius.GroupNorm <groups = 4, epsilon = 0.01, groups_shape = [0, 4, -1, {WIDTH}], row_shape = [-1, 1, 1]>
    (x, gain, shift)
  gate = Sigmoid (normed)
  active = Mul (normed, gate)
  y = moebius.Conv3x3 (active, taps, bias)
"""
NEAR = 0.015  # relative L2 error of numbers with 8 bits; 0.005 to 0.012 was measured
TOKENS = f"float[2, {HEIGHT * WIDTH}, {CHANNELS}]"
PICTURE = f"float[2, {CHANNELS}, {HEIGHT}, {WIDTH}]"
SKIP = f"float[2, {OUTPUTS}, {HEIGHT}, {WIDTH}]"


def random(seed, *shape, scale=1.0, mean=0.0):
    return (mean + scale * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)


STORED = {
    "gain": random(0, CHANNELS, scale=0.1, mean=1),
    "shift": random(1, CHANNELS, scale=0.1),
    "weight": random(2, CHANNELS, OUTPUTS, scale=CHANNELS**-0.5),
    "by_output": random(2, OUTPUTS, CHANNELS, scale=CHANNELS**-0.5),
    "bias": random(3, OUTPUTS),
    "column": random(3, OUTPUTS, 1),
    "taps": random(4, OUTPUTS, CHANNELS, 3, 3, scale=(9 * CHANNELS) ** -0.5),
    "expand": random(5, 64, CHANNELS, 1, 1, scale=CHANNELS**-0.5),
    "expand_bias": random(6, 64, scale=0.1),
    "depthwise": random(7, 64, 1, 3, 3, scale=1 / 3),
    "depthwise_bias": random(8, 64, scale=0.1),
    "project": random(9, CHANNELS, 32, 1, 1, scale=32**-0.5),
    "ones": np.ones(4, np.float32),
    "zeros": np.zeros(4, np.float32),
    "groups_shape": np.array([0, 4, -1]),
    "rows_shape": np.array([0, CHANNELS, -1]),
    "image_shape": np.array([2, OUTPUTS, HEIGHT, WIDTH]),
}


def graph(body, more_inputs="", x=TOKENS, **stored):
    """A model of these nodes, each named as its value; `stored` replaces numbers."""
    rank = 4 if "skip" in body or "stored" in body or "Conv" in body else 3
    text = f"""<ir_version: 10, opset_import: ["" : 20, "moebius" : 1]>
    g ({x} x{more_inputs}) => (float[{", ".join("abcd"[:rank])}] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    values = STORED | stored
    model.graph.initializer.extend(numpy_helper.from_array(values[name], name) for name in values if name in used)
    for node in model.graph.node:
        node.name = node.output[0]
    called = {node.op_type for node in model.graph.node if node.domain == "moebius"}
    model.functions.extend(onnx.parser.parse_function(FUNCTIONS[name]) for name in sorted(called))
    return model


WHOLE = {
    "Int8NormLinear": graph(NORM + LINEAR),
    "Int8NormFeedForward": graph(NORM + FEED_FORWARD),
    "Int8LinearOfPicture": graph(OF_PICTURE + LINEAR, x=PICTURE),
    "Int8LinearAddedToPicture": graph(TO_PICTURE, f", {SKIP} skip"),
    "Int8NormConv3x3": graph(NORM_CONV, x=PICTURE),
}


def values_of(model, names, seed=0):
    """The named values for a random input."""
    import onnxruntime as ort

    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    made.graph.output.extend(onnx.helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, None) for one in names)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {one.name: [d.dim_value for d in one.type.tensor_type.shape.dim] for one in model.graph.input}
    feeds = {name: random(seed + i, *size, scale=2, mean=0.5) for i, (name, size) in enumerate(sizes.items())}
    return dict(zip(names, session.run(names, feeds), strict=True)) | feeds


def int8(model):
    """The model with every candidate in INT8, and the candidates."""
    found, _ = candidates(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wanted = sorted({value for one in found.values() for value in one.activations})
    inside = [value for value in wanted if "/" not in value and value != "x"]
    values = values_of(model, [*inside, "y"])
    ranges = {value: (float(values[value].min()), float(values[value].max())) for value in [*inside, "x"]}
    ranges |= {value: (-2.0, 2.0) for value in wanted if "/" in value}
    return as_int8(model, lambda name: stored[name], found, ranges), found


@pytest.mark.parametrize("operator", WHOLE)
def test_one_operator_takes_all_of_it(operator):
    model = WHOLE[operator]
    made, _ = int8(model)
    onnx.checker.check_model(made)
    assert [node.op_type for node in made.graph.node] == [operator]
    expected, got = (values_of(one, ["y"])["y"] for one in (model, made))
    assert got.shape == expected.shape
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < NEAR


@pytest.mark.parametrize(
    "operator", ["Int8NormLinear", "Int8LinearOfPicture", "Int8NormConv3x3", "Int8NormFeedForward"]
)
def test_a_norm_with_another_reader_stays(operator):
    """Its value is an output of the graph here."""
    plain = operator.replace("Norm", "").replace("OfPicture", "")
    made, _ = int8(_with_output(WHOLE[operator], "normed"))
    assert plain in [node.op_type for node in made.graph.node]
    expected, got = (values_of(one, ["y"])["y"] for one in (WHOLE[operator], made))
    assert np.linalg.norm(got - expected) < NEAR * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("operator", "value"),
    [("Int8NormFeedForward", "fed"), ("Int8LinearAddedToPicture", "image"), ("Int8LinearAddedToPicture", "biased")],
)
def test_a_sum_stays_where_its_part_is_read_elsewhere(operator, value):
    made, _ = int8(_with_output(WHOLE[operator], value))
    assert "Add" in [node.op_type for node in made.graph.node]
    assert {"Int8FeedForward", "Int8LinearToPicture"} & {node.op_type for node in made.graph.node}


OTHERS = {
    "a sum with something else than the norm's input": (
        graph(NORM + FEED_FORWARD.replace("Add (x, fed)", "Add (other, fed)"), f", {TOKENS} other"),
        "Int8FeedForward",
    ),
    "a norm over another axis": (
        graph(NORM.replace("axis = -1", "axis = 1") + LINEAR, gain=random(0, 30, 64), shift=random(1, 30, 64)),
        "Int8Linear",
    ),
    "gains of a picture's norm": (graph(OF_PICTURE + LINEAR, x=PICTURE, ones=random(0, 4)), "Int8Linear"),
    "shifts of a picture's norm": (graph(OF_PICTURE + LINEAR, x=PICTURE, zeros=random(0, 4)), "Int8Linear"),
    "a sum with what is stored": (
        graph(TO_PICTURE.replace("skip", "stored"), stored=random(0, *STORED["image_shape"])),
        "Int8LinearToPicture",
    ),
    "another activation function": (graph(NORM_CONV.replace("Sigmoid", "Tanh"), x=PICTURE), "Int8Conv3x3"),
    "a gate of another value": (graph(NORM_CONV.replace("Sigmoid (normed)", "Sigmoid (x)"), x=PICTURE), "Int8Conv3x3"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_only_looks_alike_stays(case):
    model, operator = OTHERS[case]
    made, _ = int8(model)
    assert operator in [node.op_type for node in made.graph.node]
    expected, got = (values_of(one, ["y"])["y"] for one in (model, made))
    assert np.linalg.norm(got - expected) < NEAR * np.linalg.norm(expected)


CONV = "y = Conv <{attributes}> (x, {weight}, bias)"


@pytest.mark.parametrize(
    ("attributes", "weight", "operator"),
    [
        ("pads = [1, 1, 1, 1], strides = [2, 2]", "taps", "Int8DownsampleConv3x3"),
        ("pads = [0, 0, 1, 1], strides = [2, 2]", "taps", "Int8DownsampleConv3x3"),
        ("pads = [1, 1, 0, 0], strides = [2, 2]", "taps", None),
        ("pads = [1, 1, 1, 1], strides = [1, 1]", "taps", None),
        ("pads = [0, 0, 0, 0]", "pointwise", "Int8Conv1x1"),
        ("pads = [1, 1, 1, 1]", "pointwise", None),
        ("strides = [2, 2]", "pointwise", None),
        ('auto_pad = "SAME_UPPER"', "pointwise", None),
        ("pads = [0, 0, 0, 0]", "narrow", None),
    ],
)
def test_convolutions_of_onnx(attributes, weight, operator):
    weights = {"pointwise": random(4, OUTPUTS, CHANNELS, 1, 1, scale=CHANNELS**-0.5)}
    weights["narrow"] = random(4, 8, CHANNELS, 1, 1)
    bias = {"bias": random(3, 8)} if weight == "narrow" else {}
    model = graph(CONV.format(attributes=attributes, weight=weight), x=PICTURE, **weights, **bias)
    made, found = int8(model) if operator else (model, candidates(model)[0])
    assert [one.operator for one in found.values()] == ([operator] if operator else [])
    if operator:
        onnx.checker.check_model(made)
        expected, got = (values_of(one, ["y"])["y"] for one in (model, made))
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) < NEAR * np.linalg.norm(expected)


def _with_output(model, value):
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    return made
