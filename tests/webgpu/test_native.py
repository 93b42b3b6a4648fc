"""ONNX Runtime's real WebGPU provider, on any driver: `make test-webgpu` runs it on SwiftShader, a Vulkan driver in
software. Without the wheel onnxruntime-webgpu and a driver these tests are skipped.

The bundle is in MOEBIUS_WEBGPU_BUNDLE: preset tiny, random test weights, `--target webgpu`.
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends.ort_plugin import PLUGINS, OrtWebGpuBackend, check_device, plugin_devices
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.check_values import check_inputs
from moebius_runtime.errors import BundleError, DeviceError, RuntimeUnavailableError
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline

WEBGPU = PLUGINS["ort-webgpu"]
TOLERANCE = 1e-4  # relative L2 against the CPU provider, float32 on both sides; 8e-7 to 3e-6 measured on SwiftShader


def problem() -> str | None:
    """Why nothing can run here."""
    try:
        metadata.version("onnxruntime-webgpu")
    except metadata.PackageNotFoundError:
        return "the wheel onnxruntime-webgpu is not installed: `make test-webgpu` makes an environment with it"
    import onnxruntime

    try:
        check_device(onnxruntime, WEBGPU, plugin_devices(onnxruntime, WEBGPU, "ort-webgpu")[0], "ort-webgpu")
    except RuntimeUnavailableError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(bool(problem()), reason=problem() or "")


class Watched(OrtWebGpuBackend):
    """Notes outputs, and profiles."""

    folder: Path

    def _prepare(self, options, graph, path):
        super()._prepare(options, graph, path)
        options.enable_profiling = True
        options.profile_file_prefix = str(self.folder / graph)

    def _run(self, handle, inputs):
        self.output = super()._run(handle, inputs)
        return self.output


@pytest.fixture(scope="module")
def bundle():
    path = os.environ.get("MOEBIUS_WEBGPU_BUNDLE")
    if path is None:
        pytest.skip("MOEBIUS_WEBGPU_BUNDLE names no bundle: use `make test-webgpu`")
    return Bundle.open(path)


def on_the_cpu(path, inputs):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, dict(inputs))[0]


@pytest.mark.parametrize("mode", ["best", "fast", "reference"])
def test_a_whole_picture_is_that_of_the_cpu(bundle, mode, tmp_path, monkeypatch):
    """Every pixel within one grey level of ONNX Runtime's CPU provider: float32 on both sides, rounded to 8 bits."""
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    size = bundle.manifest.geometry.image_size
    picture = Picture(np.random.RandomState(0).randint(0, 256, (size, size + 40, 3)).astype(np.uint8), "RGB")
    mask = np.zeros(picture.shape, bool)
    mask[size // 4 : size // 2, size // 3 : size // 2 + 20] = True
    options = InpaintOptions(mode=mode, steps=3, seed=1)
    found, expected = (
        InpaintPipeline.from_bundle(bundle.path, runtime=runtime).inpaint(picture, mask, options)
        for runtime in ("ort-webgpu", "ort-cpu")
    )
    assert not [note for note in found.notes if "CPU" in note], found.notes
    difference = np.abs(found.picture.pixels.astype(int) - expected.picture.pixels)
    assert difference.max() <= 1
    assert (found.picture.pixels != picture.pixels)[mask].any()


@pytest.mark.parametrize("graph", ["unet", "unet_conditional", "vae_encoder", "vae_decoder"])
def test_each_graph_is_right_and_runs_on_the_provider(bundle, graph, tmp_path, monkeypatch):
    """Within 1e-4 of the CPU provider, by the device's check too, with every MAC on the provider."""
    onnx = pytest.importorskip("onnx")
    share = pytest.importorskip("moebius_export.graph.provider_share")
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    backend = Watched(bundle)
    backend.folder = tmp_path
    backend.load(graph)  # runs the check
    assert backend.take_notes() == []
    path = bundle.model_file(graph)
    expected = on_the_cpu(path, check_inputs(bundle.graph(graph), 1))
    assert np.linalg.norm(backend.output - expected) < TOLERANCE * np.linalg.norm(expected)
    events = json.loads(Path(backend._loaded[graph].end_profiling()).read_text())
    placed = share.macs_by_provider(onnx.load(path, load_external_data=False), events)
    assert set(placed) == {WEBGPU.provider}, placed
    providers = {event["args"]["provider"] for event in events if "provider" in event.get("args", {})}
    assert providers == {WEBGPU.provider}


def test_the_convolution_over_9_channels_is_caught_without_the_rule_and_right_with_it(toy, tmp_path, monkeypatch):
    """The toy's U-Net begins with dense 3x3 convolutions over 9 channels, which the provider computes wrongly."""
    onnx = pytest.importorskip("onnx")
    webgpu = pytest.importorskip("moebius_export.graph.webgpu")
    standard = pytest.importorskip("moebius_export.graph.standard")
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BundleError, match=r"fallback to CPU EP has been explicitly disabled"):
        OrtWebGpuBackend(Bundle.open(toy.path)).load("unet")  # its cast of the timestep would run on the CPU

    def rewrite(*rules):
        counts = []
        for name in ("unet/model.onnx", "unet/model_conditional.onnx"):
            model = onnx.load(toy.path / name, load_external_data=False)
            for node in model.graph.node:
                node.name = f"toy/{node.output[0]}"
            model, _ = standard.standard_only(model)
            model, fired = webgpu.for_webgpu(model, rules=rules)
            counts.append(fired)
            (toy.path / name).write_bytes(model.SerializeToString())
        toy.seal()
        return counts

    rewrite("tabulate_casts")
    backend = OrtWebGpuBackend(Bundle.open(toy.path))
    with pytest.raises(DeviceError, match=r"computes unet wrongly with runtime 'ort-webgpu' .*relative error"):
        backend.load("unet")
    assert [counts["pad_conv_channels"] for counts in rewrite("pad_conv_channels")] == [2, 1]
    backend = OrtWebGpuBackend(Bundle.open(toy.path))
    for graph in ("unet", "unet_conditional"):
        backend.load(graph)
    inputs = check_inputs(backend.bundle.graph("unet"), 1) | {"timestep": np.array([20])}
    output = backend.run("unet", inputs)
    assert np.abs(output - toy.unet(inputs["sample"], 20, 2.5)).max() < 1e-4


def test_every_dense_convolution_is_right_after_the_rule():
    """Against the CPU: the rule's condition covers everything that this version of the provider computes wrongly."""
    onnx = pytest.importorskip("onnx")
    webgpu = pytest.importorskip("moebius_export.graph.webgpu")
    opened = pytest.importorskip("moebius_export.graph.opened")
    import onnxruntime

    def error(model, x):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        data = model.SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=[(WEBGPU.provider, {})])
        (got,) = session.run(None, {"x": x})
        (right,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        return np.linalg.norm(got - right) / np.linalg.norm(right)

    rng, caught = np.random.RandomState(0), []
    for channels in (4, 6, 7, 9, 12, 15):
        for kernel, out in ((1, 8), (3, 8), (3, 7)):
            x = rng.standard_normal((1, channels, 9, 7)).astype(np.float32)
            weight = rng.standard_normal((out, channels, kernel, kernel)).astype(np.float32)
            node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="a/Conv", pads=[kernel // 2] * 4)
            ends = [
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, size, 9, 7])
                for name, size in (("x", channels), ("y", out))
            ]
            tensors = [onnx.numpy_helper.from_array(weight, "w")]
            graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], tensors)
            opsets = [onnx.helper.make_opsetid("", 20)]
            model = opened.with_types(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
            if error(model, x) > TOLERANCE:
                caught.append((channels, kernel))
                assert webgpu.computed_wrongly(weight.shape, 1)
            changed, _ = webgpu.for_webgpu(model)
            assert error(changed, x) < TOLERANCE, (channels, kernel, out)
    assert caught, "this version of the provider computes them right: the rule can go"
