"""OpenVINO: Intel's and other CPUs, Intel's GPUs and NPUs. It reads bundles of standard operators only."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius_runtime.backends.base import Array, Backend, in_words
from moebius_runtime.backends.self_check import Computes
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.graph_files import function_domains
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import BundleError, InputError, RuntimeUnavailableError
from moebius_runtime.files import native_path
from moebius_runtime.hardware.processors import physical_cores

_CPU = "CPU"
_TYPES = {"float32": "f32", "int64": "i64"}
# Best first. The CPU computes fp16 files in float32, so they gain nothing there.
_ON_CPU: tuple[Precision, ...] = ("fp32", "int8", "fp16")
_ELSEWHERE: tuple[Precision, ...] = ("fp16", "fp32", "int8")


def import_openvino() -> Any:
    """Imports `openvino`.

    Raises:
        RuntimeUnavailableError: it is not installed, or does not work.
    """
    try:
        import openvino
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime 'openvino' needs OpenVINO, which cannot be imported ({error}). Install it with "
            '`pip install "moebius-edge[openvino]"`.'
        ) from error
    return openvino


def devices(openvino: Any) -> dict[str, str]:
    """The devices that OpenVINO lists, such as `GPU.0`, with their full names."""
    core = openvino.Core()
    return {name: str(core.get_property(name, "FULL_DEVICE_NAME")).strip() for name in core.available_devices}


class OpenVinoBackend(Backend):
    """OpenVINO on one device. There is no fallback to another device.

    Every graph runs in the types of its file: the plugins' default of lower ones (bf16 on CPUs with AMX, fp16 on GPUs)
    is switched off by the execution mode ACCURACY.
    """

    name = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        precision: Precision | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(bundle, threads=threads)
        self._openvino = import_openvino()
        self._core = self._openvino.Core()
        found = devices(self._openvino)
        self.device = device or _CPU
        if self.device not in found:
            there = ", ".join(f"{name} ({words})" for name, words in found.items()) or "none"
            raise RuntimeUnavailableError(
                f"runtime 'openvino' has no device {self.device!r}; found: {there}. GPUs and NPUs need Intel's driver "
                "for them."
            )
        self._full_name = found[self.device]
        on_cpu = self.device == _CPU
        if threads is not None and not on_cpu:
            raise InputError(f"device {self.device} takes no number of threads; leave it out, or use --device CPU")
        if on_cpu and threads is None:
            self.threads = physical_cores()
        self._preferred = _ON_CPU if on_cpu else _ELSEWHERE
        self._precision = precision
        files = list(bundle.graph("unet").files)
        if precision is not None and precision not in files:
            raise BundleError(f"{bundle.path}: the U-Net has no {precision} file, only {', '.join(files)}")
        if precision is None and not set(self._preferred) & set(files):
            raise BundleError(
                f"{bundle.path}: runtime 'openvino' runs {', '.join(self._preferred)}, and the U-Net has only "
                f"{', '.join(files)}; export it with fp32 too"
            )
        for graph in bundle.manifest.graphs:
            check_standard(bundle, graph, self.precision(graph), self.name)

    def precision(self, graph: GraphName) -> Precision:
        """The precision of the file that is run: the requested one, else the device's preferred one."""
        asked = [self._precision] if self._precision else []
        return self.bundle.precision_of(graph, (*asked, *self._preferred))

    def arguments(self) -> dict[str, Any]:
        """See `Backend`."""
        threads = self.threads if self.device == _CPU else None
        return {"threads": threads, "precision": self._precision, "device": self.device}

    def computes(self, graph: GraphName) -> Computes:
        """See `Backend`."""
        file = self.bundle.graph(graph).files[self.precision(graph)]
        versions = f"OpenVINO {self._openvino.__version__}, system {platform.release()} {platform.version()}"
        digest = self.bundle.manifest.files[file.model].sha256
        return Computes(f"{self.device} {self._full_name}", versions, self.precision(graph), digest)

    def verify(self, graph: GraphName) -> None:
        """See `Backend`."""
        self.bundle.model_file(graph, self.precision(graph))

    def _load(self, graph: GraphName) -> Any:
        path = self.bundle.model_file(graph, self.precision(graph))
        config = {"EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        if self.device == _CPU:
            config["INFERENCE_NUM_THREADS"] = str(self.threads)
        try:
            with native_path(path) as name:
                compiled = self._core.compile_model(self._core.read_model(name), self.device, config)
        except Exception as error:  # its exceptions are RuntimeErrors of any content
            raise BundleError(
                f"{path}: OpenVINO {self._openvino.__version__} cannot load it for {self.device}: {_last_line(error)}. "
                "Export the bundle again, or update OpenVINO."
            ) from error
        self._check_tensors(path, graph, compiled)
        return compiled.create_infer_request()

    def _check_tensors(self, path: Path, graph: GraphName, compiled: Any) -> None:
        """Refuses a file whose inputs and outputs are not the manifest's."""
        info = self.bundle.graph(graph)
        for ours, theirs in ((info.inputs, compiled.inputs), (info.outputs, compiled.outputs)):
            declared = {tensor.name: _TYPES[tensor.dtype] for tensor in ours}
            found = {port.get_any_name(): port.get_element_type().get_type_name() for port in theirs}
            if declared != found:
                raise BundleError(
                    f"{path}: the file has {found}, the manifest has {declared}. Export the bundle again."
                )

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        try:
            handle.infer(dict(inputs))
        except Exception as error:
            raise BundleError(
                f"OpenVINO {self._openvino.__version__} cannot run a graph of {self.bundle.path} on {self.device}: "
                f"{_last_line(error)}. Free some memory if it lacks that, or export the bundle again."
            ) from error
        output: Array = handle.get_output_tensor(0).data.copy()  # the request writes there again
        return output

    def describe(self) -> dict[str, str]:
        """Library version, device, threads and precision."""
        precisions = {graph: self.precision(graph) for graph in self.bundle.manifest.graphs}
        described = {
            "runtime": self.name,
            "openvino": str(self._openvino.__version__),
            "device": f"{self.device} ({self._full_name})",
            "precision": in_words(precisions),
        }
        return described | ({"threads": str(self.threads)} if self.device == _CPU else {})


def check_standard(bundle: Bundle, graph: GraphName, precision: Precision, runtime: str) -> None:
    """Raises `BundleError` if a graph's file calls model-local functions, which the runtime does not read."""
    path = bundle.model_file(graph, precision)
    if domains := function_domains(path):
        raise BundleError(
            f"{path}: runtime {runtime!r} reads standard operators only, and this file has functions of "
            f"{', '.join(sorted(domains))}. Make such a bundle: moebius-export inline {bundle.path} --out INLINED"
        )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
