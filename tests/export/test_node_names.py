import onnx
import pytest
from onnx import TensorProto, helper

from moebius_export.errors import ExportError
from moebius_export.graph.node_names import name_nodes


def node(op, inputs, outputs, scopes=None, name=""):
    made = helper.make_node(op, inputs, outputs, name=name)
    if scopes is not None:
        made.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(scopes))
    return made


def model(nodes, weights=(), outputs=("y",)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [2, 2])],
        [helper.make_tensor_value_info(name, 1, [2, 2]) for name in outputs],
        [helper.make_tensor(name, TensorProto.FLOAT, [2, 2], [1.0] * 4) for name in weights],
        value_info=[helper.make_tensor_value_info("a", 1, [2, 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_names_come_from_weights_then_scopes_then_neighbours():
    m = model(
        [
            # a convolution with a folded norm: the exporter says bn1, the weight says conv_pw
            node("MatMul", ["x", "student.net.conv_pw.weight"], ["a"], ["", "student", "student.net.bn1", "bn"]),
            node("Relu", ["a"], ["b"], ["", "student", "student.net", "relu"]),
            node("Relu", ["b"], ["c"], ["", "student", "student.net", "relu_1"]),
            node("Identity", ["c"], ["d"]),  # made by a rewriter
            node("Neg", ["d"], ["e"], ["", "student", "student.net.head", "neg"]),
            node("Abs", ["e"], ["y"], ["", "abs"]),
        ],
        ["student.net.conv_pw.weight"],
    )
    name_nodes(m, drop=("student",))
    names = [n.name for n in m.graph.node]
    assert names == ["net.conv_pw/MatMul", "net/Relu", "net/Relu_2", "net/Identity", "net.head/Neg", "graph/Abs"]
    # Values follow; the graph's own inputs, outputs and weights keep their names.
    assert m.graph.node[1].input == ["net.conv_pw/MatMul"]
    assert m.graph.node[0].input == ["x", "student.net.conv_pw.weight"]
    assert m.graph.node[5].output == ["y"]
    assert [value.name for value in m.graph.value_info] == ["net.conv_pw/MatMul"]
    onnx.checker.check_model(m, full_check=True)


def test_naming_again_keeps_the_modules_of_what_has_names():
    m = model([node("Relu", ["x"], ["a"], ["", "m", "relu"]), node("Relu", ["a"], ["y"], ["", "m", "relu_1"])])
    name_nodes(m)
    del m.graph.node[0].metadata_props[:], m.graph.node[1].metadata_props[:]
    m.graph.node.insert(1, node("Neg", ["m/Relu"], ["n"], name="Neg_0"))  # as a simplifier does
    m.graph.node[2].input[0] = "n"
    name_nodes(m)
    assert [n.name for n in m.graph.node] == ["m/Relu", "m/Neg", "m/Relu_2"]
    onnx.checker.check_model(m, full_check=True)


def test_further_outputs_are_numbered():
    m = model([node("Split", ["x"], ["a", "b"], ["", "m", "split"]), node("Add", ["a", "b"], ["y"], ["", "m", "add"])])
    m.graph.node[0].attribute.append(helper.make_attribute("num_outputs", 2))
    name_nodes(m)
    assert m.graph.node[0].output == ["m/Split", "m/Split.1"]
    assert m.graph.node[1].input == ["m/Split", "m/Split.1"]


def test_control_flow_is_refused():
    body = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", 1, [2, 2])])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)
    with pytest.raises(ExportError, match="control flow"):
        name_nodes(model([branch]))


def test_every_node_of_an_export_has_a_module(tiny_bundle):
    for file in ("unet/model.onnx", "unet/model_conditional.onnx", "vae_encoder/model.onnx", "vae_decoder/model.onnx"):
        graph = onnx.load(tiny_bundle / file, load_external_data=False).graph
        names = [n.name for n in graph.node]
        assert all("/" in name for name in names), file
        assert len(set(names)) == len(names), file
    unet = {n.name for n in onnx.load(tiny_bundle / "unet/model.onnx", load_external_data=False).graph.node}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.pos_conv/Conv" in unet
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2/Einsum_2" in unet
    assert "up_blocks.0.upsamplers.0.conv/Conv" in unet
