"""ONNX Runtime on the CPU, and the base of its other runtimes. A session must get all requested providers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moebius_runtime import kernels
from moebius_runtime.backends.base import Array, Backend, in_words
from moebius_runtime.backends.self_check import Computes
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.graph_files import function_domains
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import BundleError, RuntimeUnavailableError
from moebius_runtime.files import native_path
from moebius_runtime.hardware.host import processor_name
from moebius_runtime.hardware.processors import physical_cores as physical_cores

# Wheels that all install the module `onnxruntime` and overwrite each other's files.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-webgpu",
)

UNREAD: tuple[Precision, ...] = ("bf16",)
"""Precisions whose files no version of ONNX Runtime reads: ONNX has no bf16 convolution before opset 22."""

_ENGINES = "build engines with `moebius-export trt` and run it with --runtime tensorrt or tensorrt-rtx"
_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


def import_onnxruntime(runtime: str = "ort-cpu", extra: str = "ort") -> Any:
    """Imports `onnxruntime`, after checking that exactly one installed package provides it.

    Args:
        runtime: what needs it, for the message.
        extra: of this project, that installs it.

    Raises:
        RuntimeUnavailableError: it is not installed, or two packages that overwrite each other are.
    """
    from importlib import metadata

    installed = []
    for name in _DISTRIBUTIONS:
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(installed) > 1:
        names = [entry.split()[0] for entry in installed]
        raise RuntimeUnavailableError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files. "
            f"Run `pip uninstall -y {' '.join(names)}` and then install the one you need."
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r} needs ONNX Runtime, which cannot be imported ({error}). "
            f'Install it with `pip install "moebius-edge[{extra}]"`.'
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeUnavailableError(
            f"the module onnxruntime is an empty folder, {', '.join(onnxruntime.__path__)}, as an uninstalled package "
            "can leave it. Remove it and install ONNX Runtime again with "
            f'`pip install --force-reinstall "moebius-edge[{extra}]"`.'
        )
    return onnxruntime


def add_kernels(options: Any, model: str | Path) -> str | None:
    """Lets a session run the model's functions with the compiled kernels, where there are any.

    Args:
        options: ONNX Runtime's session options, changed in place.
        model: the session's ONNX file, which was found to be one.

    Returns:
        What will run the functions, such as `avx512` or `none (not built)`; None where the model has none of ours.

    Raises:
        InputError, RuntimeUnavailableError: see `moebius_runtime.kernels`; or ONNX Runtime refuses the library.
    """
    library = kernels.library_path()
    if kernels.DOMAIN not in function_domains(model):
        return None
    words = kernels.in_words()
    if library is None:
        return words
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # its exceptions share no base class of their own
        raise RuntimeUnavailableError(
            f"ONNX Runtime refuses {library}: {_first_line(error)}. Update ONNX Runtime, or set {kernels.SWITCH}=off "
            "to run without compiled kernels."
        ) from error
    return words


class OrtBackend(Backend):
    """ONNX Runtime on the CPU, and the base of those on a GPU.

    Attributes:
        providers: the execution providers that a session must have.
        preferred: precisions of a graph's file, best first, if none is requested.
    """

    name = "ort-cpu"
    reference = True
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    preferred: tuple[Precision, ...] = ("fp32", "int8_cpu")

    def __init__(self, bundle: Bundle, *, threads: int | None = None, precision: Precision | None = None) -> None:
        super().__init__(bundle, threads=physical_cores() if threads is None else threads)
        self._ort = import_onnxruntime()
        self._kernels: dict[GraphName, str | None] = {}
        if precision is not None and precision not in bundle.graph("unet").files:
            raise BundleError(
                f"{bundle.path}: the U-Net has no {precision} file, only {', '.join(bundle.graph('unet').files)}. "
                f"Export it with `--precision {precision}`."
            )
        if precision is None and not set(self.preferred) & set(bundle.graph("unet").files):
            raise BundleError(_not_run(bundle, self.name, self.preferred))
        self._precision = precision

    def precision(self, graph: GraphName) -> Precision:
        """The precision of the file that is run: the requested one, else the preferred one.

        The U-Net has a file of the requested precision. The autoencoder often has fp32 only.
        """
        asked = [self._precision] if self._precision else []
        return self.bundle.precision_of(graph, (*asked, *self.preferred))

    def arguments(self) -> dict[str, Any]:
        """See `Backend`."""
        return {"threads": self.threads, "precision": self._precision}

    def computes(self, graph: GraphName) -> Computes:
        """See `Backend`."""
        file = self.bundle.graph(graph).files[self.precision(graph)]
        versions = f"ONNX Runtime {self._ort.__version__}"
        if words := self._kernels.get(graph):
            versions += f", kernels {words}"
        device, driver = self._device_and_driver()
        return Computes(
            device,
            f"{versions}, {driver}" if driver else versions,
            self.precision(graph),
            self.bundle.manifest.files[file.model].sha256,
        )

    def _device_and_driver(self) -> tuple[str, str | None]:
        """The device's name, and its driver where it has one."""
        return processor_name(), None

    def verify(self, graph: GraphName) -> None:
        """See `Backend`."""
        self.bundle.model_file(graph, self.precision(graph))

    def _load(self, graph: GraphName) -> Any:
        return self._session(graph)

    def _session(self, graph: GraphName) -> Any:
        """A session over a graph's file, with the providers asked for and the tensors that the manifest states."""
        path = self.bundle.model_file(graph, self.precision(graph))
        if self.precision(graph) in UNREAD:
            raise BundleError(
                f"{path}: ONNX Runtime reads no {self.precision(graph)} file of opset 20; {_ENGINES}, or name another "
                "--precision"
            )
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # nothing below fatal: errors come back as exceptions
        self._prepare(options, graph, path)
        try:
            with native_path(path) as name:
                session = self._ort.InferenceSession(
                    name, options, providers=self._provider_options(), enable_fallback=0
                )
        except Exception as error:  # its exceptions share no base class of their own
            raise BundleError(
                f"{path}: ONNX Runtime {self._ort.__version__} cannot load it for {self.name}: {_first_line(error)}. "
                "Export the bundle again, or update ONNX Runtime."
            ) from error
        self._check_providers(session)
        info = self.bundle.graph(graph)
        for ours, theirs in ((info.inputs, session.get_inputs()), (info.outputs, session.get_outputs())):
            declared = {tensor.name: _TYPES[tensor.dtype] for tensor in ours}
            found = {tensor.name: tensor.type for tensor in theirs}
            if declared != found:
                raise BundleError(
                    f"{path}: the file has {_listed(found)}, the manifest has {_listed(declared)}. Export the "
                    "bundle again."
                )
        return session

    def _prepare(self, options: Any, graph: GraphName, path: Path) -> None:
        """Sets the options of a session. Here for the CPU."""
        options.intra_op_num_threads = self.threads
        # Without reuse a tensor is freed after its last reader. With it, the planner keeps a dead buffer for a later
        # tensor of its size, and 15 transformers' worth add up: 1.0 GiB instead of 0.3 beside the U-Net's weights.
        options.enable_mem_reuse = False
        # A pattern is one block of every tensor at its planned place, beside the arena of the run that it learnt from.
        options.enable_mem_pattern = False
        precision = self.precision(graph)
        if precision in ("int8", "fp8"):  # TensorRT's QDQ format, run here only for evaluation: QDQ pairs are not fused
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if precision == "fp8":
            # Above this level 1.32 takes a ReLU before a quantisation for part of it, which is true of unsigned bytes
            # and wrong of E4M3: negative values came through.
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        words = add_kernels(options, path)
        is_int8 = words is not None and precision == "int8_cpu"
        self._kernels[graph] = kernels.in_words_of_bytes(words) if is_int8 and words else words

    def _provider_options(self) -> list[Any]:
        """The providers, each alone or with its options."""
        return list(self.providers)

    def _check_providers(self, session: Any) -> None:
        """Refuses a session without the requested providers: ONNX Runtime itself only warns."""
        got = session.get_providers()
        if got[: len(self.providers)] != list(self.providers):
            raise RuntimeUnavailableError(
                f"runtime {self.name!r} asked ONNX Runtime for {', '.join(self.providers)} and got "
                f"{', '.join(got)}; nothing was run."
            )

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        output: Array = self._guarded(lambda: handle.run(None, dict(inputs))[0])
        return output

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Returns the result of `work`; turns its errors into `BundleError`."""
        try:
            return work()
        except Exception as error:
            raise BundleError(
                f"ONNX Runtime {self._ort.__version__} cannot run a graph of {self.bundle.path}: "
                f"{_first_line(error)}. Free some memory if it lacks that, or export the bundle again."
            ) from error

    def release(self, graph: GraphName | None = None) -> None:
        """See `Backend`. Also returns freed memory to the system, which glibc would keep."""
        super().release(graph)
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(ctypes.c_size_t(0))

    def describe(self) -> dict[str, str]:
        """Library version, threads, precision, providers of loaded sessions, and the kernels that ran functions."""
        providers = list(dict.fromkeys(name for handle in self._loaded.values() for name in self._providers(handle)))
        functions = sorted({ran for ran in self._kernels.values() if ran})
        precisions = {graph: self.precision(graph) for graph in self.bundle.manifest.graphs}
        return {
            "runtime": self.name,
            "onnxruntime": self._ort.__version__,
            "providers": ", ".join(providers) or "none loaded yet",
            "threads": str(self.threads),
            "precision": in_words(precisions),
        } | ({"kernels": ", ".join(functions)} if functions else {})

    def _providers(self, handle: Any) -> list[str]:
        providers: list[str] = handle.get_providers()
        return providers


def _not_run(bundle: Bundle, runtime: str, preferred: tuple[Precision, ...]) -> str:
    """The error for a bundle without a file of a preferred precision, and what can run it."""
    there = list(bundle.graph("unet").files)
    on_gpu = "run it with --runtime ort-cuda, or " if "fp16" in there and runtime == "ort-cpu" else ""
    slow = f", --precision fp16 runs its file on {runtime} all the same, in float32" if "fp16" in there else ""
    return (
        f"{bundle.path}: runtime {runtime!r} runs {' or '.join(preferred)}, and the U-Net has only {', '.join(there)}: "
        f"{on_gpu}{_ENGINES}, or export it with fp32 too{slow}"
    )


def _listed(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in tensors.items())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
