"""scripts/prove-on-gpu.sh: modes, distilled bundles, batches, WebGPU, the small network's recipe, profile jetson."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moebius_bench.hardware import stages  # noqa: E402
from moebius_bench.hardware.recorder import NotInstalledError, NotRunError, Recorder, Request  # noqa: E402
from moebius_bench.hardware.report import Check, StageOutput, StageResult, read_report  # noqa: E402
from moebius_bench.hardware.stages import bundles, jetson, recipe, webgpu  # noqa: E402
from moebius_runtime.backends.ort import OrtBackend  # noqa: E402
from moebius_runtime.errors import RuntimeUnavailableError  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/prove-on-gpu.sh"


@pytest.fixture
def recorder(tmp_path):
    def make(stage, **fields):
        request = {"preset": "tiny", "device": "cpu", "seconds": 1000, "folder": str(tmp_path), "quick": True}
        return Recorder(Request(stage=stage, out=str(tmp_path / "out.json"), **{**request, **fields}))

    return make


@pytest.fixture
def exported(monkeypatch):
    """exported(bundle): the export of the stage copies this one."""

    def use(bundle):
        def export(arguments, seconds):
            assert arguments[0] == "onnx"
            shutil.copytree(bundle, arguments[arguments.index("--out") + 1])

        monkeypatch.setattr(bundles, "export_command", export)

    return use


def wrong(monkeypatch, factor, only=None):
    """Graphs of ONNX Runtime give a wrong result, all of them or those with the wrong batch."""
    right = OrtBackend._run

    def run(self, handle, inputs):
        output = right(self, handle, inputs)
        return output * factor if only is None or only(output) else output

    monkeypatch.setattr(OrtBackend, "_run", run)


def test_modes_agree_and_are_timed(recorder, exported, fused_bundle):
    exported(fused_bundle)
    record = recorder("modes")
    bundles.run_modes(record)
    assert [check.subject for check in record.output.checks] == [
        f"a picture, mode {mode}" for mode in ("best", "balanced", "fast")
    ]
    assert all(check.passed for check in record.output.checks)
    assert [row.variant for row in record.output.timings] == ["mode best", "mode balanced", "mode fast"]
    assert "ort-cpu, preset tiny" in record.output.timings[0].subject


def test_a_wrong_picture_of_a_mode_fails(recorder, exported, fused_bundle, monkeypatch):
    exported(fused_bundle)
    wrong(monkeypatch, 1.1)
    record = recorder("modes")
    bundles.run_modes(record)
    assert [check.passed for check in record.output.checks] == [False] * 3


def test_a_distilled_bundle_is_filled(recorder, exported, distilled_bundle):
    exported(distilled_bundle)
    record = recorder("lcm")
    bundles.run_distilled("lcm")(record)
    assert [check.passed for check in record.output.checks] == [True, True]
    assert [row.variant for row in record.output.timings] == ["lcm"]


def test_a_bundle_that_forgot_its_distillation_fails(recorder, exported, fused_bundle):
    exported(fused_bundle)
    record = recorder("guidance-distilled")
    bundles.run_distilled("guidance-distilled")(record)
    assert [check.passed for check in record.output.checks] == [False, True]


@pytest.mark.parametrize(("kind", "sampler"), [("guidance-distilled", None), ("lcm", "lcm")])
def test_the_checkpoint_of_a_distilled_bundle_is_one_that_the_export_reads(recorder, kind, sampler):
    from moebius.weights.sampling_record import read_sampling_record

    found = read_sampling_record(str(bundles._checkpoint(recorder(kind), kind)))
    assert (found.guidance_scale, found.sampler) == (2.5, sampler)
    assert found.steps == (4 if sampler else None)


@pytest.mark.slow
def test_a_batch_equals_its_pictures_alone(recorder, exported, open_bundle, monkeypatch):
    exported(open_bundle)
    record = recorder("batch")
    bundles.run_batch(record)
    assert [check.passed for check in record.output.checks] == [True]
    (speedup,) = record.output.speedups
    assert (speedup.above, speedup.below) == ("2 pictures one by one", "a batch of 2")
    shutil.rmtree(Path(record.request.folder) / "bundle-batch")
    wrong(monkeypatch, 1.001, only=lambda output: len(output) == 2)
    record = recorder("batch")
    bundles.run_batch(record)
    assert [check.passed for check in record.output.checks] == [False]
    assert not record.output.timings


def test_webgpu_is_skipped_where_it_is_not_installed_or_has_no_device(recorder, monkeypatch):
    monkeypatch.setattr(webgpu, "_why_not", lambda: "onnxruntime-webgpu not installed")
    with pytest.raises(NotInstalledError, match="onnxruntime-webgpu"):
        webgpu.run(recorder("ort-webgpu"))
    from moebius_runtime.backends import ort_plugin

    monkeypatch.setattr(webgpu, "_why_not", lambda: None)
    monkeypatch.setattr(ort_plugin, "plugin_devices", lambda *_: [])
    with pytest.raises(NotRunError, match="lists no device; it needs"):
        webgpu.run(recorder("ort-webgpu"))


# --- the recipe ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """trained(change): the script writes the shipped weights with `change` applied to every tensor."""
    from safetensors.torch import save_file

    from moebius import preset
    from moebius.weights.load import load_student

    def use(change):
        def script(out, environment, seconds):
            assert environment["DEVICE"] == "cpu"
            student, _ = load_student("shipped:small", preset("small").student)
            (out / "whole").mkdir(parents=True)
            state = student.state_dict()
            state = {name: change(value) if value.is_floating_point() else value for name, value in state.items()}
            save_file(state, out / "whole/model.safetensors")
            (out / "whole/config.json").write_text('{"prediction_type": "v_prediction"}')
            return ["== encoded after 3 s", "== weights after 9 s: somewhere"]

        monkeypatch.setattr(recipe, "_script", script)

    return use


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda value: value * 1.01, [True, True, True]),
        (lambda value: value.clone(), [True, False, True]),  # nothing was trained
        (lambda value: -value, [True, True, False]),  # other weights
    ],
    ids=["trained", "unchanged", "other weights"],
)
def test_the_recipes_weights_are_checked(recorder, trained, change, passed):
    trained(change)
    record = recorder("small-recipe")
    recipe.run(record)
    assert [check.passed for check in record.output.checks] == passed
    assert record.output.facts["encoded after"] == "3 s"
    assert record.output.facts["weights after"] == "9 s"


def test_a_script_that_fails_or_hangs_says_so(tmp_path, monkeypatch):
    script = tmp_path / "script.sh"
    monkeypatch.setattr(recipe, "SCRIPT", script)
    script.write_text("echo a; echo 'CUDA out of memory' >&2; exit 3\n")
    with pytest.raises(RuntimeUnavailableError, match="ended with exit code 3: a CUDA out of memory"):
        recipe._script(tmp_path, dict(os.environ), 60)
    script.write_text("exec sleep 60\n")
    with pytest.raises(RuntimeUnavailableError, match="took longer than 1 s and was ended"):
        recipe._script(tmp_path, dict(os.environ), 1)


# --- the profile jetson -------------------------------------------------------------------------------------


def test_the_profiles_share_the_doctor_and_nothing_else():
    gpu, board = stages.PROFILES["gpu"], stages.PROFILES["jetson"]
    assert set(gpu) & set(board) == {"doctor"}
    assert set(gpu) | set(board) == set(stages.STAGES)
    assert set(stages.BUDGETS) == set(stages.PROFILES)


def test_the_boards_picture_is_compared_with_the_cpu(recorder, fused_bundle, monkeypatch):
    record = recorder("board-engines", bundle=str(fused_bundle))
    jetson.run_engines(record)
    assert [check.passed for check in record.output.checks] == [True]
    assert [row.variant for row in record.output.timings] == ["ort-cpu, fp32"]
    from moebius_runtime.images import metrics

    monkeypatch.setattr(metrics, "psnr", lambda *_: 20.0)
    record = recorder("board-engines", bundle=str(fused_bundle))
    jetson.run_engines(record)
    assert [check.passed for check in record.output.checks] == [False]
    assert not record.output.timings


def test_another_machine_is_no_board(recorder):
    record = recorder("board", quick=False)
    jetson.run_board(record)
    assert record.output.checks[0].passed is (record.output.facts["a Jetson"] == "yes")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell script")
def test_the_peak_of_tegrastats_is_kept_and_it_is_ended(recorder, tmp_path, monkeypatch):
    program = tmp_path / "tegrastats"
    lines = ["RAM 855/7620MB", "RAM 5123/7620MB GR3D_FREQ 99%", "nothing", "RAM 900/7620MB"]
    program.write_text(
        "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"touch {tmp_path}/on\nexec sleep 60\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    record = recorder("board-engines")
    with jetson._watched(record):
        while not (tmp_path / "on").exists():
            pass
    assert record.output.facts == {"tegrastats, most memory of 4 s": "RAM 5123/7620MB GR3D_FREQ 99%"}


# --- the whole of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "checks", "verdict"),
    [
        ("ok", "", [True, True], "passed, 2 checks"),
        ("ok", "", [True, False], "failed: 1 of 2 checks failed"),
        ("failed", "no driver", [], "failed: no driver"),
        ("timed out", "after 60 s", [False], "failed: timed out; 1 of 1 checks failed; after 60 s"),
        ("not installed", "no torch", [], "skipped (not installed): no torch"),
        ("not run", "no GPU", [], "skipped (not run): no GPU"),
    ],
)
def test_each_stage_passed_failed_or_was_skipped(status, reason, checks, verdict):
    output = StageOutput(checks=[Check(subject="a", name="b", passed=passed) for passed in checks])
    stage = StageResult(name="x", title="X", status=status, reason=reason, seconds=1, budget_seconds=2, output=output)
    assert stage.verdict == verdict


def dry_run(*arguments):
    return subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_dry_run_of_the_profile_jetson(fused_bundle, tmp_path):
    done = dry_run("--profile", "jetson", "--bundle", fused_bundle, "--name", "board", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "board.json")
    assert [(stage.name, stage.status) for stage in report.stages] == [
        ("doctor", "ok"),
        ("board", "ok"),
        ("board-engines", "ok"),
    ]
    assert "board-engines: passed, 1 checks" in done.stderr


@pytest.mark.slow
def test_a_dry_run_of_what_needs_an_export(tmp_path):
    names = "modes,guidance-distilled,lcm,batch,small-recipe"
    done = dry_run("--out", tmp_path, "--stages", names, "--budget", "1000")
    report = read_report(tmp_path / "dry-run.json")
    assert [(stage.name, stage.status, stage.reason) for stage in report.stages] == [
        (name, "ok", "") for name in names.split(",")
    ]
    assert done.returncode == 0, done.stderr
