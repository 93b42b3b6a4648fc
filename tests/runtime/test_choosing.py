"""`--runtime auto`, runtimes that other packages bring, and what the command makes of them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends import GROUP, create_backend
from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import InputError, RuntimeUnavailableError

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
fake_ort = gpu.load_fake("fake_ort")


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """Neither TensorRT nor a GPU: with real ONNX Runtime for the CPU."""
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache")
    machine.device = None
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    return machine


class Played(Backend):
    """What another package could bring."""

    name = "torch"

    def __init__(self, bundle, *, threads=None, precision=None):
        super().__init__(bundle, threads=threads)
        self.precision = precision

    def _load(self, graph):
        return graph

    def _run(self, handle, inputs):
        info = self.bundle.graph(handle).outputs[0]
        return np.random.RandomState(0).standard_normal(info.shape).astype(np.float32)

    def describe(self):
        return {"runtime": self.name}


def brings(monkeypatch, **found):
    """Entry points of the group: name -> "module:object"."""
    points = metadata.EntryPoints(metadata.EntryPoint(name, value, GROUP) for name, value in found.items())

    def entry_points(**wanted):
        assert wanted == {"group": GROUP}
        return points

    monkeypatch.setattr(metadata, "entry_points", entry_points)


# --- auto ---------------------------------------------------------------------------------------------------


def test_auto_without_a_gpu(toy_bundle, no_gpu):
    backend = create_backend(Bundle.open(toy_bundle.path), "auto", threads=1)
    assert (backend.name, backend.threads) == ("ort-cpu", 1)
    first, *why = backend.take_notes()
    assert first == "--runtime auto: ort-cpu is run"
    assert [note.split(" was not taken: ")[0] for note in why] == [
        *("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-webgpu", "openvino"),
    ]
    assert "no GPU driver" in why[0]
    assert "cannot be imported" in why[1]
    assert "CUDAExecutionProvider" in why[2]
    assert backend.take_notes() == []


def test_auto_takes_engines_that_fit(toy_copy, no_gpu):
    no_gpu.device = gpu.DEVICE
    no_gpu.build(toy_copy.path)
    backend = create_backend(Bundle.open(toy_copy.path), "auto", threads=2)
    assert backend.name == "tensorrt"
    assert backend.take_notes() == ["--runtime auto: tensorrt is run"]


def test_auto_says_why_engines_do_not_fit(toy_copy, no_gpu, monkeypatch):
    no_gpu.device = gpu.DEVICE
    no_gpu.build(toy_copy.path, sm=[75])
    fake_ort.install(fake_ort.fake_ort(["CUDAExecutionProvider"]), monkeypatch)
    backend = create_backend(Bundle.open(toy_copy.path), "auto")
    assert backend.name == "ort-cuda"
    notes = backend.take_notes()
    assert "built for SM 75, NVIDIA RTX 4060 is SM 89" in notes[1]
    assert "moebius-export trt" in notes[1]


def test_auto_where_nothing_runs(toy_bundle, no_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match=r"nothing here can run .*no GPU driver.*ort-cpu was not taken"):
        create_backend(Bundle.open(toy_bundle.path), "auto")


# --- entry points -------------------------------------------------------------------------------------------


def test_torch_is_found_by_its_entry_point(toy_bundle, monkeypatch):
    module = type(sys)("played")
    module.Played = Played
    monkeypatch.setitem(sys.modules, "played", module)
    brings(monkeypatch, torch="played:Played", other="played:Played")
    bundle = Bundle.open(toy_bundle.path)
    backend = create_backend(bundle, "torch", threads=3)
    assert (type(backend), backend.threads, backend.precision) == (Played, 3, None)
    assert create_backend(bundle, "torch", precision="fp16").precision == "fp16"


class Fp32Only(Played):
    def __init__(self, bundle, *, threads=None, device="auto"):
        super().__init__(bundle, threads=threads)


def test_a_runtime_of_one_precision(toy_bundle, monkeypatch):
    module = type(sys)("played")
    module.Fp32Only = Fp32Only
    monkeypatch.setitem(sys.modules, "played", module)
    brings(monkeypatch, torch="played:Fp32Only")
    bundle = Bundle.open(toy_bundle.path)
    assert create_backend(bundle, "torch", precision="fp32").name == "torch"
    with pytest.raises(InputError, match=r"--precision fp16: runtime 'torch' runs in fp32"):
        create_backend(bundle, "torch", precision="fp16")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a_module_that_is_not_there:TorchBackend", r"'torch' \(a_module.*cannot be imported.*moebius-edge\[export\]"),
        ("json:JSONDecoder", "json:JSONDecoder is not a Backend"),
    ],
)
def test_an_entry_point_that_does_not_serve(toy_bundle, monkeypatch, value, words):
    brings(monkeypatch, torch=value)
    with pytest.raises(RuntimeUnavailableError, match=words):
        create_backend(Bundle.open(toy_bundle.path), "torch")


def test_no_package_brings_torch(toy_bundle, monkeypatch):
    brings(monkeypatch)
    with pytest.raises(RuntimeUnavailableError, match=r"'torch' is brought by an entry point .*no installed package"):
        create_backend(Bundle.open(toy_bundle.path), "torch")


def test_the_project_states_its_entry_point():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = text.partition(f'[project.entry-points."{GROUP}"]')[2]
    assert section.lstrip().startswith('torch = "moebius_export.network.torch_runtime:TorchBackend"')


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_runs_engines_and_says_nothing_more(
    run, here, toy_bundle, monkeypatch, tmp_path, reseal, checks_of
):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache")
    (here / "moebius-bundle").unlink()
    shutil.copytree(toy_bundle.path, here / "moebius-bundle")
    reseal(here / "moebius-bundle", checks=checks_of(toy_bundle))
    machine.build(here / "moebius-bundle")
    arguments = ("a.png", "--mask", "m.png", "--steps", 2)
    code, _, err = run(*arguments, "--out", "gpu.png", "--runtime", "tensorrt")
    assert (code, [line for line in err if line.startswith("note")]) == (0, [])
    run(*arguments, "--out", "cpu.png")
    assert (here / "gpu.png").read_bytes() == (here / "cpu.png").read_bytes()
    code, _, err = run(*arguments, "--out", "auto.png", "--runtime", "auto")
    assert [line for line in err if line.startswith("note")] == ["note: --runtime auto: tensorrt is run"]


def test_the_command_warns_of_what_is_trusted(run, here, toy_bundle, monkeypatch, tmp_path):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache")
    (here / "moebius-bundle").unlink()
    shutil.copytree(toy_bundle.path, here / "moebius-bundle")
    machine.build(here / "moebius-bundle", sm=[75])
    arguments = ("a.png", "--mask", "m.png", "--steps", 2, "--out", "o.png", "--runtime", "tensorrt")
    code, _, err = run(*arguments)
    assert code == 2
    assert "built for SM 75" in err[0]
    code, _, err = run(*arguments, "--trust")
    assert code == 0
    assert err[0].startswith("note: --trust: ")


def test_refusals_of_the_command(refused, no_gpu):
    arguments = ["a.png", "--mask", "m.png", "--out", "o.png"]
    refused([*arguments, "--runtime", "tensorrt"], "'tensorrt' needs an NVIDIA GPU", "no GPU driver")
    refused([*arguments, "--trust"], "--trust is about engines, and runtime 'ort-cpu' loads none")
    refused([*arguments, "--precision", "fp16"], "has no fp16 file, only fp32")
    refused([*arguments, "--precision", "fp8"], "--precision")
    refused([*arguments, "--runtime", "nothing"], "there is no runtime 'nothing'; use one of: auto, ort-cpu, ort-cuda")


def test_trust_is_about_engines(toy_bundle):
    with pytest.raises(InputError, match=r"--trust is about engines"):
        create_backend(Bundle.open(toy_bundle.path), "ort-cuda", trust=True)


def test_the_real_library_without_a_driver(run_process):
    """`tensorrt_rtx` as it is installed, on a machine without a GPU: one plain line."""
    pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")
    from moebius_runtime.hardware.devices import current_device

    if current_device() is not None:
        pytest.skip("this machine has a GPU")
    code, out, err = run_process("a.png", "--mask", "m.png", "--out", "o.png", "--runtime", "tensorrt-rtx")
    assert (code, out, len(err)) == (2, "", 1)
    assert "'tensorrt-rtx' needs an NVIDIA GPU, and no GPU driver was found" in err[0]
