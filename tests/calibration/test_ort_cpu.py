"""The fused graph with its products in bytes: what becomes what, how far off it is, and files in a bundle."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is a real export")
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.files.int8_arrays import merged_kernels
from moebius_calibration.files.int8_cpu_file import Placement, int8_cpu_model, write_int8_cpu
from moebius_calibration.graph.cpu_candidates import candidates
from moebius_export.errors import ExportError
from moebius_export.graph.opened import Weights, opened
from moebius_export.graph.sessions import session_of
from moebius_runtime import kernels
from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.bundle import Bundle

GRAPH = "unet"


def feeds(seed=0):
    rng = np.random.RandomState(seed)
    return {
        "sample": rng.standard_normal((1, 9, 16, 16)).astype(np.float32),
        "timestep": np.array([500], np.int64),
        "guidance_scale": np.array([1.0], np.float32),  # the conditional branch alone: nothing is extrapolated
    }


@pytest.fixture(scope="module")
def bundle(fused_bundle):
    return Bundle.open(fused_bundle)


@pytest.fixture(scope="module")
def found(bundle):
    return candidates(onnx.load(str(bundle.model_file(GRAPH)), load_external_data=False))


@pytest.fixture(scope="module")
def ranges(bundle, found):
    """Lowest and highest value of every activation that a candidate names, over three inputs."""
    names = sorted({name for candidate in found[0].values() for name in candidate.activations})
    path = bundle.model_file(GRAPH)
    model = opened(path)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = session_of(model, path.parent)
    runs = [session.run(names, feeds(seed)) for seed in range(3)]
    return {
        name: (min(float(run[i].min()) for run in runs), max(float(run[i].max()) for run in runs))
        for i, name in enumerate(names)
    }


def run(model, compiled):
    """The model's output, with the kernels or with the functions' bodies."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if compiled:
        options.register_custom_ops_library(str(kernels.library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds(1))[0].astype(np.float64)


def distance(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_what_can_be_made_of_bytes(found):
    """Every product of the network but the first and last convolutions, the time's and those inside the λ operators."""
    operators = [candidate.operator for candidate in found[0].values()]
    assert {name: operators.count(name) for name in set(operators)} == {
        "Int8NormFeedForward": 3,
        "Int8Linear": 24,
        "Int8LinearToPicture": 6,
        "Int8LinearAddedToPicture": 6,
        "Int8ResidualBlock": 1,
        "Int8ProjectedResidualBlock": 5,
        "Int8DownsampleConv3x3": 1,
        "Int8UpsampleConv3x3": 1,
    }
    assert set(found[1].values()) == {"48 expanded channels are not a multiple of 32"}
    assert len(found[1]) == 3


def test_all_of_it_is_near_float(bundle, found, ranges):
    placement = Placement(frozenset(found[0]), ranges)
    model = int8_cpu_model(bundle, GRAPH, placement)
    onnx.checker.check_model(model)
    called = {node.op_type for node in model.graph.node if node.domain == "moebius"}
    assert {function.name for function in model.functions} == called
    left = [node.op_type for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "FeedForward")]
    assert left == ["FeedForward"] * 3
    expected = session_of(onnx.load(str(bundle.model_file(GRAPH)), load_external_data=False), bundle.path / "unet")
    error = distance(run(model, compiled=False), expected.run(None, feeds(1))[0])
    assert 1e-3 < error < 1.25 * 0.0785  # measured; each layer's own numbers are checked below


@pytest.mark.skipif(not kernels.library_path(), reason=f"compiled kernels: {kernels.in_words()}")
def test_kernels_and_bodies_agree(bundle, found, ranges):
    """One node of each operator: behind many, numbers that round the other way are as far apart as rounding itself."""
    for operator in sorted({candidate.operator for candidate in found[0].values()}):
        node = next(name for name, candidate in found[0].items() if candidate.operator == operator)
        model = int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), ranges))
        assert distance(run(model, compiled=True), run(model, compiled=False)) < 1e-3, operator


def test_every_operator_alone_is_near_float(bundle, found, ranges):
    expected = session_of(onnx.load(str(bundle.model_file(GRAPH)), load_external_data=False), bundle.path / "unet")
    expected = expected.run(None, feeds(1))[0]
    for operator in sorted({candidate.operator for candidate in found[0].values()}):
        nodes = frozenset(name for name, candidate in found[0].items() if candidate.operator == operator)
        got = run(int8_cpu_model(bundle, GRAPH, Placement(nodes, ranges)), compiled=False)
        assert 1e-5 < distance(got, expected) < 1.25 * MEASURED[operator], operator


# Relative L2 distance from float32 at the network's output, of all layers of an operator in INT8.
MEASURED = {
    "Int8DownsampleConv3x3": 0.0196,
    "Int8NormFeedForward": 0.00389,
    "Int8Linear": 0.0475,
    "Int8LinearToPicture": 0.0338,
    "Int8LinearAddedToPicture": 0.0338,
    "Int8ProjectedResidualBlock": 0.0395,
    "Int8ResidualBlock": 0.0130,
    "Int8UpsampleConv3x3": 0.0136,
}


def float_weight(stored, candidate):
    """A float32 weight by output and input, in the order of the INT8 weight: [outputs, inputs]."""
    if candidate.of_tokens:
        return stored.T
    if candidate.operator == "Int8UpsampleConv3x3":
        kernels_ = merged_kernels(stored)  # [4, outputs, inputs, 2, 2]
        return np.moveaxis(kernels_, 2, 4).reshape(4 * stored.shape[0], -1)  # [4 * outputs, 2 * 2 * inputs]
    if candidate.operator == "Int8DownsampleConv3x3":
        return np.moveaxis(stored, 1, 3).reshape(stored.shape[0], -1)  # [outputs, 3 * 3 * inputs]
    return stored.reshape(stored.shape[0], -1)  # [outputs, inputs]


def wrong_numbers(model, node, candidate, bundle, ranges):
    """What is not right in a layer's numbers: `INDEX NAME`. From the definition, not from the code that made them."""
    reader = Weights(bundle.path / "unet")
    source = onnx.load(str(bundle.model_file(GRAPH)), load_external_data=False)
    stored = {tensor.name: tensor for tensor in source.graph.initializer}
    biases = [reader.array(tensor).ravel() for tensor in stored.values() if tensor.data_type == TensorProto.FLOAT]
    made = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    wrong = []
    for index, (activation, name) in enumerate(zip(candidate.activations, candidate.weights, strict=True)):
        inverse, zero, weight, scale, offset = (
            made[f"{node}/int8/{index}/{part}"] for part in ("inverse", "zero", "weight", "scale", "offset")
        )
        low, high = min(ranges[activation][0], 0.0), max(ranges[activation][1], 0.0)
        if not np.allclose(inverse, 255 / (high - low), rtol=1e-6):
            wrong.append(f"{index} inverse")
        if not np.array_equal(zero, np.full_like(zero, np.round(-low * 255 / (high - low)))):
            wrong.append(f"{index} zero")
        expected = float_weight(reader.array(stored[name]), candidate).astype(np.float64)
        scale, offset = scale.ravel().astype(np.float64), offset.ravel().astype(np.float64)
        if weight.ndim == 4 and weight.shape[2:] == (16, 4):
            weight = weight.transpose(0, 2, 1, 3).reshape(-1, 4 * weight.shape[1])[: len(scale)]
        weight = weight.reshape(len(scale), -1).astype(np.float64)
        level = scale * 255 / (high - low)  # what one level of a weight is worth
        if (
            np.abs(weight * level[:, None] - expected).max() > 0.501 * level.max()
            or (np.abs(weight * level[:, None] - expected) > 0.501 * level[:, None]).any()
        ):
            wrong.append(f"{index} scale")
        bias = offset + scale * np.round(-low * 255 / (high - low)) * weight.sum(axis=1)
        limit = 1e-5 * (np.abs(offset).max() + np.abs(bias).max())
        repeats = 4 if candidate.operator == "Int8UpsampleConv3x3" else 1
        known = [np.zeros(len(bias)), *(np.tile(one, repeats) for one in biases if one.size * repeats == bias.size)]
        if not any(np.abs(bias - one).max() <= limit for one in known):
            wrong.append(f"{index} offset")
    return wrong


PLANTS = {
    "scale": lambda array: array * np.float32(1.01),
    "inverse": lambda array: array * np.float32(1.01),
    "zero": lambda array: array + np.float32(1),
    "offset": lambda array: array + np.float32(0.01) * np.abs(array).max(),
}


def test_the_numbers_of_every_layer_are_those_of_its_definition(bundle, found, ranges):
    model = int8_cpu_model(bundle, GRAPH, Placement(frozenset(found[0]), ranges))
    for node, candidate in found[0].items():
        assert wrong_numbers(model, node, candidate, bundle, ranges) == [], node


@pytest.mark.parametrize("part", PLANTS)
def test_a_planted_fault_is_found(part, bundle, found, ranges):
    """One per cent of a scale, or one level of a zero point, in any one place of each operator."""
    for operator in sorted({candidate.operator for candidate in found[0].values()}):
        node, candidate = next((name, one) for name, one in found[0].items() if one.operator == operator)
        clean = int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), ranges))
        for index in range(len(candidate.activations)):
            model = onnx.ModelProto()
            model.CopyFrom(clean)
            tensor = next(one for one in model.graph.initializer if one.name == f"{node}/int8/{index}/{part}")
            tensor.CopyFrom(numpy_helper.from_array(PLANTS[part](numpy_helper.to_array(tensor)), tensor.name))
            assert f"{index} {part}" in wrong_numbers(model, node, candidate, bundle, ranges), operator


def test_every_operator_alone_has_neither_gain_nor_offset(bundle, found, ranges):
    """At a layer's own output: rounding is random, a wrong scale or zero point is not.

    Measured: a gain of 0.0015 at most, offsets of 0.0042 of the output's root mean square. One level of a zero point
    gives 0.022 to 0.055, three per cent of a scale a gain of 0.03.
    """
    plain = int8_cpu_model(bundle, GRAPH, Placement(frozenset(), ranges))
    for operator in sorted({candidate.operator for candidate in found[0].values()}):
        node, candidate = next((name, one) for name, one in found[0].items() if one.operator == operator)
        model = int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), ranges))
        expected, got = (run(ending_at(one, candidate.output), compiled=False) for one in (plain, model))
        axis = -1 if candidate.of_tokens or operator == "Int8NormFeedForward" else 1
        expected, got = (np.moveaxis(one, axis, 0).reshape(one.shape[axis], -1) for one in (expected, got))
        varying = expected - expected.mean(axis=1, keepdims=True)  # [channels, places]
        gain = ((got - got.mean(axis=1, keepdims=True)) * varying).sum() / np.square(varying).sum()
        offsets = (got - expected).mean(axis=1)  # [channels]
        assert abs(gain - 1) < 0.0025, operator
        assert np.sqrt(np.square(offsets).mean() / np.square(expected).mean()) < 0.006, operator


def ending_at(model, value):
    """The model with another value as its output."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    return made


def test_what_the_placement_lacks_is_said(bundle, found, ranges):
    node, candidate = next(iter(found[0].items()))
    lacking = {name: limits for name, limits in ranges.items() if name != candidate.activations[0]}
    with pytest.raises(ExportError, match=f"there is no range of .*, which {node} needs; calibrate again"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), lacking))
    broken = ranges | {candidate.activations[0]: (0.0, float("nan"))}
    with pytest.raises(ExportError, match=r"is 0\.0 to nan; expected two finite numbers in order"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), broken))
    refused = next(node for node, why in found[1].items() if "expanded" in why)
    with pytest.raises(ExportError, match="48 expanded channels are not a multiple of 32; make it float"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset([refused]), ranges))
    with pytest.raises(ExportError, match="nowhere cannot be INT8: the graph has no such candidate"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset(["nowhere"]), ranges))


def test_files_in_a_bundle(fused_bundle_copy, found, ranges):
    before = Bundle.open(fused_bundle_copy)
    placement = Placement(frozenset(found[0]), ranges, plan=b'{"target": "ort-cpu"}')
    write_int8_cpu(before, {GRAPH: placement})
    written = Bundle.open(fused_bundle_copy)
    file = written.graph(GRAPH).files["int8_cpu"]
    assert file.model == "unet/model_int8_cpu.onnx"
    assert (written.path / file.plan).read_bytes() == placement.plan
    assert written.graph(GRAPH).files["fp32"] == before.graph(GRAPH).files["fp32"]
    backend = create_backend(written, "ort-cpu", threads=1, precision="int8_cpu")
    got = backend.run(GRAPH, feeds(1))
    made = int8_cpu_model(before, GRAPH, placement)
    assert np.array_equal(got, run(made, compiled=bool(kernels.library_path())))
    said = backend.describe()["kernels"]
    assert said in (*kernels.DOT_PRODUCTS, kernels.in_words_of_bytes(kernels.in_words()))
    again = {path: (written.path / path).read_bytes() for path in (file.model, file.weights)}
    write_int8_cpu(written, {GRAPH: placement})
    assert {path: (fused_bundle_copy / path).read_bytes() for path in again} == again


def test_what_to_expect_without_the_instructions():
    for words in ("avx512vnni", "avxvnni", "dotprod", "i8mm"):
        assert kernels.in_words_of_bytes(words) == words
    for words in ("avx2", "neon", "none (not built)"):
        assert kernels.in_words_of_bytes(words) == f"{words}, without INT8 dot products: int8 gains little here"


def test_smoothing_divides_values_and_multiplies_weights(bundle, found, ranges):
    """The same product, cut into bytes at other places."""
    node = next(name for name, candidate in found[0].items() if candidate.operator == "Int8Linear")
    (activation,) = found[0][node].activations
    plain = int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), ranges))
    factors = np.full(16, 2.0)
    low, high = ranges[activation]
    smooth = int8_cpu_model(
        bundle, GRAPH, Placement(frozenset([node]), {activation: (low / 2, high / 2)}, {activation: factors})
    )
    for name in ("weight", "inverse", "zero", "offset"):
        one, other = (
            next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == f"{node}/int8/0/{name}")
            for model in (plain, smooth)
        )
        assert np.allclose(one, other, rtol=1e-6)
