"""scripts/prove-on-gpu.sh: a dry run, stages that fail or hang, checks that can fail, the report and its table."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moebius.network import lambda_layers  # noqa: E402
from moebius_bench.hardware import running, stages, table  # noqa: E402
from moebius_bench.hardware.markdown import page  # noqa: E402
from moebius_bench.hardware.network import build_networks, reduced  # noqa: E402
from moebius_bench.hardware.recorder import NotInstalledError, NotRunError, Recorder, Request, need  # noqa: E402
from moebius_bench.hardware.report import ChipRate, HardwareReport, read_report  # noqa: E402
from moebius_bench.hardware.stages import engines as stage_engines  # noqa: E402
from moebius_bench.hardware.stages import layers as stage_layers  # noqa: E402
from moebius_bench.hardware.stages import torch as stage_torch  # noqa: E402
from moebius_bench.hardware.timing import TooSlowError, interleaved  # noqa: E402
from moebius_bench.measure.results import Summary  # noqa: E402
from moebius_runtime.errors import InputError, RuntimeUnavailableError  # noqa: E402

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/prove-on-gpu.sh"


def script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def per_second(value):
    return Summary(median=value, min=value, max=value, count=1)


@pytest.fixture
def recorder(tmp_path):
    def make(stage="layers", **fields):
        request = {"preset": "tiny", "device": "cpu", "seconds": 1000, "folder": str(tmp_path), "quick": True}
        return Recorder(Request(stage=stage, out=str(tmp_path / "out.json"), **{**request, **fields}))

    return make


# --- the whole of it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    done = script("--dry-run", "--out", folder, "--stages", "limits,torch-fp32,triton,tensorrt-rtx")
    assert done.returncode == 0, done.stderr
    return read_report(folder / "dry-run.json"), (folder / "dry-run.md").read_text(), done


@pytest.mark.slow
def test_the_dry_run_measures_the_torch_runtime(dry):
    report, text, done = dry
    assert (report.device, report.dry_run, report.preset, report.exit_code) == ("cpu", True, "tiny", 0)
    assert [(stage.name, stage.status) for stage in report.stages if stage.name != "tensorrt-rtx"] == [
        ("limits", "ok"),
        ("torch-fp32", "ok"),
        ("triton", "not run"),
    ]
    assert report.stages[-1].status in ("not run", "not installed")  # no GPU, or no TensorRT-RTX
    assert {(rate.kind, rate.precision) for rate in report.output("limits").rates} == {
        ("matmul", "fp32"),
        ("matmul", "bf16"),
        ("matmul", "fp16"),
        ("copy", "fp32"),
    }
    output = report.output("torch-fp32")
    assert {row.subject for row in output.timings} == {
        "a guided step, preset tiny",
        "a whole picture, preset tiny",
    }
    assert all(row.seconds.median > 0 and row.share == row.bound.seconds / row.seconds.median for row in output.timings)
    assert len(output.speedups) == 2
    assert any("CUDA graphs" in note for note in output.notes)
    assert "A dry run" in text
    assert "every check that ran passed" in done.stderr
    assert str(ROOT) not in json.dumps(report.model_dump())  # reports are published


@pytest.mark.slow
def test_the_bound_is_weights_once_and_the_counted_products(dry):
    report, _, _ = dry
    step = report.output("torch-fp32").timings[0]
    student = build_networks("tiny", autoencoder=False).modules["unet"]
    weights = 4 * sum(parameter.numel() for parameter in student.parameters())
    sample, output, scalars = 4 * 9 * 16 * 16, 4 * 4 * 16 * 16, 8 + 4
    assert step.bound.bytes == weights + sample + output + scalars
    rates = {(rate.kind, rate.precision): rate.per_second.median for rate in report.output("limits").rates}
    assert step.bound.seconds_by_bytes == pytest.approx(step.bound.bytes / rates["copy", "fp32"])
    assert step.bound.seconds_by_macs == pytest.approx(step.bound.macs / rates["matmul", "fp32"])
    assert step.bound.seconds == max(step.bound.seconds_by_bytes, step.bound.seconds_by_macs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "--stages", "limits,engines"], "--stages limits,engines: expected some of doctor, limits"),
        (["--dry-run", "--profile", "tpu"], "--profile tpu: expected one of gpu, jetson"),
        (["--profile", "jetson"], "--profile jetson --bundle None: expected a folder with a manifest.json"),
        (["--profile", "jetson", "--bundle", "docs"], "--bundle docs: expected a folder with a manifest.json"),
        (["--dry-run", "--name", "../x"], "--name '../x': expected lower-case letters"),
        (["--dry-run", "--preset", "huge"], "--preset huge: expected full, small or tiny"),
    ],
)
def test_refusals(arguments, words):
    from typer.testing import CliRunner

    from moebius_bench.hardware.cli import app

    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_proves_nothing(tmp_path):
    done = script("--out", tmp_path)
    assert done.returncode == 2
    assert "nothing can be measured" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_script_names_an_interpreter_that_is_missing():
    done = script("--help", PYTHON="no-such-python")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no no-such-python; set PYTHON" in done.stderr


def test_the_script_names_an_interpreter_without_packages(tmp_path):
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = script("--help", PYTHON=str(bare))
    assert (done.returncode, done.stdout) == (2, "")
    assert "lacks packages of moebius-edge" in done.stderr


# --- stages that fail ---------------------------------------------------------------------------------------

WORKER = """
import json, os, subprocess, sys, time
request = json.load(sys.stdin)
stage = request["stage"]
with open(request["out"], "w") as stream:
    json.dump({"notes": [f"{stage} was here"], "rates": []}, stream)
if stage == "doctor":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(CHILD, "w") as stream:
        stream.write(str(child.pid))
    time.sleep(60)
if stage == "limits":
    os.kill(os.getpid(), 9)
if stage == "triton":
    print("first", file=sys.stderr)
    sys.exit("CUDA error: an illegal memory access was encountered")
if stage == "layers":
    print("this is no answer")
    sys.exit(0)
if stage == "training":
    print(json.dumps({"status": "not installed", "reason": "accelerate not installed"}))
    sys.exit(0)
print(json.dumps({"status": "ok", "reason": ""}))
"""


def _ended(pid):
    """Whether a process is gone or a zombie; asked for some time, as a signal takes a moment."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_no_stage_takes_the_others_along(tmp_path, monkeypatch):
    child = tmp_path / "child"
    (tmp_path / "worker.py").write_text(WORKER.replace("CHILD", repr(str(child))))
    quick = {name: replace(stage, seconds=2 if name == "doctor" else 60) for name, stage in stages.STAGES.items()}
    monkeypatch.setattr(running, "STAGES", quick)
    names = ("doctor", "limits", "triton", "layers", "training", "export")
    plan = running.Plan("x", "gpu", names, "cpu", "tiny", budget=1000)
    monkeypatch.setitem(quick, "doctor", replace(quick["doctor"], least=1))
    said = []
    report = running.run_stages(plan, lambda *text: said.append(text), [sys.executable, str(tmp_path / "worker.py")])
    ended = {stage.name: (stage.status, stage.reason) for stage in report.stages}
    assert ended["doctor"][0] == "timed out"
    assert ended["limits"] == ("failed", "its process was ended by SIGKILL and gave no answer")
    assert ended["triton"][0] == "failed"
    assert "exit code 1" in ended["triton"][1]
    assert ended["triton"][1].endswith("first | CUDA error: an illegal memory access was encountered")
    assert ended["layers"][0] == "failed"
    assert ended["training"] == ("not installed", "accelerate not installed")
    assert ended["export"] == ("ok", "")
    assert report.exit_code == 1
    assert all(stage.output.notes == [f"{stage.name} was here"] for stage in report.stages)  # kept, however it ended
    assert _ended(int(child.read_text()))  # what a stage started ends with it
    kept = report.model_copy(update={"stages": [s for s in report.stages if s.name in ("training", "export")]})
    assert kept.exit_code == 0  # what is not installed is no failure
    text = page(report)
    assert "Failed: doctor, limits, triton, layers." in text
    assert "first \\| CUDA error" in text  # a pipe in a cell would break the table


def test_no_stage_begins_without_time(monkeypatch):
    plan = running.Plan("x", "gpu", ("limits", "layers"), "cpu", "tiny", budget=1)
    report = running.run_stages(plan, lambda *text: None, ["/nothing/is/run"])
    assert [stage.status for stage in report.stages] == ["not run", "not run"]
    assert "1 s of 1 s are left, and it needs 5 s at least" in report.stages[0].reason


def test_an_error_of_a_stage_is_its_reason(tmp_path, monkeypatch):
    plan = running.Plan("x", "gpu", ("limits",), "cpu", "no-such-preset", budget=1000)
    source = (
        "from types import SimpleNamespace\n"
        "from moebius_bench.hardware import worker\n"
        "def broken(record):\n"
        "    record.at_most('a thing', 'error', float('nan'), 1.0)\n"
        "    raise RuntimeError('no kernel image is\\navailable')\n"
        "stage = SimpleNamespace(load=lambda: broken)\n"
        "worker.STAGES = {'limits': stage}\n"
        "worker.main()\n"
    )
    (tmp_path / "worker.py").write_text(source)
    report = running.run_stages(plan, lambda *text: None, [sys.executable, str(tmp_path / "worker.py")])
    (stage,) = report.stages
    assert (stage.status, stage.reason) == ("failed", "RuntimeError: no kernel image is available")
    (check,) = stage.output.checks  # NaN fails, and is no number in JSON
    assert (check.passed, check.measured, check.detail) == (False, None, "nan")


# --- checks that can fail -----------------------------------------------------------------------------------


def test_layers_agree_and_are_timed(recorder):
    record = recorder()
    stage_layers.run_layers(record)
    assert len(record.output.checks) == 16  # 2 layers, 2 sizes, 2 forms: outputs, gradients
    assert all(check.passed and 0 < check.measured < 1e-5 for check in record.output.checks)
    assert len(record.output.speedups) == 16  # 4 layers, 2 precisions, forward and both
    assert any("'triton' was left out" in note for note in record.output.notes)


def test_a_wrong_form_fails_and_is_not_timed(recorder, monkeypatch):
    right = lambda_layers.local_lambda
    monkeypatch.setattr(lambda_layers, "local_lambda", lambda *inputs: right(*inputs) * 1.001)
    record = recorder()
    stage_layers.run_layers(record)
    failed = [check for check in record.output.checks if not check.passed]
    assert {check.subject.partition(" ")[0] for check in failed} == {"Local-λ"}
    assert all(check.subject.endswith("fast") for check in failed)
    assert {row.subject.partition(" ")[0] for row in record.output.timings} == {"Interactive-λ"}


def test_a_wrong_form_fails_in_the_network_and_is_not_timed(recorder, monkeypatch):
    right = lambda_layers.local_lambda
    monkeypatch.setattr(lambda_layers, "local_lambda", lambda *inputs: right(*inputs) * 1.01)
    monkeypatch.setattr(stage_torch, "_has_vae", lambda record: False)
    record = recorder()
    stage_torch.run("fp32")(record)
    assert [check.passed for check in record.output.checks] == [True, False]
    assert [row.variant for row in record.output.timings] == [stage_torch.BASELINE]


@pytest.mark.slow
def test_training_steps_agree_and_are_timed(recorder, monkeypatch):
    from moebius_bench.hardware.stages import training as stage_training

    record = recorder("training")
    stage_training.run(record)
    assert [check.passed for check in record.output.checks] == [True] * 3
    assert {row.precision for row in record.output.speedups} == {"fp32", "bf16"}
    right = lambda_layers.interactive_lambda
    monkeypatch.setattr(lambda_layers, "interactive_lambda", lambda *inputs: right(*inputs) * 1.01)
    record = recorder("training")
    stage_training.run(record)
    assert not all(check.passed for check in record.output.checks)
    assert {row.variant for row in record.output.timings} == {"reference"}


def test_training_without_a_teacher(recorder, monkeypatch):
    """diffusers, which holds the teacher, is not installed."""
    from importlib import util

    from moebius_bench.hardware.stages import training as stage_training

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    record = recorder("training")
    step, subject = stage_training._build(record, "tiny", 2)
    assert subject == "training step without a teacher, batch 2, preset tiny"
    assert "diffusers" in record.output.notes[0]
    step.step("fast", "fp32")


# The limits of the Triton kernel's gradients are those of the fast form, which has them: here on a CPU.
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_gradient_limits(precision):
    from moebius.network.lambda_ops import eager_tile, local_lambda, local_lambda_reference

    size, depth = (7, 9), 12
    inputs, gradient = stage_layers._kernel_inputs(size, depth, precision, torch.device("cpu"))
    wide = [tensor.double() for tensor in inputs]
    expected = stage_layers._with_gradients(local_lambda_reference, wide, gradient.double(), size)

    def fast(*tensors):
        return local_lambda(*tensors, eager_tile(*size))

    got = stage_layers._with_gradients(fast, inputs, gradient, size)
    errors = [stage_layers._error(a, b) for a, b in zip(got[1:], expected[1:], strict=True)]
    limit = stage_layers.GRADIENT_LIMITS[precision]
    assert limit / 100 < max(errors) < limit


# --- engines ------------------------------------------------------------------------------------------------


def test_a_runtime_is_verified_and_timed(recorder, tiny_bundle):
    record = recorder("ort-cuda")
    stage_engines.measure(record, "ort-cpu", tiny_bundle, build=None)
    assert [check.passed for check in record.output.checks] == [True] * 7  # three graphs twice, a picture
    assert [(row.subject.partition(",")[0], row.above, row.below) for row in record.output.speedups] == [
        ("a guided step", stage_torch.BASELINE, "ort-cpu"),
        ("a whole picture", stage_torch.BASELINE, "ort-cpu"),
    ]


def test_a_wrong_result_of_a_runtime_fails_and_is_not_timed(recorder, tiny_bundle, monkeypatch):
    from moebius_runtime.backends.ort import OrtBackend

    right = OrtBackend._run
    monkeypatch.setattr(OrtBackend, "_run", lambda self, handle, inputs: right(self, handle, inputs) * 1.001)
    record = recorder("ort-cuda")
    stage_engines.measure(record, "ort-cpu", tiny_bundle, build=None)
    assert [check.passed for check in record.output.checks] == [False] * 6
    assert not record.output.timings


def test_builds_that_fail_do_not_stop_the_next(recorder, tiny_bundle):
    asked = []

    def build(bundle, runtime, precision, plugins):
        asked.append((runtime, precision, plugins))
        raise RuntimeUnavailableError(f"no {precision} today")

    record = recorder("tensorrt")
    stage_engines.measure(record, "tensorrt", tiny_bundle, build)
    assert asked == [("tensorrt", "fp32", False), ("tensorrt", "fp32", True), ("tensorrt", "fp16", False)]
    assert [check.subject for check in record.output.checks] == [
        "tensorrt, plugin off, fp32",
        "tensorrt, plugin on, fp32",
        "tensorrt, plugin off, fp16",
    ]
    assert all("no fp" in check.detail and not check.passed for check in record.output.checks)


def test_what_is_missing_is_named(recorder, monkeypatch):
    with pytest.raises(NotInstalledError, match="no_such_library, another_one not installed"):
        need("json", "no_such_library", "another_one")
    monkeypatch.setattr(stage_engines, "MODULES", {"tensorrt": ("no_such_library",)})
    with pytest.raises(NotInstalledError, match="no_such_library not installed"):
        stage_engines.run("tensorrt")(recorder("tensorrt"))
    with pytest.raises(NotRunError, match="the stage export did not make one"):
        stage_engines.bundle_of(recorder("tensorrt"))


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeUnavailableError, match=r"moebius-export trt ended with exit code 2: .*expected one of"):
        stage_engines.export_command(["trt", "nowhere", "--fp16", "--backend", "tensorrt-xl"], 100)
    # Importing PyTorch and exporting take seconds on any machine.
    sources = ["--preset", "tiny", "--weights", "stand-in", "--vae", "stand-in"]
    with pytest.raises(RuntimeUnavailableError, match="moebius-export onnx took longer than 1 s"):
        stage_engines.export_command(["onnx", *sources, "--out", str(tmp_path / "bundle")], 1)


# --- parts --------------------------------------------------------------------------------------------------


def test_variants_take_turns_in_beginning():
    seen = []
    work = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    times = interleaved(work, lambda: None, seconds=100, most=3)
    assert "".join(seen) == "baabbaab"  # the first pair is the warm-up
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_no_round_begins_that_would_end_too_late(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def work():
        clock[0] += 4

    assert len(interleaved({"a": work}, lambda: None, seconds=13, most=9)["a"]) == 2
    with pytest.raises(TooSlowError, match=r"a round takes 4\.0 s, and 3 s are available"):
        interleaved({"a": work}, lambda: None, seconds=3, most=9)


def test_a_network_that_does_not_fit_is_reduced_and_said_so(recorder):
    tried = []

    def work(name):
        tried.append(name)
        if name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "small":
            raise TooSlowError("a round takes 90.0 s, and 20 s are available")

    record = recorder(preset="full")
    reduced(record, work)
    assert tried == ["full", "small", "tiny"]
    assert record.output.notes == [
        "reduced from preset full to small: it does not fit into the device's memory",
        "reduced from preset small to tiny: a round takes 90.0 s, and 20 s are available",
    ]

    def never(name):
        raise TooSlowError("it takes long")

    with pytest.raises(NotRunError, match="preset tiny: it takes long, and there is no smaller one"):
        reduced(record, never)


def test_a_bound_needs_both_rates(recorder):
    rates = [
        ChipRate(kind="matmul", precision="bf16", size=1, per_second=per_second(1e12)),
        ChipRate(kind="copy", precision="fp32", size=1, per_second=per_second(2e9)),
    ]
    record = recorder(rates=rates)
    assert record.bound(10, 10, "fp16") is None
    bound = record.bound(4_000_000, 500_000_000_000, "bf16")
    assert (bound.seconds_by_bytes, bound.seconds_by_macs, bound.seconds) == (0.002, 0.5, 0.5)


def test_private_folders_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    text = f"cannot read /home/somebody/x and {tmp_path}/y"
    assert running.private(text) == "cannot read ~/x and ./y"


# --- the table in docs/status.md ----------------------------------------------------------------------------


def test_the_table_of_the_documentation_is_current():
    """After a report was added: scripts/prove-on-gpu.sh --table."""
    status = ROOT / "docs/status.md"
    text = status.read_text(encoding="utf-8")
    assert table.replaced(text, table.rendered(table.reports_in(ROOT / "docs/hardware")), status) == text


@pytest.mark.slow
def test_a_report_becomes_a_row(dry, tmp_path):
    report, _, _ = dry
    folder, status = tmp_path / "hardware", tmp_path / "status.md"
    folder.mkdir()
    status.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.write_table(folder, status)
    assert "No report yet" in status.read_text()
    gpus = [{"index": "0", "name": "NVIDIA Test | GPU"}]
    failing = report.stages[1].model_copy(update={"status": "timed out"})
    changed = report.model_copy(update={"name": "test", "gpus": gpus, "stages": [report.stages[0], failing]})
    (folder / "test.json").write_text(changed.model_dump_json())
    assert table.write_table(folder, status)
    assert not table.write_table(folder, status)  # twice is as once
    text = status.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if "hardware/test.md" in line)
    assert "NVIDIA Test \\| GPU (dry run)" in row
    assert "broke off: torch-fp32" in row
    best = max((s for s in failing.output.speedups if "step" in s.subject), key=lambda s: s.ratio.median)
    assert f"| {best.ratio.median:.2f} |" in row
    cells = row.replace("\\|", "").count("|")
    assert cells == next(line for line in text.splitlines() if line.startswith("| machine")).count("|")


@pytest.mark.parametrize("text", ["", table.BEGIN, f"{table.END} {table.BEGIN}", f"{table.BEGIN * 2}{table.END}"])
def test_a_page_without_its_markers_is_refused(text, tmp_path):
    status = tmp_path / "status.md"
    status.write_text(text)
    with pytest.raises(InputError, match="put them back"):
        table.write_table(tmp_path, status)
    assert status.read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "not a hardware report of schema version 1 .schema_version"),
        ({"extra": 1}, "not a hardware report of schema version 1 .extra"),
        ({"name": "other"}, "name the file other.json"),
    ],
)
def test_other_files_are_no_reports(dry, tmp_path, change, words):
    report, _, _ = dry
    content = report.model_dump() | {"name": "mine"} | change
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        table.reports_in(tmp_path)


@pytest.mark.slow
def test_the_report_reads_back(dry, tmp_path):
    report, _, _ = dry
    again = HardwareReport.model_validate_json(report.model_dump_json())
    assert again == report
    assert page(again) == page(report)
