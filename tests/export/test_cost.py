"""Counts of hand-made graphs, each worked out beside it."""

import pytest
from onnx import TensorProto, helper

from moebius_export.graph import cost
from moebius_export.graph.cost import CostError, einsum_macs, node_costs


def graph(nodes, inputs, outputs, constants=(), functions=(), opsets=(("", 20),)):
    """A model; inputs, outputs and constants as (name, shape[, type])."""

    def value(name, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    def constant(name, shape, kind=TensorProto.FLOAT):
        tensor = TensorProto(name=name, data_type=kind, dims=shape)  # no data: none is needed
        tensor.data_location = TensorProto.EXTERNAL
        return tensor

    body = helper.make_graph(
        nodes, "g", [value(*i) for i in inputs], [value(*o) for o in outputs], [constant(*c) for c in constants]
    )
    return helper.make_model(
        body, opset_imports=[helper.make_opsetid(*o) for o in opsets], functions=list(functions), ir_version=10
    )


def only(model, **options):
    (found,) = node_costs(model, **options)
    return found


@pytest.mark.parametrize(
    ("op", "x", "w", "attributes", "expected"),
    [
        # 2 * 6 * 5 * 5 outputs of 4 * 3 * 3 products
        ("Conv", [2, 4, 5, 5], [6, 4, 3, 3], {"pads": [1, 1, 1, 1]}, 2 * 6 * 5 * 5 * 4 * 3 * 3),
        ("Conv", [1, 6, 8, 8], [6, 1, 3, 3], {"pads": [1] * 4, "group": 6}, 6 * 8 * 8 * 9),
        ("Conv", [1, 6, 8, 8], [4, 6, 3, 3], {"pads": [1] * 4, "strides": [2, 2]}, 4 * 4 * 4 * 6 * 9),
        # the Local-λ position convolution: 1 -> k channels over [1, v, H, W], kernel 1 x 7 x 7
        ("Conv", [2, 1, 5, 8, 8], [3, 1, 1, 7, 7], {"pads": [0, 3, 3, 0, 3, 3]}, 2 * 3 * 5 * 8 * 8 * 49),
        ("ConvTranspose", [1, 4, 5, 5], [4, 3, 2, 2], {"strides": [2, 2]}, 4 * 5 * 5 * 3 * 2 * 2),
        ("MatMul", [2, 3, 5, 7], [7, 11], {}, 2 * 3 * 5 * 11 * 7),
        ("MatMul", [7], [7, 11], {}, 7 * 11),
        ("Gemm", [3, 5], [5, 7], {}, 3 * 5 * 7),
        ("Gemm", [5, 3], [7, 5], {"transA": 1, "transB": 1}, 3 * 5 * 7),
    ],
)
def test_products_of_one_operator(op, x, w, attributes, expected):
    node = helper.make_node(op, ["x", "w"], ["y"], name="n", **attributes)
    found = only(graph([node], [("x", x)], [("y", None)], [("w", w)]))
    assert (found.macs, found.dtype, found.op_type, found.name) == (expected, "FLOAT", op, "n")
    assert found.is_convolution == op.startswith("Conv")


def test_integer_operators_and_their_types():
    u8, i8 = TensorProto.UINT8, TensorProto.INT8
    scalar = [(f"s{i}", []) for i in range(3)]
    zeros = [(f"z{i}", [], u8 if i != 1 else i8) for i in range(3)]
    qconv = helper.make_node("QLinearConv", ["x", "s0", "z0", "w", "s1", "z1", "s2", "z2"], ["y"])
    model = graph([qconv], [("x", [1, 4, 6, 6], u8)], [("y", None, u8)], [("w", [8, 4, 3, 3], i8), *scalar, *zeros])
    assert (only(model).macs, only(model).dtype, only(model).of_bytes) == (8 * 4 * 4 * 4 * 9, "INT8", True)

    qmat = helper.make_node("QLinearMatMul", ["x", "s0", "z0", "w", "s1", "z1", "s2", "z2"], ["y"])
    model = graph([qmat], [("x", [5, 7], u8)], [("y", None, u8)], [("w", [7, 3], i8), *scalar, *zeros])
    assert (only(model).macs, only(model).dtype) == (5 * 7 * 3, "INT8")

    for op, x, w, expected in (
        ("ConvInteger", [1, 2, 5, 5], [3, 2, 3, 3], 3 * 3 * 3 * 2 * 9),
        ("MatMulInteger", [5, 7], [7, 3], 5 * 7 * 3),
    ):
        node = helper.make_node(op, ["x", "w"], ["y"])
        model = graph([node], [("x", x, u8)], [("y", None, TensorProto.INT32)], [("w", w, i8)])
        assert (only(model).macs, only(model).dtype) == (expected, "INT8")


def through_bytes(value, name):
    """Nodes that take a value through int8 and back as NAME."""
    scale = ["s", "z"]
    return [
        helper.make_node("QuantizeLinear", [value, *scale], [f"{name}q"]),
        helper.make_node("DequantizeLinear", [f"{name}q", *scale], [name]),
    ]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([], [], False),
        (through_bytes("x", "left"), [], False),
        ([], [helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["right"])], False),
        (through_bytes("x", "left"), [helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["right"])], True),
        # whole numbers kept in float32, as in the bodies of moebius::Int8...
        (
            [helper.make_node("Round", ["x"], ["r"]), helper.make_node("Clip", ["r", "s", "s"], ["left"])],
            [helper.make_node("Transpose", ["w8"], ["t"]), helper.make_node("Cast", ["t"], ["right"], to=1)],
            True,
        ),
        # scaled after it was rounded: no whole number any more
        (
            [helper.make_node("Round", ["x"], ["r"]), helper.make_node("Mul", ["r", "s"], ["left"])],
            [helper.make_node("Cast", ["w8"], ["right"], to=1)],
            False,
        ),
    ],
)
def test_products_of_bytes_are_told_from_those_of_numbers(left, right, expected):
    product = helper.make_node("MatMul", ["left" if left else "x", "right" if right else "w"], ["y"])
    i8 = TensorProto.INT8
    constants = [("w", [7, 7]), ("w8", [7, 7], i8), ("s", []), ("z", [], i8)]
    model = graph([*left, *right, product], [("x", [5, 7])], [("y", None)], constants)
    assert only(model).of_bytes is expected
    assert cost.byte_macs(node_costs(model)) == (5 * 7 * 7 if expected else 0)


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("bkn,bvn->bkv", [(2, 3, 5), (2, 7, 5)], 2 * 3 * 5 * 7),
        ("bhkn,bkvn->bhvn", [(2, 4, 3, 5), (2, 3, 7, 5)], 2 * 4 * 3 * 5 * 7),
        ("nmk,bvm->bnkv", [(5, 6, 3), (2, 7, 6)], 2 * 5 * 6 * 3 * 7),
        ("ij,jk", [(2, 3), (3, 5)], 2 * 3 * 5),  # output left out: every index that occurs once
        ("...ij,...jk->...ik", [(4, 6, 2, 3), (6, 3, 5)], 4 * 6 * 2 * 3 * 5),
        ("ij->ji", [(2, 3)], 0),
        # left to right: [i, j] x [j, k] is 2*3*5, j is then gone, [i, k] x [k, l] is 2*5*7
        ("ij,jk,kl->il", [(2, 3), (3, 5), (5, 7)], 2 * 3 * 5 + 2 * 5 * 7),
        ("bi,bj->bij", [(1, 3), (2, 5)], 2 * 3 * 5),  # a size of 1 is spread
    ],
)
def test_einsum(equation, shapes, expected):
    assert einsum_macs(equation, shapes) == expected


@pytest.mark.parametrize("equation", ["ij->ij", "ijk,jk->i", "ij,ij->i"])
def test_einsum_that_does_not_fit_is_refused(equation):
    with pytest.raises(CostError, match="einsum"):
        einsum_macs(equation, [(2, 3), (3, 5)])


def test_element_wise_operators_cost_nothing():
    nodes = [helper.make_node("Add", ["x", "x"], ["a"]), helper.make_node("Softmax", ["a"], ["y"])]
    assert node_costs(graph(nodes, [("x", [2, 3])], [("y", [2, 3])])) == []


def test_shapes_between_nodes_are_inferred():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "u"], ["y"], name="second"),
    ]
    costs = node_costs(graph(nodes, [("x", [2, 3])], [("y", None)], [("w", [3, 5]), ("u", [5, 7])]))
    assert [(c.name, c.macs) for c in costs] == [("first", 30), ("second", 70)]
    assert cost.total_macs(costs) == 100
    assert cost.convolution_macs(costs) == 0
    assert cost.macs_by_dtype(costs) == {"FLOAT": 100}


@pytest.mark.parametrize("batch", [1, 3])
def test_an_open_batch_is_given_a_size(batch):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = graph([node], [("x", ["batch", 4, 3])], [("y", ["batch", 4, 5])], [("w", [3, 5])])
    assert only(model, batch=batch).macs == batch * 4 * 3 * 5
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"  # left as it was


def test_a_function_body_is_counted_at_each_call():
    body = helper.make_function(
        "moebius",
        "Twice",
        ["a", "b"],
        ["c"],
        [helper.make_node("MatMul", ["a", "b"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["c"])],
        [helper.make_opsetid("", 20)],
    )
    nodes = [
        helper.make_node("Twice", ["x", "w"], ["h"], domain="moebius"),
        helper.make_node("Twice", ["h", "w"], ["y"], domain="moebius"),
    ]
    model = graph(nodes, [("x", [2, 3])], [("y", None)], [("w", [3, 3])], [body], [("", 20), ("moebius", 1)])
    assert cost.total_macs(node_costs(model)) == 4 * 2 * 3 * 3


@pytest.mark.parametrize(
    ("op", "domain"), [("LocalLambda", "moebius"), ("LSTM", ""), ("FusedAttention", "com.microsoft")]
)
def test_an_operator_with_unknown_products_is_refused(op, domain):
    node = helper.make_node(op, ["x", "w"], ["y"], name="here", domain=domain)
    model = graph([node], [("x", [2, 3])], [("y", None)], [("w", [3, 3])], opsets=[("", 20), (domain or "x", 1)])
    with pytest.raises(CostError, match=f"here.*{op}"):
        node_costs(model)


def test_control_flow_is_refused():
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], name="branch", then_branch=body, else_branch=body)
    model = graph([node], [("c", [], TensorProto.BOOL), ("x", [2, 3])], [("y", None)], [("w", [3, 3])])
    with pytest.raises(CostError, match="control flow"):
        node_costs(model)


def test_an_unknown_shape_is_refused():
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="here")
    model = graph([node], [("x", None)], [("y", None)], [("w", [6, 4, 3, 3])])
    with pytest.raises(CostError, match=r"here.*cannot be inferred"):
        node_costs(model)


def test_contradicting_shapes_are_refused():
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = graph([node], [("x", [2, 3])], [("y", [9, 9])], [("w", [4, 5])])
    with pytest.raises(CostError):
        node_costs(model)


def test_a_real_export_costs_what_torch_counts(tiny_bundle):
    """Two counters that share nothing: onnx shapes here, torch's own operation counter on the network there."""
    pytest.importorskip("torch")
    from moebius_bench.measure.costs import count_torch

    expected = count_torch("tiny")
    for name, file in (
        ("unet", "unet/model.onnx"),
        ("unet_conditional", "unet/model_conditional.onnx"),
        ("vae_encoder", "vae_encoder/model.onnx"),
        ("vae_decoder", "vae_decoder/model.onnx"),
    ):
        costs = node_costs(tiny_bundle / file)
        # Only the torch network computes the categories' constants anew: k, v and their λ of each Interactive-λ.
        assert cost.convolution_macs(costs) == expected[name]["convolutions"], name
        assert 0.97 * expected[name]["all"] <= cost.total_macs(costs) <= expected[name]["all"], name
