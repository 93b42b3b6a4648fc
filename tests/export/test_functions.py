"""The λ operators as ONNX functions: one node per layer, a body that is right in every form and in every session."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import inliner
from torch import nn

from moebius.network import lambda_ops
from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.graph.functions import DOMAIN, FORMS, function_protos
from moebius_export.onnx_export.convert import GraphSpec, to_onnx
from moebius_export.verify.placement import placement_checks

LEVELS = ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]
# float32 products of 8 to 200 terms; a wrong tap or place costs 1e-2 and more
TOLERANCE = 2e-6


class Local(nn.Module):
    def __init__(self, size, tile, depth, window):
        super().__init__()
        self.size, self.tile = size, tile
        self.window = nn.Parameter(torch.randn(depth, window, window))

    def forward(self, query, values, keys):
        summary = lambda_ops.lambda_summary(keys, values)
        return lambda_ops.local_lambda(query, values, summary, self.window, self.size, self.tile)


class Interactive(nn.Module):
    def forward(self, query, keys, values):
        return lambda_ops.interactive_lambda(query, keys, values)


def exported(module, inputs, form="tiles"):
    spec = GraphSpec("probe", module, inputs, "y", local_lambda_form=form)
    return to_onnx(spec, lambda stage: None)


def run(model, inputs, level="ORT_ENABLE_ALL"):
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def local_case(size=(8, 8), tile=(2, 4), depth=4, heads=3, window=5, batch=2):
    torch.manual_seed(1)
    height, width = size
    inputs = {
        "query": torch.randn(batch, height * width, heads * depth),
        "values": torch.randn(batch, height * width, depth),
        "keys": torch.randn(batch, depth, height * width),
    }
    return Local(size, tile, depth, window), inputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "tile"), [((8, 8), (2, 4)), ((6, 10), (1, 10)), ((16, 16), (16, 16))])
def test_every_form_is_exact(form, size, tile):
    module, inputs = local_case(size, tile)
    model = exported(module, inputs, form)
    assert [node.op_type for node in model.graph.node if node.domain == DOMAIN] == ["LambdaSummary", "LocalLambda"]
    expected = module(*inputs.values()).detach().numpy()
    for level in LEVELS:
        error = np.linalg.norm(run(model, inputs, level) - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE, level


def test_interactive_lambda():
    torch.manual_seed(2)
    inputs = {"query": torch.randn(2, 1, 9, 12), "keys": torch.randn(2, 9, 4, 5), "values": torch.randn(2, 5, 4)}
    model = exported(Interactive(), inputs)
    assert [node.op_type for node in model.graph.node] == ["InteractiveLambda"]
    expected = Interactive()(*inputs.values()).numpy()
    assert np.linalg.norm(run(model, inputs) - expected) / np.linalg.norm(expected) < TOLERANCE


def test_products_are_counted_inside_the_functions():
    """Both forms as exact-rewrites.md counts them: r*r k v + h k v per position, or h j (k + v)."""
    module, inputs = local_case(batch=1)
    positions, depth, heads, taps, near = 64, 4, 3, 25, 6 * 8
    summary = depth * depth * positions
    convolution = total_macs(node_costs(exported(module, inputs, "convolution")))
    assert convolution == summary + positions * depth * depth * (taps + heads)
    tiled = total_macs(node_costs(exported(module, inputs, "tiles")))
    assert tiled == summary + positions * heads * (depth * depth + near * 2 * depth)


def test_the_file_is_valid_and_its_functions_inline():
    module, inputs = local_case()
    model = exported(module, inputs)
    onnx.checker.check_model(model, full_check=True)
    inlined = inliner.inline_local_functions(model)
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} <= {"", "ai.onnx"}
    expected = run(model, inputs)
    assert np.array_equal(run(inlined, inputs), expected)


def test_functions_are_not_named_like_standard_operators():
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    for form in FORMS:
        assert not standard & set(function_protos(form))


def test_every_product_of_a_body_has_a_name_of_its_own_and_is_found_in_the_profile(tmp_path):
    """Two calls of one function, so that names that say only which function they are of would be mixed up."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, _ = local_case()
            self.second, _ = local_case()

        def forward(self, query, values, keys):
            return self.second(self.first(query, values, keys), values, keys)

    _, inputs = local_case()
    model = exported(Twice(), inputs)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    costs = node_costs(path)
    names = [cost.name for cost in costs]
    assert len(set(names)) == len(names) == 1 + 2 * 3  # both calls share one summary
    assert {name.rpartition("/")[0] for name in names} == {node.name for node in model.graph.node}
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    events = [event for event in json.loads(Path(session.end_profiling()).read_text()) if event["cat"] == "Node"]
    checks, placement = placement_checks("probe", "fp32", path, events, 1.0)
    assert [check.status for check in checks] == ["pass", "pass"]
    assert placement.rows[0][2] == pytest.approx(total_macs(costs) / 1e9)
