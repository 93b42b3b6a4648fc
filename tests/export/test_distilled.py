"""Bundles of distilled networks: one U-Net graph of half the cost, through every command that takes a bundle."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from moebius.weights.load import default_sources
from moebius.weights.sampling_record import SamplingRecord, read_sampling_record
from moebius_export.commands.app import app
from moebius_export.errors import ExportError
from moebius_export.onnx_export.export import ExportOptions, export_onnx
from moebius_export.onnx_export.record import mode_defaults
from moebius_export.trajectories.scenes import default_steps, guided_scale, seeded_inputs, seeded_scene
from moebius_export.verify import VerifyOptions, verify
from moebius_export.verify.declared import _distillation_check
from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.images.metrics import psnr
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options


def test_the_export_writes_one_graph_and_what_the_checkpoint_records(distilled_bundle, fused_bundle):
    manifest, before = read_manifest(distilled_bundle), read_manifest(fused_bundle)
    assert set(manifest.graphs) == {"unet", "vae_encoder", "vae_decoder"}
    assert [tensor.name for tensor in manifest.graphs["unet"].inputs] == ["sample", "timestep"]
    assert manifest.guidance is not None
    assert manifest.guidance.distilled == 2.5
    assert manifest.defaults.guidance_scale == 2.5
    assert (manifest.defaults.sampler, manifest.defaults.num_inference_steps) == ("lcm", 3)
    assert (before.guidance, before.defaults.sampler, before.defaults.num_inference_steps) == (None, "ddim", 20)
    assert not list(distilled_bundle.rglob("*conditional*"))


def test_a_call_costs_what_the_conditional_graph_costs(distilled_bundle, fused_bundle):
    from moebius_export.graph.cost import node_costs, total_macs

    one, two, alone = (
        total_macs(node_costs(Bundle.open(folder).model_file(graph)))
        for folder, graph in ((distilled_bundle, "unet"), (fused_bundle, "unet"), (fused_bundle, "unet_conditional"))
    )
    assert one == alone
    assert one < 0.6 * two  # not 0.5: both branches share what stands before the first cross attention


def test_every_backend_gives_the_same_picture(distilled_bundle):
    bundle = Bundle.open(distilled_bundle)
    scene = seeded_scene(bundle.manifest, 3, 0)
    pictures = {}
    for runtime in ("ort-cpu", "torch"):
        pipeline = InpaintPipeline(create_backend(bundle, runtime))
        result = pipeline.inpaint(Picture(scene.picture, "RGB"), scene.mask, make_options(seed=9))
        pictures[runtime] = result.picture.to_rgb()
        assert len(result.seconds["step"]) == 3
    assert psnr(pictures["ort-cpu"], pictures["torch"]) > 50  # float32 on both sides, rounded to grey levels


def test_verify_passes(distilled_bundle):
    report = verify(distilled_bundle, VerifyOptions())
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]
    assert "979" in report.facts["steps"]
    assert [c.status for c in report.checks if c.name == "distillation"] == ["pass"]


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (SamplingRecord(2.0, "lcm", 3), "guidance.distilled is 2.5, the weights record 2.0"),
        (SamplingRecord(2.5, "lcm", 4), "num_inference_steps is 3, the weights record 4"),
        (SamplingRecord(2.5), "sampler is lcm, the weights record ddim"),
        (SamplingRecord(), "guidance.distilled is 2.5, the weights record None; sampler is lcm"),
    ],
)
def test_verify_finds_a_manifest_that_promises_something_else(distilled_bundle, known, words):
    check = _distillation_check(read_manifest(distilled_bundle), known)
    assert check.status == "fail"
    assert words in check.detail


def test_another_guidance_scale_is_refused_before_anything_is_written(distilled_bundle, tmp_path):
    weights = distilled_bundle.with_name("distilled-weights")
    options = ExportOptions(weights=str(weights), vae="stand-in", preset="tiny", guidance_scale=2.0)
    with pytest.raises(ExportError, match=r"--guidance-scale 2: .* was distilled at 2.5 and has no other scale"):
        export_onnx(tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_a_record_that_is_damaged_is_refused_before_anything_is_written(distilled_bundle, tmp_path):
    weights = shutil.copytree(distilled_bundle.with_name("distilled-weights"), tmp_path / "weights")
    (weights / "config.json").write_text(json.dumps({"guidance": {"distilled": "much"}}))
    arguments = ["onnx", "--weights", str(weights), "--vae", "stand-in", "--preset", "tiny", "--out", f"{tmp_path}/out"]
    done = CliRunner().invoke(app, arguments)
    assert "guidance = {'distilled': 'much'}; expected" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_mixed_precision_and_int8_take_the_one_graph(distilled_bundle, tmp_path):
    from moebius_calibration.files.write import write_int8
    from moebius_calibration.graph.gain import Rates
    from moebius_calibration.options import Int8Options
    from moebius_calibration.placed import PlacedCalibrator
    from moebius_export.precision.quick import make_plans, quick_options
    from moebius_export.precision.write import write_typed

    def quiet(what, done, total):
        pass

    folder = shutil.copytree(distilled_bundle, tmp_path / "bundle")
    bundle, notes = Bundle.open(folder), []
    plans = make_plans(bundle, quick_options(pictures=1, steps=2), quiet, notes.append)
    write_typed(bundle, plans, only=False, progress=quiet)
    every = Rates(per_gmac=1e3, per_activation=0.0, per_weight=0.0)
    steps = default_steps(bundle.manifest, 10)
    assert steps == 3
    options = Int8Options(target="ort-cpu", pictures=1, steps=steps, samples=1, error=0.4, rates=every)
    bundle = Bundle.open(folder)
    calibrator = PlacedCalibrator(bundle, options, quiet, notes.append)
    plans = calibrator.run()
    assert set(plans) == {"unet", "vae_encoder", "vae_decoder"}  # one U-Net
    assert plans["unet"].calibration.runs == 3
    manifest = write_int8(bundle, plans, calibrator.works, quiet)
    assert set(manifest.graphs["unet"].files) == {"fp32", "fp16", "int8_cpu"}
    pipeline = InpaintPipeline.from_bundle(folder, precision="int8_cpu")
    scene = seeded_scene(manifest, 3, 0)
    pipeline.inpaint(Picture(scene.picture, "RGB"), scene.mask, replace(make_options(), seed=1))


def test_inputs_are_those_of_the_graph(distilled_bundle, fused_bundle):
    manifest = read_manifest(distilled_bundle)
    assert set(seeded_inputs("unet", manifest, 0)) == {"sample", "timestep"}
    assert guided_scale(manifest) == 2.5
    alone = manifest.defaults.model_copy(update={"guidance_scale": 1.0})
    assert guided_scale(manifest.model_copy(update={"defaults": alone})) == 1.0
    before = read_manifest(fused_bundle)
    assert guided_scale(before.model_copy(update={"defaults": alone})) == 2.5
    assert default_steps(before, 10) == 10


def test_tune_runs_the_one_graph(distilled_bundle):
    from moebius_export.lowering.tune import _inputs

    bundle = Bundle.open(distilled_bundle)
    inputs = _inputs(bundle)
    assert create_backend(bundle, "ort-cpu").run("unet", inputs).shape == (1, 4, 16, 16)
    assert np.isfinite(inputs["sample"]).all()


def test_bench_measures_and_counts_the_one_graph(distilled_bundle, fused_bundle):
    from moebius_bench.measure.costs import branches_of, count_bundle, count_torch
    from moebius_bench.measure.measuring import measure
    from moebius_bench.measure.worker_job import Job

    job = Job(kind="measure", runtime="ort-cpu", bundle=str(distilled_bundle), threads=1, steps=None)
    found = measure(job, 0.0)
    assert set(found.load_seconds) == {"unet", "vae_encoder", "vae_decoder"}
    assert all(len(run.stages["step"]) == 3 for run in found.pictures)
    counted = count_bundle(job.model_copy(update={"kind": "cost"}))
    guided = count_bundle(job.model_copy(update={"kind": "cost", "bundle": str(fused_bundle)}))
    assert counted["unet"] == guided["unet_conditional"]
    assert branches_of("unet", read_manifest(distilled_bundle)) == 1
    assert branches_of("unet", read_manifest(fused_bundle)) == 2
    written = count_bundle(job.model_copy(update={"kind": "cost", "runtime": "torch", "baseline": True}))
    assert written["unet"] == count_torch("tiny")["unet_conditional"]


def test_the_command_prints_what_was_distilled(distilled_bundle, fused_bundle):
    from moebius_export.commands.onnx import _sampling

    manifest = read_manifest(distilled_bundle)
    assert _sampling(manifest) == "guidance distilled at 2.5, sampler lcm, 3 steps"
    plain = manifest.defaults.model_copy(update={"sampler": "ddim"})
    assert _sampling(manifest.model_copy(update={"defaults": plain})) == "guidance distilled at 2.5"
    assert _sampling(read_manifest(fused_bundle)) == "default guidance scale 2.5"


def test_the_weights_own_defaults_of_modes_are_the_bundles():
    known = read_sampling_record(default_sources("small")[0])
    modes = mode_defaults(known.modes, tiny=True)
    assert (modes["best"].start, modes["best"].strength, modes["best"].steps) == ("pixels", 0.2, 10)
    assert (modes["fast"].steps, modes["fast"].sampler, modes["fast"].vae_decoder) == (5, "dpmpp-2m", "tiny")
    assert modes["balanced"].decode == "masked"
    assert set(mode_defaults({}, tiny=False)) == {"best", "balanced", "fast"}
    assert mode_defaults({}, tiny=False)["best"].strength == 1
