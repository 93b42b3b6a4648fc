"""Plans: measured, written, edited, refused; and a layer that overflows."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from moebius_export.commands.app import app
from moebius_export.errors import ExportError, PrecisionError
from moebius_export.graph.opened import Opened, opened
from moebius_export.graph.sessions import session_of
from moebius_export.precision import planning
from moebius_export.precision.choose import Chooser
from moebius_export.precision.plan import read_plan, write_plan
from moebius_export.precision.planning import Planner, PlanOptions
from moebius_export.precision.trials import Trials
from moebius_export.precision.write import plans_of, write_typed
from moebius_export.trajectories import measure
from moebius_export.trajectories.ranges import Ranges, observed
from moebius_export.trajectories.scenes import seeded_scene
from moebius_export.verify import VerifyOptions, verify
from moebius_export.verify.mixed_precision import mixed_precision_checks
from moebius_export.verify.pictures import fill_emulated
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.cli import app as inpaint
from moebius_runtime.errors import BundleError

QUICK = PlanOptions(pictures=1, steps=2, evaluations=10, samples=1, error=2.5e-3)
OVERFLOWING = "down_blocks.0.resnets.0"


def silent(what, done, total):
    """A progress callback that says nothing."""


def typed_bundle(bundle, options=QUICK, **keywords):
    opened_bundle = Bundle.open(bundle)
    plans = Planner(opened_bundle, options, silent).run()
    return write_typed(opened_bundle, plans, only=keywords.get("only", False), progress=silent)


@pytest.fixture(scope="module")
def planned(fused_bundle, tmp_path_factory):
    """A fused bundle with fp16 files. Read only: copy it."""
    folder = tmp_path_factory.mktemp("planned") / "bundle"
    shutil.copytree(fused_bundle, folder)
    typed_bundle(folder)
    return folder


@pytest.mark.parametrize(("default", "scale"), [(1.0, 2.5), (1.5, 1.5)])
def test_the_guided_graph_is_watched_where_pictures_need_no_guidance(fused_bundle, default, scale):
    bundle = Bundle.open(fused_bundle)
    defaults = bundle.manifest.defaults.model_copy(update={"guidance_scale": default})
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"defaults": defaults}))
    scenes = [seeded_scene(bundle.manifest, 2, 1)]
    guided, alone = (measure.follow(bundle, {}, scenes, which, silent).inputs for which in (True, False))
    assert "unet" in guided
    assert "unet_conditional" not in guided
    assert guided["unet"][0]["guidance_scale"].tolist() == [scale]
    assert "unet_conditional" in alone
    assert "unet" not in alone


@pytest.fixture
def copy(planned, tmp_path):
    return shutil.copytree(planned, tmp_path / "bundle")


def test_the_bundle_has_every_graph_in_fp16_with_its_plan(planned, fused_bundle):
    manifest, before = read_manifest(planned), read_manifest(fused_bundle)
    for name, graph in manifest.graphs.items():
        assert set(graph.files) == {"fp32", "fp16"}
        assert graph.files["fp32"] == before.graphs[name].files["fp32"]
        path = Bundle.open(planned).model_file(name, "fp16")
        onnx.checker.check_model(str(path), full_check=True)
        plan = read_plan(planned / graph.files["fp16"].plan)
        assert plan.graph == name
        assert plan.onnx_sha256 == manifest.files[graph.files["fp32"].model].sha256
        reasons = {node.reason for node in plan.nodes.values() if node.type == "fp32"}
        assert "" not in reasons
        if name.startswith("unet"):
            assert {"norm statistics", "last convolution"} <= reasons
            assert all(node.largest > 0 for node in plan.nodes.values())
            assert sum(node.type == "fp16" for node in plan.nodes.values()) > 50
        else:
            assert reasons == {"VAE: fp32 asked"}
        assert sum(weight.type == "fp16" for weight in plan.weights.values()) > 20
    small = sum(manifest.files[p].size for p in {g.files["fp16"].weights for g in manifest.graphs.values()})
    large = sum(manifest.files[p].size for p in {g.files["fp32"].weights for g in manifest.graphs.values()})
    assert small < 0.62 * large


def test_the_plan_is_better_than_everything_low(planned):
    plan = read_plan(planned / "unet/precision_fp16.json")
    assert plan.errors["plan"] <= np.hypot(QUICK.error, plan.errors["weights"]) < plan.errors["blunt"]
    assert any(part.kept for part in plan.parts)


def test_every_part_has_a_name_of_its_own_and_says_what_it_holds(planned):
    plan = read_plan(planned / "unet/precision_fp16.json")
    assert len({part.name for part in plan.parts}) == len(plan.parts) > 4
    held = [int(entry.split()[1]) for part in plan.parts for entry in part.holds.split(", ")]
    tried = [node for node in plan.nodes.values() if node.type == "fp16" or node.reason.startswith("error")]
    assert sum(held) == len(tried)  # each node is in one part
    kept = {part.name for part in plan.parts if part.kept}
    assert {node.reason.split(" costs")[0] for node in tried if node.reason} == {f"error: {name}" for name in kept}


def test_what_is_left_of_a_cut_module_has_another_name_than_the_whole(tmp_path):
    value = helper.make_tensor_value_info
    names = ["m/Neg", "m.a/Neg", "m.a.deep/Neg", "m.b/Neg"]
    ends = ["x", *names[:-1], "y"]
    nodes = [helper.make_node("Neg", [a], [b], name=n) for n, a, b in zip(names, ends[:-1], ends[1:], strict=True)]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [4])], [value("y", 1, [4])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    x = np.array([0.1, 0.2, 0.3, 0.7], np.float32)  # not exact in fp16
    said = []
    trials = Trials(Opened(opened(tmp_path / "m.onnx")), tmp_path, [{"x": x}])
    choice = Chooser(trials, "fp16", {}, {}, progress=said.append).run(budget=1e-9, evaluations=8)
    assert [part.name for part in choice.parts] == ["m itself rest", "m.a itself rest", "m.a.deep rest", "m.b rest"]
    assert [part.holds for part in choice.parts] == ["Neg 1"] * 4
    alone = [text for text in said if text.endswith(" alone")]
    assert len(set(alone)) == len(alone)  # no name was tried for two contents


def test_verify_holds_and_only_leaves_the_rest_out(planned, tmp_path):
    folder = shutil.copytree(planned, tmp_path / "bundle")
    report = verify(folder, VerifyOptions(steps=2, precisions=("fp16",)))
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]
    names = {check.name for check in report.checks}
    assert {"inputs of one type", "types of the plan", "equal the fp32 file's, rounded", "PSNR in the mask"} <= names
    bundle = Bundle.open(folder)
    manifest = write_typed(bundle, plans_of(bundle, "fp16"), only=True, progress=silent)
    assert {precision for graph in manifest.graphs.values() for precision in graph.files} == {"fp16"}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert there == {"manifest.json", *manifest.files}

    bundle = Bundle.open(folder)
    for name in manifest.graphs:  # the weights are then judged by the output alone, which still can be made
        found = {check.name: check for check in mixed_precision_checks(name, bundle, name, "fp16")[0]}
        assert found.pop("equal the fp32 file's, rounded").status == "note"
        assert {check.status for check in found.values()} == {"pass"}
    filled = fill_emulated(bundle, "fp16", seeded_scene(manifest, 2, 1), lambda done, total: None)
    assert filled.picture is not None
    picture, mask = Image.linear_gradient("L"), Image.new("L", (256, 256))
    mask.paste(255, (90, 90, 150, 150))
    paths = [str(tmp_path / name) for name in ("a.png", "m.png", "o.png")]
    picture.convert("RGB").save(paths[0])
    mask.save(paths[1])
    arguments = [paths[0], "--mask", paths[1], "--out", paths[2], "--bundle", str(folder), "--runtime", "ort-cpu"]
    result = CliRunner().invoke(inpaint, arguments)
    assert isinstance(result.exception, BundleError)
    words = r"runs fp32 or int8_cpu, and the U-Net has only fp16: run it with --runtime ort-cuda, or build engines"
    assert re.search(words, str(result.exception))
    assert result.exception.exit_code == 2


def test_a_norm_whose_statistics_are_forced_low_fails(copy):
    bundle = Bundle.open(copy)
    plans = plans_of(bundle, "fp16")
    nodes = dict(plans["unet"].nodes)
    statistics = [name for name, node in nodes.items() if node.reason == "norm statistics"]
    assert len(statistics) > 20
    for name in statistics:
        nodes[name] = nodes[name].model_copy(update={"type": "fp16", "reason": ""})
    write_typed(
        bundle, plans | {"unet": plans["unet"].model_copy(update={"nodes": nodes})}, only=False, progress=silent
    )
    report = verify(copy, VerifyOptions(steps=2, precisions=("fp16",)))
    assert report.exit_code == 1
    failed = {(c.subject, c.name): c.detail for c in report.checks if c.status == "fail"}
    assert f"and {len(statistics) - 1} more in fp16" in failed["unet fp16", "norm statistics in fp32"]
    assert ("unet fp16", "types of the plan") not in failed  # the plan says the same


@pytest.mark.slow
def test_the_report_of_modules_is_written(copy, tmp_path):
    arguments = ["precision", str(copy), "--reapply", "--steps", "2", "--report", str(tmp_path / "report.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "every module's error" in result.output
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found["graphs"]) == {"unet", "vae_encoder", "vae_decoder"}
    assert found["measured"]["seed"] not in range(QUICK.seed, QUICK.seed + QUICK.pictures)
    rows = found["graphs"]["unet"]
    assert {row["type"] for row in rows} == {"fp16", "fp32"}
    assert max(row["own"] for row in rows) < 8e-3
    assert 1e-4 < rows[-1]["error"] < 8e-3


def test_a_weight_that_is_not_the_fp32_files_is_found(copy):
    path = copy / "unet/model_fp16.onnx"
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("conv_in.conv_pw.weight"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * tensor_type(tensor)(1.01), tensor.name))
    onnx.save(model, path)
    relist(copy, "unet/model_fp16.onnx")
    report = verify(copy, VerifyOptions(steps=2, precisions=("fp16",)))
    wrong = {(check.subject, check.name) for check in report.checks if check.status == "fail"}
    assert ("unet fp16", "equal the fp32 file's, rounded") in wrong


def tensor_type(tensor):
    return numpy_helper.to_array(tensor).dtype.type


def relist(folder, name):
    from moebius_runtime.bundle.manifest import FileInfo, write_manifest
    from moebius_runtime.files import sha256_file

    manifest = read_manifest(folder)
    info = FileInfo(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, name: info}}), folder)


def test_an_edited_plan_is_applied_again(copy):
    path = copy / "unet/precision_fp16.json"
    plan = read_plan(path)
    name = next(name for name, node in plan.nodes.items() if node.type == "fp16")
    nodes = plan.nodes | {name: plan.nodes[name].model_copy(update={"type": "fp32", "reason": "by hand"})}
    write_plan(plan.model_copy(update={"nodes": nodes}), path)
    result = CliRunner().invoke(app, ["precision", str(copy), "--reapply"])
    assert result.exit_code == 0, result.output
    file = Opened(onnx.load(Bundle.open(copy).model_file("unet", "fp16"), load_external_data=False))
    assert file.types[file.nodes[name].output[0]] == onnx.TensorProto.FLOAT
    assert read_plan(path).nodes[name].reason == "by hand"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"onnx_sha256": "0" * 64}, "Make it again, without --reapply"),
        ({"graph": "vae_decoder"}, "it is a plan of vae_decoder"),
        ({"colour": 1}, "colour: .*expected a precision plan"),
        ({"schema_version": 2}, "schema_version: .*expected a precision plan"),
        ({"limit": float("nan")}, "limit: .*expected a precision plan"),
    ],
)
def test_plans_that_are_refused(copy, change, words):
    path = copy / "unet/precision_fp16.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words):
        plans_of(Bundle.open(copy), "fp16")


def test_a_plan_of_unknown_or_missing_tensors_is_refused(copy):
    bundle = Bundle.open(copy)
    plans = plans_of(bundle, "fp16")
    nodes = dict(plans["unet"].nodes)
    name, entry = nodes.popitem()
    for changed, words in (({**nodes, "nowhere/Conv": entry}, "'nowhere/Conv'"), (nodes, f"no entry for.*{name}")):
        wrong = plans | {"unet": plans["unet"].model_copy(update={"nodes": changed})}
        with pytest.raises(ExportError, match=words):
            write_typed(bundle, wrong, only=False, progress=silent)
    assert read_manifest(copy) == bundle.manifest


def test_an_interrupted_write_leaves_the_bundle(copy, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    bundle = Bundle.open(copy)

    def interrupted(what, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_typed(bundle, plans_of(bundle, "fp16"), only=False, progress=interrupted)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    assert [p.name for p in copy.parent.iterdir() if p.name.endswith(".part")] == []


@pytest.mark.slow
def test_the_vae_is_refused_where_its_error_is_too_large(fused_bundle_copy, monkeypatch):
    monkeypatch.setattr(planning, "VAE_ERROR", 1e-6)
    with pytest.raises(PrecisionError, match="not proven for vae_encoder") as caught:
        typed_bundle(fused_bundle_copy, PlanOptions(**{**vars(QUICK), "vae": "fp16"}))
    assert caught.value.exit_code == 1
    assert "fp16" not in read_manifest(fused_bundle_copy).graphs["unet"].files


@pytest.mark.parametrize(
    "arguments",
    [["--to", "int8"], ["--vae", "fp8"], ["--reapply", "--vae", "fp16"], ["--data", "/nowhere"], ["--report", "/no/r"]],
)
def test_wrong_options(fused_bundle, arguments, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    result = CliRunner().invoke(app, ["precision", str(fused_bundle), *arguments])
    assert result.exit_code != 0
    assert arguments[0] in str(result.exception) or arguments[1] in str(result.exception)


def test_a_report_needs_the_fp32_files(planned, tmp_path):
    result = CliRunner().invoke(app, ["precision", str(planned), "--only", "--report", str(tmp_path / "r.json")])
    assert "--report compares with the fp32 files, which --only leaves out" in str(result.exception)


def test_ranges_are_those_of_numpy(tmp_path):
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Mul", ["x", "x"], ["m"], name="m"), helper.make_node("Neg", ["m"], ["y"], name="y")]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [2, 3])], [value("y", 1, [2, 3])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    session = session_of(observed(Opened(opened(tmp_path / "m.onnx"))), tmp_path)
    ranges, runs = Ranges(), [np.random.RandomState(i).standard_normal((2, 3)).astype(np.float32) for i in range(3)]
    for x in runs:
        ranges.add(dict(zip((o.name for o in session.get_outputs()), session.run(None, {"x": x}), strict=True)))
    squares = np.stack(runs) ** 2
    assert ranges.largest["y"] == pytest.approx(squares.max())
    assert ranges.rms("y") == pytest.approx(np.sqrt((squares**2).mean()))
    assert ranges.largest["x"] == pytest.approx(np.abs(np.stack(runs)).max())


def test_the_part_that_costs_error_is_kept_first(tmp_path):
    """Two layers whose results are added: one of thousandths, one whose rounding is the output's error."""
    rng = np.random.RandomState(0)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "loud.weight"], ["loud/MatMul"], name="loud/MatMul"),
        helper.make_node("MatMul", ["x", "quiet.weight"], ["quiet/MatMul"], name="quiet/MatMul"),
        helper.make_node("Add", ["loud/MatMul", "quiet/MatMul"], ["y"], name="graph/Add"),
    ]
    stored = {
        "loud.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "quiet.weight": 1e-3 * rng.standard_normal((8, 8)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", 1, [4, 8])],
        [value("y", 1, [4, 8])],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    opened_graph = Opened(opened(tmp_path / "m.onnx"))
    trials = Trials(opened_graph, tmp_path, [{"x": rng.standard_normal((4, 8)).astype(np.float32)}])
    stores = dict.fromkeys(stored, "fp32")
    choice = Chooser(trials, "fp16", {"graph/Add": "guidance"}, stores).run(budget=1e-5, evaluations=4)
    assert [part.name for part in choice.kept] == ["loud products"]
    assert choice.errors["plan"] <= 1e-5 < choice.errors["rules"]


@pytest.fixture(scope="module")
def overflowing_bundle(tmp_path_factory):
    """A network whose first residual block reaches beyond fp16 before its second norm, which makes it harmless."""
    pytest.importorskip("torch")
    from safetensors.torch import save_file

    from moebius import preset
    from moebius.weights.load import load_student
    from moebius_export.onnx_export.export import ExportOptions, export_onnx

    folder = tmp_path_factory.mktemp("overflowing")
    student, _ = load_student("stand-in:0", preset("tiny").student)
    state = {name: tensor.contiguous().clone() for name, tensor in student.state_dict().items()}
    for name in ("weight", "bias"):
        state[f"diff_model.{OVERFLOWING}.conv1.bn2.{name}"] *= 4e4
    save_file(state, folder / "weights.safetensors")
    options = ExportOptions(weights=str(folder / "weights.safetensors"), vae="stand-in", preset="tiny")
    export_onnx(folder / "bundle", options)
    typed_bundle(folder / "bundle", PlanOptions(**{**vars(QUICK), "error": 1e-2}))
    return folder / "bundle"


@pytest.mark.slow
def test_a_layer_that_overflows_stays_float32_and_forced_it_fails(overflowing_bundle, tmp_path):
    folder = shutil.copytree(overflowing_bundle, tmp_path / "bundle")
    path = folder / "unet/precision_fp16.json"
    plan = read_plan(path)
    over = {name: node for name, node in plan.nodes.items() if node.reason.startswith("overflow")}
    first = f"{OVERFLOWING}/ResidualBlock/first_product"
    assert first in over
    assert all(name.startswith(OVERFLOWING) for name in over)
    assert over[first].largest > 65504
    assert "seen, limit 16,376 (65,504 / 4)" in over[first].reason
    options = VerifyOptions(steps=2, precisions=("fp16",))
    report = verify(folder, options)
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]

    forced = {first: plan.nodes[first].model_copy(update={"type": "fp16", "reason": ""})}
    write_plan(plan.model_copy(update={"nodes": plan.nodes | forced}), path)
    bundle = Bundle.open(folder)
    write_typed(bundle, plans_of(bundle, "fp16"), only=False, progress=silent)
    report = verify(folder, options)
    assert report.exit_code == 1
    assert ("unet fp16, emulated", "finite") in {(c.subject, c.name) for c in report.checks if c.status == "fail"}


def test_values_are_reduced_as_soon_as_they_are_there(tmp_path):
    """Else all values of a graph would wait in memory until its end: 9 GB at full size."""
    import onnxruntime

    value = helper.make_tensor_value_info
    names = [f"m{index}" for index in range(6)]
    pairs = zip(["x", *names], [*names[:-1], "y"], names, strict=False)
    nodes = [helper.make_node("Sin", [a], [b], name=name) for a, b, name in pairs]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [4])], [value("y", 1, [4])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    model = observed(Opened(opened(tmp_path / "m.onnx"))).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(4, np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    order = [event["name"].removesuffix("_kernel_time") for event in events if event["name"].endswith("_kernel_time")]
    for earlier, later in zip(names[:-1], names[2:], strict=False):
        assert order.index(f"observed/{earlier}/ReduceMax") < order.index(later)
