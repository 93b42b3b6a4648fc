"""ONNX Runtime on an NVIDIA GPU, with its CUDA or its TensorRT execution provider."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moebius_runtime.backends.base import Array
from moebius_runtime.backends.ort import OrtBackend, import_onnxruntime
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphInfo, GraphName, Precision
from moebius_runtime.errors import InputError, OutputError, RuntimeUnavailableError
from moebius_runtime.files.cache import cache_folder
from moebius_runtime.hardware.devices import current_device

# An ONNX file, IR 8, opset 13: y = Identity(x), float32 [1]. As bytes, so that a device needs no onnx package.
PROBE = bytes.fromhex(
    "08083a3b0a100a017812017922084964656e74697479120570726f62655a0f0a0178120a0a08080112040a020801620f0a"
    "0179120a0a08080112040a02080142040a00100d"
)
_CUDA = "CUDAExecutionProvider"


class _Bound:
    """A session with fixed input and output buffers on the device."""

    def __init__(self, ort: Any, session: Any, info: GraphInfo) -> None:
        self.session = session
        self._ort = ort
        self._info = info
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._output: Any = None

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """The output, copied to the host."""
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            self._bind(inputs)
            self._shapes = shapes
        else:
            for name, array in inputs.items():
                self._inputs[name].update_inplace(array)
        self.session.run_with_iobinding(self._binding)
        output: Array = self._binding.copy_outputs_to_cpu()[0] if self._output is None else self._output.numpy()
        return output

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._inputs = {
            name: self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in inputs.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        output = self._info.outputs[0]
        sizes = {
            named: size
            for tensor in self._info.inputs
            for named, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
        }
        shape = [sizes.get(size) if isinstance(size, str) else size for size in output.shape]
        if None in shape:  # a size that the graph computes: ONNX Runtime allocates the output
            self._output = None
            self._binding.bind_output(output.name, "cuda", 0)
            return
        self._output = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(output.dtype), "cuda", 0)
        self._binding.bind_ortvalue_output(output.name, self._output)


class OrtCudaBackend(OrtBackend):
    """ONNX Runtime's CUDA provider. Nothing of a graph may fall back to the CPU."""

    name = "ort-cuda"
    reference = False
    providers: tuple[str, ...] = (_CUDA,)
    preferred: tuple[Precision, ...] = ("fp16", "fp32")

    def __init__(self, bundle: Bundle, *, threads: int | None = None, precision: Precision | None = None) -> None:
        if threads is not None:
            raise InputError(f"runtime {self.name!r} runs on the GPU, which takes no number of threads; leave it out")
        import_onnxruntime(self.name, "ort-gpu")
        super().__init__(bundle, precision=precision)
        self._check_available()
        self._probe()

    def arguments(self) -> dict[str, Any]:
        """See `Backend`. A GPU takes no number of threads."""
        return {"precision": self._precision}

    def has(self, graph: GraphName) -> bool:
        """See `Backend`. The decoder's upper part has an open size, computed by nodes that only the CPU runs."""
        return graph != "vae_decoder_upper" and super().has(graph)

    def _device_and_driver(self) -> tuple[str, str | None]:
        device = current_device()
        return ("the GPU", None) if device is None else (f"{device.name} (SM {device.sm})", f"driver {device.driver}")

    def _check_available(self) -> None:
        there = self._ort.get_available_providers()
        if missing := [provider for provider in self.providers if provider not in there]:
            raise RuntimeUnavailableError(
                f"runtime {self.name!r} needs ONNX Runtime with {', '.join(missing)}; the installed one, "
                f"{self._ort.__version__}, has {', '.join(there)}. Run `pip uninstall -y onnxruntime` and then "
                '`pip install "moebius-edge[ort-gpu]"` (on Jetson: the wheel for your JetPack from NVIDIA).'
            )

    def _probe(self) -> None:
        """Runs one value through the providers, because their libraries are loaded only with a session."""
        if hasattr(self._ort, "preload_dlls"):  # CUDA and cuDNN from NVIDIA's wheels, where those are installed
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
                self._ort.preload_dlls(directory="")
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        try:
            session = self._ort.InferenceSession(PROBE, options, providers=self._provider_options(), enable_fallback=0)
        except Exception as error:
            raise RuntimeUnavailableError(self._unusable(" ".join(str(error).split())[:300])) from error
        got = session.get_providers()
        if got[: len(self.providers)] != list(self.providers):
            raise RuntimeUnavailableError(
                self._unusable(f"asked for {', '.join(self.providers)}, got {', '.join(got)}")
            )

    def _unusable(self, reason: str) -> str:
        return (
            f"runtime {self.name!r}: ONNX Runtime {self._ort.__version__} cannot use the GPU ({reason}). Check the "
            "driver with nvidia-smi, and that CUDA and cuDNN of the version that it was built with are installed: "
            '`pip install "onnxruntime-gpu[cuda,cudnn]"`.'
        )

    def _prepare(self, options: Any, graph: GraphName, path: Path) -> None:
        """Registers no compiled kernels, which are for the CPU; functions are inlined."""
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")

    def _provider_options(self) -> list[Any]:
        return [(_CUDA, {"device_id": "0", "use_tf32": "0"})]  # no TF32 in fp32

    def _load(self, graph: GraphName) -> Any:
        return _Bound(self._ort, self._session(graph), self.bundle.graph(graph))

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        output: Array = self._guarded(lambda: handle.run(inputs))
        return output

    def _providers(self, handle: Any) -> list[str]:
        return super()._providers(handle.session)

    def describe(self) -> dict[str, str]:
        """See `OrtBackend`; without the threads, which do not matter here."""
        described = super().describe()
        del described["threads"]
        return described | {"device": str(self._ort.get_device())}


class OrtTensorRTBackend(OrtCudaBackend):
    """ONNX Runtime's TensorRT provider. It builds engines when a graph is first loaded and caches them for the user.

    The precision is the graph's own: no flag that lets TensorRT choose types is set.
    """

    name = "ort-tensorrt"
    providers = ("TensorrtExecutionProvider", _CUDA)

    def __init__(self, bundle: Bundle, *, threads: int | None = None, precision: Precision | None = None) -> None:
        folder = cache_folder() / "ort-tensorrt"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make {folder} for engines ({error.strerror}); set MOEBIUS_CACHE to a writable folder"
            ) from error
        self._folder = folder
        super().__init__(bundle, threads=threads, precision=precision)

    def _provider_options(self) -> list[Any]:
        kept = str(self._folder)
        options = {
            "device_id": "0",
            "trt_engine_cache_enable": "1",  # by the graph's hash, TensorRT's version and the GPU
            "trt_engine_cache_path": kept,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": kept,
        }
        return [("TensorrtExecutionProvider", options), *super()._provider_options()]

    def describe(self) -> dict[str, str]:
        """See `OrtCudaBackend`; with the folder of the engines."""
        return super().describe() | {"engines": str(self._folder)}
