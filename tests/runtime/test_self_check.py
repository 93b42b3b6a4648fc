"""The check of a device: one seeded run per graph against the manifest's values, on every backend."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends import create_backend
from moebius_runtime.bundle import check_values
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.check_values import check_inputs, inputs_digest, make_check, relative_error
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.errors import BundleError, DeviceError

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
plugins, fake_openvino = gpu.load_fake("fake_plugins"), gpu.load_fake("fake_openvino")
WEBGPU = "WebGpuExecutionProvider"
RUNTIMES = ("ort-cpu", "ort-webgpu", "openvino", "tensorrt", "tensorrt-rtx")


@pytest.fixture
def checked(tmp_path, make_toy, checks_of):
    """A toy bundle with check values."""
    toy = make_toy(tmp_path / "checked")
    return make_toy(tmp_path / "checked", checks=checks_of(toy))


@pytest.fixture
def planted(tmp_path, make_toy, checks_of):
    """The same with one wrong node: one of 324 weights of the conditional branch's convolution is off by 0.3."""
    right = make_toy(tmp_path / "planted")
    wrong = right.weights["with"].copy()
    wrong[2, 5, 1, 1] += 0.3
    return make_toy(tmp_path / "planted", weights={"with": wrong}, checks=checks_of(right))


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """opened(toy, runtime): a backend on a machine where that runtime is installed."""

    def open_(toy, runtime, **options):
        if "tensorrt" in runtime:
            rtx = runtime == "tensorrt-rtx"
            machine = gpu.make_machine(monkeypatch, tmp_path / "cache", "1.7.1.116" if rtx else "10.9.0.34", rtx)
            if not (toy.path / "engines").exists():
                machine.build(toy.path)
        elif runtime == "ort-webgpu":
            plugins.install(monkeypatch, [plugins.device(WEBGPU, description="Arc")], **options)
        elif runtime == "openvino":
            monkeypatch.setitem(sys.modules, "openvino", fake_openvino.fake_openvino())
        monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
        return create_backend(Bundle.open(toy.path), runtime)

    return open_


def verdicts(tmp_path):
    folder = tmp_path / "cache" / "device-checks"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def count_runs(backend):
    """A list that grows with every run of a graph."""
    runs, original = [], backend._run

    def run(handle, inputs):
        runs.append(list(inputs))
        return original(handle, inputs)

    backend._run = run
    return runs


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_right_device_is_checked_once(checked, opened, runtime, tmp_path):
    backend = opened(checked, runtime)
    runs = count_runs(backend)
    for graph in checked_graphs(backend):
        backend.load(graph)
    backend.release()
    backend.load("unet")
    assert len(runs) == len(verdicts(tmp_path)) == 4
    assert backend.take_notes() == []
    again = opened(checked, runtime)
    runs = count_runs(again)
    again.load("unet")
    assert runs == []


def checked_graphs(backend):
    return [graph for graph in backend.bundle.manifest.graphs if backend.has(graph)]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_planted_wrong_node_is_caught(planted, opened, runtime, tmp_path):
    backend = opened(planted, runtime)
    backend.load("vae_encoder")  # it has no wrong node
    for _ in range(2):
        with pytest.raises(
            DeviceError, match=rf"computes unet wrongly with runtime '{runtime}' .*relative error [1-9]"
        ):
            backend.load("unet")
        assert not backend.is_loaded("unet")
    with pytest.raises(DeviceError, match="computes unet_conditional wrongly"):
        backend.run("unet_conditional", check_inputs(backend.bundle.graph("unet_conditional"), 1))
    again = opened(planted, runtime)
    runs = count_runs(again)
    with pytest.raises(DeviceError, match=r"report this line with the output of `moebius-export doctor`.*remove "):
        again.load("unet")
    assert runs == []  # by the kept verdict
    next(path for path in verdicts(tmp_path) if path.name.startswith("unet-")).unlink()
    with pytest.raises(DeviceError):
        again.load("unet")
    assert len(runs) == 1


def test_a_wrong_kernel_is_refused_until_it_is_updated(checked, opened):
    def wrong(model, output):
        return output * 1.001 if output.shape == (1, 4, 16, 16) else output

    with pytest.raises(DeviceError, match=r"relative error (\d\.\de-04|1\.\de-03)"):
        opened(checked, "ort-webgpu", change=wrong).load("unet")
    with pytest.raises(DeviceError):  # the kept verdict
        opened(checked, "ort-webgpu").load("unet")
    opened(checked, "ort-webgpu", version="1.33.0").load("unet")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(checked, opened, value):
    def wrong(model, output):
        output = output.copy()
        output.flat[-1] = value
        return output

    with pytest.raises(DeviceError, match="relative error inf"):
        opened(checked, "ort-webgpu", change=wrong).load("vae_decoder")


def test_auto_takes_the_next_runtime_after_a_failure(planted, opened, monkeypatch, tmp_path):
    with pytest.raises(DeviceError):
        opened(planted, "ort-webgpu").load("unet")
    gpu.make_machine(monkeypatch, tmp_path / "cache").device = None
    for name in ("tensorrt_rtx", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    backend = create_backend(Bundle.open(planted.path), "auto")
    assert backend.name == "ort-cpu"
    assert any("ort-webgpu was not taken: GPU Arc computes unet wrongly" in note for note in backend.take_notes())


@pytest.mark.parametrize("content", [b"", b"{}", b'{"error": "x", "words": 1}', b"[" * 100_000, b"\xff\x00"])
def test_a_damaged_verdict_is_none(checked, opened, tmp_path, content):
    opened(checked, "ort-cpu").load("unet")
    (path,) = verdicts(tmp_path)
    path.write_bytes(content)
    backend = opened(checked, "ort-cpu")
    runs = count_runs(backend)
    backend.load("unet")
    assert len(runs) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs a file of another user")  # noqa: TID251
def test_a_verdict_of_another_user_is_not_read(planted, opened, tmp_path):
    with pytest.raises(DeviceError):
        opened(planted, "ort-cpu").load("unet")
    (path,) = verdicts(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"error": "', b'"error": "0.'))
    os.chmod(path, 0o666)
    with pytest.raises(DeviceError):
        opened(planted, "ort-cpu").load("unet")


@pytest.mark.parametrize(("runtime", "notes"), [("ort-cpu", 0), ("ort-webgpu", 1), ("openvino", 1)])
def test_a_bundle_without_values_gets_one_note(toy_bundle, opened, runtime, notes):
    backend = opened(toy_bundle, runtime)
    for graph in ("unet", "vae_decoder"):
        backend.load(graph)
    found = backend.take_notes()
    assert [note.startswith("this bundle holds no values to check") for note in found] == [True] * notes


def test_inputs_that_numpy_draws_otherwise_are_no_verdict(checked, opened, monkeypatch):
    monkeypatch.setattr(check_values, "_INPUT_SEED", 9)
    backend = opened(checked, "ort-webgpu")
    backend.load("unet")
    assert "NumPy draws other inputs for unet" in backend.take_notes()[0]


def test_an_open_batch_runs_one_picture(tmp_path, make_toy, opened):
    toy = make_toy(tmp_path / "open", batch="batch")
    found = {}
    for graph, info in read_manifest(toy.path).graphs.items():
        inputs = check_inputs(info, 2)
        assert next(iter(inputs.values())).shape[0] == 1
        found[graph] = inputs
    output = toy.encode(found["vae_encoder"]["image"]).astype(np.float32)
    checks = {"vae_encoder": make_check(found["vae_encoder"], output, 2)}
    backend = opened(make_toy(tmp_path / "open", batch="batch", checks=checks), "ort-cpu")
    backend.load("vae_encoder")
    assert len(verdicts(tmp_path)) == 1


@pytest.mark.parametrize(("precision", "refused"), [("int8", False), ("fp8", False), ("fp16", True)])
def test_quantized_files_are_not_checked(planted, opened, edit_manifest, monkeypatch, precision, refused):
    """Their own rounding reaches 0.85 of the output on random test weights."""

    def add(content):
        content["graphs"]["unet"]["files"][precision] = content["graphs"]["unet"]["files"]["fp32"]

    edit_manifest(planted.path, add)
    backend = opened(planted, "ort-webgpu")
    monkeypatch.setattr(backend, "_precision", precision)
    if refused:
        with pytest.raises(DeviceError):
            backend.load("unet")
        return
    backend.load("unet")
    assert any("are not checked" in note for note in backend.take_notes())
    backend.refuse_known_failure()


def test_faults_can_be_run_to_find_them(planted, opened):
    backend = opened(planted, "ort-cpu")
    backend.self_check = False
    backend.load("unet")


@pytest.mark.parametrize("size", [64, 4096, 100_000])
@pytest.mark.parametrize("where", ["all", "one element", "a corner"])
def test_the_sketch_measures_the_error_wherever_it_is(size, where):
    """16 projections give the relative error with a standard deviation of 18 %: within a factor of 2 (four sigma)."""
    rng = np.random.RandomState(size)
    right = rng.standard_normal(size).astype(np.float32)
    check = make_check({"x": right}, right, 1)
    wrong = np.zeros(size)
    part = {"all": slice(None), "one element": slice(size // 3, size // 3 + 1), "a corner": slice(size // 16)}[where]
    wrong[part] = rng.standard_normal(wrong[part].shape)
    wrong *= 1e-2 * np.linalg.norm(right) / np.linalg.norm(wrong)
    assert 0.5e-2 < relative_error(check, right + wrong) < 2e-2
    assert relative_error(check, right) < 1e-12


def test_inputs_are_told_apart():
    a = {"x": np.zeros((1, 2), np.float32), "y": np.zeros(1, np.int64)}
    digests = {
        inputs_digest(one)
        for one in (a, {**a, "x": np.zeros((2, 1), np.float32)}, {**a, "y": np.zeros(2, np.float32)}, {"x": a["x"]})
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    "change",
    [{"norm": 0.0}, {"norm": -1.0}, {"projections": [0.0] * 7}, {"values": []}, {"inputs_sha256": "x"}, {"drawn": 0}],
)
def test_a_manifest_with_wrong_values_is_refused(checked, edit_manifest, change):
    edit_manifest(checked.path, lambda content: content["checks"]["unet"].update(change))
    with pytest.raises(BundleError, match=r"checks\.unet"):
        Bundle.open(checked.path)
