"""`moebius-export doctor` as it is run: what it prints, its exit code, and a machine with nothing installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebius_export import doctor
from moebius_export.commands.app import app
from moebius_export.doctor import examine
from moebius_export.doctor.rows import Verdict

ROOT = Path(__file__).parents[3]
# Hides what a fresh environment with the base package does not have, from every process.
HIDE = """
import importlib.metadata as metadata
import sys

HIDDEN = {"torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "onnxsim", "tensorrt", "tensorrt_rtx", "triton",
          "cuda", "diffusers", "transformers", "safetensors", "huggingface_hub", "polygraphy", "scipy"}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def test_the_report_of_a_machine_with_nothing(machines, tmp_path):
    report = examine(None, machines.machine(tmp_path), lambda what: None)
    assert report.usable == ()
    assert report.sound is None
    assert report.exit_code == 1
    assert Verdict.failed not in {row.verdict for row in report.rows()}
    assert [part.name for part in report.parts] == ["machine", "gpu", "libraries", "runtimes"]


def test_the_report_of_a_jetson(machines, tmp_path):
    ask = machines.answers(
        tensorrt={"version": "10.3.0", "cuda": None},
        cuda={"version": "12.6.2", "file": "x"},
        device=machines.device("Orin", 87, "540.4.0", "12.6"),
    )
    report = examine(None, machines.orin(tmp_path, ask=ask), lambda what: None)
    assert report.usable == ("tensorrt",)
    assert report.exit_code == 0
    assert Verdict.failed not in {row.verdict for row in report.rows()}


def test_the_exit_code_also_tells_of_the_bundle(machines, tmp_path, tiny_copy):
    sources = machines.machine(tmp_path / "root", ask=machines.answers(onnxruntime=machines.ORT))
    assert examine(tiny_copy, sources, lambda what: None).exit_code == 0
    (tiny_copy / "unet/model.onnx").unlink()
    report = examine(tiny_copy, sources, lambda what: None)
    assert (report.usable, report.sound, report.exit_code) == (("ort-cpu",), False, 1)


def test_a_check_that_breaks_is_a_row(machines, tmp_path, monkeypatch):
    def broken(sources):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(doctor, "processor_rows", broken)
    monkeypatch.setattr(doctor, "find_gpu", broken)
    ask = machines.answers(onnxruntime=machines.ORT)
    report = examine(None, machines.machine(tmp_path, ask=ask), lambda what: None)
    part = report.parts[-1]
    assert part.name == "failed checks"
    assert [(row.name, row.verdict) for row in part.rows] == [("processor", Verdict.failed), ("gpu", Verdict.failed)]
    assert "ZeroDivisionError: by zero" in part.rows[0].found
    assert report.usable == ("ort-cpu",)  # the rest was looked at


def test_on_this_machine(tmp_path, tiny_bundle):
    path = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["doctor", str(tiny_bundle), "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "ok      ort-cpu: can run" in result.output
    found = json.loads(path.read_text())
    assert found["sound"] is True
    assert "ort-cpu" in found["usable"]
    rows = [row for part in found["parts"] for row in part["rows"]]
    assert {row["verdict"] for row in rows} <= {"ok", "missing", "wrong"}


def test_json_that_cannot_be_written_is_refused_first(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path)])
    assert "it is a folder" in str(result.exception)


@pytest.fixture
def bare(tmp_path):
    """Runs the command where only the base package can be imported."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    paths = [tmp_path / "hide", ROOT, ROOT / "export", ROOT / "runtimes", ROOT / "benchmarks"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}

    def run(*arguments):
        command = [sys.executable, "-m", "moebius_export.commands.app", "doctor", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    return run


def test_a_machine_with_nothing_but_the_base_package(bare, tmp_path, tiny_bundle):
    done = bare(tiny_bundle, "--json", "found.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["usable"] == []
    assert found["sound"] is True
    assert "failed checks" not in {part["name"] for part in found["parts"]}
    rows = {row["name"]: row for part in found["parts"] for row in part["rows"] if part["name"] == "libraries"}
    for name in ("onnxruntime", "tensorrt", "tensorrt-rtx", "torch", "CUDA bindings"):
        assert rows[name]["verdict"] == "missing", rows[name]
        assert rows[name]["fix"]
    assert 'pip install "moebius-edge[ort]"' in rows["onnxruntime"]["fix"]
    assert "no runtime can run here" in done.stdout
