"""The runtime "torch": a bundle's graphs as eager PyTorch modules, on a CPU, or on a GPU as CUDA graphs.

It runs the weights that the bundle was exported from, not its ONNX files: the reference of `moebius-export verify`, and
the baseline of `moebius-bench --baseline torch`. torch and the network are imported when a backend is made, so that
this module can be imported, and can say what is missing, where they are not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from moebius_runtime.backends.base import Array, Backend
from moebius_runtime.backends.engine_runner import SWITCH, graphs_wanted
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision, WeightsInfo
from moebius_runtime.errors import InputError, RuntimeUnavailableError

if TYPE_CHECKING:
    from moebius import Moebius
    from moebius.network.lambda_layers import LambdaForm

DeviceName = Literal["auto", "cpu", "cuda"]
TorchPrecision = Literal["fp32", "bf16", "fp16"]
_Part = Literal["unet", "vae", "tiny"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WARM_UPS = 3  # runs before a capture: libraries choose their kernels, Triton times its blocks


def import_torch() -> Any:
    """The module `torch`.

    Raises:
        RuntimeUnavailableError: it or the network's package is not installed.
    """
    try:
        import torch

        import moebius.weights.load  # noqa: F401
        import moebius_export.network.wrappers  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime 'torch' needs PyTorch and the network, which cannot be imported ({error}). "
            'Install them with `pip install "moebius-edge[export]"`.'
        ) from error
    return torch


def unet_modules(student: Moebius, *, distilled: bool = False) -> dict[GraphName, Any]:
    """The modules of the graphs that the student is in, in eval mode; `distilled` as in `wrappers.unet_graphs`."""
    from moebius_export.network.wrappers import unet_graphs

    return dict(unet_graphs(student, distilled=distilled))


def vae_modules(autoencoder: Any) -> dict[GraphName, Any]:
    """The modules of the graphs that the autoencoder is in, in eval mode."""
    from moebius import VaeDecoder, VaeEncoder
    from moebius_export.network.masked_decoder import LowerDecoder, UpperDecoder

    return {
        "vae_encoder": VaeEncoder(autoencoder).eval(),
        "vae_decoder": VaeDecoder(autoencoder).eval(),
        "vae_decoder_lower": LowerDecoder(autoencoder).eval(),
        "vae_decoder_upper": UpperDecoder(autoencoder).eval(),
    }


def origin(weights: WeightsInfo) -> str:
    """The source string inside the origin of weights, which may carry notes after semicolons."""
    return weights.origin.partition("; ")[0]


class TorchBackend(Backend):
    """PyTorch's own kernels. On CUDA each graph is captured once per batch size and then replayed.

    In fp16 and bf16 the U-Net's weights and activations have that type throughout; guidance is computed in float32.
    The autoencoder follows in bf16 and stays in float32 in fp16: its decoder overflows float16 (docs/precision.md).

    Args:
        bundle: the bundle whose network is run; its graph files are not read.
        threads: of PyTorch on the CPU, for the whole process; None is the physical cores.
        weights, vae: sources of the weights; None is what the manifest names. Their SHA-256 must be the manifest's.
        device: "auto" is a CUDA GPU where PyTorch sees one, else the CPU.
        form: of the λ layers (`moebius.network.lambda_layers.set_lambda_form`); "reference" computes as written.
        modules: the graphs' modules where they are loaded already, in place of `weights` and `vae`. They are moved to
            the device and to the precision, and get the form; give backends that differ in one of these a copy each.
        precision: of the U-Net; None is fp32.
        cuda_graphs: False launches every kernel of every run (the slow form). None captures on a GPU, unless
            MOEBIUS_CUDA_GRAPHS is `off`. A graph that cannot be captured is an error and never runs without.

    Raises:
        RuntimeUnavailableError: PyTorch, the device or what the form needs is not there.
        InputError: an unknown device, form or precision, or CUDA graphs asked for on a CPU.
    """

    name = "torch"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        weights: str | None = None,
        vae: str | None = None,
        device: DeviceName = "auto",
        form: LambdaForm = "reference",
        modules: Mapping[GraphName, Any] | None = None,
        precision: Precision | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        from moebius_runtime.hardware.processors import physical_cores

        super().__init__(bundle, threads=physical_cores() if threads is None else threads)
        self._arguments = {"threads": self.threads, "weights": weights, "vae": vae, "device": device, "form": form}
        self._torch = import_torch()
        self._torch.set_num_threads(self.threads)
        self._device = _device(self._torch, device)
        self._form = _form(form, self._device)
        self.precision = _precision(precision)
        self._captures = _captures(cuda_graphs, self._device)
        model = bundle.manifest.model
        self._sources: dict[str, str] = {"unet": weights or origin(model.unet), "vae": vae or origin(model.vae)}
        if model.tiny_decoder is not None:
            self._sources["tiny"] = origin(model.tiny_decoder)
        self._given = bool(modules)
        self._modules: dict[GraphName, Any] = dict(modules or {})

    def arguments(self) -> dict[str, Any]:
        """See `Backend`. With modules that its caller made it cannot be pickled."""
        return super().arguments() if self._given else dict(self._arguments)

    def verify(self, graph: GraphName) -> None:
        """Nothing of the bundle's files is used."""

    def _load(self, graph: GraphName) -> Any:
        from moebius.network.lambda_layers import set_lambda_form

        if graph not in self._modules:  # the graphs of one network share it
            part: _Part = "unet" if graph.startswith("unet") else "tiny" if graph == "vae_decoder_tiny" else "vae"
            self._modules |= self._read(part)
        precision = "fp32" if graph.startswith("vae") and self.precision == "fp16" else self.precision
        dtype = getattr(self._torch, _DTYPES[precision])
        module = self._modules[graph].to(self._device, dtype)
        set_lambda_form(module, self._form)
        run = CapturedModule(module, self._torch.cuda, graph) if self._captures else module
        return _Loaded(run, dtype)

    def _read(self, part: _Part) -> dict[GraphName, Any]:
        from moebius import preset
        from moebius.errors import CheckpointError
        from moebius.network.tiny_vae import TinyDecoder
        from moebius.weights.load import load_student, load_tiny_vae, load_vae

        model, source = self.bundle.manifest.model, self._sources[part]
        modules: dict[GraphName, Any]
        try:
            sizes = preset(model.preset)
            if part == "unet":
                student, checkpoint = load_student(source, sizes.student)
                distilled = self.bundle.manifest.guidance is not None
                modules, expected = unet_modules(student, distilled=distilled), model.unet.sha256
            elif part == "tiny" and model.tiny_decoder is not None:
                tiny, checkpoint = load_tiny_vae(source)
                modules, expected = {"vae_decoder_tiny": TinyDecoder(tiny).eval()}, model.tiny_decoder.sha256
            else:
                autoencoder, checkpoint = load_vae(source, sizes.vae)
                modules, expected = vae_modules(autoencoder), model.vae.sha256
        except CheckpointError as error:
            raise InputError(
                f"runtime 'torch' needs the {part} weights that the bundle was exported from, and found: {error}"
            ) from error
        if checkpoint.sha256 != expected:
            raise InputError(
                f"runtime 'torch': {source} holds other {part} weights than the bundle was exported from "
                f"(SHA-256 {checkpoint.sha256[:12]}, the manifest says {expected[:12]}); name the source of the export"
            )
        return modules

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        with self._torch.inference_mode():
            tensors = [self._torch.from_numpy(array).to(self._device) for array in inputs.values()]
            # Pictures and latents get the network's type; the timestep and the guidance scale, both [1], keep theirs.
            typed = [tensor.to(handle.dtype) if tensor.dim() > 1 else tensor for tensor in tensors]
            output: Array = handle.run(*typed).float().cpu().numpy()
        return output

    def _unload(self, handle: Any) -> None:
        """Frees a captured graph's buffers. The networks stay: they are read once for all pictures."""
        del handle
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()

    def describe(self) -> dict[str, str]:
        """Versions, device, the λ layers' form and threads, read back from torch."""
        found = {"runtime": self.name, "torch": str(self._torch.__version__)}
        if self._device.type == "cuda":
            found |= {
                "providers": "eager, CUDA graphs" if self._captures else "eager",
                "device": self._torch.cuda.get_device_name(self._device),
                "cuda": str(self._torch.version.cuda),
            }
        else:
            found |= {"providers": "eager, cpu", "device": "cpu"}
        if self._form == "triton":
            import triton

            found["triton"] = triton.__version__
        return found | {
            "form": self._form,
            "precision": self.precision,
            "threads": str(self._torch.get_num_threads()),
        }


def _device(torch: Any, name: DeviceName) -> Any:
    if name not in get_args(DeviceName):
        raise InputError(f"device {name!r}: expected {', '.join(get_args(DeviceName))}")
    seen = torch.cuda.is_available()
    if name == "cuda" and not seen:
        raise RuntimeUnavailableError(
            f"device 'cuda': PyTorch {torch.__version__} sees no CUDA GPU; check nvidia-smi and install "
            "PyTorch's CUDA build, or choose device 'cpu'"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and seen) else "cpu")


def _form(form: LambdaForm, device: Any) -> LambdaForm:
    from moebius.network.lambda_layers import FORMS
    from moebius.network.triton_lambda import unavailable

    if form not in FORMS:
        raise InputError(f"λ form {form!r}: expected {', '.join(FORMS)}")
    if form == "triton" and (problem := unavailable(device)):
        raise RuntimeUnavailableError(problem)
    return form


def _precision(precision: Precision | None) -> TorchPrecision:
    found = next((known for known in get_args(TorchPrecision) if known == (precision or "fp32")), None)
    if found is None:
        raise InputError(f"--precision {precision}: runtime 'torch' runs in {', '.join(get_args(TorchPrecision))}")
    return found


def _captures(asked: bool | None, device: Any) -> bool:
    """Whether graphs are captured on this device."""
    if asked and device.type != "cuda":
        raise InputError(f"cuda_graphs: the device is {device}; expected a CUDA GPU, or leave it out")
    return device.type == "cuda" and (graphs_wanted() if asked is None else asked)


@dataclass(frozen=True)
class _Loaded:
    """A graph that is ready: the module, or what replays it, and the type of its pictures and latents."""

    run: Any
    dtype: Any


class CapturedModule:
    """A module's forward as CUDA graphs, one per set of input shapes, over inputs and an output at fixed addresses.

    Args:
        module: called with tensors on a CUDA device, in eval mode; answers one tensor.
        cuda: `torch.cuda`, or what stands for it in a test.
        name: of the graph, for messages.
    """

    def __init__(self, module: Any, cuda: Any, name: str = "graph") -> None:
        self._module, self._cuda, self._name = module, cuda, name
        self._captured: dict[tuple[Any, ...], tuple[Any, list[Any], Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        """The output for inputs on the device; it is overwritten by the next call with these shapes.

        Raises:
            RuntimeUnavailableError: an operation of the module cannot be captured. It does not run without.
        """
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture([tensor.clone() for tensor in inputs])
        graph, fixed, output = self._captured[key]
        for mine, given in zip(fixed, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return output

    def _capture(self, fixed: list[Any]) -> tuple[Any, list[Any], Any]:
        aside = self._cuda.Stream()  # a capture may not follow work of its own on the default stream
        aside.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(aside):
            for _ in range(_WARM_UPS):
                self._module(*fixed)
        self._cuda.current_stream().wait_stream(aside)
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph):
                output = self._module(*fixed)
        except RuntimeError as error:
            if isinstance(error, getattr(self._cuda, "OutOfMemoryError", ())):
                raise  # a smaller network may be captured
            raise RuntimeUnavailableError(
                f"runtime 'torch': {self._name} cannot be captured as a CUDA graph ({' '.join(str(error).split())}). "
                f"Set {SWITCH}=off to launch its kernels one by one, which is slower."
            ) from error
        return graph, fixed, output
