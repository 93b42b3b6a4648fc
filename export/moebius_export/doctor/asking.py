"""Asks one library what it is, in a process of its own: `python -m moebius_export.doctor.asking NAME`.

A library with a broken dependency can end the process that imports it, and a heavy one costs seconds and memory. So the
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
"""Begins the answer's line: libraries print lines of their own."""

Facts = dict[str, Any]
_BESIDE_TORCH = ("diffusers", "safetensors")  # what the network and the autoencoder need


def ask_onnxruntime() -> Facts:
    """Version, execution providers, and whether its INT8 operators saturate on this CPU.

    `RuntimeUnavailableError` where two packages overwrite each other.
    """
    from moebius_runtime.backends.ort import import_onnxruntime
    from moebius_runtime.backends.ort_integer import saturates

    module = import_onnxruntime()
    providers = list(module.get_available_providers())
    return {"version": module.__version__, "providers": providers, "saturates": saturates()}


def ask_tensorrt() -> Facts:
    """Version, file, and the CUDA major version that the package's name states."""
    import tensorrt

    return _tensorrt(tensorrt, "tensorrt")


def ask_tensorrt_rtx() -> Facts:
    """As `ask_tensorrt`, of TensorRT-RTX."""
    import tensorrt_rtx

    return _tensorrt(tensorrt_rtx, "tensorrt_rtx")


def ask_cuda() -> Facts:
    """Version of the bindings to CUDA, of which versions before 12.6 name their module otherwise."""
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        from cuda import cudart as runtime

    return {"version": _version("cuda-bindings") or _version("cuda-python") or "", "file": runtime.__file__}


def ask_device() -> Facts | None:
    """The GPU through CUDA: the fields of `moebius_runtime.passport.Device`; None where there is none."""
    from moebius_runtime.devices import current_device

    device = current_device()
    return None if device is None else dataclasses.asdict(device)


def ask_kernels() -> Facts:
    """What runs the λ operators in ONNX Runtime."""
    from moebius_runtime.kernels import in_words

    return {"words": in_words()}


def ask_torch() -> Facts:
    """Version, the CUDA that it was built for, whether it sees a GPU, and what of the export is lacking beside it."""
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
    "tensorrt": ask_tensorrt,
    "tensorrt_rtx": ask_tensorrt_rtx,
    "cuda": ask_cuda,
    "device": ask_device,
    "kernels": ask_kernels,
    "torch": ask_torch,
    "triton": ask_triton,
}


def answer(name: str) -> str:
    """The answer as a line: `value`, or `error` with its `kind`, of which `missing` is a module that is not there."""
    try:
        content: dict[str, Any] = {"value": QUESTIONS[name]()}
    except Exception as error:  # whatever a library raises on import is what is to be told
        # Our own errors wrap the import's: of a library that is not there, the import's says so in fewer words.
        absent = next((e for e in (error, error.__cause__) if isinstance(e, ModuleNotFoundError)), None)
        told = absent or error
        content = {"error": str(told) or type(told).__name__, "kind": "missing" if absent else type(told).__name__}
    return MARK + json.dumps(content)


def _tensorrt(module: Any, name: str) -> Facts:
    cuda = next((major for major in (13, 12, 11) if _version(f"{name}_cu{major}")), None)
    return {"version": module.__version__, "file": module.__file__, "cuda": cuda}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.stdout.write(answer(sys.argv[1]) + "\n")
