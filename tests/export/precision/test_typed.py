"""Typing and its emulation: rounding and overflow really happen, and the files are what runtimes read."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_export.graph.kinds import round_trip, tensor_of
from moebius_export.graph.opened import Opened, Weights, opened
from moebius_export.graph.sessions import session_of
from moebius_export.precision.emulate import emulated_model
from moebius_export.precision.typed import typed
from moebius_runtime.bundle.bundle import Bundle

SEED = 3


def small_model(tmp_path, nodes, tensors, shape=(1, 8)):
    """A float32 file with input x and output y of one shape."""
    value = helper.make_tensor_value_info
    ends = [value(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    return Opened(opened(tmp_path / "model.onnx")), Weights(tmp_path)


def all_low(graph, kind="fp16"):
    computes = {node.name: kind for node in graph.model.graph.node if graph.computes(node)}
    return computes, dict.fromkeys(graph.storable, kind)


def run(model, folder, **inputs):
    return session_of(model, folder).run(None, inputs)[0]


def seeded(graph):
    rng = np.random.RandomState(SEED)
    inputs = {}
    for value in graph.model.graph.input:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        inputs[value.name] = rng.standard_normal(shape).astype(np.float32)
    return inputs | ({"timestep": np.array([500])} if "timestep" in inputs else {})


def distance(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_values_are_rounded_where_they_are_low(kind, tmp_path):
    rng = np.random.RandomState(0)
    w = rng.standard_normal((8, 8)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="m"), helper.make_node("Neg", ["m"], ["y"], name="y")]
    graph, weights = small_model(tmp_path, nodes, {"w": w})
    x = rng.standard_normal((1, 8)).astype(np.float32)
    got = run(emulated_model(typed(graph, weights, *all_low(graph, kind))), tmp_path, x=x)
    expected = -round_trip(round_trip(x, kind) @ round_trip(w, kind), kind)
    np.testing.assert_array_equal(got, expected)
    assert np.abs(got + x @ w).max() > 1e-5  # so that it was no exact product


def test_70000_overflows_unless_its_node_stays_float32(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "large"], ["m"], name="m"),
        helper.make_node("Mul", ["m", "small"], ["y"], name="y"),
    ]
    tensors = {"large": np.array([7e4], np.float32), "small": np.array([1e-4], np.float32)}
    graph, weights = small_model(tmp_path, nodes, tensors)
    stores = {"small": "fp16"}
    x = np.ones((1, 8), np.float32)
    forced = run(emulated_model(typed(graph, weights, {"m": "fp16", "y": "fp16"}, stores)), tmp_path, x=x)
    assert np.isinf(forced).all()
    kept = run(emulated_model(typed(graph, weights, {"m": "fp32", "y": "fp32"}, stores)), tmp_path, x=x)
    np.testing.assert_allclose(kept, 7.0, rtol=1e-3)


def test_casts_are_in_the_file_and_inputs_agree(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="m"),
        helper.make_node("Softmax", ["m"], ["s"], name="s"),
        helper.make_node("Reshape", ["s", "shape"], ["r"], name="r"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="y"),
    ]
    tensors = {"w": np.eye(8, dtype=np.float32), "shape": np.array([1, 8], np.int64)}
    graph, weights = small_model(tmp_path, nodes, tensors)
    model = typed(graph, weights, {"m": "fp16", "y": "fp16"}, {"w": "fp16"})
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert kinds["m"] == TensorProto.FLOAT16
    assert kinds["s"] == TensorProto.FLOAT
    assert kinds["r"] == TensorProto.FLOAT16  # cast before it is moved, since its reader wants no more
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert [node.op_type for node in model.graph.node].count("Cast") == 4


def test_rounding_is_to_nearest_even():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 70000, -1e-9, np.nan], np.float32)
    np.testing.assert_array_equal(round_trip(values, "fp16"), [1, 1 + 2**-9, np.inf, 0, np.nan])
    half = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.nan], np.float32)
    np.testing.assert_array_equal(round_trip(half, "bf16"), [1, 1 + 2**-6, np.nan])
    assert numpy_helper.to_array(tensor_of(values, "t", "fp16")).dtype == np.float16


@pytest.mark.parametrize("name", ["unet", "unet_conditional", "vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("bundle", ["fused_bundle", "tiny_bundle"])
def test_the_graphs_of_a_bundle(bundle, name, request, tmp_path):
    path = Bundle.open(request.getfixturevalue(bundle)).model_file(name)
    graph, weights = Opened(opened(path)), Weights(path.parent)
    inputs = seeded(graph)
    expected = run(onnx.load(path), path.parent, **inputs)
    assert distance(run(graph.model, path.parent, **inputs), expected) < 1e-5
    assert len(graph.nodes) == len(graph.model.graph.node)
    same = typed(graph, weights, {}, {})
    assert distance(run(emulated_model(same), tmp_path, **inputs), expected) < 1e-5
    model = typed(graph, weights, *all_low(graph))
    onnx.save(model, tmp_path / "typed.onnx")
    onnx.checker.check_model(str(tmp_path / "typed.onnx"), full_check=True)
    assert model.ir_version <= 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert [v.type.tensor_type.elem_type for v in model.graph.input] == [
        v.type.tensor_type.elem_type for v in graph.model.graph.input
    ]
    assert 1e-4 < distance(run(emulated_model(model), tmp_path, **inputs), expected) < 0.03
    assert session_of(model, tmp_path).get_outputs()[0].type == "tensor(float)"


def test_local_lambda_can_stay_a_function(fused_bundle, tmp_path):
    path = Bundle.open(fused_bundle).model_file("unet")
    graph, weights = Opened(opened(path, keep=("LocalLambda",))), Weights(path.parent)
    calls = [node for node in graph.model.graph.node if node.op_type == "LocalLambda"]
    assert calls
    assert [function.name for function in graph.model.functions] == ["LocalLambda"]
    inputs = seeded(graph)
    model = typed(graph, weights, *all_low(graph))
    onnx.save(model, tmp_path / "typed.onnx")
    expected = run(onnx.load(path), path.parent, **inputs)
    from moebius_export.precision.emulate import emulated

    assert distance(run(emulated(tmp_path / "typed.onnx"), tmp_path, **inputs), expected) < 0.03


@pytest.mark.parametrize("kind", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_tensorrt_rtx_builds_it(fused_bundle, name, kind, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")
    path = Bundle.open(fused_bundle).model_file(name)
    graph, weights = Opened(opened(path)), Weights(path.parent)
    computes, stores = all_low(graph, kind)
    computes |= {name: "fp32" for name, node in graph.nodes.items() if node.op_type == "InstanceNormalization"}
    onnx.save(typed(graph, weights, computes, stores), tmp_path / "typed.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "typed.onnx")), [
        str(parser.get_error(i)) for i in range(parser.num_errors)
    ]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_it_needs_no_torch():
    """So that a machine with onnx and onnxruntime alone can type a bundle."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import moebius_export.commands.precision, moebius_export.precision.planning, moebius_export.precision.write"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
