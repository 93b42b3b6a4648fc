"""Where the error enters: figures against NumPy's, and a coarse weight that is planted in one module and found."""

import json
import math
import shutil

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import round_trip
from moebius_export.graph.opened import Opened, Weights, layer_of, opened
from moebius_export.precision.error_report import ErrorReport, last_values, module_errors, write_report
from moebius_export.precision.plan import Measured
from moebius_export.precision.trials import Trials
from moebius_export.precision.typed import typed
from moebius_runtime.bundle.bundle import Bundle


@pytest.fixture(scope="module")
def unet(fused_bundle, tmp_path_factory):
    """The tiny U-Net in a folder of its own, laid open, and inputs of one run."""
    folder = tmp_path_factory.mktemp("unet")
    path = Bundle.open(fused_bundle).model_file("unet")
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    graph, rng = Opened(opened(path)), np.random.RandomState(5)
    inputs = {"timestep": np.array([500])}
    for value in graph.model.graph.input:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        inputs.setdefault(value.name, rng.standard_normal(shape).astype(np.float32))
    return folder / path.name, graph, [inputs]


def all_low(graph):
    computes = {node.name: "fp16" for node in graph.model.graph.node if graph.computes(node)}
    return computes, dict.fromkeys(graph.storable, "fp16")


def saved(unet, name, computes, stores, change=lambda model: None):
    path, graph, samples = unet
    model = typed(graph, Weights(path.parent), computes, stores)
    change(model)
    onnx.save(model, path.parent / name)
    return module_errors(path, path.parent / name, samples)


def scaled(weight, work):
    """A change of one weight in a typed model."""

    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name == weight)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(work(array.astype(np.float32)).astype(array.dtype), weight))

    return change


def test_float32_has_no_error(unet):
    rows = saved(unet, "same.onnx", {}, {})
    assert len({row.module for row in rows}) == len(rows) > 20
    assert max(row.error for row in rows) < 1e-6
    assert {row.type for row in rows} == {"fp32"}


def test_the_last_row_is_what_a_trial_says(unet):
    path, graph, samples = unet
    rows = saved(unet, "low.onnx", *all_low(graph))
    assert rows[-1].tensor == graph.model.graph.output[0].name
    assert rows[-1].error == pytest.approx(Trials(graph, path.parent, samples).error(*all_low(graph)), rel=0.02)
    assert {row.type for row in rows} == {"fp16"}
    assert all(0 < row.error < 0.03 for row in rows)
    assert all(row.rms > 0 for row in rows)


@pytest.mark.parametrize("place", [0.3, 0.7])
def test_a_coarse_weight_is_where_the_error_enters(unet, place):
    _, graph, _ = unet
    kernels = [name for name in graph.storable if name.endswith(".weight") and len(graph.stored[name].dims) == 4]
    weight = kernels[int(place * len(kernels))]
    reader = next(node for node in graph.consumers[weight] if graph.computes(node))
    step = 0.6  # of the weight's root mean square

    def coarse(values):
        width = step * np.sqrt(np.square(values).mean())
        return np.round(values / width) * width

    rows = saved(unet, "coarse.onnx", *all_low(graph), scaled(weight, coarse))
    first, second = sorted(rows, key=lambda row: -row.own)[:2]
    assert first.module == layer_of(reader.name)
    assert first.own > 5 * second.own
    place = rows.index(first)
    assert max(row.error for row in rows[place:]) > max(row.error for row in rows[:place])


def test_an_overflow_is_infinite_from_there_on_and_null_in_the_file(unet, tmp_path):
    _, graph, _ = unet
    weight = next(name for name in graph.storable if "up_blocks.0.resnets.0" in name and name.endswith(".weight"))
    rows = saved(unet, "large.onnx", *all_low(graph), scaled(weight, lambda values: np.sign(values) * 6e4))
    finite = [math.isfinite(row.error) for row in rows]
    assert not finite[-1]
    assert all(finite[: finite.index(False)])
    assert [row.module for row in rows if not math.isfinite(row.own)] == [rows[finite.index(False)].module]
    measured = Measured(pictures=1, steps=1, seed=0)
    write_report(ErrorReport("fp16", measured, {"unet": 1}, {"unet": rows}), tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert [row["error"] is not None for row in written["graphs"]["unet"]] == finite


def test_figures_are_those_of_numpy(tmp_path):
    """Two modules in a row and a third beside them."""
    rng = np.random.RandomState(0)
    w, x = rng.standard_normal((8, 8)).astype(np.float32), rng.standard_normal((2, 3, 8)).astype(np.float32)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a/MatMul"], name="a/MatMul"),
        helper.make_node("Reshape", ["a/MatMul", "shape"], ["b/Reshape"], name="b/Reshape"),
        helper.make_node("Neg", ["b/Reshape"], ["b/Neg"], name="b/Neg"),
        helper.make_node("Sqrt", ["squares"], ["c/Sqrt"], name="c/Sqrt"),
        helper.make_node("Add", ["b/Neg", "c/Sqrt"], ["y"], name="graph/Add"),
    ]
    nodes.insert(0, helper.make_node("Mul", ["x", "x"], ["squares"], name="c/Mul"))
    tensors = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([3, 8]), "shape")]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [3, 8])], [value("y", 1, [3, 8])], tensors)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    laid_open = Opened(opened(path))
    assert list(last_values(laid_open).values()) == ["a", "b", "c", "graph"]
    onnx.save(typed(laid_open, Weights(tmp_path), {"a/MatMul": "fp16"}, {}), tmp_path / "low.onnx")
    rows = {row.module: row for row in module_errors(path, tmp_path / "low.onnx", [{"x": one} for one in x])}
    exact = x.astype(np.float64) @ w
    low = round_trip(round_trip(x, "fp16") @ round_trip(w, "fp16"), "fp16")
    error = np.linalg.norm(low - exact) / np.linalg.norm(exact)
    assert rows["a"].error == pytest.approx(error, rel=1e-3)
    assert (rows["a"].type, rows["a"].own) == ("fp16", rows["a"].error)
    assert rows["a"].rms == pytest.approx(np.sqrt((exact**2).mean()), rel=1e-5)
    assert (rows["b"].type, rows["b"].own) == ("fp32", 0)
    assert rows["b"].error == pytest.approx(error, rel=1e-3)
    assert (rows["c"].error, rows["c"].own) == (0, 0)
    assert rows["graph"].own == 0
    assert rows["graph"].error == pytest.approx(
        np.linalg.norm(low - exact) / np.linalg.norm(np.abs(x) - exact), rel=1e-3
    )


def test_another_graph_s_file_is_refused(unet, fused_bundle):
    path, _, samples = unet
    other = Bundle.open(fused_bundle).model_file("vae_decoder")
    with pytest.raises(ExportError, match=r"so it was not made from .*; write it again"):
        module_errors(path, other, samples)
    with pytest.raises(ExportError, match="no recorded inputs"):
        module_errors(path, path, [])
