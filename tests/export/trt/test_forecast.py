"""The memory forecast against graphs small enough to count by hand, and against TensorRT-RTX's own networks."""

from __future__ import annotations

from types import SimpleNamespace as Any

import numpy as np
import onnx
import pytest

from moebius_export.trt.builder import EngineBuilder
from moebius_export.trt.forecast import Forecast, GraphNeeds, activation_peak, graph_needs, input_shapes
from moebius_export.trt.monitor import Phases
from moebius_export.trt.options import Tuning
from moebius_runtime.bundle.graph_files import tensor_bytes
from moebius_runtime.bundle.passport import Range


def tensor(name, *shape, dtype="FLOAT", shape_tensor=False):
    return Any(name=name, shape=shape, dtype=Any(name=dtype), is_shape_tensor=shape_tensor)


def layer(kind, inputs, outputs):
    return Any(
        type=Any(name=kind),
        num_inputs=len(inputs),
        num_outputs=len(outputs),
        get_input=lambda i: inputs[i],
        get_output=lambda i: outputs[i],
    )


def network(inputs, layers, outputs):
    return Any(
        num_inputs=len(inputs),
        get_input=lambda i: inputs[i],
        num_outputs=len(outputs),
        get_output=lambda i: outputs[i],
        num_layers=len(layers),
        get_layer=lambda i: layers[i],
    )


def test_a_chain_holds_two_tensors_at_a_time():
    x, a, b, c = (tensor(name, 100) for name in "xabc")
    chain = network([x], [layer("UNARY", [x], [a]), layer("UNARY", [a], [b]), layer("UNARY", [b], [c])], [c])
    assert activation_peak(chain) == 2 * 400


def test_a_skip_connection_lives_until_it_is_read():
    x, a, b, c = (tensor(name, 100) for name in "xabc")
    layers = [layer("UNARY", [x], [a]), layer("UNARY", [a], [b]), layer("ELEMENTWISE", [b, x], [c])]
    assert activation_peak(network([x], layers, [c])) == 3 * 400


def test_outputs_live_to_the_end_and_types_have_their_size():
    x, early, a, b = tensor("x", 100), tensor("early", 100, dtype="HALF"), tensor("a", 1000), tensor("b", 100)
    layers = [layer("CAST", [x], [early]), layer("UNARY", [x], [a]), layer("UNARY", [a], [b])]
    assert activation_peak(network([x], layers, [early, b])) == 200 + 4000 + 400  # x is gone, early is not


def test_constants_and_what_is_computed_from_them_are_no_activations():
    x, w, folded, y = tensor("x", 10), tensor("w", 10_000), tensor("folded", 10_000), tensor("y", 10)
    layers = [layer("CONSTANT", [], [w]), layer("UNARY", [w], [folded]), layer("ELEMENTWISE", [x, folded], [y])]
    assert activation_peak(network([x], layers, [y])) == 80


def test_another_name_for_the_same_memory_costs_nothing():
    x, same, y = tensor("x", 100), tensor("same", 1, 100), tensor("y", 1, 100)
    layers = [layer("UNSQUEEZE", [x], [same]), layer("UNARY", [same], [y])]
    assert activation_peak(network([x], layers, [y])) == 800


def test_open_dimensions_and_shape_tensors():
    x, shape, y = tensor("x", -1, 10), tensor("shape", 2, dtype="INT64", shape_tensor=True), tensor("y", -1, 10)
    layers = [layer("SHAPE", [x], [shape]), layer("SHUFFLE", [x, shape], [y])]
    needs = graph_needs("unet", network([x], layers, [y]), 7, open_size=4)
    assert needs == GraphNeeds("unet", 7, 2 * 4 * 40, 2 * 4 * 40)


def forecast(free, workspace=None):
    needs = (
        GraphNeeds("unet", 1000 << 20, 300 << 20, 10 << 20),
        GraphNeeds("vae_decoder", 200 << 20, 900 << 20, 3 << 20),
    )
    return Forecast(needs, workspace, None if free is None else free << 20, "Orin")


def test_what_the_engines_need_together():
    one = forecast(None, workspace=256 << 20)
    assert one.running >> 20 == 1200 + 900
    assert one.sequential >> 20 == 1300
    assert one.building >> 20 == 1300 + 256
    assert one.least >> 20 == 1010
    assert one.advice == []
    assert not one.cannot_fit


@pytest.mark.parametrize(
    ("free", "words", "refused"),
    [
        (3000, [], False),
        (1800, ["--keep-loaded"], False),
        (1400, ["--workspace 100MiB", "--keep-loaded"], False),
        (1100, ["smaller precision", "--keep-loaded"], False),
        (1000, ["smaller precision", "--keep-loaded"], True),
    ],
)
def test_advice(free, words, refused):
    one = forecast(free, workspace=256 << 20)
    assert len(one.advice) == len(words)
    for word, advice in zip(words, one.advice, strict=True):
        assert word in advice
    assert one.cannot_fit is refused


def write(path, nodes, inputs, outputs, weights=(), opsets=()):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [value(name, onnx.TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    imports = [onnx.helper.make_opsetid("", 20), *opsets]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def test_bytes_of_a_models_tensors(tmp_path, tiny_bundle):
    weights = {"w": np.zeros((8, 3, 3, 3), np.float32), "h": np.zeros(5, np.float16)}
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    path = write(tmp_path / "m.onnx", [node], {"x": [1, 3, 8, 8]}, {"y": [1, 8, 6, 6]}, weights)
    assert tensor_bytes(path) == 8 * 27 * 4 + 10
    for file in sorted(tiny_bundle.rglob("*.onnx")):  # weights in a file of their own, some of them shared
        model = onnx.load(file)
        distinct = {onnx.numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
        counted = sum(len(content) for content in distinct)
        assert (
            counted
            <= tensor_bytes(file)
            <= sum(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer) + 64 * len(model.graph.node)
        )
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="reaches beyond the end"):
        tensor_bytes(path)


def rtx():
    from moebius_export.trt.library import Library

    module = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")
    return EngineBuilder(Library("tensorrt-rtx", module))


def test_a_network_of_tensorrt_rtx_counts_as_by_hand(tmp_path):
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["a"]),
        onnx.helper.make_node("Conv", ["a", "w"], ["b"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Add", ["b", "x"], ["y"]),
    ]
    weights = {"w": np.ones((4, 4, 3, 3), np.float32)}
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 4, 8, 8]}, weights)
    one = 4 * 64 * 4
    assert graph_needs("unet", rtx().parse(path).network, 0) == GraphNeeds("unet", 0, 3 * one, 2 * one)


def test_an_open_batch_is_set_before_it_is_counted(tmp_path):
    nodes = [
        onnx.helper.make_node("Concat", ["x", "x"], ["both"], axis=0),
        onnx.helper.make_node("Relu", ["both"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["batch", 4]}, {"y": ["two", 4]})
    builder = rtx()
    parsed = builder.parse(path)
    with input_shapes(parsed.network, {"x": [5, 4]}):
        assert activation_peak(parsed.network) == 2 * 10 * 16
    # The same network is then built with a profile, so its batch must be open again.
    assert tuple(parsed.network.get_input(0).shape) == (-1, 4)
    profile = {"x": Range(min=[1, 4], opt=[2, 4], max=[5, 4])}
    assert builder.build(parsed, Tuning(), [86], profile, Phases(lambda phase, share: None), None) is not None
