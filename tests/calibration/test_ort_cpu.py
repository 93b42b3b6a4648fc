"""The fused graph with its products in bytes: what becomes what, how far off it is, and files in a bundle."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bundle is a real export")
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.int8_cpu_file import Placement, int8_cpu_model, write_int8_cpu
from moebius_calibration.ort_cpu import candidates
from moebius_export.errors import ExportError
from moebius_export.precision.graph import opened
from moebius_export.precision.sessions import session_of
from moebius_runtime import kernels
from moebius_runtime.backends import create_backend
from moebius_runtime.bundle import Bundle

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
        "Int8FeedForward": 3,
        "Int8Linear": 24,
        "Int8LinearToPicture": 12,
        "Int8ResidualBlock": 1,
        "Int8ProjectedResidualBlock": 5,
        "Int8DownsampleConv3x3": 1,
        "Int8UpsampleConv3x3": 1,
    }
    assert set(found[1].values()) == {"48 expanded channels are no multiple of 32"}
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
    assert 1e-3 < error < 0.15  # 8 bits in 47 layers with random weights; a wrong scale or zero gives 1 and more


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
        assert 1e-5 < distance(got, expected) < 0.1, operator


def test_what_the_placement_lacks_is_said(bundle, found, ranges):
    node, candidate = next(iter(found[0].items()))
    lacking = {name: limits for name, limits in ranges.items() if name != candidate.activations[0]}
    with pytest.raises(ExportError, match=f"there is no range of .*, which {node} needs; calibrate again"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), lacking))
    broken = ranges | {candidate.activations[0]: (0.0, float("nan"))}
    with pytest.raises(ExportError, match=r"is 0\.0 to nan; expected two finite numbers in order"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset([node]), broken))
    refused = next(iter(found[1]))
    with pytest.raises(ExportError, match="48 expanded channels are no multiple of 32; make it float"):
        int8_cpu_model(bundle, GRAPH, Placement(frozenset([refused]), ranges))
    with pytest.raises(ExportError, match="nowhere cannot be made of bytes: it is no node of this graph that can"):
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
    expected = create_backend(written, "ort-cpu", threads=1).run(GRAPH, feeds(1))
    assert 1e-3 < distance(got, expected) < 0.15
    said = backend.describe()["kernels"]
    assert said in (kernels.BYTE_PRODUCTS, kernels.in_words_of_bytes(kernels.in_words()))
    again = {path: (written.path / path).read_bytes() for path in (file.model, file.weights)}
    write_int8_cpu(written, {GRAPH: placement})
    assert {path: (fused_bundle_copy / path).read_bytes() for path in again} == again


def test_what_to_expect_without_the_instructions():
    assert kernels.in_words_of_bytes("avx512vnni") == "avx512vnni"
    assert kernels.in_words_of_bytes("avx2") == "avx2, without AVX512-VNNI: int8 gains little here"


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
