"""Backends: the shared checks, ONNX Runtime as it is installed, and that nothing else is run in its place."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from moebius_runtime.backends import Backend, create_backend, ort
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import BundleError, InputError, RuntimeUnavailableError
from moebius_runtime.pipeline import InpaintPipeline


class Recorder(Backend):
    """Gives back what it is told to."""

    name = "recorder"
    output = np.zeros((1, 3, 128, 128), np.float32)

    def __init__(self, bundle, **more):
        super().__init__(bundle, **more)
        self.calls: list[str] = []

    def _load(self, graph):
        self.calls.append(f"load {graph}")
        return graph

    def _run(self, handle, inputs):
        self.calls.append(f"run {handle}")
        assert all(array.flags.c_contiguous for array in inputs.values())
        return self.output

    def _unload(self, handle):
        self.calls.append(f"unload {handle}")

    def describe(self):
        return {"runtime": self.name}


@pytest.fixture
def recorder(toy_bundle) -> Recorder:
    return Recorder(Bundle.open(toy_bundle.path))


LATENT = np.zeros((1, 4, 16, 16), np.float32)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, r"takes \['latent'\], got \[\]"),
        ({"latents": LATENT}, r"got \['latents'\]"),
        ({"latent": LATENT, "more": LATENT}, "takes"),
        ({"latent": LATENT.astype(np.float64)}, "expected float32 .* got float64"),
        ({"latent": LATENT.astype(np.float16)}, "got float16"),
        ({"latent": LATENT[0]}, r"got float32 \[4, 16, 16\]"),
        ({"latent": LATENT[:, :3]}, r"got float32 \[1, 3, 16, 16\]"),
        ({"latent": np.repeat(LATENT, 2, 0)}, r"got float32 \[2, 4, 16, 16\]"),
        ({"latent": LATENT.reshape(1, 4, 256)}, r"got float32 \[1, 4, 256\]"),
    ],
)
def test_inputs_must_be_those_of_the_manifest(recorder, inputs, words):
    with pytest.raises(ValueError, match=words):
        recorder.run("vae_decoder", inputs)
    assert recorder.calls == []


def test_the_output_must_be_that_of_the_manifest(recorder):
    assert recorder.run("vae_decoder", {"latent": LATENT}) is recorder.output
    for wrong in (recorder.output[:, :, 1:], recorder.output.astype(np.float16)):
        recorder.output = wrong
        with pytest.raises(BundleError, match=r"vae_decoder: output image: expected float32 \[1, 3, 128, 128\]"):
            recorder.run("vae_decoder", {"latent": LATENT})


def test_open_dimensions_fit_any_number(make_toy, tmp_path):
    toy = make_toy(tmp_path / "bundle", batch="batch")
    backend = create_backend(Bundle.open(toy.path), "ort-cpu", threads=1)
    latents = np.random.RandomState(0).standard_normal((3, 4, 16, 16)).astype(np.float32)
    together = backend.run("vae_decoder", {"latent": latents})
    for index in range(3):
        alone = backend.run("vae_decoder", {"latent": latents[index : index + 1]})
        assert np.abs(together[index] - alone[0]).max() < 1e-5  # values up to 20; the order of additions may differ


def test_graphs_are_loaded_once_and_released(recorder):
    assert not recorder.is_loaded("vae_decoder")
    recorder.load("vae_decoder")
    assert recorder.is_loaded("vae_decoder")
    for _ in range(2):
        recorder.run("vae_decoder", {"latent": np.asfortranarray(LATENT)})
    recorder.load("vae_encoder")
    recorder.release("unet")  # was never loaded
    recorder.release("vae_decoder")
    assert not recorder.is_loaded("vae_decoder")
    recorder.run("vae_decoder", {"latent": LATENT})
    recorder.release()
    assert recorder.calls == [
        "load vae_decoder",
        "run vae_decoder",
        "run vae_decoder",
        "load vae_encoder",
        "unload vae_decoder",
        "load vae_decoder",
        "run vae_decoder",
        "unload vae_encoder",
        "unload vae_decoder",
    ]
    assert not recorder.is_loaded("vae_encoder")


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_impossible_numbers_of_threads(toy_bundle, threads):
    with pytest.raises(InputError, match=f"threads is {threads}; expected 1 to 1024"):
        InpaintPipeline.from_bundle(toy_bundle.path, threads=threads)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "ort", "ORT-CPU", "cpu", "ort-cpu "])
def test_an_unknown_runtime(toy_bundle, name):
    with pytest.raises(RuntimeUnavailableError, match=r"there is no runtime .*; use one of: auto, ort-cpu"):
        create_backend(Bundle.open(toy_bundle.path), name)


# --- ONNX Runtime as it is installed ------------------------------------------------------------------------


def test_it_is_not_installed(toy_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # import then fails
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "moebius-edge\[ort\]"') as caught:
        create_backend(Bundle.open(toy_bundle.path), "ort-cpu")
    assert "\n" not in str(caught.value)


def test_what_is_left_of_it_is_an_empty_folder(toy_bundle, monkeypatch):
    shell = types.ModuleType("onnxruntime")
    shell.__path__ = ["/site-packages/onnxruntime"]
    monkeypatch.setitem(sys.modules, "onnxruntime", shell)
    with pytest.raises(RuntimeUnavailableError, match=r"/site-packages/onnxruntime.*--force-reinstall"):
        create_backend(Bundle.open(toy_bundle.path), "ort-cpu")


@pytest.mark.parametrize("other", ["onnxruntime-gpu", "onnxruntime_directml", "OnnxRuntime.OpenVINO"])
def test_two_packages_that_overwrite_each_other(toy_bundle, monkeypatch, tmp_path, other):
    """The second is told by its metadata alone, in any spelling of its name."""
    for name in ("onnxruntime", other):
        info = tmp_path / f"{name.replace('-', '_')}-1.20.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.20.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeUnavailableError) as caught:
        create_backend(Bundle.open(toy_bundle.path), "ort-cpu")
    plain = other.lower().replace("_", "-").replace(".", "-")
    assert f"onnxruntime 1.20.0 and {plain} 1.20.0 are both installed" in str(caught.value)
    assert f"pip uninstall -y onnxruntime {plain}" in str(caught.value)
    (info / "METADATA").unlink()
    info.rmdir()
    assert ort.import_onnxruntime().InferenceSession  # one package alone is fine


def test_providers_are_those_that_were_asked_for(toy_bundle, monkeypatch):
    backend = create_backend(Bundle.open(toy_bundle.path), "ort-cpu", threads=1)
    monkeypatch.setattr(ort.OrtBackend, "providers", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    if "CUDAExecutionProvider" not in backend._ort.get_available_providers():
        # ONNX Runtime only warns, and runs on the CPU in silence: this is what must not go unnoticed
        with (
            pytest.warns(UserWarning, match="CUDAExecutionProvider"),
            pytest.raises(RuntimeUnavailableError, match=r"asked ONNX Runtime for CUDA.* and got CPU.*nothing was run"),
        ):
            backend.load("vae_decoder")
        assert not backend.is_loaded("vae_decoder")


def test_it_describes_itself(toy_bundle):
    import onnxruntime

    backend = create_backend(Bundle.open(toy_bundle.path), "ort-cpu", threads=2)
    expected = {"runtime": "ort-cpu", "onnxruntime": onnxruntime.__version__, "threads": "2", "precision": "fp32"}
    assert backend.describe() == {**expected, "providers": "none loaded yet"}
    backend.load("vae_decoder")
    assert backend.describe() == {**expected, "providers": "CPUExecutionProvider"}


def test_threads_reach_the_session(toy_bundle, monkeypatch):
    import onnxruntime

    seen = []
    real = onnxruntime.InferenceSession

    def spy(path, options, **more):
        seen.append(options.intra_op_num_threads)
        return real(path, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    for threads in (1, 3, None):
        create_backend(Bundle.open(toy_bundle.path), "ort-cpu", threads=threads).load("vae_decoder")
    assert seen == [1, 3, ort.physical_cores()]
