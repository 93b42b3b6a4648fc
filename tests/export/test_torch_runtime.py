"""The runtime "torch": against the modules it wraps and the exported files, refusals, the order of a capture."""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from moebius import preset
from moebius.load import load_student
from moebius_export import torch_runtime
from moebius_export.scenes import seeded_inputs
from moebius_export.torch_runtime import CapturedModule, TorchBackend
from moebius_export.wrappers import GuidedUNet
from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import InputError, RuntimeUnavailableError

GRAPHS = ("unet", "unet_conditional", "vae_encoder", "vae_decoder")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


def error(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("graph", GRAPHS)
def test_it_agrees_with_the_exported_file(bundle, graph):
    inputs = seeded_inputs(graph, bundle.manifest, 3)
    backend = TorchBackend(bundle, threads=1, device="cpu")
    assert error(backend.run(graph, inputs), OrtBackend(bundle, threads=1).run(graph, inputs)) < 1e-5


def test_the_fast_form_agrees(bundle):
    inputs = seeded_inputs("unet", bundle.manifest, 0)
    written, fast = (TorchBackend(bundle, threads=1, device="cpu", form=form) for form in ("reference", "fast"))
    assert error(fast.run("unet", inputs), written.run("unet", inputs)) < 1e-5
    assert fast.describe()["form"] == "fast"


def test_modules_that_are_loaded_already_are_run(bundle):
    student, _ = load_student("stand-in:9", preset("tiny").student)  # others than the bundle's
    backend = TorchBackend(bundle, threads=1, device="cpu", modules={"unet": GuidedUNet(student).eval()})
    inputs = seeded_inputs("unet", bundle.manifest, 0)
    with torch.inference_mode():
        expected = GuidedUNet(student)(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    np.testing.assert_array_equal(backend.run("unet", inputs), expected)


# Relative L2 error of a 16-bit run. The largest errors are the budgets of `moebius_export.verify.budgets`.
@pytest.mark.parametrize("form", ["reference", "fast"])
@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 1e-5, 8e-3), ("bf16", 1e-4, 6e-2)])
@pytest.mark.parametrize("graph", GRAPHS)
def test_16_bit_precisions_agree(bundle, graph, precision, least, most, form):
    inputs = seeded_inputs(graph, bundle.manifest, 3)
    expected = TorchBackend(bundle, threads=1, device="cpu").run(graph, inputs)
    backend = TorchBackend(bundle, threads=1, device="cpu", precision=precision, form=form)
    found = error(backend.run(graph, inputs), expected)
    assert backend.describe()["precision"] == precision
    if graph.startswith("vae") and precision == "fp16":  # the autoencoder stays float32: its decoder overflows fp16
        assert found == 0
    else:
        assert least < found < most  # below the least it did not run in 16 bits


def test_guidance_is_computed_in_float32(bundle):
    """A scale that fp16 cannot hold: 2.5005 rounds to 2.5."""
    inputs = seeded_inputs("unet", bundle.manifest, 3)
    backend = TorchBackend(bundle, threads=1, device="cpu", precision="fp16")
    one, other = (
        backend.run("unet", inputs | {"guidance_scale": np.array([scale], np.float32)}) for scale in (2.5, 2.5005)
    )
    assert not np.array_equal(one, other)


def test_description(bundle):
    described = TorchBackend(bundle, threads=1, device="cpu").describe()
    assert described == {
        "runtime": "torch",
        "torch": torch.__version__,
        "providers": "eager, cpu",
        "device": "cpu",
        "form": "reference",
        "precision": "fp32",
        "threads": "1",
    }


def test_released_graphs_run_again(bundle):
    backend, inputs = TorchBackend(bundle, threads=1, device="cpu"), seeded_inputs("vae_decoder", bundle.manifest, 0)
    first = backend.run("vae_decoder", inputs)
    backend.release()
    assert not backend.is_loaded("vae_decoder")
    np.testing.assert_array_equal(backend.run("vae_decoder", inputs), first)


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        ({"device": "tpu"}, InputError, "device 'tpu': expected auto, cpu, cuda"),
        ({"form": "slow"}, InputError, "λ form 'slow': expected reference, fast, triton"),
        ({"form": "triton", "device": "cpu"}, RuntimeUnavailableError, "λ form 'triton'"),
        ({"threads": 0}, InputError, "threads is 0"),
        ({"precision": "int8"}, InputError, "--precision int8: runtime 'torch' runs in fp32, bf16, fp16"),
        ({"device": "cpu", "cuda_graphs": True}, InputError, "cuda_graphs: the device is cpu; expected a CUDA GPU"),
    ],
)
def test_refusals(bundle, options, expected, words):
    with pytest.raises(expected, match=words):
        TorchBackend(bundle, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(bundle):
    with pytest.raises(RuntimeUnavailableError, match=r"device 'cuda': PyTorch .* sees no CUDA GPU"):
        TorchBackend(bundle, device="cuda")


@pytest.mark.parametrize(
    ("options", "graph", "words"),
    [
        ({"weights": "stand-in:5"}, "unet", r"stand-in:5 holds other unet weights .* the manifest says"),
        ({"vae": "stand-in:5"}, "vae_encoder", r"stand-in:5 holds other vae weights .* name the source"),
        ({"weights": "missing.safetensors"}, "unet", r"needs the unet weights .*, and found: .*missing.safetensors"),
    ],
)
def test_other_weights_are_refused(bundle, options, graph, words):
    with pytest.raises(InputError, match=words):
        TorchBackend(bundle, device="cpu", **options).load(graph)


def test_without_torch_it_says_what_to_install(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeUnavailableError, match=r"runtime 'torch' needs PyTorch.*moebius-edge\[export\]"):
        TorchBackend(bundle)


class FakeCuda:
    """Notes what `CapturedModule` asks of torch.cuda. A replay runs what was captured again, into the same memory."""

    def __init__(self):
        self.events = []

    def Stream(self):  # noqa: N802
        return self.current_stream()

    def current_stream(self):
        cuda = self

        class Stream:
            def wait_stream(self, other):
                cuda.events.append("wait")

        return Stream()

    @contextmanager
    def stream(self, stream):
        self.events.append("aside")
        yield

    def CUDAGraph(self):  # noqa: N802
        cuda = self

        class Graph:
            def replay(self):
                cuda.events.append("replay")
                self.again()

        return Graph()

    @contextmanager
    def graph(self, graph):
        self.events.append("capture")
        yield
        graph.again = self.again


class Sum(torch.nn.Module):
    """The sum of two tensors, written to one place, as kernels in a captured graph do."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda, self.calls = cuda, 0

    def forward(self, a, b):
        self.calls += 1
        output = torch.empty_like(a)
        self.cuda.again = lambda: torch.add(a, b, out=output)
        return output


def test_a_capture_is_made_once_per_shape_and_replayed():
    cuda = FakeCuda()
    module = Sum(cuda)
    captured = CapturedModule(module, cuda)
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert captured(one, two).tolist() == [3.0, 3.0]
    assert cuda.events == ["wait", "aside", "wait", "capture", "replay"]
    assert module.calls == 4  # three to warm up, one captured
    assert captured(two, two).tolist() == [4.0, 4.0]
    assert cuda.events[5:] == ["replay"]
    assert captured(torch.ones(3), torch.ones(3)).tolist() == [2.0] * 3
    assert module.calls == 8
    assert captured(two, one).tolist() == [3.0, 3.0]  # the first capture is still there
    assert module.calls == 8
    assert one.tolist() == [1.0, 1.0]  # the caller's tensors are left alone


def test_a_graph_that_cannot_be_captured_is_refused():
    class Uncapturable(FakeCuda):
        @contextmanager
        def graph(self, graph):
            raise RuntimeError("operation not permitted when stream is capturing")
            yield

    cuda = Uncapturable()
    captured = CapturedModule(Sum(cuda), cuda, "unet")
    for _ in range(2):  # the second call neither replays half a graph nor runs without one
        with pytest.raises(RuntimeUnavailableError, match=r"unet cannot be captured .*not permitted.*GRAPHS=off"):
            captured(torch.ones(2), torch.ones(2))
    assert "replay" not in cuda.events


def test_too_little_memory_for_a_capture_stays_what_it_is():
    class Full(FakeCuda):
        OutOfMemoryError = torch.OutOfMemoryError

        @contextmanager
        def graph(self, graph):
            raise torch.OutOfMemoryError("CUDA out of memory")
            yield

    cuda = Full()
    with pytest.raises(torch.OutOfMemoryError):
        CapturedModule(Sum(cuda), cuda)(torch.ones(2), torch.ones(2))


class _Gpu:
    type = "cuda"


@pytest.mark.parametrize(
    ("asked", "switch", "expected"),
    [(None, "", True), (None, "off", False), (True, "off", True), (False, "", False)],
)
def test_when_graphs_are_captured(monkeypatch, asked, switch, expected):
    monkeypatch.setenv("MOEBIUS_CUDA_GRAPHS", switch)
    assert torch_runtime._captures(asked, _Gpu()) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("fp16", 8e-3), ("bf16", 6e-2)])
@pytest.mark.parametrize("form", ["reference", "fast", "triton"])
def test_cuda_graphs_agree_with_the_cpu(bundle, form, precision, most):
    if form == "triton":
        pytest.importorskip("triton")
    cpu = TorchBackend(bundle, threads=1, device="cpu")
    expected = {seed: cpu.run("unet", seeded_inputs("unet", bundle.manifest, seed)) for seed in (0, 1)}
    backend = TorchBackend(bundle, device="cuda", form=form, precision=precision)
    for seed in (0, 1, 0):
        assert error(backend.run("unet", seeded_inputs("unet", bundle.manifest, seed)), expected[seed]) < most
    assert backend.describe()["providers"] == "eager, CUDA graphs"
