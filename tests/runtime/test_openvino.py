"""`--runtime openvino`: on the installed OpenVINO where there is one, and on one that is not there."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime import kernels
from moebius_runtime.backends import create_backend
from moebius_runtime.backends import openvino as backend_module
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import BundleError, InputError, RuntimeUnavailableError

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
fake = gpu.load_fake("fake_openvino")
REAL = importlib.util.find_spec("openvino") is not None


@pytest.fixture(params=["fake", "real"])
def either(request, monkeypatch):
    """The fake OpenVINO, and the installed one."""
    if request.param == "real":
        if not REAL:
            pytest.skip("openvino is not installed: `make test-webgpu` makes an environment with it")
        return importlib.import_module("openvino")
    module = fake.fake_openvino()
    monkeypatch.setitem(sys.modules, "openvino", module)
    return module


@pytest.fixture
def installed(monkeypatch):
    """installed(...) makes a fake the installed OpenVINO."""

    def install(**options):
        module = fake.fake_openvino(**options)
        monkeypatch.setitem(sys.modules, "openvino", module)
        return module

    return install


def toy_inputs(rng=None):
    rng = rng or np.random.RandomState(5)
    return {
        "sample": rng.standard_normal((1, 9, 16, 16)).astype(np.float32),
        "timestep": np.array([500], np.int64),
        "guidance_scale": np.array([2.5], np.float32),
    }


def test_it_equals_what_the_toy_computes(toy_bundle, either):
    """float32 against float64 loops: 1e-6 relative; bf16, which OpenVINO prefers on some CPUs, would give 4e-3."""
    backend = create_backend(Bundle.open(toy_bundle.path), "openvino", threads=1)
    inputs = toy_inputs()
    first = backend.run("unet", inputs)
    again = backend.run("unet", toy_inputs(np.random.RandomState(6)))
    assert not np.array_equal(first, again)  # an output is not overwritten by the next run
    expected = toy_bundle.unet(inputs["sample"], 500, 2.5)
    assert np.abs(first - expected).max() < 1e-5
    latent = np.random.RandomState(1).standard_normal((1, 4, 16, 16)).astype(np.float32)
    assert np.abs(backend.run("vae_decoder", {"latent": latent}) - toy_bundle.decode(latent)).max() < 1e-5
    described = backend.describe()
    assert described["device"].startswith("CPU (")
    assert (described["threads"], described["precision"]) == ("1", "fp32")
    backend.release()
    assert not backend.is_loaded("unet")


def test_it_can_be_pickled(toy_bundle, either):
    backend = create_backend(Bundle.open(toy_bundle.path), "openvino", threads=1)
    again = copy.copy(backend)  # as pickling does: by `arguments`
    assert again.arguments() == {"threads": 1, "precision": None, "device": "CPU"}


def test_a_device_is_chosen_and_listed(toy_bundle, installed):
    module = installed()
    backend = create_backend(Bundle.open(toy_bundle.path), "openvino", device="NPU")
    backend.load("unet")
    assert module.compiled[-1][0] == "NPU"
    assert backend.describe()["device"] == "NPU (Intel AI Boost)"
    with pytest.raises(RuntimeUnavailableError, match=r"no device 'list'; found: CPU \(AMD EPYC\), GPU \(Intel Arc"):
        create_backend(Bundle.open(toy_bundle.path), "openvino", device="list")
    with pytest.raises(InputError, match="device GPU takes no number of threads"):
        create_backend(Bundle.open(toy_bundle.path), "openvino", device="GPU", threads=2)


@pytest.mark.parametrize("device", ["AUTO", "HETERO:GPU,CPU", "MULTI:GPU,CPU", "cpu"])
def test_devices_that_choose_or_mix_are_refused(toy_bundle, installed, device):
    installed()
    with pytest.raises(RuntimeUnavailableError, match="no device"):
        create_backend(Bundle.open(toy_bundle.path), "openvino", device=device)


def test_precisions_by_device(toy_copy, installed, edit_manifest):
    installed()

    def add(content):
        for graph in ("unet", "vae_decoder"):
            files = content["graphs"][graph]["files"]
            files["fp16"] = files["fp32"]

    edit_manifest(toy_copy.path, add)
    for device, precision in (("CPU", "fp32"), ("GPU", "fp16 (vae_encoder fp32, unet_conditional fp32)")):
        words = create_backend(Bundle.open(toy_copy.path), "openvino", device=device).describe()["precision"]
        assert words.split(" ")[0] == precision.split(" ")[0]
    asked = create_backend(Bundle.open(toy_copy.path), "openvino", precision="fp16")
    assert asked.precision("unet") == "fp16"
    assert asked.precision("vae_encoder") == "fp32"
    with pytest.raises(BundleError, match="no int8 file"):
        create_backend(Bundle.open(toy_copy.path), "openvino", precision="int8")


def test_a_bundle_with_functions_is_refused_with_the_command(toy_bundle, installed, monkeypatch):
    installed()
    monkeypatch.setattr(backend_module, "function_domains", lambda path: {"moebius"})
    with pytest.raises(BundleError, match=r"functions of moebius.*moebius-export inline .* --out INLINED"):
        create_backend(Bundle.open(toy_bundle.path), "openvino")


def test_what_openvino_refuses_is_one_line(toy_bundle, installed):
    installed(broken="Check 'rank().is_static()' failed\nConversion is failed for: Conv-20")
    with pytest.raises(BundleError, match=r"OpenVINO 2026.4.1 cannot load it for CPU: Conversion is failed for: Conv"):
        create_backend(Bundle.open(toy_bundle.path), "openvino").load("unet")


def test_it_is_not_installed(toy_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "moebius-edge\[openvino\]"'):
        create_backend(Bundle.open(toy_bundle.path), "openvino")


@pytest.mark.parametrize(
    ("machine", "flags", "library", "domains", "taken", "words"),
    [
        ("x86_64", "sse2 avx2", False, set(), "openvino", None),
        ("x86_64", "sse2 avx2", True, set(), "openvino", None),  # kernels that this bundle's graphs do not call
        ("x86_64", "avx2", True, {"moebius"}, "ort-cpu", "the compiled kernels of ort-cpu run this bundle"),
        ("x86_64", "avx2", False, {"moebius"}, "ort-cpu", "standard operators only"),
        ("x86_64", "avx2 avx512f", False, set(), "ort-cpu", "not faster than ort-cpu on a processor with AVX-512"),
        ("x86_64", "", False, set(), "ort-cpu", "on x86-64 with AVX2 only"),
        ("aarch64", "", False, set(), "ort-cpu", "on x86-64 with AVX2 only"),
    ],
)
def test_auto_takes_it_where_it_is_faster(
    toy_bundle, installed, monkeypatch, tmp_path, machine, flags, library, domains, taken, words
):
    installed()
    gpu.make_machine(monkeypatch, tmp_path / "cache").device = None
    for name in ("tensorrt_rtx", "onnxruntime_ep_webgpu"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("moebius_runtime.backends.processor_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(kernels, "library_path", lambda: Path("kernels.so") if library else None)
    for module in ("moebius_runtime.backends", "moebius_runtime.backends.openvino"):
        monkeypatch.setattr(f"{module}.function_domains", lambda path: domains)
    backend = create_backend(Bundle.open(toy_bundle.path), "auto", threads=1)
    assert backend.name == taken
    if words:
        assert any(words in note for note in backend.take_notes() if note.startswith("openvino"))


def test_device_is_refused_where_it_has_no_meaning(toy_bundle):
    with pytest.raises(InputError, match=r"--device GPU: runtime 'ort-cpu' takes none; name a runtime of openvino, "):
        create_backend(Bundle.open(toy_bundle.path), "ort-cpu", device="GPU")
