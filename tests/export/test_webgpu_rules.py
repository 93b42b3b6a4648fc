"""The rewrites for ONNX Runtime's WebGPU provider: they fire, agree, and leave everything else alone.

tests/webgpu runs them on the provider.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_export.errors import ExportError
from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.graph.opened import with_types
from moebius_export.graph.webgpu import RULES, for_webgpu
from moebius_export.onnx_export.inline import inline_bundle
from moebius_runtime import Bundle
from moebius_runtime.bundle.manifest import read_manifest


def model_of(nodes, inputs, outputs, weights):
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in part.items()]
        for part in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *ends, tensors)
    return with_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def run(model, **inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def copy(model):
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def fired(**counts):
    return {**dict.fromkeys(RULES, 0), **counts}


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def convolution(channels, kernel=3, group=1, out=8, **attributes):
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="a/Conv", group=group, **attributes)
    weights = {"w": normal(out, channels // group, kernel, kernel), "b": normal(out, seed=1)}
    return model_of([node], {"x": [2, channels, 10, 7]}, {"y": [2, out, None, None]}, weights)


@pytest.mark.parametrize(("channels", "padded"), [(6, 8), (9, 12), (15, 16), (18, 20), (21, 24), (27, 28), (30, 32)])
@pytest.mark.parametrize("attributes", [{"pads": [1] * 4}, {"strides": [2, 2]}, {"dilations": [2, 1], "pads": [2] * 4}])
def test_channels_are_padded_with_zeros(channels, padded, attributes):
    model = convolution(channels, **attributes)
    changed, counts = for_webgpu(copy(model))
    assert counts == fired(pad_conv_channels=1)
    assert [node.op_type for node in changed.graph.node] == ["Pad", "Pad", "Conv"]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in changed.graph.value_info}
    assert shapes["a/Conv/input_padded"] == [2, padded, 10, 7]
    assert shapes["a/Conv/weight_padded"] == [8, padded, 3, 3]
    x = normal(2, channels, 10, 7, seed=2)
    np.testing.assert_allclose(run(changed, x=x)[0], run(model, x=x)[0], rtol=0, atol=1e-4)  # values to 50
    before, after = (total_macs(node_costs(one)) for one in (model, changed))
    assert after * channels == before * padded


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        *((channels, {}) for channels in (1, 2, 3, 4, 5, 7, 8, 10, 12, 24, 36)),
        (9, {"kernel": 1}),
        (9, {"group": 9, "out": 9}),
        (18, {"group": 2}),
    ],
)
def test_other_convolutions_are_left_alone(channels, options):
    model = convolution(channels, **options)
    changed, counts = for_webgpu(copy(model))
    assert counts == fired()
    assert changed.graph.node == model.graph.node


def test_a_shared_weight_and_outputs_of_the_graph_stay():
    """Two convolutions over one weight, of which one is computed right, and a weight that is an output too."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="wrong", pads=[1] * 4),
        helper.make_node("Add", ["w", "w"], ["twice"], name="twice"),
        helper.make_node("Identity", ["x"], ["same"], name="same"),
    ]
    model = model_of(
        nodes,
        {"x": [1, 9, 6, 6]},
        {"y": [1, 4, 6, 6], "twice": [4, 9, 3, 3], "same": [1, 9, 6, 6]},
        {"w": normal(4, 9, 3, 3)},
    )
    changed, counts = for_webgpu(copy(model))
    assert counts == fired(pad_conv_channels=1)
    x = normal(1, 9, 6, 6, seed=4)
    for got, expected in zip(run(changed, x=x), run(model, x=x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", [[1, 1], [2, 2], [2, 3]])
@pytest.mark.parametrize("kernel", [[3, 3], [2, 5]])
def test_auto_pad_becomes_pads(mode, strides, kernel):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", auto_pad=mode, strides=strides),
        helper.make_node("MaxPool", ["x"], ["m"], name="pool", auto_pad=mode, strides=strides, kernel_shape=kernel),
        helper.make_node("AveragePool", ["x"], ["a"], name="mean", auto_pad=mode, strides=strides, kernel_shape=kernel),
    ]
    outputs = {name: [1, channels, None, None] for name, channels in (("c", 5), ("m", 4), ("a", 4))}
    model = model_of(nodes, {"x": [1, 4, 11, 8]}, outputs, {"w": normal(5, 4, *kernel)})
    changed, counts = for_webgpu(copy(model))
    assert counts == fired(explicit_pads=3)
    assert not any(attribute.name == "auto_pad" for node in changed.graph.node for attribute in node.attribute)
    x = normal(1, 4, 11, 8, seed=3)
    for got, expected in zip(run(changed, x=x), run(model, x=x), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_auto_pad_of_an_open_size_is_refused():
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="a/Conv", auto_pad="SAME_UPPER")
    model = model_of([node], {"x": [1, 4, "h", 8]}, {"y": [1, 5, None, 8]}, {"w": normal(5, 4, 3, 3)})
    with pytest.raises(ExportError, match=r"node a/Conv \(Conv\) has auto_pad SAME_UPPER"):
        for_webgpu(model)


def test_indices_become_int32_where_gathers_alone_read_them():
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["picked"], name="gather", axis=1),
        helper.make_node("Gather", ["x", "shared"], ["also"], name="also", axis=0),
        helper.make_node("Reshape", ["also", "shared"], ["flat"], name="reshape"),
    ]
    weights = {"i": np.array([[0, -1], [3, 2]]), "shared": np.array([2, 2])}
    model = model_of(nodes, {"x": [4, 4]}, {"picked": [4, 2, 2], "flat": [None, None]}, weights)
    changed, counts = for_webgpu(copy(model))
    assert counts == fired(int32_indices=1)
    assert {t.name: t.data_type for t in changed.graph.initializer} == {
        "i": TensorProto.INT32,
        "shared": TensorProto.INT64,
    }


def test_a_cast_of_the_timestep_becomes_a_gather():
    nodes = [
        helper.make_node("Cast", ["timestep"], ["t"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Cast", ["timestep"], ["again"], name="again", to=TensorProto.FLOAT),
        helper.make_node("Cast", ["timestep"], ["half"], name="half", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["other"], name="other", to=TensorProto.FLOAT),
    ]
    model = model_of(nodes, {}, {"t": [1], "again": [1], "other": [1]}, {})
    model.graph.input.append(helper.make_tensor_value_info("timestep", TensorProto.INT64, [1]))
    changed, counts = for_webgpu(copy(model))
    assert counts == fired(tabulate_casts=2)
    for timestep in (0, 1, 999, 9999):
        given = {"timestep": np.array([timestep])}
        assert run(changed, **given)[:2] == run(model, **given)[:2] == [timestep, timestep]
    assert for_webgpu(copy(model), rules=())[1] == fired()


@pytest.mark.slow
def test_the_bundle_for_webgpu(fused_bundle, tmp_path):
    manifest = inline_bundle(fused_bundle, tmp_path / "out", for_gpu=True)
    for graph in manifest.graphs:
        model = onnx.load(Bundle.open(tmp_path / "out").model_file(graph), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        gathered = [stored[n.input[1]] for n in model.graph.node if n.op_type == "Gather" and n.input[1] in stored]
        assert TensorProto.INT64 not in gathered
    before = read_manifest(fused_bundle)
    assert all(manifest.parity[graph].relative_error < 3e-5 for graph in before.parity)
    assert manifest.checks == before.checks
