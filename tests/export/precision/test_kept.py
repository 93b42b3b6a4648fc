"""Typed files in which LocalLambda stays a function: planned as one node each, judged by what is inside."""

import shutil

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from moebius_export.commands.app import app
from moebius_export.errors import ExportError
from moebius_export.graph.opened import Opened, opened
from moebius_export.precision.kept_functions import calls_of, folded
from moebius_export.precision.plan import read_plan, write_plan
from moebius_export.precision.rules import fixed_reasons
from moebius_export.precision.write import plans_of, write_typed
from moebius_export.trajectories.ranges import Ranges
from moebius_export.verify import VerifyOptions, verify
from moebius_runtime.bundle.bundle import Bundle

KEEP = ("LocalLambda",)
PLAN = "unet/precision_fp16.json"


def silent(what, done, total):
    """A progress callback that says nothing."""


def precision(*arguments):
    return CliRunner().invoke(app, ["precision", *map(str, arguments)])


@pytest.fixture
def copy(kept_bundle, tmp_path):
    return shutil.copytree(kept_bundle, tmp_path / "bundle")


def test_each_call_is_one_typed_node(kept_bundle):
    bundle = Bundle.open(kept_bundle)
    for name, info in bundle.manifest.graphs.items():
        path = bundle.model_file(name, "fp16")
        plan = read_plan(kept_bundle / info.files["fp16"].plan)
        model = onnx.load(path, load_external_data=False)
        functions = [function.name for function in model.functions]
        if not name.startswith("unet"):
            assert (plan.keep, functions) == ((), [])
            continue
        assert (plan.keep, functions) == (KEEP, ["LocalLambda"])
        onnx.checker.check_model(str(path), full_check=True)
        file = Opened(model)
        calls = calls_of(file, KEEP)
        assert len(calls) == 6
        for call in calls:
            assert len(call.input) == 4
            kind = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[plan.nodes[call.name].type]
            assert {file.types[value] for value in (*call.input, *call.output)} == {kind}
            assert not [node for node in plan.nodes if node.startswith(f"{call.name}/")]
        assert "fp16" in {plan.nodes[call.name].type for call in calls}


def test_verify_holds(kept_bundle):
    report = verify(kept_bundle, VerifyOptions(steps=2, precisions=("fp16",)))
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]


def test_tensorrt_rtx_takes_the_function(kept_bundle):
    trt = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(kept_bundle / "unet/model_fp16.onnx"))


def test_the_plan_keeps_it_when_applied_again(copy):
    plan = read_plan(copy / PLAN)
    name = next(node for node, entry in plan.nodes.items() if "LocalLambda" in node and entry.type == "fp16")
    nodes = plan.nodes | {name: plan.nodes[name].model_copy(update={"type": "fp32", "reason": "by hand"})}
    write_plan(plan.model_copy(update={"nodes": nodes}), copy / PLAN)
    result = precision(copy, "--reapply")
    assert result.exit_code == 0, result.output
    file = Opened(onnx.load(copy / "unet/model_fp16.onnx", load_external_data=False))
    assert [function.name for function in file.model.functions] == ["LocalLambda"]
    assert file.types[file.nodes[name].output[0]] == onnx.TensorProto.FLOAT
    assert read_plan(copy / PLAN).keep == KEEP


def test_a_value_inside_that_overflows_keeps_the_node_in_float32(tensorrt_bundle):
    path = Bundle.open(tensorrt_bundle).model_file("unet")
    inside, graph = Opened(opened(path)), Opened(opened(path, KEEP))
    ranges = Ranges()
    names = [node.output[0] for node in inside.model.graph.node if inside.computes(node)]
    call = calls_of(graph, KEEP)[1].name
    body = [name for name in names if name.startswith(f"{call}/")]
    assert len(body) > 2
    for low, high in ((-1.0, 1.0), (-20_000.0, 2.0)):
        ranges.add({f"observed/{name}": np.array([low if name == body[0] else -1.0, high, 4.0]) for name in names})
    found = folded(ranges, graph, KEEP)
    assert set(found.largest) >= {node.name for node in calls_of(graph, KEEP)}
    assert not [name for name in found.largest if "LocalLambda/" in name]
    assert (found.largest[call], found.rms(call), found.runs) == (20_000.0, 2.0, 2)
    reasons = fixed_reasons(graph, "fp16", found)
    assert reasons[call].startswith("overflow: 20,000 seen, limit 16,376")
    assert not [reason for name, reason in reasons.items() if "LocalLambda" in name and name != call]


def test_what_is_refused_before_any_measuring(kept_bundle, fused_bundle, tiny_bundle):
    for arguments, words in (
        ((kept_bundle, "--keep", "GroupNorm"), "--keep GroupNorm: expected LocalLambda"),
        ((kept_bundle, "--keep", "LocalLambda", "--reapply"), "with the functions that they keep: leave --keep out"),
        ((kept_bundle, "--keep", "LocalLambda", "--to", "bf16"), "the plugin takes float32 and float16 only"),
        (
            (fused_bundle, "--keep", "LocalLambda"),
            "has 6 inputs, the body for CPUs; the plugin takes the 4 of the body",
        ),
        ((tiny_bundle, "--keep", "LocalLambda"), "no graph of this bundle calls it; export the bundle with its"),
    ):
        result = precision(*arguments)
        assert result.exit_code != 0
        assert words in str(result.exception), arguments


def test_a_plan_that_keeps_what_is_not_there_is_refused(copy):
    path = copy / "vae_decoder/precision_fp16.json"
    write_plan(read_plan(path).model_copy(update={"keep": KEEP}), path)
    bundle = Bundle.open(copy)
    before = sorted(p.name for p in copy.rglob("*"))
    with pytest.raises(ExportError, match="no graph of this bundle calls it"):
        write_typed(bundle, plans_of(bundle, "fp16"), only=False, progress=silent)
    assert sorted(p.name for p in copy.rglob("*")) == before
    text = path.read_text().replace("LocalLambda", "GroupNorm")
    path.write_text(text)
    with pytest.raises(ExportError, match=r"keep.*expected a precision plan"):
        plans_of(bundle, "fp16")
