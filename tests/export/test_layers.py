"""Whole layers as ONNX functions: one node each, a body that is right at every optimisation level, opcheck."""

import onnxruntime as ort
import pytest
import torch
from torch import nn

from moebius.network import layer_ops
from moebius_export.graph.functions import DOMAIN
from moebius_export.onnx_export.convert import GraphSpec, to_onnx

LEVELS = ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
# float32 sums of up to some hundred terms in another order measure 1e-7 to 4e-7; a wrong tap costs 1e-2 and more
TOLERANCE = 2e-6


class Layer(nn.Module):
    """An operator with its weights as parameters; lists of weights stay lists."""

    def __init__(self, operator, weights, rest):
        super().__init__()
        self.operator, self.rest, self.lists = operator, rest, [isinstance(w, list) for w in weights]
        self.groups = nn.ModuleList(
            nn.ParameterList(nn.Parameter(t) for t in (w if isinstance(w, list) else [w])) for w in weights
        )

    def forward(self, *inputs):
        weights = [list(g) if many else g[0] for g, many in zip(self.groups, self.lists, strict=True)]
        return self.operator(*inputs, *weights, *self.rest)


def half(inputs, outputs):
    depthwise = [torch.randn(inputs, 1, 3, 3), torch.randn(inputs)]
    return [1 + torch.randn(inputs) / 8, torch.randn(inputs), *depthwise, *point(inputs, outputs)]


def point(inputs, outputs):
    return [torch.randn(outputs, inputs, 1, 1), torch.randn(outputs)]


def feed_forward():
    weights = [torch.randn(20, 8, 1, 1), torch.randn(20), torch.randn(20, 1, 3, 3), torch.randn(20)]
    layer = Layer(layer_ops.feed_forward, [*weights, torch.randn(8, 10, 1, 1)], [(5, 7)])
    return layer, {"x": torch.randn(2, 35, 8)}, "FeedForward"


def block(inputs, outputs, rows):
    shortcut = point(inputs, outputs) if inputs != outputs else []
    layer = Layer(layer_ops.residual_block, [half(inputs, outputs), half(outputs, outputs), shortcut], [4, 1e-5])
    kind = "ProjectedResidualBlock" if shortcut else "ResidualBlock"
    return layer, {"x": torch.randn(2, inputs, 5, 7), "time": torch.randn(rows, outputs)}, kind


def conv(operator, kind):
    layer = Layer(operator, [torch.randn(6, 5, 3, 3), torch.randn(6)], [])
    return layer, {"x": torch.randn(2, 5, 6, 9)}, kind


def norm():
    layer = Layer(layer_ops.group_norm, [1 + torch.randn(12) / 8, torch.randn(12)], [3, 1e-3])
    return layer, {"x": torch.randn(2, 12, 5, 7)}, "GroupNorm"


CASES = {
    "group_norm": norm,
    "feed_forward": feed_forward,
    "residual": lambda: block(8, 8, 1),
    "projected": lambda: block(8, 12, 2),
    "conv3x3": lambda: conv(layer_ops.conv3x3, "Conv3x3"),
    "upsample": lambda: conv(layer_ops.upsample_conv3x3, "UpsampleConv3x3"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_layer_is_one_node_with_an_exact_body(case):
    torch.manual_seed(5)
    layer, inputs, kind = CASES[case]()
    model = to_onnx(GraphSpec("probe", layer, inputs, "y"), lambda stage: None)
    assert [node.op_type for node in model.graph.node if node.domain == DOMAIN] == [kind]
    with torch.inference_mode():
        expected = layer.double()(*(tensor.double() for tensor in inputs.values()))
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        assert float((torch.from_numpy(got) - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_operators_keep_torch_s_contract(case):
    layer, inputs, _ = CASES[case]()
    weights = [
        [t.detach() for t in g] if many else g[0].detach() for g, many in zip(layer.groups, layer.lists, strict=True)
    ]
    torch.library.opcheck(layer.operator, (*inputs.values(), *weights, *layer.rest))


def test_a_feed_forward_of_another_size_is_refused():
    layer, inputs, _ = feed_forward()
    layer.rest = [(5, 8)]
    with pytest.raises(ValueError, match="expected 40 positions"):
        torch.export.export(layer, tuple(inputs.values()))
