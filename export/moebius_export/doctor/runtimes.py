"""Checks which runtimes can run on this machine, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moebius_export.doctor import facts
from moebius_export.doctor.gpu import Gpu
from moebius_export.doctor.libraries import Found
from moebius_export.doctor.rows import Row, Verdict
from moebius_runtime import kernels
from moebius_runtime.backends.ort_integer import SATURATES

RUNTIMES = (
    *("ort-cpu", "ort-cuda", "ort-tensorrt", "ort-webgpu", "ort-openvino"),
    *("openvino", "tensorrt", "tensorrt-rtx", "torch"),
)


@dataclass(frozen=True)
class RuntimeStatus:
    """A runtime, the reasons why it cannot run (empty if it can), a note on what it runs on, and a command to try."""

    name: str
    reasons: tuple[str, ...]
    note: str = ""
    instead: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it can run."""
        return not self.reasons


def check_runtimes(libraries: Mapping[str, Found], gpu: Gpu) -> list[RuntimeStatus]:
    """The status of every runtime, in the order of `RUNTIMES`."""
    return [_CHECKS[name](name, libraries, gpu) for name in RUNTIMES]


def runtime_rows(statuses: list[RuntimeStatus]) -> list[Row]:
    """One row per runtime. The rows of the libraries and the GPU say how to fix the reasons."""
    rows = []
    for runtime in statuses:
        if runtime.usable:
            rows.append(Row(runtime.name, f"can run{runtime.note and ': '}{runtime.note}"))
        else:
            found = f"cannot run: {'; '.join(runtime.reasons)}"
            rows.append(Row(runtime.name, found, Verdict.missing, runtime.instead))
    return rows


def _ort(name: str, libraries: Mapping[str, Found], gpu: Gpu) -> RuntimeStatus:
    provider = {"ort-cpu": "CPU", "ort-cuda": "CUDA", "ort-tensorrt": "Tensorrt"}[name]
    library = libraries["onnxruntime"]
    reasons = _library("ONNX Runtime", library)
    if not reasons and f"{provider}ExecutionProvider" not in library.answer.value["providers"]:
        reasons.append(f"this ONNX Runtime has no {provider}ExecutionProvider")
    if name == "ort-cpu":
        return RuntimeStatus(name, tuple(reasons), _on_the_cpu(library, libraries["kernels"]))
    # It has its own CUDA and needs no bindings, so a GPU that only nvidia-smi sees may work.
    if gpu.driver is None or gpu.name is None:
        reasons.append(f"no GPU ({gpu.reason})")
    return RuntimeStatus(name, tuple(reasons))


def _with_devices(name: str, libraries: Mapping[str, Found], gpu: Gpu) -> RuntimeStatus:
    """A runtime whose library lists its own devices."""
    library = libraries[name]
    shown = {"ort-webgpu": "the WebGPU provider", "ort-openvino": "the OpenVINO provider", "openvino": "OpenVINO"}[name]
    reasons = _library(shown, library)
    found = library.answer.value["devices"] if not reasons else []
    if not reasons and not found:
        reasons.append(f"{shown} lists no device")
    return RuntimeStatus(name, tuple(reasons), f"on {'; '.join(found)}")


def _on_the_cpu(library: Found, compiled: Found) -> str:
    """The compiled kernels in use, and what they mean for INT8."""
    notes = []
    if compiled.answer.value:
        words = str(compiled.answer.value["words"])
        notes.append(f"kernels {words}")
        if words not in kernels.DOT_PRODUCTS:
            notes.append(
                "INT8 is exact and gains little over fp32: this CPU has no INT8 dot products (VNNI, Arm's dotprod)"
            )
    if library.answer.value and library.answer.value.get("saturates"):
        notes.append(SATURATES)
    return "; ".join(notes)


def _tensorrt(name: str, libraries: Mapping[str, Found], gpu: Gpu) -> RuntimeStatus:
    shown, key = {"tensorrt": ("TensorRT", "tensorrt"), "tensorrt-rtx": ("TensorRT-RTX", "tensorrt_rtx")}[name]
    library = libraries[key]
    reasons = _library(shown, library) + _library("cuda-python", libraries["cuda"])
    instead = None
    if gpu.device is None:
        reasons.append(f"no GPU ({gpu.reason})" if gpu.name is None else f"CUDA does not reach the GPU ({gpu.reason})")
        if name == "tensorrt-rtx" and library.usable:
            sms = ",".join(map(str, facts.RTX_SM))
            instead = f"it can build engines for other machines: moebius-export trt BUNDLE --fp16 --sm {sms}"
    return RuntimeStatus(name, tuple(dict.fromkeys(reasons)), f"on {gpu.name}, SM {gpu.sm}", instead)


def _torch(name: str, libraries: Mapping[str, Found], gpu: Gpu) -> RuntimeStatus:
    library = libraries["torch"]
    reasons = _library("PyTorch", library)
    if not reasons and (lacking := library.answer.value["lacking"]):
        reasons.append(f"{' and '.join(lacking)} not installed")
    if reasons:
        return RuntimeStatus(name, tuple(reasons))
    return RuntimeStatus(name, (), f"on {gpu.name or 'the GPU'}" if library.answer.value["gpu"] else "on the processor")


def _library(shown: str, library: Found) -> list[str]:
    if library.answer.problem is not None:
        return [f"{shown} is not installed" if library.answer.missing else f"{shown} does not work"]
    return [library.misfit] if library.misfit else []


_CHECKS: dict[str, Callable[[str, Mapping[str, Found], Gpu], RuntimeStatus]] = {
    "ort-cpu": _ort,
    "ort-cuda": _ort,
    "ort-tensorrt": _ort,
    "ort-webgpu": _with_devices,
    "ort-openvino": _with_devices,
    "openvino": _with_devices,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
    "torch": _torch,
}
