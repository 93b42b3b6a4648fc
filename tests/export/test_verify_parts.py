"""The parts of `moebius-export verify`, each on inputs small enough to know the answer by hand."""

from itertools import chain

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moebius_export.errors import ExportError
from moebius_export.onnx_export.convert import IR_VERSION, OPSET
from moebius_export.trajectories.scenes import seeded_inputs
from moebius_export.verify import bisect as bisecting
from moebius_export.verify.bisect import bisect
from moebius_export.verify.budgets import BUDGETS, MEANING, budgets_for, parse_changes
from moebius_export.verify.declared import file_checks
from moebius_export.verify.graphs import difference
from moebius_export.verify.placement import placement_checks
from moebius_export.verify.reference import load_reference
from moebius_export.verify.results import Check, Report, at_least, at_most, write_json
from moebius_export.verify.trace import SAMPLES, positions, trace_module
from moebius_export.verify.weights import norm_pairs, weight_checks
from moebius_runtime import Bundle
from moebius_runtime.bundle.manifest import FileInfo, read_manifest, write_manifest
from moebius_runtime.files import sha256_file


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return read_manifest(tiny_bundle)


@pytest.fixture(scope="module")
def reference(manifest):
    return load_reference(manifest, None, None, lambda text: None)


def run_once(module, inputs):
    with norm_pairs(module) as pairs, torch.inference_mode():
        module(*(torch.from_numpy(array) for array in inputs.values()))
    return pairs


@pytest.fixture(scope="module")
def pairs(manifest, reference):
    return {
        graph: run_once(reference.modules[graph], seeded_inputs(graph, manifest, 0))
        for graph in ("unet", "vae_encoder")
    }


# Results and budgets


def test_only_a_run_check_that_held_is_a_pass(tmp_path):
    def exit_code(*statuses):
        checks = [Check("a", "b", "c", status) for status in statuses]
        return Report("bundle", {}, stand_in=False, checks=checks).exit_code

    assert exit_code("pass", "note") == 0
    assert exit_code() == exit_code("note") == exit_code("pass", "not run") == exit_code("pass", "fail") == 1
    nan = float("nan")
    assert at_most("a", "b", "c", nan, 1.0).status == at_least("a", "b", "c", nan, 1.0).status == "fail"
    assert at_most("a", "b", "c", 1.0, 1.0).status == at_least("a", "b", "c", 1.0, 1.0).status == "pass"
    report = Report("bundle", {}, stand_in=False, checks=[at_most("a", "b", "c", nan, 1.0)])
    write_json(report, tmp_path / "r.json")
    assert '"measured": "nan"' in (tmp_path / "r.json").read_text()


def test_budgets_are_one_complete_table():
    assert all(set(table) == set(MEANING) for table in BUDGETS.values())
    assert budgets_for("fp32", parse_changes(["psnr=40", "drift=0.5"])) == {**BUDGETS["fp32"], "psnr": 40, "drift": 0.5}
    assert budgets_for("int8", {"psnr": 40.0}) is None
    for text in ("psnr", "psnr=", "psnr=x", "psnr=inf", "psnr=-1", "speed=1", "=1"):
        with pytest.raises(ExportError, match=f"--budget {text}"):
            parse_changes([text])


# Outputs


def test_difference_names_the_worst_place():
    expected = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)  # of norm 5
    got = expected.copy()
    got[1, 0] += np.float32(0.5)
    found = difference(got, expected)
    assert (found.relative, found.worst, found.place, found.rms) == (0.1, 0.5, (1, 0), 2.5)
    got[0, 1], got[1, 1] = np.inf, np.nan
    found = difference(got, expected)
    assert found.not_finite == 2
    assert found.place == (0, 1)
    assert not found.relative <= 1e9
    assert np.isnan(found.worst)


def test_inputs_come_from_the_seed_and_the_manifest(manifest):
    first, again, other = (seeded_inputs("unet", manifest, seed) for seed in (3, 3, 4))
    assert list(first) == ["sample", "timestep", "guidance_scale"]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["sample"], other["sample"])
    assert set(np.unique(first["sample"][:, 4])) == {0, 1}
    assert first["timestep"].dtype == np.int64
    assert first["guidance_scale"][0] != manifest.defaults.guidance_scale


# Weights


def changed(bundle, tmp_path, file, name, new):
    model = onnx.load(bundle / file)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(new(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def one_off(place):
    def new(values):
        values[place] *= np.float32(1.01)
        return values

    return new


def details(checks):
    return {check.name: (check.status, check.detail) for check in checks}


def test_one_element_off_by_one_per_cent(tiny_bundle, tmp_path, reference, pairs):
    name = "encoder.down_blocks.0.resnets.0.conv1.weight"
    path = changed(tiny_bundle, tmp_path, "vae_encoder/model.onnx", name, one_off((3, 2, 0, 1)))
    found = details(weight_checks("s", path, reference.modules["vae_encoder"], pairs["vae_encoder"], False))
    status, detail = found["equal the checkpoint"]
    assert status == "fail"
    assert detail.startswith(f"{name}: 1 of 576 values differ from the checkpoint's, worst at [3, 2, 0, 1]")
    assert found["types"][0] == found["not rounded"][0] == "pass"


def test_one_element_of_a_folded_weight(tiny_bundle, tmp_path, reference, pairs):
    """With the batch norm in it; 1e-5 of its value is seen, being ten times the rounding that folding may cost."""
    name = "student.diff_model.conv_in.conv_pw.weight"

    def new(values):
        values[7, 4] *= np.float32(1 + 1e-5)
        return values

    path = changed(tiny_bundle, tmp_path, "unet/model.onnx", name, new)
    status, detail = details(weight_checks("s", path, reference.modules["unet"], pairs["unet"], False))[
        "equal the checkpoint"
    ]
    assert status == "fail"
    assert f"{name}: 1 of 144 values differ from the checkpoint's {name} with student.diff_model.conv_in.bn2" in detail
    assert "[7, 4, 0, 0]" in detail


def test_one_element_of_a_tensor_without_its_name(tiny_bundle, tmp_path, reference, pairs):
    """A gain that the exporter reshaped and renamed: known by its other values."""
    model = onnx.load(tiny_bundle / "unet" / "model.onnx")
    state = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    unnamed = (n for n, v in state.items() if not n.startswith("student") and v.shape == (16, 1, 1))
    name = next(n for n in unnamed if len(np.unique(state[n])) == 16)
    path = changed(tiny_bundle, tmp_path, "unet/model.onnx", name, one_off(5))
    detail = details(weight_checks("s", path, reference.modules["unet"], pairs["unet"], False))["equal the checkpoint"][
        1
    ]
    assert f"{name}: 1 of 16 values differ from the checkpoint's student.diff_model." in detail
    assert "[5, 0, 0]" in detail


def test_weights_in_each_others_place(tiny_bundle, tmp_path, reference, pairs):
    """Values of the checkpoint under another parameter's name do not count as equal."""
    first, second = (f"encoder.down_blocks.0.resnets.0.conv{i}.weight" for i in (1, 2))
    other = reference.modules["vae_encoder"].state_dict()[second].numpy()
    path = changed(tiny_bundle, tmp_path, "vae_encoder/model.onnx", first, lambda values: other)
    module = reference.modules["vae_encoder"]
    found = details(weight_checks("s", path, module, pairs["vae_encoder"], False))
    assert found["equal the checkpoint"][1].startswith(f"{first}: 576 of 576 values differ")
    # In a rewritten graph a name may carry other values, and the output has to judge them; all but one equal does not.
    assert details(weight_checks("s", path, module, {}, True))["equal the checkpoint"][0] == "pass"
    path = changed(tiny_bundle, tmp_path, "vae_encoder/model.onnx", first, one_off((0, 0, 0, 0)))
    assert details(weight_checks("s", path, module, {}, True))["equal the checkpoint"][0] == "fail"


def test_hooks_are_taken_off_again(manifest, reference, pairs):
    module = reference.modules["unet"]
    assert pairs["unet"]["student.diff_model.conv_in.bn1"] == "student.diff_model.conv_in.conv_dw"
    trace = trace_module(module, seeded_inputs("unet", manifest, 0))
    assert any(name.startswith("student.diff_model.conv_out.conv_pw ") for name in chain(*trace.names.values()))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_samples_keep_the_ends_of_a_large_tensor():
    assert list(positions(5)) == [0, 1, 2, 3, 4]
    kept = positions(10 * SAMPLES + 3)
    assert len(kept) == len(set(kept)) == SAMPLES
    assert (kept[0], kept[-1]) == (0, 10 * SAMPLES + 2)


# The first wrong tensor


def test_the_first_wrong_tensor_is_the_same_in_many_small_runs(tiny_bundle, tmp_path, manifest, reference, monkeypatch):
    """A file whose tensors do not fit in memory at once is run several times."""
    name = "encoder.mid_block.resnets.1.conv1.weight"
    path = changed(tiny_bundle, tmp_path, "vae_encoder/model.onnx", name, lambda values: values * np.float32(1.01))
    module, inputs = reference.modules["vae_encoder"], seeded_inputs("vae_encoder", manifest, 1)
    at_once = bisect("s", path, module, inputs, 3e-5)
    runs = []
    monkeypatch.setattr(bisecting, "_BYTES_AT_ONCE", 1 << 20)
    monkeypatch.setattr(bisecting, "_run", lambda *given, run=bisecting._run: runs.append(given) or run(*given))
    assert bisect("s", path, module, inputs, 3e-5) == at_once
    assert len(runs) > 5
    assert "of node encoder.mid_block.resnets.1.conv1/Conv (Conv)" in at_once.detail
    assert f"It reads the stored {name}" in at_once.detail
    assert at_once.measured == pytest.approx(0.01, rel=0.05)  # 1 % of all but the bias


def test_a_file_without_a_wrong_tensor_has_none(tiny_bundle, manifest, reference):
    path = tiny_bundle / "vae_encoder" / "model.onnx"
    inputs = seeded_inputs("vae_encoder", manifest, 1)
    found = bisect("s", path, reference.modules["vae_encoder"], inputs, 3e-5)
    assert found.measured is None
    assert found.detail.startswith("every tensor of the file is within 3e-05 of PyTorch's")


# Placement


@pytest.fixture
def two_products(tmp_path):
    """y = (x @ a) @ (b @ c): 2*3*4 and 2*4*6 MACs on the input, 4*5*6 on constants alone."""
    stored = {"a": (3, 4), "b": (4, 5), "c": (5, 6)}
    nodes = [
        helper.make_node("MatMul", ["b", "c"], ["bc"], name="constants"),
        helper.make_node("MatMul", ["x", "a"], ["xa"], name="first"),
        helper.make_node("MatMul", ["xa", "bc"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6])],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.save(model, tmp_path / "two.onnx")
    return tmp_path / "two.onnx"


def event(name, kind="float", provider="CPUExecutionProvider"):
    shapes = [{kind: [2, 2]}]
    arguments = {"provider": provider, "op_name": "MatMul", "input_type_shape": shapes, "output_type_shape": shapes}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": arguments}


def test_shares_of_what_ran(two_products):
    checks, placement = placement_checks("s", "fp32", two_products, [event("first"), event("second")], 0.999)
    assert [check.status for check in checks] == ["pass", "pass"]
    assert placement.rows == [("CPUExecutionProvider", "float", 72e-9, 1.0)]
    assert placement.ahead == pytest.approx(120e-9)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([event("first"), event("second", kind="float16")], "second in float16 on CPUExecutionProvider"),
        ([event("first", provider="CUDAExecutionProvider"), event("second")], "first in float on CUDA"),
        ([event("first"), event("second"), event("cast", kind="bfloat16")], "cast in bfloat16"),
    ],
)
def test_another_type_or_provider_than_asked_for_fails(two_products, events, words):
    (found, where), placement = placement_checks("s", "fp32", two_products, events, 0.999)
    assert found.status == "pass"
    assert where.status == "fail"
    assert f"expected fp32 on ort-cpu, but {words}" in where.detail
    assert sum(share for *_, share in placement.rows) == pytest.approx(1)


def test_macs_that_the_profile_does_not_show_fail(two_products):
    (found, _), _ = placement_checks("s", "fp32", two_products, [event("first")], 0.999)
    assert (found.status, found.measured, found.detail) == ("fail", 24 / 72, "second")


def test_a_precision_that_this_runtime_does_not_compute_in_is_not_run(two_products):
    (check,), placement = placement_checks("s", "fp16", two_products, [event("first"), event("second")], 0.999)
    assert check.status == "not run"
    assert placement is None


# Files


def sign(bundle, file):
    manifest = read_manifest(bundle)
    info = FileInfo(size=(bundle / file).stat().st_size, sha256=sha256_file(bundle / file))
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, file: info}}), bundle)


def test_files_that_are_damaged_foreign_or_too_new(tiny_copy):
    (tiny_copy / "vae_encoder" / "model.onnx").write_bytes(b"\x08\x0a\x12\x03abc")
    sign(tiny_copy, "vae_encoder/model.onnx")
    newer = onnx.load(tiny_copy / "vae_decoder" / "model.onnx", load_external_data=False)
    newer.ir_version = IR_VERSION + 1
    onnx.save(newer, tiny_copy / "vae_decoder" / "model.onnx")
    sign(tiny_copy, "vae_decoder/model.onnx")
    with open(tiny_copy / "unet" / "model.onnx", "ab") as stream:
        stream.write(b"x")
    candidates = [(graph, "fp32") for graph in ("unet", "unet_conditional", "vae_encoder", "vae_decoder")]
    checks, sound = file_checks(Bundle.open(tiny_copy), candidates)
    assert sound == [("unet_conditional", "fp32")]
    words = {check.subject: check.detail for check in checks if check.status == "fail"}
    assert "it is damaged" in words["unet fp32"]
    assert "not a valid ONNX file" in words["vae_encoder fp32"]
    assert words["vae_decoder fp32"].startswith(f"opset {OPSET} and IR {IR_VERSION + 1}")
