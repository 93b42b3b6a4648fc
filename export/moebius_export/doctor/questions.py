"""Asks one library for its version in a process of its own: `python -m moebius_export.doctor.questions NAME`.

A library with a broken dependency can end the process that imports it, and a large one takes seconds and memory. So the
doctor imports none of them itself. The answer is one line of JSON on the standard output.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

MARK = "moebius-doctor:"
"""Starts the line of the answer, because libraries print lines of their own."""

Facts = dict[str, Any]
_BESIDE_TORCH = ("diffusers", "safetensors")  # the network and the autoencoder need them


def ask_onnxruntime() -> Facts:
    """Version, execution providers, and whether its INT8 operators saturate on this CPU.

    Raises `RuntimeUnavailableError` if two packages overwrite each other.
    """
    from moebius_runtime.backends.ort import import_onnxruntime
    from moebius_runtime.backends.ort_integer import saturates

    module = import_onnxruntime()
    providers = list(module.get_available_providers())
    return {"version": module.__version__, "providers": providers, "saturates": saturates()}


def ask_tensorrt(name: str = "tensorrt") -> Facts:
    """Version, file, and the CUDA major version in the name of the package: 12 for `tensorrt_cu12`."""
    module = importlib.import_module(name)
    cuda = next((major for major in (13, 12, 11) if _version(f"{name}_cu{major}")), None)
    return {"version": module.__version__, "file": module.__file__, "cuda": cuda}


def ask_tensorrt_rtx() -> Facts:
    """As `ask_tensorrt`, of TensorRT-RTX."""
    return ask_tensorrt("tensorrt_rtx")


def ask_openvino() -> Facts:
    """Version, and the devices with their names."""
    from moebius_runtime.backends.openvino import devices, import_openvino

    module = import_openvino()
    return {
        "version": str(module.__version__),
        "devices": [f"{name} {words}" for name, words in devices(module).items()],
    }


def ask_plugin(runtime: str) -> Facts:
    """Version of the package of a provider of ONNX Runtime, and its devices."""
    from moebius_runtime.backends.ort import import_onnxruntime
    from moebius_runtime.backends.ort_plugin import PLUGINS, check_device, plugin_devices

    plugin = PLUGINS[runtime]
    ort = import_onnxruntime(runtime, plugin.extra)
    found = plugin_devices(ort, plugin, runtime)
    for device in found:
        check_device(ort, plugin, device, runtime)
    version = _version(plugin.package) or f"built into ONNX Runtime {ort.__version__}"
    return {"version": version, "devices": [device.name for device in found]}


def ask_ort_webgpu() -> Facts:
    """As `ask_plugin`, of WebGPU."""
    return ask_plugin("ort-webgpu")


def ask_ort_openvino() -> Facts:
    """As `ask_plugin`, of OpenVINO."""
    return ask_plugin("ort-openvino")


def ask_cuda() -> Facts:
    """Version of the CUDA bindings, whose module has another name before 12.6."""
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        from cuda import cudart as runtime

    return {"version": _version("cuda-bindings") or _version("cuda-python") or "", "file": runtime.__file__}


def ask_device() -> Facts | None:
    """The GPU that CUDA reports: the fields of `moebius_runtime.bundle.passport.Device`; None if there is none."""
    from moebius_runtime.hardware.devices import current_device

    device = current_device()
    return None if device is None else dataclasses.asdict(device)


def ask_kernels() -> Facts:
    """The compiled kernels that run the λ operators in ONNX Runtime."""
    from moebius_runtime.kernels import in_words

    return {"words": in_words()}


def ask_torch() -> Facts:
    """Version, its CUDA, whether it sees a GPU, and which other packages of the export are missing."""
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.is_available(),
        "lacking": [name for name in _BESIDE_TORCH if importlib.util.find_spec(name) is None],
    }


def ask_triton() -> Facts:
    """Version."""
    import triton

    return {"version": triton.__version__}


QUESTIONS: dict[str, Callable[[], Facts | None]] = {
    "onnxruntime": ask_onnxruntime,
    "ort-webgpu": ask_ort_webgpu,
    "ort-openvino": ask_ort_openvino,
    "openvino": ask_openvino,
    "tensorrt": ask_tensorrt,
    "tensorrt_rtx": ask_tensorrt_rtx,
    "cuda": ask_cuda,
    "device": ask_device,
    "kernels": ask_kernels,
    "torch": ask_torch,
    "triton": ask_triton,
}


def answer(name: str) -> str:
    """The answer as a line: `value`, or `error` and its `kind`, `missing` for a module that is not installed."""
    try:
        content: dict[str, Any] = {"value": QUESTIONS[name]()}
    except Exception as error:  # a library may raise anything on import
        # Our own errors wrap the import's, whose text is shorter for a library that is not installed.
        absent = next((e for e in (error, error.__cause__) if isinstance(e, ModuleNotFoundError)), None)
        cause = absent or error
        content = {"error": str(cause) or type(cause).__name__, "kind": "missing" if absent else type(cause).__name__}
    return MARK + json.dumps(content)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(answer(sys.argv[1]) + "\n")
