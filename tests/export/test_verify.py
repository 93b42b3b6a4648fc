"""`moebius-export verify`: a good bundle passes, and each of five planted faults fails and is located.

The faults rewrite the manifest's hashes through the real manifest writer, so that no hash finds them first.
"""

import json
import re

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from moebius_export.commands.app import app
from moebius_export.errors import ExportError
from moebius_export.verify import VerifyOptions, verify
from moebius_export.verify.page import page
from moebius_runtime.bundle.manifest import FileInfo, read_manifest, write_manifest
from moebius_runtime.files import sha256_file

QUICK = VerifyOptions(steps=2, bisect=True)


def load(bundle, file):
    return onnx.load(bundle / file)


def store(bundle, file, model):
    """Writes a changed model, its weights inside, and the manifest with its new size and hash."""
    for tensor in model.graph.initializer:
        assert tensor.data_location != onnx.TensorProto.EXTERNAL
    onnx.save(model, bundle / file)
    sign(bundle, file)


def sign(bundle, file):
    manifest = read_manifest(bundle)
    path = bundle / file
    info = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, file: info}}), bundle)


def change(model, name, new):
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(new(numpy_helper.to_array(tensor).copy()), name))
            return
    raise AssertionError(f"no initializer {name}")


def failed(report):
    return {(c.area, c.subject, c.name): c for c in report.checks if c.status == "fail"}


def first_wrong(report, subject):
    (found,) = [c.detail for c in report.checks if c.area == "bisect" and c.subject == subject]
    return found


@pytest.fixture(scope="module")
def good_report(tiny_bundle):
    return verify(tiny_bundle, QUICK)


def test_a_good_bundle_passes_every_check(good_report, tiny_bundle):
    assert good_report.held, [c for c in good_report.checks if c.status not in ("pass", "note")]
    assert good_report.exit_code == 0
    asked = {(c.area, c.subject) for c in good_report.checks}
    for graph in read_manifest(tiny_bundle).graphs:
        assert {(area, f"{graph} fp32") for area in ("files", "parity", "weights", "placement")} <= asked
    assert {"trajectory", "picture", "manifest"} <= {area for area, _ in asked}
    notes = [c for c in good_report.checks if c.status == "note"]
    assert [c.name for c in notes] == ["LPIPS"]
    assert "not computed" in notes[0].detail
    assert notes[0].measured is None


def test_all_macs_are_accounted_for_in_float_on_the_cpu(good_report, tiny_bundle):
    from moebius_export.graph.cost import node_costs, total_macs

    for placement in good_report.placements:
        graph = placement.subject.split()[0]
        counted = total_macs(node_costs(tiny_bundle / read_manifest(tiny_bundle).graphs[graph].files["fp32"].model))
        ((provider, kind, gmac, share),) = placement.rows
        assert (provider, kind, share) == ("CPUExecutionProvider", "float", 1.0)
        assert gmac + placement.ahead == pytest.approx(counted / 1e9, rel=1e-12)


def test_drift_has_the_start_and_every_step(good_report):
    (trajectory,) = good_report.trajectories
    assert trajectory.timesteps == [0]  # 2 steps at the default strength of 0.99 keep one
    assert len(trajectory.drift) == 2
    assert all(0 <= value < 1e-5 for value in trajectory.drift)


# 1. A weight changed by one per cent


@pytest.fixture
def weight_off_by_a_hundredth(tiny_copy):
    model = load(tiny_copy, "unet/model.onnx")
    name = "student.diff_model.up_blocks.0.resnets.1.conv1.conv_pw.weight"
    change(model, name, lambda values: values * np.float32(1.01))
    store(tiny_copy, "unet/model.onnx", model)
    return tiny_copy, name


def test_a_weight_tensor_off_by_one_per_cent(weight_off_by_a_hundredth):
    bundle, name = weight_off_by_a_hundredth
    report = verify(bundle, QUICK)
    assert report.exit_code == 1
    wrong = failed(report)
    assert wrong["weights", "unet fp32", "equal the checkpoint"].detail.startswith(
        f"{name}: 1536 of 1536 values differ"
    )
    assert wrong["parity", "unet fp32", "relative error"].measured > 1e-4
    assert re.match(
        r"\S* of node up_blocks\.0\.resnets\.1\.conv1\.conv_pw/Conv \(Conv\)", first_wrong(report, "unet fp32")
    )
    assert {subject for _, subject, _ in wrong} <= {"unet fp32", "fp32 on ort-cpu"}  # and nothing else is blamed


# 2. Swapped guidance branches


def test_swapped_guidance_branches(tiny_copy):
    model = load(tiny_copy, "unet/model.onnx")
    (split,) = [node for node in model.graph.node if node.name == "graph/Split"]
    swapped = {split.output[0]: split.output[1], split.output[1]: split.output[0]}
    for node in model.graph.node:
        if node is not split:
            for index, name in enumerate(node.input):
                node.input[index] = swapped.get(name, name)
    store(tiny_copy, "unet/model.onnx", model)
    report = verify(tiny_copy, QUICK)
    assert report.exit_code == 1
    wrong = failed(report)
    assert "with the guidance branches swapped" in wrong["parity", "unet fp32", "relative error"].detail
    assert "of node graph/Sub (Sub)" in first_wrong(report, "unet fp32")
    assert ("weights", "unet fp32", "equal the checkpoint") not in wrong


# 3. A wrong scaling factor: in the encoder, in the decoder, in the manifest


def test_wrong_scaling_factor_in_the_encoder(tiny_copy):
    model = load(tiny_copy, "vae_encoder/model.onnx")
    (scale,) = [node.input[1] for node in model.graph.node if node.output[0] == "latent"]
    change(model, scale, lambda values: np.full_like(values, 0.18215))
    store(tiny_copy, "vae_encoder/model.onnx", model)
    report = verify(tiny_copy, QUICK)
    assert report.exit_code == 1
    wrong = failed(report)
    detail = wrong["parity", "vae_encoder fp32", "relative error"].detail
    assert "the output is PyTorch's times 1.39846, as with a scaling factor of 0.18215" in detail
    assert "latent of node graph/Mul (Mul)" in first_wrong(report, "vae_encoder fp32")
    assert "1.39846 times it" in first_wrong(report, "vae_encoder fp32")


@pytest.mark.slow
def test_wrong_scaling_factor_in_the_decoder(tiny_copy):
    model = load(tiny_copy, "vae_decoder/model.onnx")
    (division,) = [node for node in model.graph.node if "latent" in node.input]
    change(model, division.input[1], lambda values: np.full_like(values, 0.18215))
    store(tiny_copy, "vae_decoder/model.onnx", model)
    report = verify(tiny_copy, QUICK)
    assert ("parity", "vae_decoder fp32", "relative error") in failed(report)
    assert f"of node {division.name} ({division.op_type})" in first_wrong(report, "vae_decoder fp32")
    assert "0.715070 times it" in first_wrong(report, "vae_decoder fp32") or "0.71507 times it" in first_wrong(
        report, "vae_decoder fp32"
    )


def test_wrong_scaling_factor_and_schedule_in_the_manifest(tiny_copy):
    manifest = read_manifest(tiny_copy)
    geometry = manifest.geometry.model_copy(update={"scaling_factor": 0.18215})
    schedule = manifest.schedule.model_copy(update={"beta_end": 0.0121})
    write_manifest(manifest.model_copy(update={"geometry": geometry, "schedule": schedule}), tiny_copy)
    report = verify(tiny_copy, QUICK)
    assert report.exit_code == 1
    wrong = failed(report)
    assert set(wrong) == {("manifest", "manifest", "scaling factor"), ("manifest", "manifest", "schedule")}
    assert (
        "scaling_factor is 0.18215, the network's is 0.13025" in wrong["manifest", "manifest", "scaling factor"].detail
    )


# 4. float16 weights under a float32 name


def test_weights_rounded_through_float16(tiny_copy):
    model = load(tiny_copy, "unet/model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name != "unsqueeze_1":
            change(model, tensor.name, lambda values: values.astype(np.float16).astype(np.float32))
    store(tiny_copy, "unet/model.onnx", model)
    report = verify(tiny_copy, QUICK)
    assert report.exit_code == 1
    wrong = failed(report)
    assert "every value fits float16" in wrong["weights", "unet fp32", "not rounded"].detail
    assert (
        wrong["parity", "unet fp32", "relative error"].measured
        > 5 * wrong["parity", "unet fp32", "relative error"].budget
    )
    assert "student.diff_model." in first_wrong(report, "unet fp32")  # the stored weight that it takes


@pytest.mark.slow
def test_float16_weights_with_casts(tiny_copy):
    """Stored in half the bytes and cast when loaded: the MACs run in float32, the numbers are not float32."""
    model = load(tiny_copy, "vae_decoder/model.onnx")
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name.endswith("conv1.weight"):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], name=f"cast {name}", to=1))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    store(tiny_copy, "vae_decoder/model.onnx", model)
    wrong = failed(verify(tiny_copy, QUICK))
    assert "conv1.weight.half is float16" in wrong["weights", "vae_decoder fp32", "types"].detail


# 5. An output of NaN


def test_an_output_of_nan(tiny_copy):
    model = load(tiny_copy, "unet/model.onnx")
    name = "student.diff_model.down_blocks.1.attentions.0.proj_out.bias"

    def one(values):
        values[4] = np.nan
        return values

    change(model, name, one)
    store(tiny_copy, "unet/model.onnx", model)
    report = verify(tiny_copy, QUICK)
    assert report.exit_code == 1
    wrong = failed(report)
    assert "values are not finite, first at [0, 0, 0, 0]: nan" in wrong["parity", "unet fp32", "finite"].detail
    assert f"{name}: 1 of 32 values differ" in wrong["weights", "unet fp32", "equal the checkpoint"].detail
    assert "nan instead of" in wrong["weights", "unet fp32", "equal the checkpoint"].detail
    assert "of node down_blocks.1.attentions.0.proj_out/Conv" in first_wrong(report, "unet fp32")
    assert "stopped after 0 of 1 steps" in wrong["trajectory", "fp32 on ort-cpu", "drift over 1 steps"].detail
    assert "NaN" in wrong["picture", "fp32 on ort-cpu", "picture"].detail
    json.dumps(report.to_json(), allow_nan=False)
    assert "The candidate gave no picture" in page(report)


# A check that cannot run is not a pass


def test_an_engine_without_passport_and_stray_files_are_no_pass(tiny_copy):
    engine = tiny_copy / "engines" / "sm_89-tensorrt11-fp16" / "unet.plan"
    engine.parent.mkdir(parents=True)
    for path in (engine, tiny_copy / "unet" / "stray.plan", tiny_copy / "unet" / "model_fp16.onnx"):
        path.write_bytes(b"stray")
    report = verify(tiny_copy, VerifyOptions(steps=2))
    [(key, check)] = failed(report).items()
    assert key[:2] == ("engine", "engines/sm_89-tensorrt11-fp16")
    assert "loaded only with their passport" in check.detail
    unrun = {c.subject: c.detail for c in report.checks if c.status == "not run"}
    assert set(unrun) == {"unet/stray.plan", "unet/model_fp16.onnx"}
    assert report.exit_code == 1


def test_a_precision_without_budgets_is_not_checked(tiny_copy):
    manifest = read_manifest(tiny_copy)
    unet = manifest.graphs["unet"]
    files = unet.model_copy(update={"files": {**unet.files, "int8": unet.files["fp32"]}})
    write_manifest(manifest.model_copy(update={"graphs": {**manifest.graphs, "unet": files}}), tiny_copy)
    report = verify(tiny_copy, VerifyOptions(steps=2))
    assert {c.subject for c in report.checks if c.status == "not run"} == {"unet int8", "int8 on ort-cpu"}
    assert report.exit_code == 1


def test_a_mixed_precision_file_without_plan_or_companions_is_no_pass(tiny_copy):
    manifest = read_manifest(tiny_copy)
    unet = manifest.graphs["unet"]
    files = unet.model_copy(update={"files": {**unet.files, "fp16": unet.files["fp32"]}})
    write_manifest(manifest.model_copy(update={"graphs": {**manifest.graphs, "unet": files}}), tiny_copy)
    report = verify(tiny_copy, VerifyOptions(steps=2, precisions=("fp16",)))
    unrun = {(c.subject, c.name) for c in report.checks if c.status == "not run"}
    assert unrun == {
        ("unet fp16", "types of the plan"),
        ("fp16, emulated", "trajectory"),
        ("fp16, emulated", "picture"),
    }
    assert report.exit_code == 1


@pytest.mark.slow
def test_a_damaged_file_fails_and_stops_what_needs_it(tiny_copy):
    path = tiny_copy / "vae_decoder" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    report = verify(tiny_copy, VerifyOptions(steps=2))
    assert "SHA-256" in failed(report)["files", "vae_decoder fp32", "undamaged and valid"].detail
    unrun = {c.area: c.detail for c in report.checks if c.status == "not run"}
    assert set(unrun) == {"trajectory", "picture"}
    assert "vae_decoder" in unrun["picture"]


def test_other_weights_than_the_bundles_are_refused(tiny_bundle):
    with pytest.raises(ExportError, match=r"U-Net weights of stand-in:5 .* nothing was compared"):
        verify(tiny_bundle, VerifyOptions(weights="stand-in:5"))
    with pytest.raises(ExportError, match=r"VAE weights of stand-in:5 .* Name those with --vae"):
        verify(tiny_bundle, VerifyOptions(vae="stand-in:5"))


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_the_command_writes_text_json_and_a_page(tiny_bundle, tmp_path):
    result = invoke(tiny_bundle, "--steps", 2, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert "0 failed, 0 not run" in result.output
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["exit_code"] == 0
    assert data["stand_in_weights"] is True
    assert set(data) == {
        "schema_version",
        "bundle",
        "held",
        "exit_code",
        "stand_in_weights",
        "facts",
        "checks",
        "trajectories",
        "placement",
    }
    assert set(data["checks"][0]) == {"area", "subject", "name", "status", "measured", "budget", "detail"}
    text = (tmp_path / "r.html").read_text()
    assert text.count("data:image/png;base64,") == 4
    assert "<svg" in text
    assert "http" not in text  # self-contained
    assert "<script" not in text


def test_a_missed_budget_is_exit_code_1(tiny_bundle):
    result = invoke(tiny_bundle, "--steps", 2, "--budget", "drift=1e-9")
    assert result.exit_code == 1
    assert re.search(r"fail\s+fp32 on ort-cpu\s+drift over 1 steps", result.output)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "drift"], "expected NAME=VALUE"),
        (["--budget", "colour=1"], "NAME one of relative"),
        (["--budget", "psnr=nan"], "not a finite number"),
        (["--precision", "fp4"], "expected some of fp32"),
        (["--precision", "int8"], "no file of precision int8"),
        (["--json", "/nowhere/r.json"], "cannot write"),
        (["--seed", "-1"], "expected a whole number"),
        (["--steps", "1001"], "number of steps"),
    ],
)
def test_wrong_usage_is_refused_in_words(tiny_bundle, arguments, words):
    result = invoke(tiny_bundle, *arguments)
    assert words in str(result.exception)
    assert result.exception.exit_code == 2
