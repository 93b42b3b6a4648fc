"""Bundles of standard operators only, read by everyone: ONNX's reference, ONNX Runtime, TensorRT-RTX's parser."""

import numpy as np
import onnx
import onnx.reference
import pytest

from moebius import preset
from moebius.weights.load import load_vae
from moebius_export.errors import ExportError
from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.graph.standard import INLINE_RULE, standard_only
from moebius_export.onnx_export import export as exporting
from moebius_export.onnx_export import inline as inlining
from moebius_export.onnx_export.export import ExportOptions
from moebius_export.onnx_export.inline import inline_bundle
from moebius_export.onnx_export.parity import run_file
from moebius_export.trajectories.scenes import seeded_inputs
from moebius_runtime import Bundle
from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.graph_files import function_domains
from moebius_runtime.bundle.manifest import read_manifest

GRAPHS = ("unet", "unet_conditional", "vae_encoder", "vae_decoder", "vae_decoder_lower", "vae_decoder_upper")


def load(bundle, graph):
    return onnx.load(Bundle.open(bundle).model_file(graph), load_external_data=False)


@pytest.mark.parametrize("graph", GRAPHS)
def test_only_standard_operators_are_left(graph, fused_bundle, inlined_bundle):
    before, after = load(fused_bundle, graph), load(inlined_bundle, graph)
    assert before.functions
    assert not after.functions
    assert {node.domain for node in after.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in after.opset_import] == [("", 20)]
    found = {node.op_type for node in after.graph.node[:-1]}
    if graph == "vae_decoder_upper":  # its window is open, so that some shapes are known at run time alone
        found.remove("Shape")
    assert not {"Shape", "Constant", "Identity"} & found
    assert total_macs(node_costs(after)) == total_macs(node_costs(before))
    for name in ("input", "output"):
        assert getattr(after.graph, name) == getattr(before.graph, name)


def test_the_manifest_names_the_rewrite_and_bounds_the_distance(fused_bundle, inlined_bundle):
    before, after = read_manifest(fused_bundle), read_manifest(inlined_bundle)
    assert {r.graph: r.count for r in after.rewrites if r.name == INLINE_RULE} == {
        graph: sum(node.domain == "moebius" for node in load(fused_bundle, graph).graph.node) for graph in GRAPHS
    }
    for graph in GRAPHS:
        assert before.parity[graph].relative_error <= after.parity[graph].relative_error < 3e-5
    assert {name for name in after.files if after.files[name] != before.files[name]} == {
        info.files["fp32"].model for info in after.every_graph.values()
    }


def test_no_file_of_an_inlined_bundle_has_a_function(inlined_bundle):
    """Whatever lies in the folder, also what the manifest does not list as a graph."""
    files = sorted(inlined_bundle.rglob("*.onnx"))
    assert len(files) == len(GRAPHS)
    assert [path for path in files if function_domains(path)] == []
    assert {entry.domain for path in files for entry in onnx.load(path, load_external_data=False).opset_import} == {""}


@pytest.mark.parametrize("graph", ["unet", "vae_encoder", "vae_decoder", "vae_decoder_lower", "vae_decoder_upper"])
def test_the_reference_implementation_of_onnx_agrees(graph, fused_bundle, inlined_bundle):
    """float32 on both sides; only the order of additions differs (3e-6 measured, 3e-5 is the export's own budget)."""
    inputs = seeded_inputs(graph, read_manifest(inlined_bundle), 4)
    reference = onnx.reference.ReferenceEvaluator(str(Bundle.open(inlined_bundle).model_file(graph)))
    (got,) = reference.run(None, inputs)
    expected = run_file(Bundle.open(fused_bundle).model_file(graph), inputs)
    assert np.linalg.norm(got - expected) < 3e-5 * np.linalg.norm(expected)


def test_the_parser_of_tensorrt_rtx_reads_it(inlined_bundle):
    trt = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")
    for graph in GRAPHS:
        logger = trt.Logger(trt.Logger.ERROR)
        network = trt.Builder(logger).create_network()
        parser = trt.OnnxParser(network, logger)
        read = parser.parse_from_file(str(Bundle.open(inlined_bundle).model_file(graph)))
        assert read, [str(parser.get_error(i)) for i in range(parser.num_errors)]


def test_ort_cpu_runs_it_without_kernels(inlined_bundle):
    backend = create_backend(Bundle.open(inlined_bundle), "ort-cpu")
    output = backend.run("unet", seeded_inputs("unet", backend.bundle.manifest, 1))
    assert np.isfinite(output).all()
    assert "kernels" not in backend.describe()


def test_the_export_inlines_too(tmp_path):
    sizes = preset("tiny")
    modules = {"vae_decoder": exporting.VaeDecoder(load_vae("stand-in", sizes.vae)[0])}
    options = ExportOptions(weights="stand-in", vae="stand-in", preset="tiny", inline=True)
    written = exporting._write_graphs(tmp_path, "vae_decoder", modules, sizes, options, lambda *_: None)
    model = onnx.load(tmp_path / "vae_decoder/model.onnx", load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert [r.name for r in written["vae_decoder"].rewrites][-1] == INLINE_RULE
    assert written["vae_decoder"].parity.relative_error < 3e-5


def test_a_wrong_file_is_refused_and_nothing_is_written(fused_bundle, tmp_path, monkeypatch):
    def wrong(model):
        result, calls = standard_only(model)
        node = next(node for node in result.graph.node if node.op_type == "InstanceNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f *= 1e4
        return result, calls

    monkeypatch.setattr(inlining, "standard_only", wrong)
    with pytest.raises(ExportError, match=r"unet fp32: .* differs from the one with functions"):
        inline_bundle(fused_bundle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_functions_and_an_existing_folder_are_refused(tiny_bundle, tmp_path):
    with pytest.raises(ExportError, match="standard already"):
        inline_bundle(tiny_bundle, tmp_path / "out")
    with pytest.raises(ExportError, match="exists; name a new folder"):
        inline_bundle(tiny_bundle, tmp_path)


def test_an_operator_of_another_domain_is_refused():
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("QuickGelu", ["x"], ["y"], name="a/QuickGelu", domain="com.microsoft")
    ends = ([value(name, onnx.TensorProto.FLOAT, [1, 4])] for name in ("x", "y"))
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", *ends), opset_imports=opsets)
    with pytest.raises(ExportError, match=r"com\.microsoft::QuickGelu"):
        standard_only(model)


def test_shapes_of_open_dimensions_stay():
    """A `Shape` of a value with an open dimension is no constant; one of static dimensions is."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    nodes = [
        node("Shape", ["x"], ["open"], name="open"),
        node("Shape", ["x"], ["static"], name="static", start=1, end=-1),
        node("Concat", ["open", "static"], ["y"], name="y", axis=0),
    ]
    ends = [value("x", onnx.TensorProto.FLOAT, ["batch", 4, 7])], [value("y", onnx.TensorProto.INT64, [4])]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *ends), opset_imports=[onnx.helper.make_opsetid("", 20)]
    )
    result, _ = standard_only(model)
    assert [n.op_type for n in result.graph.node] == ["Shape", "Shape", "Concat"]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    result, _ = standard_only(model)
    (y,) = onnx.reference.ReferenceEvaluator(result).run(None, {"x": np.zeros((3, 4, 7), np.float32)})
    assert [n.op_type for n in result.graph.node] == ["Concat"]
    assert y.tolist() == [3, 4, 7, 4]
