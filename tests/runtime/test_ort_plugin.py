"""`--runtime ort-webgpu` and the other plugin providers: on a fake ONNX Runtime, and on what is installed.

`make test-webgpu` makes environments with the real ones.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends import create_backend, ort_plugin
from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import InputError, RuntimeUnavailableError

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
fake = gpu.load_fake("fake_plugins")
WEBGPU, OPENVINO = "WebGpuExecutionProvider", "OpenVINOExecutionProvider"


def installed(distribution):
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def opened(bundle, runtime="ort-webgpu", **options):
    return create_backend(Bundle.open(bundle.path), runtime, **options)


@pytest.fixture
def inputs():
    rng = np.random.RandomState(5)
    return {
        "sample": rng.standard_normal((1, 9, 16, 16)).astype(np.float32),
        "timestep": np.array([500], np.int64),
        "guidance_scale": np.array([2.5], np.float32),
    }


@pytest.mark.parametrize(
    ("runtime", "provider", "package"),
    [("ort-webgpu", WEBGPU, "onnxruntime_ep_webgpu"), ("ort-openvino", OPENVINO, "onnxruntime_ep_openvino")],
)
def test_a_session_gets_the_one_device(toy_bundle, monkeypatch, inputs, runtime, provider, package):
    devices = [fake.device(provider, description="Iris"), fake.device(provider, description="Arc", discrete="1")]
    ort = fake.install(monkeypatch, devices, package=package)
    backend = opened(toy_bundle, runtime)
    output = backend.run("unet", inputs)
    assert np.abs(output - toy_bundle.unet(inputs["sample"], 500, 2.5)).max() < 1e-5
    assert ort.sessions == [[devices[1]]] * 3  # two probes and the graph, all on the discrete GPU
    described = backend.describe()
    assert (described["device"], described["providers"]) == ("GPU Arc", f"{provider}, CPUExecutionProvider")
    assert "threads" not in described


def test_the_decoders_part_of_an_open_size_is_not_run(toy_bundle, monkeypatch):
    """ONNX Runtime would compute that size on the CPU, which the session forbids."""
    fake.install(monkeypatch, [fake.device(WEBGPU)])
    backend = opened(toy_bundle)
    monkeypatch.setattr(Backend, "has", lambda self, graph: True)  # a bundle with every graph
    assert backend.has("vae_decoder_lower")
    assert not backend.has("vae_decoder_upper")


def test_a_library_is_registered_once(toy_bundle, monkeypatch):
    ort = fake.install(monkeypatch, [fake.device(WEBGPU)])
    first = opened(toy_bundle, device="0")
    opened(toy_bundle)
    assert copy.copy(first).arguments() == {"precision": None, "device": "0"}
    assert ort.registered == ["onnxruntime-ep-webgpu"]


def test_the_device_is_chosen_by_number_or_name_and_listed(toy_bundle, monkeypatch):
    devices = [
        fake.device(WEBGPU, description="Intel Arc A770"),
        fake.device(WEBGPU, "NPU", "Intel NPU"),
        fake.device(WEBGPU),
    ]
    fake.install(monkeypatch, devices)
    for wanted, name in (("1", "NPU Intel NPU"), ("arc", "GPU Intel Arc A770"), ("0x56a0", "GPU Intel 0x8086:0x56a0")):
        assert opened(toy_bundle, device=wanted).describe()["device"] == name
    for wanted in ("list", "intel", "3", "-1", ""):
        with pytest.raises(InputError, match=r"0: GPU Intel Arc A770; 1: NPU Intel NPU; 2: GPU Intel 0x8086:0x56a0"):
            opened(toy_bundle, device=wanted)


def test_the_provider_that_is_built_in_chooses_itself(toy_bundle, monkeypatch, inputs):
    ort = fake.install(monkeypatch, [], built_in=(WEBGPU,), package=None)
    backend = opened(toy_bundle)
    backend.run("unet", inputs)
    assert ort.registered == []
    assert backend.describe()["device"] == "the device that the provider chooses"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"package": None}, r'needs the package onnxruntime-ep-webgpu.*"moebius-edge\[webgpu\]"'),
        ({"version": "1.23.2"}, r"needs ONNX Runtime 1.24 or later, which loads plugins; here is 1.23.2"),
        ({"broken": "undefined symbol"}, r"cannot load onnxruntime-ep-webgpu \(undefined symbol\). Update both"),
        ({}, r"lists no device; it needs a GPU with a Vulkan, Direct3D 12 or Metal driver"),
    ],
)
def test_what_is_missing(toy_bundle, monkeypatch, options, words):
    fake.install(monkeypatch, [] if not options else [fake.device(WEBGPU)], **options)
    with pytest.raises(RuntimeUnavailableError, match=words):
        opened(toy_bundle)


def test_a_fallback_to_the_cpu_is_refused(toy_bundle, monkeypatch):
    fake.install(monkeypatch, [fake.device(WEBGPU)], silent=True)
    with pytest.raises(RuntimeUnavailableError, match=r"asked for WebGpuExecutionProvider, got CPUExecutionProvider"):
        opened(toy_bundle)


def test_fp16_only_where_the_device_computes_in_it(toy_copy, monkeypatch, edit_manifest):
    def add(content):
        content["graphs"]["unet"]["files"]["fp16"] = content["graphs"]["unet"]["files"]["fp32"]

    edit_manifest(toy_copy.path, add)
    for f16, precision in ((True, "fp16"), (False, "fp32")):
        fake.install(monkeypatch, [fake.device(WEBGPU)], f16=f16)
        assert opened(toy_copy).precision("unet") == precision
    with pytest.raises(RuntimeUnavailableError, match=r"does not compute in fp16 \(WebGPU's shader-f16\)"):
        opened(toy_copy, precision="fp16")


def test_threads_are_the_cpu_s(toy_bundle, monkeypatch):
    fake.install(monkeypatch, [fake.device(WEBGPU)])
    with pytest.raises(InputError, match="leave --threads out"):
        opened(toy_bundle, threads=2)


@pytest.mark.parametrize(("kind", "taken"), [("GPU", "ort-webgpu"), ("CPU", "ort-cpu"), ("built in", "ort-cpu")])
def test_auto_takes_a_gpu_and_no_software_driver(toy_bundle, monkeypatch, tmp_path, kind, taken):
    gpu.make_machine(monkeypatch, tmp_path / "cache").device = None
    own = kind == "built in"
    fake.install(monkeypatch, [] if own else [fake.device(WEBGPU, kind)], built_in=(WEBGPU,) if own else ())
    for name in ("tensorrt_rtx", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    backend = opened(toy_bundle, "auto")
    first, *others = backend.take_notes()
    assert first == f"--runtime auto: {taken} is run"
    assert any("ort-webgpu was not taken: it found no GPU" in note for note in others) == (taken == "ort-cpu")


def test_the_probe_is_what_it_says():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(ort_plugin.PROBE_F16)
    onnx.checker.check_model(model)
    assert [(node.op_type, *node.input) for node in model.graph.node] == [("Mul", "x", "x")]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


# --- what is installed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["ort-webgpu", "ort-openvino"])
def test_the_real_plugin_lists_no_device_here(toy_bundle, runtime):
    """On a machine without a GPU. It fails with words, not with a run on the CPU."""
    package = ort_plugin.PLUGINS[runtime].package
    if not installed(package):
        pytest.skip(f"{package} is not installed: `make test-webgpu` makes an environment with it")
    if Path("/sys/class/drm").is_dir():
        pytest.skip("this machine may have a GPU")
    with pytest.raises(RuntimeUnavailableError, match=f"{package} is installed and lists no device"):
        opened(toy_bundle, runtime)
