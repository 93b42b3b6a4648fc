"""The fused U-Net in TensorRT-RTX: parsed with the functions' bodies inlined, and built. Neither needs a GPU."""

from pathlib import Path

import onnx
import pytest

from moebius import preset
from moebius.weights.load import load_student
from moebius_export.graph.functions import DOMAIN
from moebius_export.lowering.lowering import shipped
from moebius_export.network.wrappers import GuidedUNet
from moebius_export.onnx_export.convert import GraphSpec, to_onnx
from moebius_export.onnx_export.examples import example_inputs
from moebius_export.rules import rewrite_unet

trt = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")


def built(path: Path, *names: str) -> tuple[list[str], bytes | None]:
    """Messages of the parser, and the engine for Ada GPUs (SM 89) where there were none."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return [str(parser.get_error(i)) for i in range(parser.num_errors)], None
    assert [network.get_input(i).name for i in range(network.num_inputs)] == list(names)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    return [], None if engine is None else bytes(engine)


@pytest.mark.parametrize("target", [pytest.param("ort-cpu", marks=pytest.mark.slow), "tensorrt"])
def test_the_fused_unet_builds(target, tmp_path):
    sizes = preset("tiny")
    student, _ = load_student("stand-in:0", sizes.student)
    module, inputs = GuidedUNet(student).eval(), example_inputs("unet", sizes, 1)
    rewritten, _ = rewrite_unet(module, student, module.category_ids)
    model = to_onnx(
        GraphSpec("unet", rewritten, inputs, "noise_pred", local_lambda_form=shipped()[target].form), lambda stage: None
    )
    assert sum(node.domain == DOMAIN for node in model.graph.node) == 5 * 6 + 1
    onnx.save(model, tmp_path / "model.onnx")
    problems, engine = built(tmp_path / "model.onnx", *inputs)
    assert problems == []
    assert engine


def test_an_operator_that_it_does_not_know_is_reported(tmp_path):
    """So that the test above could fail."""
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("LocalLambda", ["x"], ["y"], domain=DOMAIN)
    ends = ([value(name, onnx.TensorProto.FLOAT, [1, 4])] for name in ("x", "y"))
    graph = onnx.helper.make_graph([node], "g", *ends)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    problems, engine = built(tmp_path / "model.onnx", "x")
    assert "LocalLambda" in " ".join(problems)
    assert engine is None
