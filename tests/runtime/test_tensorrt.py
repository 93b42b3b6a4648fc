"""Engines on a fake GPU: the whole picture, what is copied and captured, memory, versions, and refusals."""

from __future__ import annotations

import gc
import importlib.util
import mmap
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends import create_backend
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import CudaError, EngineError, InputError, RuntimeUnavailableError
from moebius_runtime.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).with_name("gpu.py"))
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)

VERSIONS = [("10.0.1.6", False), ("10.3.0.30", False), ("10.9.0.34", False), ("11.4.1.7", False), ("1.7.1.116", True)]
SAMPLE = np.random.RandomState(0).standard_normal((1, 9, 16, 16)).astype(np.float32)
ONE = np.array([1.5], np.float32)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return gpu.make_machine(monkeypatch, tmp_path / "cache")


@pytest.fixture
def bundle(toy_copy) -> Path:
    return toy_copy.path


def opened(machine, bundle, **more):
    return create_backend(Bundle.open(bundle), machine.backend, **more)


def picture():
    return Picture(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8), "RGB")


def hole():
    mask = np.zeros((128, 128), bool)
    mask[40:80, 40:90] = True
    return mask


def filled(pipeline, **options):
    return pipeline.inpaint(picture(), hole(), make_options(**{"steps": 4, **options})).picture.pixels


def step(backend, sample=SAMPLE, timestep=500):
    return backend.run("unet", {"sample": sample, "timestep": np.array([timestep]), "guidance_scale": ONE})


@pytest.mark.parametrize("memory", ["low", "fast"])
@pytest.mark.parametrize(("version", "rtx"), VERSIONS)
def test_a_picture_is_that_of_ort_cpu(monkeypatch, tmp_path, bundle, version, rtx, memory):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache", version, rtx)
    machine.build(bundle)
    expected = filled(InpaintPipeline.from_bundle(bundle, threads=1))
    pipeline = InpaintPipeline(opened(machine, bundle), memory=memory)
    for _ in range(2):
        assert np.array_equal(filled(pipeline), expected)
    assert machine.trt.most_alive == (1 if memory == "low" else 3)
    described = pipeline.backend.describe()
    assert described[machine.backend] == version
    assert described["precision"] == "fp32"
    assert "SM 89" in described["device"]
    del pipeline
    gc.collect()
    assert machine.cuda.leaks() == []
    assert not machine.trt.alive


def test_the_old_layout_of_the_bindings(monkeypatch, tmp_path, bundle):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache", old_layout=True)
    machine.build(bundle)
    assert np.isfinite(step(opened(machine, bundle))).all()


def test_low_memory_holds_nothing_between_graphs(machine, bundle):
    machine.build(bundle)
    backend = opened(machine, bundle)
    for graph in ("vae_encoder", "unet", "vae_decoder"):
        backend.load(graph)
        backend.release(graph)
        assert [leak.split()[0] for leak in machine.cuda.leaks()] == ["stream"]
        assert backend.describe()["activation memory"] == "0.0 MiB"


# --- CUDA graphs and copies ---------------------------------------------------------------------------------


def test_the_second_run_is_captured_and_later_ones_replayed(machine, bundle):
    machine.build(bundle)
    backend = opened(machine, bundle)
    results = [step(backend, SAMPLE * factor) for factor in (1, 2, 3, 1)]
    assert np.array_equal(results[0], results[3])
    assert not np.array_equal(results[0], results[1])
    assert [captured for _, captured in machine.trt.runs] == [False, True]  # enqueued once, captured once
    assert sum(call == "cudaGraphLaunch" for call in machine.cuda.calls) == 3
    assert "unet captured" in backend.describe()["cuda graphs"]


def test_only_what_changed_is_copied(machine, bundle):
    machine.build(bundle)
    backend = opened(machine, bundle)
    step(backend)
    machine.cuda.calls.clear()
    next_sample = SAMPLE.copy()
    next_sample[:, :4] += 1  # the latents; the condition stays
    expected = step(create_backend(Bundle.open(bundle), "ort-cpu", threads=1), next_sample, 250)
    assert np.array_equal(step(backend, next_sample, 250), expected)
    up = [call for call in machine.cuda.calls if "HostToDevice" in call]
    assert up == ["cudaMemcpyAsync HostToDevice 4096", "cudaMemcpyAsync HostToDevice 4"]  # 4 x 16 x 16 floats; one word
    machine.cuda.calls.clear()
    assert np.array_equal(step(backend, next_sample, 250), expected)
    assert not any("HostToDevice" in call for call in machine.cuda.calls)


def test_results_do_not_change_under_the_caller(machine, bundle):
    machine.build(bundle)
    backend = opened(machine, bundle)
    first = step(backend)
    kept = first.copy()
    step(backend, SAMPLE * 2)
    assert np.array_equal(first, kept)


def test_without_graphs(machine, bundle, monkeypatch):
    machine.build(bundle)
    monkeypatch.setenv("MOEBIUS_CUDA_GRAPHS", "off")
    backend = opened(machine, bundle)
    for _ in range(3):
        step(backend)
    assert not any("Capture" in call for call in machine.cuda.calls)
    assert backend.describe()["cuda graphs"] == "unet off"
    monkeypatch.setenv("MOEBIUS_CUDA_GRAPHS", "no")
    with pytest.raises(InputError, match=r"MOEBIUS_CUDA_GRAPHS is 'no'; expected off"):
        opened(machine, bundle)


def test_rtx_captures_by_itself(monkeypatch, tmp_path, bundle):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache", "1.7.1.116", rtx=True)
    machine.build(bundle)
    backend = opened(machine, bundle)
    for _ in range(3):
        step(backend)
    assert not any("BeginCapture" in call for call in machine.cuda.calls)
    assert backend.describe()["cuda graphs"] == "unet by TensorRT-RTX"


def test_a_capture_that_fails_says_how_to_do_without(machine, bundle):
    machine.build(bundle, engine={"allocates": True})
    backend = opened(machine, bundle)
    step(backend)
    with pytest.raises(CudaError, match=r"cudaErrorStreamCaptureInvalidated .*MOEBIUS_CUDA_GRAPHS=off"):
        step(backend)
    backend.close()
    assert machine.cuda.leaks() == []


# --- activation memory --------------------------------------------------------------------------------------


def test_one_allocation_serves_all_engines_and_grows(machine, bundle):
    """unet needs 3000 bytes, vae_decoder 5000: graphs that were captured with the old place must not be replayed."""
    machine.build(bundle)
    backend = opened(machine, bundle)
    first = step(backend)
    step(backend)
    backend.load("vae_decoder")
    sizes = [memory.size for memory in machine.cuda.device.values()]
    assert sizes.count(5000) == 1
    assert 3000 not in sizes
    for _ in range(3):
        assert np.array_equal(step(backend), first)
    assert [captured for _, captured in machine.trt.runs] == [False, True, False, True]


def test_too_little_memory_leaves_the_other_engines_usable(machine, bundle):
    machine.build(bundle)
    backend = opened(machine, bundle)
    first = step(backend)
    machine.cuda.room = 5500  # the decoder's weights take 4096 of it, its activations 5000
    with pytest.raises(CudaError, match=r"cudaMalloc failed with cudaErrorMemoryAllocation .*--keep-loaded"):
        backend.load("vae_decoder")
    assert not backend.is_loaded("vae_decoder")
    assert np.array_equal(step(backend), first)
    backend.close()
    assert machine.cuda.leaks() == []


@pytest.mark.parametrize("recovers", [True, False])
def test_without_memory_for_the_smaller_block_either_no_engine_runs_in_freed_memory(machine, bundle, recovers):
    """Another process takes what the failed growth gave back: the older engine's next run allocates again, or fails."""
    machine.build(bundle)
    backend = opened(machine, bundle)
    first = step(backend)
    step(backend)
    free, machine.cuda.room = machine.cuda.cudaFree, 5500
    taken = []

    def free_for_another_process(address):
        result = free(address)
        taken.append(machine.cuda.room)
        machine.cuda.room = 100
        return result

    machine.cuda.cudaFree = free_for_another_process
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        backend.load("vae_decoder")
    machine.cuda.cudaFree = free
    assert backend.describe()["activation memory"] == "0.0 MiB"
    if recovers:
        machine.cuda.room = max(taken)
        for _ in range(3):
            assert np.array_equal(step(backend), first)
    else:
        for _ in range(2):
            with pytest.raises(CudaError, match=r"cudaMalloc failed with cudaErrorMemoryAllocation"):
                step(backend)
    backend.close()
    assert machine.cuda.leaks() == []


def test_batches(monkeypatch, tmp_path, make_toy, machine):
    toy = make_toy(tmp_path / "open", batch="batch")
    machine.build(toy.path, engine={"max_batch": 2})
    backend = opened(machine, toy.path)
    latents = np.random.RandomState(1).standard_normal((3, 4, 16, 16)).astype(np.float32)
    both = backend.run("vae_decoder", {"latent": latents[:2]})
    assert np.allclose(backend.run("vae_decoder", {"latent": latents[:1]})[0], both[0], atol=1e-5)
    with pytest.raises(EngineError, match=r"not built for latent of shape \[3, 4, 16, 16\].*outside of the profile"):
        backend.run("vae_decoder", {"latent": latents})
    backend.close()
    assert machine.cuda.leaks() == []


# --- errors of the libraries --------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_error_recorder_raises(machine, bundle, asynchronous):
    machine.build(bundle, engine={"error": "a kernel\nfailed", "asynchronous": asynchronous})
    with pytest.raises(EngineError, match=r"tensorrt 10.9.0.34: .*a kernel failed") as caught:
        step(opened(machine, bundle))
    assert "\n" not in str(caught.value)


def test_an_illegal_access_is_an_error_of_the_wait(machine, bundle):
    machine.build(bundle)
    backend = opened(machine, bundle)
    step(backend)
    machine.cuda.put(next(iter(machine.cuda.streams)), lambda: machine.cuda.span(1, 1))
    with pytest.raises(CudaError, match=r"cudaStreamSynchronize failed with cudaErrorIllegalAddress .*start again"):
        step(backend)
    backend.close()  # nothing can be freed any more, and nothing hides the error above


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"types": {"sample": "HALF"}}, "an engine has sample HALF, .*the manifest says sample FLOAT"),
        ({"on_host": ["timestep"]}, "wants timestep in host memory"),
    ],
)
def test_an_engine_of_other_tensors(machine, bundle, engine, words):
    machine.build(bundle, engine=engine)
    with pytest.raises(EngineError, match=words):
        opened(machine, bundle).load("unet")


def test_rtx_says_whether_an_engine_is_valid(monkeypatch, tmp_path, bundle):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache", "1.7.1.116", rtx=True)
    folder = machine.build(bundle, engine={"validity": "INVALID", "diagnostics": 2})
    for ask in ("load", "verify"):  # `verify`, which comes before the first graph runs, asks the library too
        with pytest.raises(EngineError, match=r"not valid on this system \(unsupported_cc\)\. Build it again"):
            getattr(opened(machine, bundle), ask)("unet")
    shutil.rmtree(folder)
    machine.build(bundle, engine={"validity": "SUBOPTIMAL", "diagnostics": 2})
    backend = opened(machine, bundle)
    backend.load("unet")
    assert [note for note in backend.take_notes() if "runs slower here" in note]


def test_stripped_engines_are_given_their_weights(machine, bundle):
    machine.build(bundle, flags={"strip_weights": "on"}, engine={"stripped": True})
    expected = step(create_backend(Bundle.open(bundle), "ort-cpu", threads=1))
    assert np.array_equal(step(opened(machine, bundle)), expected)
    del machine.trt.OnnxParserRefitter
    with pytest.raises(EngineError, match=r"without its weights, .* cannot put them in"):
        step(opened(machine, bundle))


# --- RTX's compiled kernels ---------------------------------------------------------------------------------


def test_compiled_kernels_are_kept(monkeypatch, tmp_path, bundle):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache", "1.7.1.116", rtx=True)
    machine.build(bundle)
    kept = tmp_path / "cache" / "tensorrt-rtx"
    for _ in range(2):
        backend = opened(machine, bundle)
        step(backend)
        backend.release("unet")
        (file,) = kept.iterdir()
        assert file.read_bytes().startswith(b"JIT 1.7.1.116")
        written = file.stat().st_mtime_ns if _ else 0
    file.write_bytes(b"of another version")  # it is refused, and made anew
    backend = opened(machine, bundle)
    step(backend)
    backend.release("unet")
    assert file.read_bytes().startswith(b"JIT 1.7.1.116")
    assert written >= 0
    file.chmod(0o666)  # others could have written it
    backend = opened(machine, bundle)
    backend.load("unet")
    backend.release("unet")


# --- which engines ------------------------------------------------------------------------------------------


def test_no_engines(machine, bundle):
    with pytest.raises(EngineError, match=r"holds no engines for tensorrt\. Build them.*moebius-export trt .* --fp16"):
        opened(machine, bundle)


@pytest.mark.parametrize(
    ("built", "words"),
    [
        ({"version": "10.3.0"}, r"built by tensorrt 10.3.0, here is 10.9.0.34\. Build it again"),
        ({"sm": [86]}, "built for SM 86, NVIDIA RTX 4060 is SM 89"),
    ],
)
def test_engines_for_something_else_are_refused(machine, bundle, built, words):
    machine.build(bundle, **built)
    with pytest.raises(EngineError, match=words):
        opened(machine, bundle)


@pytest.mark.parametrize(
    ("built", "words"),
    [
        ({"driver": "999.1"}, "built with driver 999.1, here is 550.54. tensorrt decides whether it loads"),
        ({"gpu": "NVIDIA RTX 4090"}, "built with NVIDIA RTX 4090, here is NVIDIA RTX 4060 of the same SM 89"),
    ],
)
def test_what_the_library_itself_decides_is_a_note(machine, bundle, built, words):
    folder = machine.build(bundle, **built)
    backend = opened(machine, bundle)
    (note,) = backend.take_notes()
    assert note.startswith(f"{folder}: {words}")
    expected = step(create_backend(Bundle.open(bundle), "ort-cpu", threads=1))
    assert np.array_equal(step(backend), expected)


def test_engines_of_this_driver_are_preferred(machine, bundle):
    other = machine.build(bundle, driver="999.1")
    other.rename(other.with_name(f"a_{other.name}"))  # by its name it comes first
    own = machine.build(bundle, driver="550.54")
    backend = opened(machine, bundle)
    assert backend.describe()["engines"] == own.name
    assert backend.take_notes() == []


def test_engines_are_mapped_and_never_read_as_a_whole(machine, bundle, monkeypatch):
    """An engine as large as the free memory of an 8 GB Jetson is loaded from the system's file cache."""
    machine.build(bundle)
    given = []
    load = machine.trt.Runtime.deserialize_cuda_engine

    def watched(self, data):
        given.append(data)
        assert isinstance(data.obj, mmap.mmap)
        with pytest.raises(TypeError):
            data[0] = 0
        return load(self, data)

    monkeypatch.setattr(machine.trt.Runtime, "deserialize_cuda_engine", watched)
    backend = opened(machine, bundle)
    for _ in range(2):  # hashed, and known
        backend.load("unet")
        backend.release("unet")
    for data in given:
        with pytest.raises(ValueError, match="released"):
            len(data)
    assert len(given) == 2


def test_several_folders_that_do_not_fit(machine, bundle):
    machine.build(bundle, sm=[86], gpu="NVIDIA A")
    machine.build(bundle, sm=[75], gpu="NVIDIA B")
    with pytest.raises(EngineError, match=r"none of 2 folders of engines fits: .*SM 86.*SM 75"):
        opened(machine, bundle)


def test_the_engines_of_this_very_gpu_are_preferred(machine, bundle):
    machine.build(bundle, gpu=None, sm=[86, 89])
    machine.build(bundle, gpu="Another of SM 89")
    machine.build(bundle, gpu="NVIDIA A", sm=[86])
    own = machine.build(bundle)
    assert opened(machine, bundle).describe()["engines"] == own.name


def test_precisions(machine, bundle, edit_manifest):
    """fp16 before fp32 where both fit; the autoencoder may have fp32 alone."""

    def add(content):
        for graph in ("unet", "unet_conditional"):
            content["graphs"][graph]["files"]["fp16"] = content["graphs"][graph]["files"]["fp32"]

    machine.build(bundle)
    edit_manifest(bundle, add)
    machine.build(bundle, "fp16", only=["unet"])
    backend = opened(machine, bundle)
    assert backend.describe()["precision"].startswith("fp16 (")
    assert "vae_decoder fp32" in backend.describe()["precision"]
    backend.load("vae_decoder")
    assert np.isfinite(step(backend)).all()
    assert opened(machine, bundle, precision="fp32").describe()["precision"] == "fp32"
    assert not opened(machine, bundle, precision="fp16").has("unet_conditional")
    with pytest.raises(EngineError, match=r"no engine of unet in bf16 among those that fit .*--bf16"):
        opened(machine, bundle, precision="bf16")


def test_without_the_conditional_branch_scale_1_runs_the_guided_network(machine, bundle):
    machine.build(bundle, only=["unet", "vae_encoder", "vae_decoder"])
    backend = opened(machine, bundle)
    assert not backend.has("unet_conditional")
    alone = filled(InpaintPipeline.from_bundle(bundle, threads=1), guidance_scale=1.0)
    guided = filled(InpaintPipeline(backend), guidance_scale=1.0)
    assert np.abs(alone.astype(int) - guided.astype(int)).max() <= 1  # the same but for rounding
    with pytest.raises(EngineError, match=r"no engine of unet_conditional fits"):
        backend.load("unet_conditional")


def test_an_exchanged_engine_is_not_loaded(machine, bundle):
    folder = machine.build(bundle)
    path = folder / "unet.plan"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    backend = opened(machine, bundle)
    with pytest.raises(EngineError, match=r"not the engine that its passport names"):
        backend.verify("unet")
    with pytest.raises(EngineError, match=r"not the engine that its passport names"):
        backend.load("unet")


def test_an_engine_that_is_exchanged_later_is_found(machine, bundle):
    folder = machine.build(bundle)
    backend = opened(machine, bundle)
    backend.verify("unet")
    (folder / "unet.plan").write_bytes((folder / "vae_decoder.plan").read_bytes())
    with pytest.raises(EngineError, match=r"not the engine that its passport names"):
        backend.load("unet")


# --- trust --------------------------------------------------------------------------------------------------


def test_trust_runs_what_would_be_refused_and_says_so(machine, bundle):
    folder = machine.build(bundle, sm=[86])
    backend = opened(machine, bundle, trust=True)
    (note,) = backend.take_notes()
    assert note.startswith(f"--trust: {folder} is run though it should be refused")
    assert "SM 86" in note
    assert np.isfinite(step(backend)).all()


def test_trust_needs_no_passport(machine, bundle):
    folder = machine.build(bundle)
    (folder / "passport.json").unlink()
    with pytest.raises(EngineError, match=r"passport\.json.*only with their passport"):
        opened(machine, bundle)
    backend = opened(machine, bundle, trust=True)
    assert backend.describe()["precision"] == "fp32"
    assert np.isfinite(step(backend)).all()


def test_trust_follows_no_link_out_of_the_folder(machine, bundle, tmp_path):
    folder = machine.build(bundle)
    (folder / "passport.json").unlink()
    shutil.move(folder / "unet.plan", tmp_path / "elsewhere.plan")
    (folder / "unet.plan").symlink_to(tmp_path / "elsewhere.plan")
    with pytest.raises(EngineError, match=r"is a link that leaves its folder"):
        opened(machine, bundle, trust=True).load("unet")
    shutil.move(folder, tmp_path / "engines-elsewhere")
    folder.symlink_to(tmp_path / "engines-elsewhere")
    with pytest.raises(EngineError, match=r"holds no engines"):
        opened(machine, bundle, trust=True)


# --- what is not there --------------------------------------------------------------------------------------


def test_no_driver(machine, bundle):
    machine.device = None
    with pytest.raises(RuntimeUnavailableError, match=r"'tensorrt' needs an NVIDIA GPU, and no GPU driver answers"):
        opened(machine, bundle)


def test_the_bindings_find_no_device(machine, bundle):
    machine.cuda.failing["cudaGetDeviceCount"] = gpu.fake_cuda.Error.cudaErrorInsufficientDriver
    with pytest.raises(RuntimeUnavailableError, match=r"no GPU can be used: .*cudaErrorInsufficientDriver"):
        opened(machine, bundle)
    machine.cuda.devices = 0
    with pytest.raises(RuntimeUnavailableError, match=r"CUDA finds none"):
        opened(machine, bundle)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("tensorrt", "needs the Python package tensorrt, .*JetPack"),
        ("cuda", "the CUDA bindings for Python .*pip install"),
    ],
)
def test_a_package_is_not_installed(machine, bundle, monkeypatch, module, words):
    machine.build(bundle)
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailableError, match=words):
        opened(machine, bundle)


def test_tensorrt_8(monkeypatch, tmp_path, bundle):
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache", "8.6.1")
    with pytest.raises(RuntimeUnavailableError, match=r"needs TensorRT 10 or newer, here is 8\.6\.1"):
        opened(machine, bundle)


def test_threads_are_the_cpus(machine, bundle):
    machine.build(bundle)
    with pytest.raises(InputError, match=r"runs on the GPU, which takes no number of threads"):
        opened(machine, bundle, threads=2)


@pytest.mark.parametrize("flag", ["on", "off"])
def test_only_version_compatible_engines_may_bring_code_for_the_host(machine, bundle, flag):
    machine.build(bundle, flags={"version_compatible": flag}, engine={"host_code": True})
    backend = opened(machine, bundle)
    if flag == "on":
        return backend.load("unet")
    with pytest.raises(EngineError, match=r"host code is not allowed"):
        backend.load("unet")


def test_the_passport_of_another_gpu_with_compatible_hardware(machine, bundle):
    machine.build(bundle, sm=[80], gpu="NVIDIA A", flags={"hardware_compatibility": "ampere+"})
    assert np.isfinite(step(opened(machine, bundle))).all()
    machine.device = replace(gpu.DEVICE, sm=75)
    with pytest.raises(EngineError, match=r"built for SM 80"):
        opened(machine, bundle)
