"""ONNX Runtime on a GPU that is played: what is asked for, bound and copied; nothing else runs in its place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends import create_backend, ort_gpu
from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import BundleError, InputError, RuntimeUnavailableError
from moebius_runtime.graph_choice import decoder_note, decoders
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options
from moebius_runtime.settings.options import InpaintOptions, settings_of

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
fake_ort = gpu.load_fake("fake_ort")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))

    def install(*providers, **more):
        module = fake_ort.fake_ort(list(providers or fake_ort.GPU), **more)
        fake_ort.install(module, monkeypatch)
        return module

    return install


def filled(pipeline):
    picture = Picture(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8), "RGB")
    mask = np.zeros((128, 128), bool)
    mask[40:80, 40:90] = True
    return pipeline.inpaint(picture, mask, make_options(steps=4)).picture.pixels


@pytest.mark.parametrize("runtime", ["ort-cuda", "ort-tensorrt"])
def test_a_picture_is_that_of_ort_cpu(toy_bundle, installed, tmp_path, capsys, runtime):
    expected = filled(InpaintPipeline.from_bundle(toy_bundle.path, threads=1))
    module = installed()
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, runtime)
    assert np.array_equal(filled(pipeline), expected)
    pipeline.backend.load("unet")
    described = pipeline.backend.describe()
    assert described["providers"].startswith(pipeline.backend.providers[0])
    assert described["precision"] == "fp32"
    assert capsys.readouterr().out == ""  # ONNX Runtime prints which libraries it does not find
    options = module.sessions[-1][1]
    assert options["CUDAExecutionProvider"]["use_tf32"] == "0"
    if runtime == "ort-tensorrt":
        kept = options["TensorrtExecutionProvider"]
        assert kept["trt_engine_cache_path"] == str(tmp_path / "cache" / "ort-tensorrt")
        assert not any("fp16" in key or "int8" in key for key in kept)  # types are the graph's


def test_places_are_bound_once(toy_bundle, installed):
    module = installed()
    backend = create_backend(Bundle.open(toy_bundle.path), "ort-cuda")
    latent = np.random.RandomState(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    results = [backend.run("vae_decoder", {"latent": latent * factor}) for factor in (1, 2, 1)]
    assert module.copies == [latent.nbytes] * 2  # the first run makes the places
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


def test_batches(make_toy, tmp_path, installed):
    toy = make_toy(tmp_path / "open", batch="batch")
    installed()
    backend = create_backend(Bundle.open(toy.path), "ort-cuda")
    latents = np.random.RandomState(0).standard_normal((3, 4, 16, 16)).astype(np.float32)
    together = backend.run("vae_decoder", {"latent": latents})
    assert np.allclose(backend.run("vae_decoder", {"latent": latents[1:2]})[0], together[1], atol=1e-5)


@pytest.mark.parametrize(("runtime", "missing"), [("ort-cuda", "CUDAExecution"), ("ort-tensorrt", "TensorrtExecution")])
def test_onnxruntime_without_the_provider(toy_bundle, installed, runtime, missing):
    installed("OtherExecutionProvider")
    with pytest.raises(RuntimeUnavailableError) as caught:
        create_backend(Bundle.open(toy_bundle.path), runtime)
    words = f"{runtime!r} needs ONNX Runtime with {missing}Provider"
    for part in (words, "1.23.2, has OtherExecutionProvider", "moebius-edge[ort-gpu]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("silent", [False, True])
def test_libraries_that_cannot_be_loaded(toy_bundle, installed, silent):
    """ONNX Runtime goes on with the CPU here, unless it is told not to: neither may pass for a GPU."""
    module = installed(broken="libcublasLt.so.12: cannot open\nshared object file", silent=silent)
    with pytest.raises(RuntimeUnavailableError, match=r"'ort-cuda': .* cannot use the GPU \(.*nvidia-smi") as caught:
        create_backend(Bundle.open(toy_bundle.path), "ort-cuda")
    assert ("got CPUExecutionProvider" if silent else "libcublasLt.so.12: cannot open shared") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert module.loaded == [""]


def test_this_machine_s_own_onnxruntime_is_refused(toy_bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(RuntimeUnavailableError, match=r"'ort-cuda' needs ONNX Runtime with CUDAExecutionProvider"):
        create_backend(Bundle.open(toy_bundle.path), "ort-cuda")


def test_threads_are_the_cpu_s(toy_bundle, installed):
    installed()
    with pytest.raises(InputError, match=r"'ort-cuda' runs on the GPU"):
        create_backend(Bundle.open(toy_bundle.path), "ort-cuda", threads=2)


def test_fp16_is_preferred_and_can_be_asked_for(toy_copy, installed, edit_manifest):
    with pytest.raises(BundleError, match=r"U-Net has no fp16 file, only fp32\. Export it with `--precision fp16`"):
        create_backend(Bundle.open(toy_copy.path), "ort-cpu", precision="fp16")

    def add(content):
        content["graphs"]["unet"]["files"]["fp16"] = content["graphs"]["unet"]["files"]["fp32"]

    edit_manifest(toy_copy.path, add)
    bundle = Bundle.open(toy_copy.path)
    installed()
    backend = create_backend(bundle, "ort-cuda")
    assert (backend.precision("unet"), backend.precision("vae_decoder")) == ("fp16", "fp32")
    assert backend.describe()["precision"] == "fp16 (unet_conditional fp32, vae_encoder fp32, vae_decoder fp32)"
    assert create_backend(bundle, "ort-cuda", precision="fp32").precision("unet") == "fp32"


def test_on_the_cpu_fp16_is_not_chosen(toy_copy, edit_manifest):
    def add(content):
        content["graphs"]["unet"]["files"]["fp16"] = content["graphs"]["unet"]["files"]["fp32"]

    edit_manifest(toy_copy.path, add)
    bundle = Bundle.open(toy_copy.path)
    assert create_backend(bundle, "ort-cpu").precision("unet") == "fp32"
    assert create_backend(bundle, "ort-cpu", precision="fp16").precision("unet") == "fp16"


@pytest.mark.parametrize(
    ("runtime", "there", "words"),
    [
        (
            "ort-cpu",
            "fp16",
            r"'ort-cpu' runs fp32 or int8_cpu, and the U-Net has only fp16: run it with --runtime ort-cuda, or build",
        ),
        ("ort-cpu", "fp16", r"`moebius-export trt` and run it with --runtime tensorrt or tensorrt-rtx, or export it"),
        ("ort-cpu", "fp16", r"--precision fp16 runs its file on ort-cpu all the same, in float32$"),
        (
            "ort-cpu",
            "bf16",
            r"runs fp32 or int8_cpu, and the U-Net has only bf16: build engines .* with fp32 too$",
        ),
        ("ort-cuda", "bf16", r"'ort-cuda' runs fp16 or fp32, and the U-Net has only bf16: build engines"),
        ("auto", "bf16", r"nothing here can run .*ort-cpu was not taken: .*'ort-cpu' runs fp32"),
    ],
)
def test_a_bundle_without_what_onnxruntime_runs(toy_copy, installed, edit_manifest, runtime, there, words):
    def only(content):
        for graph in content["graphs"].values():
            graph["files"] = {there: graph["files"]["fp32"]}

    edit_manifest(toy_copy.path, only)
    installed()
    with pytest.raises((BundleError, RuntimeUnavailableError), match=words) as caught:
        create_backend(Bundle.open(toy_copy.path), runtime)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_bf16_file_is_not_given_to_onnxruntime(toy_copy, edit_manifest):
    def add(content):
        content["graphs"]["unet"]["files"]["bf16"] = content["graphs"]["unet"]["files"]["fp32"]

    edit_manifest(toy_copy.path, add)
    backend = create_backend(Bundle.open(toy_copy.path), "ort-cpu", precision="bf16")
    with pytest.raises(BundleError, match=r"reads no bf16 file of opset 20; build engines with `moebius-export trt`"):
        backend.load("unet")


def test_the_probe_is_what_it_says():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(ort_gpu.PROBE)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
    assert (model.ir_version, model.opset_import[0].version) == (8, 13)


def test_an_output_of_open_size_is_allocated_by_the_session(fused_bundle, installed):
    """The window of a masked decode: two sizes one after the other, each as the CPU computes it."""
    on_cpu = create_backend(Bundle.open(fused_bundle), "ort-cpu", threads=1)
    installed()
    backend = create_backend(Bundle.open(fused_bundle), "ort-cuda")
    rng = np.random.RandomState(0)
    for height, width in ((12, 20), (8, 8), (12, 20)):
        inputs = {
            "features": rng.standard_normal((1, 24, height, width)).astype(np.float32),
            "overview": rng.standard_normal((1, 24, 8, 8)).astype(np.float32),
            "inside": np.ones((1, 1, 8, 8), np.float32),
        }
        found = backend.run("vae_decoder_upper", inputs)
        assert found.shape == (1, 3, 4 * height, 4 * width)
        np.testing.assert_allclose(found, on_cpu.run("vae_decoder_upper", inputs), rtol=0, atol=2e-4)


@pytest.mark.parametrize("runtime", ["ort-cuda", "ort-tensorrt"])
def test_the_square_is_decoded_whole_where_a_part_would_need_the_cpu(toy_bundle, installed, monkeypatch, runtime):
    """The upper part's size is open: ONNX Runtime computes it on the CPU, which `_prepare` forbids."""
    installed()
    backend = create_backend(Bundle.open(toy_bundle.path), runtime)
    monkeypatch.setattr(Backend, "has", lambda self, graph: True)  # a bundle with every graph
    options = InpaintOptions(mode="balanced")
    settings = settings_of(options, backend.bundle.manifest.defaults)
    assert decoders(backend, settings, options) == ("vae_decoder",)
    assert "the whole square is decoded in full" in decoder_note(backend, settings, options)
    with pytest.raises(InputError, match="Use decode full"):
        decoders(backend, settings, InpaintOptions(mode="balanced", decode="masked"))
